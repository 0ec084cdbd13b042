"""Adaptive networks evaluated: the grid of every sub-network, its latencies, files; any model taken for one."""

import dataclasses
import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny import ENCODER, tiny_config

from compactlm_jax.checkpoint import Checkpoints
from compactlm_jax.cli import main
from compactlm_jax.compress.subnet import subnet_config
from compactlm_jax.config import AdaptConfig, Cell
from compactlm_jax.errors import ConfigError
from compactlm_jax.interop.bundle import from_pretrained, save_pretrained
from compactlm_jax.jobs import build_job, grid, load_model
from compactlm_jax.jobs import evaluate as evaluate_module
from compactlm_jax.jobs.evaluate import run_evaluate
from compactlm_jax.jobs.export_cell import Wanted, run_export_cell
from compactlm_jax.jobs.grid import Network, Timed, as_text, cell_bundle, load_network, timed_rows
from compactlm_jax.jobs.latency import Latencies, Timing
from compactlm_jax.report.grid import GridRow, as_csv, as_entries, over_runs, read_rows
from compactlm_jax.tasks.finetune import classify
from compactlm_jax.train.rundir import open_run
from compactlm_jax.types import TrainState

ROOT = pathlib.Path(__file__).parents[2]
ADAPT = AdaptConfig(widths=(0.5, 1.0), depths=(0.5, 1.0), stages=('final',))
CELLS = [Cell(w, d) for d in (1.0, 0.5) for w in (1.0, 0.5)]
_CLASSIFY = jax.jit(classify, static_argnums=1)


def config_of(**changes):
  return tiny_config('adapt', **{'encoder': ENCODER, 'adapt': ADAPT, 'batch_size': 256, **changes})


def save_run(folder, config):
  """A run of random weights, wide enough that its sub-networks disagree; nothing is trained."""
  task, rng = build_job(config).task, np.random.default_rng(0)
  shapes = jax.eval_shape(task.init, jax.random.key(0))
  params = jax.tree.map(lambda s: jnp.asarray(rng.standard_normal(s.shape), s.dtype), shapes)
  with open_run(folder, config, {}), Checkpoints(folder / 'checkpoints', 1) as checkpoints:
    metadata = {'model': dict(task.model), 'task': task.name, 'identity': {}}
    checkpoints.save(1, TrainState(jnp.int32(1), params, ()), metadata, wait=True)
  return str(folder)


@pytest.fixture(scope='module')
def run(tmp_path_factory):
  """Directory of a run."""
  return save_run(tmp_path_factory.mktemp('adaptive') / 'run', config_of())


@pytest.fixture
def measured(monkeypatch):
  """The calls of `measure`, in place of its work: a millisecond for each model before."""
  calls = []

  def measure(models, batch_sizes, seq_len, seconds, engines):
    calls.append((dict(models), tuple(batch_sizes), seq_len, tuple(engines)))
    rows = [Timing(name, batch_sizes[0], engines[0], i + 1.0, None, 3) for i, name in enumerate(models)]
    return Latencies(tuple(rows), seq_len, 'cpu')

  monkeypatch.setattr(grid, 'measure', measure)
  return calls


def test_every_sub_network_is_evaluated_as_its_own_model_would_be(run, tmp_path, measured):
  """Latencies, accuracies counted here from each cell's own model, and the files of it.

  Mutations: the accuracy of the full network everywhere; untimed; what stands in the run's own folder.
  """
  found = run_evaluate(config_of(teacher='elsewhere'), run, output=str(tmp_path), timing=Timed(2, 8))
  assert (found['task'], found['split'], set(found['metrics'])) == ('adapt', 'dev', {'loss', 'accuracy', 'f1'})
  assert [entry['latency_ms'] for entry in found['grid']] == [1.0, 2.0, 3.0, 4.0]
  assert json.loads((tmp_path / 'results.json').read_text()) == found
  assert found['latency'] == {'batch': 2, 'seq_len': 8, 'engine': 'jax', 'device': jax.devices()[0].device_kind}
  ((models, *how),) = measured
  assert how == [(2,), 8, ('jax',)] and list(models) == [cell.name for cell in CELLS]
  rows, batches = read_rows(found['grid'], 'x'), list(build_job(config_of()).evals[0].batches())
  for row, cell in zip(rows, CELLS, strict=True):
    own = models[cell.name]
    outputs = np.concatenate([np.asarray(_CLASSIFY(own.params, own.config, batch)) for batch in batches])
    labels = np.concatenate([np.asarray(batch.labels) for batch in batches])
    assert row.cell == cell and row.metrics['accuracy'] == pytest.approx(np.mean(outputs.argmax(-1) == labels))
    assert row.params == sum(leaf.size for leaf in jax.tree.leaves(own.params))
  assert len({row.metrics['accuracy'] for row in rows}) > 1
  assert (tmp_path / 'grid.csv').read_text() == as_csv(over_runs([rows]))
  assert (tmp_path / 'grid.png').read_bytes().startswith(b'\x89PNG')
  text = as_text(found)
  assert 'accuracy:' in text and text.rstrip().endswith(f'batch 2, 8 tokens, jax on {found["latency"]["device"]}.')


def test_any_fine_tuned_model_is_taken_for_one(run, tmp_path, monkeypatch):
  """What its sub-networks are worth as they are cut; without matplotlib too. Mutation: the stage of widths alone."""
  bare = load_model(run)
  save_pretrained(bare, tmp_path / 'model')
  config = config_of(adapt=dataclasses.replace(ADAPT, stages=('width', 'depth', 'final')))

  def without(grids):
    raise ConfigError('plots need matplotlib')

  monkeypatch.setattr(grid, 'draw_grid', without)
  found = run_evaluate(config, str(tmp_path / 'model'), output=str(tmp_path / 'out'))
  assert [entry['depth'] for entry in found['grid']] == [1.0, 1.0, 0.5, 0.5] and 'latency' not in found
  assert all(set(entry['metrics']) >= {'accuracy', 'f1'} for entry in found['grid'])
  assert {p.name for p in (tmp_path / 'out').iterdir()} == {'results.json', 'grid.csv'}
  save_pretrained(dataclasses.replace(bare, params={'encoder': bare.params['encoder']}), tmp_path / 'bare')
  with pytest.raises(ConfigError, match='bare: its head was never trained; fine-tune it first'):
    run_evaluate(config, str(tmp_path / 'bare'))


def test_sub_networks_that_were_never_trained_are_told(run, tmp_path, caplog):
  """Those of a stage of widths; not of a whole grid, nor of a model that says nothing. Mutations: always, never."""
  adapt = dataclasses.replace(ADAPT, stages=('width',), width_loss='labels')
  width = save_run(tmp_path / 'width', config_of(adapt=adapt))
  found = run_evaluate(config_of(), width)
  assert 'width: of the grid 1x0.5, 0.5x0.5 were never trained, they are scored as they are cut' in caplog.text
  assert 'those that were are 1x1, 0.5x1: set config.adapt.widths, .depths' in caplog.text and len(found['grid']) == 4
  caplog.clear()
  whole = load_network(run)
  for network in (whole, dataclasses.replace(whole, cells=())):
    grid.with_grid(found, network, None)
  assert 'never trained' not in caplog.text


def test_pre_trained_sub_networks(tmp_path, measured):
  """Losses of hidden sizes; the lowest is the best.

  Mutations: a head that is asked of 'adapt'; choose by accuracy; count the FLOPs of `config.data.seq_len`.
  """
  config = config_of(adapt=AdaptConfig(base='mlm', widths=(1.0,), depths=(1.0,), hidden_sizes=(8, 16)))
  path = save_run(tmp_path / 'run', config)
  found = run_evaluate(config, path, output=str(tmp_path / 'out'))
  losses = {row.cell: row.metrics['loss'] for row in read_rows(found['grid'], 'x')}
  assert [(cell.hidden, cell.depth) for cell in losses] == [(16, 1.0), (8, 1.0)] and found['step'] == 1
  assert 'hidden size' in as_text(found) and not measured
  found['seq_len'] -= 1  # rows that were prepared have a length of their own, whatever the configuration says
  (tmp_path / 'run/results.json').write_text(json.dumps(found))
  done = run_export_cell(path, str(tmp_path / 'cell'), Wanted(budget='params<1M'))
  assert done.seq_len == found['seq_len'] == config.data.seq_len - 1
  assert dataclasses.replace(done.network, seq_len=999).length() == done.network.bundle.config.max_positions
  assert done.choice.metric == 'loss' and done.cell == min(losses, key=losses.get)
  small = run_export_cell(path, str(tmp_path / 'small'), Wanted(hidden=8))
  back = from_pretrained(tmp_path / 'small')
  assert (back.config.hidden_size, back.config.num_heads) == (8, 1)
  assert 'mlm_head' in back.params and small.cell == Cell(0.5, 1.0, 8)
  save_pretrained(dataclasses.replace(back, params={'encoder': back.params['encoder']}), tmp_path / 'bare')
  with pytest.raises(ConfigError, match='bare: has no mlm_head, which the objective mlm evaluates'):
    run_evaluate(config, str(tmp_path / 'bare'))


def test_latencies_stand_in_the_order_of_the_grid(run, monkeypatch):
  """Each sub-network's own, by the engine asked for. Mutation: in the order in which they were measured."""
  network = load_network(run)
  rows = tuple(GridRow(cell, {'accuracy': 0.5}) for cell in CELLS)
  assert [row.cell for row in rows] == list(network.grid) and network.seq_len == 16 == network.length()

  def measure(models, batch_sizes, seq_len, seconds, engines):
    assert (batch_sizes, seq_len, engines) == ((3,), 16, ('onnxruntime',))
    sizes = {name: float(sum(x.size for x in jax.tree.leaves(model.params))) for name, model in models.items()}
    rows = [Timing(name, 3, engines[0], size, None, 3) for name, size in sorted(sizes.items(), key=lambda x: x[1])]
    return Latencies(tuple(rows[1:] if broken else rows), seq_len, 'cpu', ('0.5x0.5: no',))

  monkeypatch.setattr(grid, 'measure', measure)
  broken = False
  timed = timed_rows(rows, network, Timed(3, engine='onnxruntime'))
  for row in timed:
    assert row.latency_ms == sum(x.size for x in jax.tree.leaves(cell_bundle(network.bundle, row.cell).params))
    assert row.metrics == {'accuracy': 0.5}
  broken = True
  with pytest.raises(ConfigError, match='latency through onnxruntime: 0.5x0.5: no'):
    timed_rows(rows, network, Timed(3, engine='onnxruntime'))
  with pytest.raises(ConfigError, match='--seq_len=17: .* has 16 positions'):
    network.length(17)
  with pytest.raises(ConfigError, match='--batch: must be at least 1'):
    Timed(0)


def test_what_stays_whole_is_shared(run):
  """Embeddings of all sub-networks are one array. Mutation: a copy for each."""
  whole = load_network(run).bundle
  cells = [cell_bundle(whole, cell) for cell in CELLS]
  assert cells[0] is whole
  for cell, bundle in zip(CELLS, cells):
    assert bundle.config == subnet_config(whole.config, cell)
    same = bundle.params['encoder']['embeddings']['word']['embedding']
    assert same is whole.params['encoder']['embeddings']['word']['embedding']
  assert Network(whole, 'x').grid == (Cell(),)


def test_the_command(run, tmp_path, monkeypatch, capsys):
  """Mutations: print the metrics of the full network alone; leave a flag out."""
  asked, entries = [], as_entries([GridRow(cell, {'accuracy': 0.5}, 10, 1e9, 2.0) for cell in CELLS])

  def evaluate(config, checkpoint, split, output, *, timing):
    asked.append((config.task, checkpoint, split, output, timing))
    return {'metrics': {'accuracy': 0.5}, 'grid': entries}

  monkeypatch.setattr(evaluate_module, 'run_evaluate', evaluate)
  flags = [f'--config={ROOT}/configs/tiny.py:adapt', '--config.steps=1', f'--checkpoint={run}', '--output=out']
  assert main(['evaluate', *flags, '--batch=4', '--seq_len=8']) == 0
  said = capsys.readouterr().out
  assert '| depth \\ width |' in said and 'latency (ms):' in said and 'out: {"accuracy": 0.5}' in said
  assert main(['evaluate', *flags, '--nolatency']) == 0
  assert asked == [('adapt', run, 'dev', 'out', timing) for timing in (Timed(4, 8), None)]
