"""Plans without libtpu: what is assumed, what is refused, and the search, on a compiler that is made up."""

import dataclasses
import importlib.util
import json
import pathlib
import re

import jax
import pytest
from tiny import tiny_config

from compactlm_jax import cli
from compactlm_jax.config import (
  DataConfig,
  DistillConfig,
  EncoderConfig,
  FinetuneConfig,
  MeshConfig,
  PruneConfig,
  RunConfig,
  from_config_dict,
)
from compactlm_jax.errors import ConfigError
from compactlm_jax.parallel import make_mesh
from compactlm_jax.plan import main
from compactlm_jax.plan.abstract import abstract_step, resolve
from compactlm_jax.plan.compile import tpu_devices
from compactlm_jax.plan.program import Overflow, Program
from compactlm_jax.plan.topology import parse_topology

GIB = 2**30


@pytest.fixture
def compiled(monkeypatch, tmp_path):
  """Rows that were compiled; a row needs 1 GiB beside 1 GiB of state on each of 8 devices."""
  rows = []

  def compile_program(step, state, frozen, batch, effort):
    size = batch.input_ids.shape[0]
    rows.append(size)
    if size > 8 * 14.48:
      return Overflow(int((1 + size / 8) * GIB), int(15.48 * GIB))
    memory = {'arguments': GIB, 'outputs': 0, 'aliased': 0, 'temporaries': size * GIB // 8, 'code': 0}
    return Program(memory, 1e9, 1e9, 0.01, 10, (), (('forward: x', 1, 10),), 'HloModule m')

  monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path))
  monkeypatch.setattr(main, 'tpu_devices', lambda topology: jax.devices()[: topology.devices])
  monkeypatch.setattr(main, 'compile_program', compile_program)
  return rows


def test_a_program_that_does_not_fit_says_by_how_much_and_what_does(compiled):
  """Mutation: report the batch that was asked for as the largest."""
  report = main.plan_run(tiny_config('finetune', batch_size=256), 'tiny.py:finetune', 'v3-8')
  assert not report.fits and report.batches == (112, 120)
  said = main.too_large(report)
  assert '256 rows need 33.00 GiB of HBM on each core of v3-8, 17.52 more than the 15.48' in said
  assert '112 rows fit, 120 do not' in said


def test_the_sweep_starts_from_what_fits(compiled):
  """A second plan compiles nothing. Mutation: search from 1."""
  config = tiny_config('finetune', batch_size=64)
  report = main.plan_run(config, 'tiny.py:finetune', 'v3-8', sweep=True)
  assert report.fits and report.batches == (112, 120) and len(compiled) <= 4 and compiled[0] == 64
  count = len(compiled)
  assert main.plan_run(config, 'tiny.py:finetune', 'v3-8').batches is None
  assert main.too_large(report) == '' and len(compiled) == count
  main.plan_run(config, 'tiny.py:finetune', 'v3-8', thorough=True)
  assert len(compiled) == count + 1


def test_parameters_are_replicated_or_sliced(compiled):
  """Mutation: count the bytes of whole arrays."""
  config = tiny_config('finetune', batch_size=16)
  assert main.plan_run(config, 'a.py:b', 'v3-8').parameters.endswith('M, replicated')
  sliced = main.plan_run(dataclasses.replace(config, mesh=MeshConfig(data=1, fsdp=8)), 'a.py:b', 'v3-8')
  share = re.search(r'in slices over fsdp 8: ([\d.]+)% on each device', sliced.parameters)
  assert share is not None and 12.5 <= float(share[1]) < 20  # biases and norms are whole everywhere


def test_rows_that_do_not_divide(compiled):
  with pytest.raises(ConfigError, match='config.batch_size: 12 rows do not divide over 8 devices'):
    main.plan_run(tiny_config('finetune', batch_size=12), 'a.py:b', 'v3-8')


def test_a_penalty_without_weight():
  """Mutation: leave `require_weight` to the job."""
  with pytest.raises(ConfigError, match=r'config\.prune\.density: is not reached .* soft_movement .* prune\.control'):
    main.plan_run(tiny_config('prune', prune=PruneConfig(method='soft_movement')), 'a.py:b', 'v3-8')


def test_a_first_threshold_above_all_scores():
  """Mutation: leave it out of `require_weight`."""
  config = PruneConfig(method='soft_movement', threshold_on='scores')
  with pytest.raises(ConfigError, match=r'config\.prune\.initial_threshold: 0.0 is not below the scores'):
    main.plan_run(tiny_config('prune', prune=config), 'a.py:b', 'v3-8')
  dataclasses.replace(config, initial_threshold=-1.0).require_weight()


def test_what_is_assumed():
  """Mutation: plan with the scan of the configuration: costs of its body would count once."""
  plan = resolve(tiny_config('finetune', finetune=FinetuneConfig(), steps=0, epochs=2.0))
  assert plan.config.encoder.scan_unroll == 0 and plan.config.finetune.num_classes == 2
  assert 'two classes' in plan.notes[0] and '--config.steps' in plan.notes[1]


@pytest.mark.parametrize(
  ('finetune', 'data', 'classes'),
  [
    (FinetuneConfig(benchmark='mnli'), {}, 3),
    (FinetuneConfig(benchmark='stsb'), {}, 0),
    (FinetuneConfig(benchmark='squad2'), {}, 0),
    (FinetuneConfig(num_classes=5), {}, 5),
    (FinetuneConfig(), {'score_column': 'score'}, 0),
  ],
)
def test_labelled_data(finetune, data, classes):
  """A benchmark's folder has no manifest; its classes are known. Mutation: read one, or assume two classes."""
  data = DataConfig(seq_len=16, path='glue_data', **data)
  plan = resolve(tiny_config('finetune', finetune=finetune, data=data, steps=5))
  assert plan.config.finetune.num_classes == classes and plan.notes == () and plan.config.data.seq_len == 16
  batch = abstract_step(plan, make_mesh(MeshConfig(), jax.devices()[:2]))[1][2]
  expected = ((16, 3), 'int32') if finetune.benchmark == 'squad2' else ((16,), 'int32' if classes else 'float32')
  assert (batch.labels.shape, batch.labels.dtype.name) == expected


def test_a_pooler_comes_with_the_head_that_reads_it():
  """Mutation: leave the encoder as it is; the task refuses it."""
  plan = resolve(tiny_config('finetune', finetune=FinetuneConfig(benchmark='rte', pooled=True)))
  state = abstract_step(plan, make_mesh(MeshConfig(), jax.devices()[:2]))[1][0]
  assert plan.config.encoder.pooler and 'pooler' in state.params['encoder']


@pytest.mark.parametrize('file', ['glue', 'squad', 'finetune'])
def test_configurations_of_labelled_data_have_a_step(file):
  """Every head of the shipped recipes, without a model or data. Mutation: make no span task."""
  variants = {
    'glue': ['bert-mnli', 'electra-small-stsb', 'minilm-rte'],
    'squad': ['electra-small-v1', 'electra-small-v2', 'bert-v2'],
    'finetune': ['table'],
  }
  path = pathlib.Path(__file__).parents[2] / 'configs' / f'{file}.py'
  spec = importlib.util.spec_from_file_location(file, path)
  assert spec is not None and spec.loader is not None
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  for variant in variants[file]:
    plan = resolve(from_config_dict(RunConfig, module.get_config(variant)))
    assert abstract_step(plan, make_mesh(MeshConfig(), jax.devices()[:1]))[1][2].labels is not None


def test_a_fine_tuned_teacher_is_part_of_the_step(tmp_path):
  """Its head is that of the task. Mutation: leave the teacher out of the task."""
  sizes = {'model_type': 'bert', 'vocab_size': 64, 'hidden_size': 48, 'num_hidden_layers': 3, 'num_attention_heads': 4}
  (tmp_path / 'config.json').write_text(json.dumps({**sizes, 'intermediate_size': 96, 'max_position_embeddings': 16}))
  for benchmark, head in (('mnli', 'classifier'), ('squad1', 'span')):
    plan = resolve(tiny_config('finetune', finetune=FinetuneConfig(benchmark=benchmark), teacher=str(tmp_path)))
    _, frozen, _ = abstract_step(plan, make_mesh(MeshConfig(), jax.devices()[:2]))[1]
    assert set(frozen) == {'encoder', head} and plan.teacher.num_layers == 3


@pytest.mark.parametrize(
  ('changes', 'layers', 'note'),
  [
    ({'encoder': EncoderConfig(num_layers=6, hidden_size=384, num_heads=12)}, 12, 'BERT-base'),
    (
      {'encoder': EncoderConfig(num_layers=6), 'distill': DistillConfig(relation_heads=64, teacher_layer=21)},
      24,
      'BERT-large',
    ),
    ({}, 4, 'twice as deep'),
  ],
)
def test_the_assumed_teacher_fits(changes, layers, note):
  """Mutation: always take BERT-base (whose heads do not fit a tiny student)."""
  plan = resolve(tiny_config('distill', **changes))
  assert plan.teacher.num_layers == layers and note in plan.notes[0]
  assert plan.teacher.vocab_size == plan.config.encoder.vocab_size


def test_named_models_need_no_weights(tmp_path):
  """Only config.json is read; dropout and dtype are those of the run. Mutation: load the whole model."""
  sizes = {'model_type': 'bert', 'vocab_size': 64, 'hidden_size': 48, 'num_hidden_layers': 3, 'num_attention_heads': 4}
  more = {'intermediate_size': 96, 'max_position_embeddings': 16}
  (tmp_path / 'config.json').write_text(json.dumps({**sizes, **more}))
  encoder = dataclasses.replace(tiny_config().encoder, hidden_dropout=0.25, dtype='bfloat16')
  plan = resolve(tiny_config('finetune', model=str(tmp_path), encoder=encoder))
  own = plan.config.encoder
  assert (own.hidden_size, own.num_layers, own.hidden_dropout, own.dtype) == (48, 3, 0.25, 'bfloat16')
  plan = resolve(tiny_config('distill', teacher=str(tmp_path), distill=DistillConfig(relation_heads=4)))
  assert (plan.teacher.num_layers, plan.teacher.scan_unroll, plan.notes) == (3, 0, ())


def test_rows_longer_than_positions():
  with pytest.raises(ConfigError, match='config.data.seq_len: 32 is more than encoder.max_positions 16'):
    resolve(tiny_config('finetune', data=DataConfig(seq_len=32)))


def test_without_libtpu_one_line_says_what_to_install(monkeypatch):
  """Mutation: let the import error through."""
  monkeypatch.setattr(importlib.util, 'find_spec', lambda name: None)
  with pytest.raises(ConfigError, match=r"pip install 'compactlm-jax\[plan\]'"):
    tpu_devices(parse_topology('v3-8'))


@pytest.mark.parametrize(
  ('flag', 'message'),
  [
    ('--topology=v3-9', "there is no slice 'v3-9'"),
    ('--topology=a100', 'known are v2-8'),
    ('--output=/nowhere/plan.json', '--output: the folder of /nowhere/plan.json is not there'),
    ('--sweep=steps', 'sweep'),
  ],
)
def test_complaints_of_the_command(flag, message, capsys):
  argv = ['plan', '--config=configs/tiny.py:finetune', '--topology=v3-8', flag]
  assert cli.main(argv) == 78
  said = capsys.readouterr().err
  assert message in said and 'bug' not in said
