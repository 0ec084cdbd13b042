"""`compactlm export` of one sub-network: the same outputs here, in transformers and onnxruntime; budgets; refusals."""

import dataclasses
import itertools
import json
import math
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from ragged import masked, masks_of

from compactlm_jax import cli
from compactlm_jax.checkpoint import Checkpoints
from compactlm_jax.compress.subnet import subnet, subnet_config
from compactlm_jax.config import AdaptConfig, Cell, EncoderConfig, cells, to_json
from compactlm_jax.errors import ConfigError
from compactlm_jax.interop.bundle import Bundle, from_pretrained, save_pretrained
from compactlm_jax.jobs import export_cell, grid, load_model
from compactlm_jax.jobs.budget import Budget, as_text, choose, parse_budgets
from compactlm_jax.jobs.export import Export
from compactlm_jax.jobs.export_cell import Wanted, run_export_cell
from compactlm_jax.jobs.grid_rows import grid_rows
from compactlm_jax.jobs.latency import Latencies, Timing
from compactlm_jax.nn.encoder import encoder_shapes
from compactlm_jax.report.grid import GridRow
from compactlm_jax.tasks.finetune import classify
from compactlm_jax.types import Batch, TrainState

SMALL = dict(
  vocab_size=37, hidden_size=16, num_layers=3, num_heads=4, intermediate_size=8, max_positions=16, scan_unroll=1
)
KINDS = {
  'bert': dict(pooler=True),
  'roberta': dict(architecture='bert', type_vocab_size=1, pad_token_id=1, pooler=True),
  'electra': dict(embedding_size=8),
  'convbert': dict(embedding_size=8, head_size=2, conv_kernel_size=3, conv_sees_padding=True, num_groups=2),
}
ADAPT = AdaptConfig(widths=(0.5, 1.0), depths=(2 / 3, 1.0))
CELL = Cell(0.5, 2 / 3)
MASK = (np.arange(11) < np.array([[11], [6], [1]])).astype(np.int32)
IDS = np.random.default_rng(3).integers(2, 37, (3, 11)).astype(np.int32) * MASK
_LOGITS = jax.jit(classify, static_argnums=1)
_VIEW = jax.jit(
  lambda params, config, cell, batch: classify(subnet(params, config, cell), subnet_config(config, cell), batch),
  static_argnums=(1, 2),
)


def network(kind='bert', seed=0, **fields):
  """A classifier of three classes; every parameter is random, so that none is without effect."""
  config = EncoderConfig(**{'architecture': kind, **SMALL, **KINDS[kind], **fields})
  rng = np.random.default_rng(seed)
  params = jax.tree.map(lambda s: (rng.standard_normal(s.shape) / 3).astype(s.dtype), encoder_shapes(config))
  kernel = rng.standard_normal((config.hidden_size, 3)).astype(np.float32)
  params['classifier'] = {'kernel': kernel, 'bias': rng.standard_normal(3).astype(np.float32)}
  return Bundle(config, jax.tree.map(jnp.asarray, params), None, ('a', 'b', 'c'))


def logits(bundle):
  return np.asarray(_LOGITS(bundle.params, bundle.config, Batch(IDS, MASK, np.zeros_like(IDS))))


def view(bundle, cell=CELL):
  """The sub-network as training sees it."""
  return np.asarray(_VIEW(bundle.params, bundle.config, cell, Batch(IDS, MASK, np.zeros_like(IDS))))


def save_run(folder, bundle, adapt=ADAPT, scores=None, names=None):
  """What a run of task 'adapt' leaves that export reads."""
  every = cells(adapt, bundle.config)
  model = {
    'encoder': to_json(bundle.config), 'classes': list(bundle.labels), 'adapt': to_json(adapt), 'stage': 'final',
    'finetune': {'pooled': bundle.config.pooler, 'score_scale': 1.0, 'keep_layers': []},
    'cells': [cell.name for cell in every] if names is None else names,
  }  # fmt: skip
  with Checkpoints(folder / 'checkpoints', 1) as checkpoints:
    metadata = {'model': model, 'task': 'adapt', 'identity': {}}
    checkpoints.save(1, TrainState(jnp.int32(1), bundle.params, ()), metadata, wait=True)
  (folder / 'config.json').write_text(json.dumps({'config': {'data': {'seq_len': 12}}}))
  if scores:
    named = {f'{metric}@{cell.name}' if cell != every[0] else metric: score for metric, by_cell in scores.items()
             for cell, score in zip(every, by_cell)}  # fmt: skip
    rows = grid_rows(named, every, bundle.config, bundle.params, 12)
    (folder / 'results.json').write_text(json.dumps({'grid': rows}))
  return str(folder)


@pytest.fixture(scope='module')
def runs(tmp_path_factory):
  """bert, electra, convbert: adaptive runs; bert has scores, and its best networks."""
  folder = tmp_path_factory.mktemp('adaptive')
  scores = {'accuracy': [0.9, 0.8, 0.85, 0.7], 'loss': [0.1, 0.2, 0.3, 0.4]}
  for kind in KINDS:
    save_run(folder / kind, network(kind), scores=scores if kind == 'bert' else None)
  best = folder / 'bert' / 'best'
  best.mkdir()
  save_run(best, network('bert', seed=1))
  (best / 'config.json').unlink()
  save_pretrained(grid.cell_bundle(network('bert', seed=2), CELL), best / 'cells' / CELL.name)
  values = {'1x1': 0.9, '0.5x1': 0.99, '1x0.666667': 0.8, '0.5x0.666667': 0.95}
  record = {name: {'value': value, 'step': 1} for name, value in values.items()}
  (folder / 'bert' / 'best.json').write_text(json.dumps({'all': {'value': 9.0, 'step': 1}, **record}))
  return folder


@pytest.fixture
def measured(monkeypatch):
  """The models that are timed, in place of the work: so many milliseconds as thousands of parameters."""
  calls = []

  def measure(models, batch_sizes, seq_len, seconds, engines=('jax',)):
    calls.append((dict(models), tuple(batch_sizes), seq_len, tuple(engines)))
    sizes = {name: sum(leaf.size for leaf in jax.tree.leaves(bundle.params)) for name, bundle in models.items()}
    rows = [Timing(name, b, engines[0], 1e-3 * sizes[name], 1.0, 3) for b in batch_sizes for name in models]
    return Latencies(tuple(rows), seq_len, 'cpu')

  for module in (grid, export_cell):
    monkeypatch.setattr(module, 'measure', measure)
  return calls


@pytest.mark.parametrize('kind', KINDS)
def test_a_sub_network_is_a_model_of_its_own(kind, runs, tmp_path):
  """The view's logits, those of the full network with everything else masked, and of onnxruntime.

  Mutations: the rightmost heads; the first layers in place of the kept ones; the full network's configuration; a
  RoBERTa's padding with 0.
  """
  whole = load_model(str(runs / kind))
  done = run_export_cell(str(runs / kind), str(tmp_path / 'hf'), Wanted(0.5, 0.667))
  back = from_pretrained(tmp_path / 'hf')
  assert done.cell == CELL and back.labels == ('a', 'b', 'c') and back.config == subnet_config(whole.config, CELL)
  assert (back.config.num_layers, back.config.num_heads, back.config.intermediate_size) == (2, 2, 4)
  np.testing.assert_allclose(logits(back), view(whole), rtol=0, atol=1e-5)
  run_export_cell(str(runs / kind), str(tmp_path / 'padded'), Wanted(0.5, 0.667), layout='padded')
  stock = from_pretrained(tmp_path / 'padded')
  assert stock.config.num_heads == 4 and not (tmp_path / 'padded' / 'modeling_compactlm.py').exists()
  np.testing.assert_allclose(logits(stock), view(whole), rtol=0, atol=1e-5)
  if kind != 'convbert':  # where kernels read the queries of all heads: see the tests of `compress.subnet`
    tree = masked(whole.params, whole.config, masks_of(whole.config, (2,) * 3, (4,) * 3))
    layers = jax.tree.map(lambda leaf: leaf[jnp.array([0, 1])], tree['encoder']['layers'])
    same = {**tree, 'encoder': {**tree['encoder'], 'layers': layers}}
    expected = dataclasses.replace(whole, params=same, config=dataclasses.replace(whole.config, num_layers=2))
    np.testing.assert_allclose(logits(back), logits(expected), rtol=0, atol=1e-5)
  onnxruntime = pytest.importorskip('onnxruntime')
  pytest.importorskip('onnx')
  run_export_cell(str(runs / kind), str(tmp_path / 'onnx'), Wanted(0.5, 0.667), format='onnx')
  session = onnxruntime.InferenceSession(str(tmp_path / 'onnx/model.onnx'), providers=['CPUExecutionProvider'])
  feeds = {'input_ids': IDS, 'attention_mask': MASK, 'token_type_ids': np.zeros_like(IDS)}
  names = [output.name for output in session.get_outputs()]
  found = dict(zip(names, session.run(None, {name: value.astype(np.int64) for name, value in feeds.items()})))
  np.testing.assert_allclose(found['logits'], view(whole), rtol=0, atol=1e-5)


@pytest.mark.torch
@pytest.mark.parametrize('kind', KINDS)
def test_transformers_computes_the_same(kind, runs, tmp_path, monkeypatch):
  """By the modelling file; of BERT also, filled up with zeros, by its stock class.

  Mutation: a head size of D / H.
  """
  torch, transformers = pytest.importorskip('torch'), pytest.importorskip('transformers')
  from transformers import dynamic_module_utils

  monkeypatch.setattr(dynamic_module_utils, 'HF_MODULES_CACHE', str(tmp_path / 'modules'))
  monkeypatch.setattr(sys, 'path', [*sys.path])
  auto, expected = transformers.AutoModelForSequenceClassification, view(load_model(str(runs / kind)))
  rows = {'input_ids': torch.tensor(IDS.astype(np.int64)), 'attention_mask': torch.tensor(MASK.astype(np.int64))}
  for layout, trust in (('auto', True), *((('padded', False),) if kind in ('bert', 'roberta') else ())):
    run_export_cell(str(runs / kind), str(tmp_path / layout), Wanted(0.5, 0.667), layout=layout)
    model = auto.from_pretrained(tmp_path / layout, trust_remote_code=trust).eval()
    with torch.no_grad():
      np.testing.assert_allclose(model(**rows).logits.numpy(), expected, rtol=0, atol=1e-5)
  for name in [name for name in sys.modules if name.startswith('transformers_modules')]:
    del sys.modules[name]


def test_different_sub_networks_differ(runs, tmp_path):
  """In outputs and in size. Mutation: cut the smallest one whatever is asked."""
  found = {}
  for cell in cells(ADAPT, load_model(str(runs / 'bert')).config):
    run_export_cell(str(runs / 'bert'), str(tmp_path / cell.name), Wanted(cell.width, cell.depth))
    found[cell] = logits(from_pretrained(tmp_path / cell.name))
  for a, b in itertools.combinations(found.values(), 2):
    assert np.abs(a - b).max() > 1e-2
  assert len({(tmp_path / cell.name / 'model.safetensors').stat().st_size for cell in found}) == len(found) == 4


@pytest.mark.parametrize(
  ('wanted', 'message'),
  [
    (Wanted(0.25), r'--width=0.25: .*bert was trained at widths 0.5, 1; choose one of them'),
    (Wanted(depth=1.5), '--depth=1.5: write a share of the full network, above 0 and at most 1'),
    (Wanted(0.0), '--width=0: write a share'),
    (Wanted(hidden=8), '--hidden=8: .* was trained at widths 0.5, 1 with the hidden size whole'),
    (Wanted(0.5, depth=0.1), '--depth: 0.1 of 3 layers is none; use a larger share'),
    (Wanted(0.5, budget='params<1M'), '--budget: chooses width and depth itself'),
    (Wanted(budget='speed<5'), "--budget=speed<5: 'speed<5' is none of latency<5ms"),
    (Wanted(budget='params<1M', seq_len=17), '--seq_len=17: .* has 16 positions'),
    (Wanted(budget='latency<1ms', batch=0), '--batch: must be at least 1'),
    (
      Wanted(budget='params<1e3'),
      r'--budget=params<1e3: no sub-network fits; the nearest is 0.5x0.666667 with \d+ par',
    ),
  ],
)
def test_what_cannot_be_cut_is_refused(wanted, message, runs, tmp_path):
  """Mutation: cut it all the same."""
  with pytest.raises(ConfigError, match=message):
    run_export_cell(str(runs / 'bert'), str(tmp_path / 'out'), wanted)
  assert not (tmp_path / 'out').exists()


def test_runs_without_what_is_asked_for(runs, tmp_path):
  """Mutations: an empty grid; the last checkpoint for the best."""
  with pytest.raises(ConfigError, match=r'electra/results.json: cannot be read .*finished run of task adapt'):
    run_export_cell(str(runs / 'electra'), str(tmp_path / 'out'), Wanted(budget='params<1M'))
  with pytest.raises(ConfigError, match='--best: .*electra has no folder best; train with config.adapt.keep_best'):
    run_export_cell(str(runs / 'electra'), str(tmp_path / 'out'), Wanted(best=True))
  folder = tmp_path / 'run'
  save_run(folder, network())
  (folder / 'results.json').write_text(json.dumps({'metrics': {}}))
  with pytest.raises(ConfigError, match='results.json: has no grid of sub-networks'):
    run_export_cell(str(folder), str(tmp_path / 'out'), Wanted(budget='params<1M'))


def test_what_was_never_trained_is_told(runs, tmp_path, caplog):
  """A stage of widths, a depth beyond the grid, a network that is not adaptive. Mutation: warn always, or never."""
  for depth in (0.667, 0.7):  # the same two of three layers
    run_export_cell(str(runs / 'bert'), str(tmp_path / 'a'), Wanted(0.5, depth))
  assert 'never trained' not in caplog.text
  found = run_export_cell(str(runs / 'bert'), str(tmp_path / 'b'), Wanted(depth=1 / 3))
  assert 'the sub-network 1x0.333333 was never trained, those that were are 1x1, 0.5x1,' in caplog.text
  assert found.export.bundle.config.num_layers == 1
  caplog.clear()
  save_run(tmp_path / 'width', network(), names=['1x1', '0.5x1'])
  run_export_cell(str(tmp_path / 'width'), str(tmp_path / 'c'), Wanted(0.5, 0.667))
  assert 'the sub-network 0.5x0.666667 was never trained' in caplog.text
  caplog.clear()
  save_pretrained(network(), tmp_path / 'plain')
  with pytest.raises(ConfigError, match='--width: 0.1 of 4 heads is none; use a larger one'):
    run_export_cell(str(tmp_path / 'plain'), str(tmp_path / 'd'), Wanted(0.1))
  run_export_cell(str(tmp_path / 'plain'), str(tmp_path / 'd'), Wanted(0.75))
  assert 'plain does not say which sub-networks were trained' in caplog.text
  np.testing.assert_allclose(logits(from_pretrained(tmp_path / 'd')), view(network(), Cell(0.75)), atol=1e-5)


def test_hidden_sizes(tmp_path):
  """Heads, neurons and depth follow. Mutations: keep all heads; take a width for a hidden size."""
  adapt = AdaptConfig(widths=(1.0,), depths=(2 / 3, 1.0), hidden_sizes=(8, 16))
  path = save_run(tmp_path / 'run', network(), adapt)
  done = run_export_cell(path, str(tmp_path / 'out'), Wanted(hidden=8, depth=0.667))
  small = from_pretrained(tmp_path / 'out').config
  assert done.cell == Cell(0.5, 2 / 3, 8)
  with pytest.raises(ConfigError, match='--width=0.25: heads and neurons follow --hidden=8'):
    run_export_cell(path, str(tmp_path / 'no'), Wanted(0.25, hidden=8))
  assert (small.hidden_size, small.num_heads, small.num_layers, small.intermediate_size) == (8, 2, 2, 4)
  np.testing.assert_allclose(logits(from_pretrained(tmp_path / 'out')), view(network(), done.cell), rtol=0, atol=1e-5)
  full = run_export_cell(path, str(tmp_path / 'full'), Wanted(depth=1.0))
  assert full.cell == Cell(1.0, 1.0, 16) and full.export.bundle.config == network().config
  for wanted in (Wanted(0.5), Wanted(hidden=12)):
    with pytest.raises(ConfigError, match=r'was trained at the hidden sizes 8, 16; choose one of them by --hidden'):
      run_export_cell(path, str(tmp_path / 'not'), wanted)


def test_the_best_within_a_budget_is_exported(runs, tmp_path, measured):
  """By the first score, not by the loss; latencies of the format's engine. Mutations: the smallest that fits; the first
  that fits; time through JAX what runs in onnxruntime."""
  sizes = {c: sum(x.size for x in jax.tree.leaves(grid.cell_bundle(network(), c).params))
           for c in cells(ADAPT, network().config)}  # fmt: skip
  limit = sizes[Cell(1.0, 2 / 3)] + 1
  by_size = run_export_cell(str(runs / 'bert'), str(tmp_path / 'size'), Wanted(budget=f'params<{limit}'))
  assert by_size.cell == Cell(1.0, 2 / 3) and by_size.choice.metric == 'accuracy' and not measured
  assert {row.cell for row in by_size.choice.others + by_size.choice.missed} == set(sizes) - {by_size.cell}
  wanted = Wanted(budget=f'latency<={1e-3 * sizes[CELL]}ms', batch=4, seq_len=9)
  by_time = run_export_cell(str(runs / 'bert'), str(tmp_path / 'time'), wanted)
  ((models, batches, length, engines),) = measured
  assert by_time.cell == CELL and (batches, length, engines) == ((4,), 9, ('jax',)) and len(models) == 4
  assert 'batch 4, 9 tokens, jax on cpu' in by_time.text()
  assert f'0.5x0.666667 is the best sub-network by accuracy with latency <= {1e-3 * sizes[CELL]}ms.' in by_time.text()
  pytest.importorskip('onnx')
  run_export_cell(str(runs / 'bert'), str(tmp_path / 'onnx'), wanted, format='onnx')
  assert measured[-1][3] == ('onnxruntime',)


def test_each_sub_network_at_its_best(runs, tmp_path, caplog):
  """From its own folder, else from the best network; a budget then goes by the best values. Mutations: cut it from the
  last checkpoint; choose by the scores of the end."""
  run_export_cell(str(runs / 'bert'), str(tmp_path / 'own'), Wanted(0.5, 0.667, best=True))
  np.testing.assert_allclose(logits(from_pretrained(tmp_path / 'own')), view(network(seed=2)), rtol=0, atol=1e-5)
  assert 'cut out of the network with the best sum' not in caplog.text
  found = run_export_cell(str(runs / 'bert'), str(tmp_path / 'budget'), Wanted(budget='params<1M', best=True))
  assert found.cell == Cell(0.5, 1.0) and found.choice.row.metrics == {'accuracy': 0.99} and found.seq_len == 12
  assert 'cells/0.5x1 is not there: 0.5x1 is cut out of the network with the best sum' in caplog.text
  cut = from_pretrained(tmp_path / 'budget')
  np.testing.assert_allclose(logits(cut), view(network(seed=1), Cell(0.5)), rtol=0, atol=1e-5)
  whole = run_export_cell(str(runs / 'bert'), str(tmp_path / 'all'), Wanted(best=True))
  assert isinstance(whole, Export)
  np.testing.assert_allclose(logits(from_pretrained(tmp_path / 'all')), logits(network(seed=1)), rtol=0, atol=1e-5)


def test_the_command(runs, tmp_path, measured, capsys):
  """Mutations: leave out a flag; a report without the sub-network."""
  flags = [f'--checkpoint={runs / "bert"}', f'--report={tmp_path}/numbers.json']
  assert cli.main(['export', f'--output={tmp_path}/out', *flags, '--width=.5', '--depth=.667']) == 0
  said = capsys.readouterr().out
  assert 'Sub-network 0.5x0.666667 of ' in said and '2 of 3 layers, 2 of 4 heads, 4 of 8 neurons, 16 of 16' in said
  assert '| full network |     1 |' in said and '| exported     |    32 |' in said
  found = json.loads((tmp_path / 'numbers.json').read_text())
  small = sum(leaf.size for leaf in jax.tree.leaves(from_pretrained(tmp_path / 'out').params))
  assert (found['cell']['width'], found['cell']['params'], found['cell']['name']) == (0.5, small, '0.5x0.666667')
  assert found['full']['params'] > small and found['choice'] is None and found['seq_len'] == 12
  flags += ['--budget=params<1M,latency<1s', '--batch=2', '--seq_len=8', '--best', '--nolatency']
  assert cli.main(['export', f'--output={tmp_path}/out', *flags]) == 0
  assert '| 0.5x1 ' in capsys.readouterr().out and measured[-1][1:3] == ((2,), 8)
  found = json.loads((tmp_path / 'numbers.json').read_text())
  assert found['choice']['budget'] == ['params<1M', 'latency<1s'] and len(found['choice']['others']) == 3
  assert cli.main(['export', f'--output={tmp_path}/out', flags[0], '--width=.3']) == 78
  assert '--width=0.3: ' in capsys.readouterr().err


@pytest.mark.parametrize(
  ('text', 'expected'),
  [
    ('latency<5ms', [('latency_ms', 5.0, False)]),
    ('latency <= 0.5 s', [('latency_ms', 500.0, True)]),
    ('latency<250us', [('latency_ms', 0.25, False)]),
    ('params<20e6', [('params', 2e7, False)]),
    ('params<20M, flops<=3G', [('params', 2e7, False), ('flops', 3e9, True)]),
    ('flops<.5e9', [('flops', 5e8, False)]),
  ],
)
def test_budgets_are_read(text, expected):
  """Mutations: seconds as milliseconds; 3e9 as 3."""
  assert [(b.quantity, pytest.approx(b.limit), b.inclusive) for b in parse_budgets(text)] == expected


@pytest.mark.parametrize(
  ('text', 'message'),
  [
    ('latency<5', 'write the unit as in latency<5us, latency<5ms, latency<5s'),
    ('params<5ms', 'write the unit as in params<5, params<5k'),
    ('params>5', "'params>5' is none of"),
    ('', "'' is none of"),
    ('params<1M,', "'' is none of"),
    ('params<0', 'leaves no sub-network'),
    ('params<1e400', 'or all of them'),
    ('params<1M,params<2M', 'names a quantity twice'),
    ('latency<-5ms', 'is none of'),
  ],
)
def test_budgets_that_mean_nothing_are_refused(text, message):
  with pytest.raises(ConfigError, match=message):
    parse_budgets(text)


def rows(values):
  return [
    GridRow(Cell((i + 1) / 10), {'m': score}, params, 1e9, latency) for i, (score, params, latency) in enumerate(values)
  ]


FINITE = st.tuples(st.integers(0, 2).map(float) | st.just(math.nan), st.integers(1, 5), st.integers(1, 5).map(float))


@settings(deadline=None)
@given(st.lists(FINITE, min_size=1, max_size=6), st.integers(1, 6), st.integers(1, 6), st.booleans())
def test_the_choice_is_what_a_search_finds(values, params, latency, inclusive):
  """Mutations: > for <; NaN as the best; of equal scores the dearer one."""
  limits = (Budget('', 'params', params, inclusive), Budget('', 'latency_ms', latency, inclusive))
  found, slack = rows(values), 0.5 if inclusive else 0
  usable = [r for r in found if not math.isnan(r.metrics['m'])]
  fitting = [r for r in usable if r.params < params + slack and r.latency_ms < latency + slack]
  if not fitting:
    with pytest.raises(ConfigError, match='no sub-network (fits|has a score)'):
      choose(found, limits, 'm')
    return
  chosen = choose(found, limits, 'm')
  best = max(r.metrics['m'] for r in fitting)
  equal = [r for r in fitting if r.metrics['m'] == best]
  assert chosen.row.params == min(r.params for r in equal) and chosen.row in equal
  assert {r.cell for r in chosen.others} == {r.cell for r in fitting} - {chosen.row.cell}
  assert {r.cell for r in chosen.missed} == {r.cell for r in usable} - {r.cell for r in fitting}


def test_what_was_close_is_shown():
  """Losses: the lowest. Mutations: the highest loss; the farthest misses first."""
  found = rows([(0.1, 100, 9.0), (0.2, 100, 5.5), (0.3, 100, 5.0), (0.4, 90, 4.0), (0.5, 80, 3.0), (0.6, 70, 2.0)])
  found = [dataclasses.replace(row, metrics={'loss': row.metrics['m']}) for row in found]
  choice = choose(found, parse_budgets('latency<=5ms'), 'loss')
  assert choice.row == found[2] and choice.others == tuple(found[3:]) and choice.missed == (found[1], found[0])
  lines = [[c.strip() for c in line.strip('|').split('|')] for line in as_text(choice).splitlines() if '|' in line]
  assert [(line[0], line[-1]) for line in lines[2:]] == [
    ('0.3x1', 'chosen'), ('0.4x1', 'fits'), ('0.5x1', 'fits'), ('0.2x1', '10 % too much latency'),
    ('0.1x1', '80 % too much latency'),
  ]  # fmt: skip
