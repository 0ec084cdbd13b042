"""Reading the compiler's text: exchanges between devices, estimated cycles, complaints about memory; and the cache."""

import dataclasses

import pytest

from compactlm_jax.config import DataConfig, EncoderConfig, MeshConfig, OptimizerConfig, RunConfig
from compactlm_jax.plan import cache
from compactlm_jax.plan.estimate import OPTIMAL, ROOFLINE, estimate, exchange_seconds, published_hours, step_seconds
from compactlm_jax.plan.program import Collective, Overflow, Program, costly_parts, overflow_of, read_collectives
from compactlm_jax.plan.report import Report, as_json, as_table, collectives
from compactlm_jax.plan.topology import parse_topology

# Lines as libtpu 0.0.42 writes them, shortened.
HLO = """
%region_1 (a: f32[], b: f32[]) -> f32[] {
  ROOT %add.1 = f32[]{:T(256)} add(%a, %b), metadata={op_name="jit(train_step)/reduce_sum"}
}

ENTRY %main.1 (p0: f32[64,2], p1: bf16[8,8,2]) -> (f32[64,2]) {
  %all-reduce.7 = (bf16[768]{0:T(1024)(128)(2,1)}, bf16[768,768]{1,0:T(8,128)(2,1)}, /*index=2*/f32[]{:T(256)}) all-reduce(%a, %b, /*index=2*/%c), channel_id=1, to_apply=%region_1
  %all-gather.1 = bf16[2,64,64]{1,2,0:T(8,128)(2,1)} all-gather(%fusion.1), channel_id=2, dimensions={1}
  %all-gather-start.2 = (f32[8,64]{1,0}, f32[64,64]{1,0}) all-gather-start(%p0), channel_id=3
  %all-gather-done.2 = f32[64,64]{1,0} all-gather-done(%all-gather-start.2)
  %collective-permute-start = (bf16[4,8]{1,0}, bf16[4,8]{1,0}, u32[], u32[]) collective-permute-start(%p1)
  %fusion.5 = bf16[32,128]{1,0} fusion(%p0), kind=kOutput, calls=%fused.5, metadata={op_name="jit(train_step)/transpose(jvp(Encoder))/Encoder._run/closed_call/layers.body/layers/ffn_in/dot_general" stack_frame_id=3}, backend_config={"window_config":{"estimated_cycles":"900","iteration_bounds":["1"]}}
  %fusion.6 = bf16[32,128]{1,0} fusion(%p0), kind=kOutput, calls=%fused.6, metadata={op_name="jit(train_step)/transpose(jvp(Encoder))/Encoder._run/closed_call/layers.body/layers/ffn_in/dot_general" stack_frame_id=4}, backend_config={"window_config":{"estimated_cycles":"1000"}}
  %fusion.7 = f32[32]{0} fusion(%p0), kind=kLoop, calls=%fused.7, metadata={op_name="jit(train_step)/jvp(Encoder)/embeddings/norm/div"}, backend_config={"window_config":{"estimated_cycles":"5"}}
  %fusion.8 = f32[32]{0} fusion(%p0), kind=kLoop, calls=%fused.8, backend_config={"window_config":{"estimated_cycles":"7"}}
  ROOT %tuple = (f32[64,2]{1,0}) tuple(%fusion.5)
}
"""  # noqa: E501

MEMORY = {'arguments': 100, 'outputs': 50, 'aliased': 48, 'temporaries': 30, 'code': 4}
PROGRAM = Program(MEMORY, 6e9, 3e9, 0.25, 1912, tuple(read_collectives(HLO)), tuple(costly_parts(HLO)), HLO)
CONFIG = RunConfig(
  task='mlm', steps=7200, batch_size=16, encoder=EncoderConfig(num_layers=1), data=DataConfig(seq_len=32)
)
V3 = parse_topology('v3-8')


def test_exchanges_between_devices():
  """A started one counts once, with what it receives. Mutation: count the done line; or the whole start tuple."""
  assert read_collectives(HLO) == [
    Collective('all-reduce', (('bf16', (768,)), ('bf16', (768, 768)), ('f32', ()))),
    Collective('all-gather', (('bf16', (2, 64, 64)),)),
    Collective('all-gather', (('f32', (64, 64)),)),
    Collective('collective-permute', (('bf16', (4, 8)),)),
  ]
  assert collectives(PROGRAM) == {
    'all-reduce': {'count': 1, 'bytes': 2 * 768 + 2 * 768 * 768 + 4},
    'all-gather': {'count': 2, 'bytes': 2 * 2 * 64 * 64 + 4 * 64 * 64},
    'collective-permute': {'count': 1, 'bytes': 2 * 32},
  }


def test_costly_parts_of_the_model():
  """Mutation: sort by name; or forget that the backward pass has the same names."""
  assert costly_parts(HLO) == [
    ('backward: layers/ffn_in/dot_general', 2, 1900),
    ('(no name)', 1, 7),
    ('forward: embeddings/norm/div', 1, 5),
  ]


def test_peak_memory_counts_reused_outputs_once():
  """Mutation: add all outputs."""
  assert PROGRAM.peak_bytes == 100 + 50 - 48 + 30 + 4


@pytest.mark.parametrize(
  ('message', 'needed', 'available'),
  [
    (
      'RESOURCE_EXHAUSTED: Ran out of memory on HBM, the total memory required for HLO temporaries (22.07G) exceeds '
      'available HBM (15.48G).',
      22.07,
      15.48,
    ),
    ('Ran out of memory in memory space hbm. Used 20.53G of 15.48G hbm. Exceeded hbm capacity by 5.05G.', 20.53, 15.48),
    ('Ran out of memory in memory space hbm. Used 512.00M of 15.48G hbm.', 0.5, 15.48),
  ],
)
def test_complaints_about_memory(message, needed, available):
  """Mutation: drop the unit."""
  found = overflow_of(message)
  assert found is not None
  assert (found.needed / 2**30, found.available / 2**30) == pytest.approx((needed, available))
  assert overflow_of('INTERNAL: something else') is None


@pytest.mark.parametrize('optimal', [-2.0, 0.0, float('nan'), float('inf'), 0.05])
def test_an_estimate_that_cannot_be_is_replaced(optimal):
  """Negative, absent, or below FLOPs / peak (0.06 s here). Mutation: trust every positive number."""
  program = dataclasses.replace(PROGRAM, optimal_seconds=optimal)
  assert step_seconds(program, 1e11, 1e10) == (0.3, ROOFLINE)
  assert step_seconds(program, 1e11, 1e12) == (0.06, ROOFLINE)
  assert step_seconds(PROGRAM, 1e11, 1e12) == (0.25, OPTIMAL)


def test_time_from_a_program():
  """Mutation: divide by the peak of one device; or forget the micro-batches."""
  est = estimate(CONFIG, None, V3, PROGRAM)
  assert (est.step_seconds, est.hours, est.tokens_per_second) == (0.25, 0.5, 16 * 32 / 0.25)
  assert est.mfu == pytest.approx(est.model_flops / 0.25 / (8 * 61.5e12))
  assert est.cycle_seconds == pytest.approx(1912 / 940e6)
  twice = dataclasses.replace(CONFIG, optimizer=OptimizerConfig(accumulate=2))
  doubled = estimate(twice, None, V3, PROGRAM)
  assert (doubled.step_seconds, doubled.flops, doubled.model_flops) == (0.5, 12e9, est.model_flops)
  assert estimate(dataclasses.replace(CONFIG, steps=0, epochs=1.0), None, V3, PROGRAM).hours is None


def test_collectives_on_the_links():
  """Four chips, 82 GB/s each way; an all-reduce sends 2 * 3/4 of its bytes. Mutation: count devices for chips."""
  program = dataclasses.replace(PROGRAM, collectives=(Collective('all-reduce', (('f32', (1000, 1000)),)),))
  assert exchange_seconds(program, V3) == pytest.approx(1.5 * 4e6 / 164e9)
  gather = dataclasses.replace(program, collectives=(Collective('all-gather', (('bf16', (1000, 1000)),)),))
  assert exchange_seconds(gather, V3) == pytest.approx(0.75 * 2e6 / 164e9)
  assert exchange_seconds(program, parse_topology('v5e-1')) == 0


def test_published_hours():
  """Of ConvBERT and ELECTRA on a v3-8 (answers to reviewers, NeurIPS 2020). Mutation: take the folder for the file."""
  assert published_hours('configs/convbert.py:base') == 72 and published_hours('/a/b/electra.py:base') == 192
  assert [published_hours(f'convbert.py:{size}') for size in ('small', 'medium-small')] == [12, 18]
  assert published_hours('electra.py:small') == 12
  assert published_hours('configs/convbert.py:small-dynamic') is None and published_hours('convbert.py') is None


def report(program, **fields):
  est = estimate(CONFIG, None, V3, program) if isinstance(program, Program) else None
  return Report('configs/electra.py:base', CONFIG, V3, program, est, 192.0, '1.0 M, replicated', ('a guess',), **fields)


@pytest.mark.parametrize(('model', 'rows'), [(-1, 32), (4, 32), (2, 16)])
def test_rows_of_a_core_count_each_axis_of_the_mesh(model, rows):
  """Mutation: take an axis of -1 for one of 1."""
  config = dataclasses.replace(CONFIG, batch_size=64, mesh=MeshConfig(data=2 if model != 2 else -1, model=model))
  assert f'{rows} rows per core' in as_table(dataclasses.replace(report(PROGRAM), config=config))


def test_table_and_json():
  """Mutation: report the chip's HBM for the core; or leave the word estimate out."""
  found, said = as_json(report(PROGRAM)), as_table(report(PROGRAM))
  names = ('fits', 'peak_hbm_bytes', 'hbm_bytes', 'flops', 'model_flops', 'bytes_accessed', 'step_seconds',
           'estimate_source', 'mfu', 'collectives', 'exchange_seconds', 'tokens_per_second', 'hours',
           'published_hours')  # fmt: skip
  assert all(found[name] is not None for name in names)
  assert (found['fits'], found['peak_hbm_bytes'], found['hbm_bytes']) == (True, 136, 16 * 2**30)
  assert (found['hours'], found['published_hours'], found['measured']) == (0.5, 192.0, False)
  assert 'estimates; nothing here was measured' in said and OPTIMAL in said and 'of 15.48 GiB per core' in said
  assert 'all-reduce 1 (1.2 MB)' in said and 'published 192 on a v3-8' in said and 'a guess' in said
  assert '2 rows per core' in said


def test_table_of_what_does_not_fit():
  """Mutation: call a refused program fitting."""
  large = report(Overflow(20 * 2**30, 15 * 2**30), batches=(96, 104))
  found, said = as_json(large), as_table(large)
  assert found['fits'] is False and found['peak_hbm_bytes'] == 20 * 2**30 and found['step_seconds'] is None
  assert (found['largest_batch_that_fits'], found['smallest_batch_that_does_not']) == (96, 104)
  assert 'no: 20.00 of 15.48 GiB' in said and '4.52 GiB too much' in said and '96 rows fit, 104 do not' in said


def test_cache_keeps_programs(tmp_path, monkeypatch, caplog):
  """Mutation: let the error of a damaged file through."""
  monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path))
  key = cache.cache_key({'batch_size': 8}, 'v3:2x2')
  assert cache.load(key) is None
  cache.save(key, PROGRAM)
  assert cache.load(key) == PROGRAM
  cache.save(key, Overflow(2, 1))
  assert cache.load(key) == Overflow(2, 1)
  assert not list(tmp_path.rglob('*.tmp'))
  (cache.cache_folder() / f'{key}.json').write_text('{"memory": ')
  assert cache.load(key) is None and 'ignored' in caplog.text
  monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path / key / 'file'))
  (tmp_path / key).write_text('not a folder')
  cache.save(key, PROGRAM)
  assert 'is not kept' in caplog.text


def test_cache_key_knows_what_decides(monkeypatch):
  """Mutation: drop one of its parts."""
  same = cache.cache_key({'a': 1}, 'v3:2x2', teacher=None)
  assert same == cache.cache_key({'a': 1}, 'v3:2x2', teacher=None) and len(same) == 64
  others = [
    cache.cache_key({'a': 2}, 'v3:2x2', teacher=None),
    cache.cache_key({'a': 1}, 'v3:4x4', teacher=None),
    cache.cache_key({'a': 1}, 'v3:2x2', teacher={'hidden_size': 1}),
  ]
  monkeypatch.setattr(cache, 'versions', lambda: {'jax': '0'})
  others.append(cache.cache_key({'a': 1}, 'v3:2x2', teacher=None))
  monkeypatch.undo()
  monkeypatch.setenv('XLA_FLAGS', '--changed')
  others.append(cache.cache_key({'a': 1}, 'v3:2x2', teacher=None))
  assert len({same, *others}) == 6
