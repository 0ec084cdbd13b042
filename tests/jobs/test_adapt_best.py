"""What a run keeps of its evaluations: the same after any interruption, whole or not at all."""

import dataclasses
import json
import pathlib
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from etils import epath
from killing import Kill, killed_at
from tiny import ENCODER

from compactlm_jax.checkpoint import load_params
from compactlm_jax.compress.subnet import subnet
from compactlm_jax.config import AdaptConfig, cells, to_json
from compactlm_jax.errors import StorageError
from compactlm_jax.interop.bundle import from_pretrained
from compactlm_jax.jobs import adapt_best as module
from compactlm_jax.jobs.adapt_best import ALL, BestCells, read_best
from compactlm_jax.jobs.grid_rows import cell_scores, grid_rows, metrics_of_cells
from compactlm_jax.nn.encoder import init_encoder
from compactlm_jax.nn.flops import encoder_flops
from compactlm_jax.types import TrainState

SMALL = dataclasses.replace(ENCODER, num_layers=1)
GRID = cells(AdaptConfig(widths=(0.5, 1.0), depths=(1.0,)), SMALL)
MODEL = {'encoder': to_json(SMALL), 'classes': ['a', 'b'], 'finetune': {'pooled': False, 'score_scale': 1.0}}
HALF = '0.5x1'


def params_at(step):
  params = init_encoder(SMALL, jax.random.key(step))
  return {**params, 'classifier': {'kernel': jnp.ones((16, 2)) * step, 'bias': jnp.zeros(2)}}


def keeper(metric='accuracy', higher=True, **fields):
  return BestCells(GRID, SMALL, MODEL, metric, higher, None, 16, **fields)


def offered(best, workdir, scores, weights=0):
  """Evaluations of step 1, 2, ... of (full, half) in a fresh run; returns best.json."""
  workdir.mkdir(parents=True, exist_ok=True)
  best.start(workdir, 0)
  for step, (full, half) in enumerate(scores, 1):
    found = {best.metric: full, f'{best.metric}@{HALF}': half}
    best.offer(TrainState(jnp.int32(step), params_at(step + weights), ()), found, {'model': MODEL, 'task': 'adapt'})
  return read_best(workdir)


def test_of_equal_values_the_earliest_stays_and_what_is_not_finite_never(tmp_path):
  """Mutations: keep the latest; let NaN in; compare cells by the sum."""
  nan = float('nan')
  found = offered(keeper(), epath.Path(tmp_path), [(nan, 0.1), (0.5, 0.3), (nan, 0.9), (0.5, 0.4)])
  assert found == {
    ALL: {'value': pytest.approx(0.9), 'step': 4},
    '1x1': {'value': 0.5, 'step': 2},
    HALF: {'value': 0.9, 'step': 3},
  }
  assert load_params(tmp_path / 'best')[1]['step'] == 4
  half, full = (from_pretrained(tmp_path / 'best' / 'cells' / name).params for name in (HALF, '1x1'))
  assert float(full['classifier']['kernel'][0, 0]) == 2 and float(half['classifier']['kernel'][0, 0]) == 3
  np.testing.assert_array_equal(
    half['encoder']['layers']['ffn_in']['kernel'],
    subnet(params_at(3), SMALL, GRID[1])['encoder']['layers']['ffn_in']['kernel'],
  )


def test_losses_are_better_when_lower_and_a_fresh_run_starts_with_nothing(tmp_path):
  """Mutations: always take the highest; keep what a run of another configuration left."""
  workdir = epath.Path(tmp_path)
  assert offered(keeper('loss', False), workdir, [(2.0, 3.0), (1.0, 4.0)])[ALL] == {'value': 5.0, 'step': 1}
  assert offered(keeper('loss', False), workdir, [(7.0, 7.0)], weights=9) == {
    name: {'value': value, 'step': 1} for name, value in ((ALL, 14.0), ('1x1', 7.0), (HALF, 7.0))
  }
  assert float(load_params(tmp_path / 'best')[0]['classifier']['kernel'][0, 0]) == 10
  for content in ('{', '{"all": 1}', '{"all": {"value": "0.5", "step": 1}}', '{"all": {"value": NaN, "step": 1}}'):
    (workdir / 'best.json').write_text(content)
    with pytest.raises(StorageError, match='best.json'):
      read_best(workdir)
  off = keeper(keep=False)
  assert not offered(off, epath.Path(tmp_path / 'off'), [(0.5, 0.5)])
  assert not list((tmp_path / 'off').iterdir())


FIRST = (0.5, 0.3)


def contents(folder):
  """Every file of what is kept but Orbax's own, by its path."""
  folder = pathlib.Path(folder)
  files = [p for p in folder.rglob('*') if p.is_file() and 'checkpoints' not in p.parts]
  return {p.relative_to(folder): p.read_bytes() for p in files}


@pytest.mark.parametrize('call', [1, 2, 3, 4, 6])
def test_killed_at_any_moment_it_ends_with_the_same_files(tmp_path, monkeypatch, call, uninterrupted):
  """best.json never names what is not there. Mutations: note before the export; refuse a step that is there already.

  Moments: before and after the network is saved; before and after a cell is; before the last note.
  """
  workdir = epath.Path(tmp_path)
  offered(keeper(), workdir, [FIRST])
  best = keeper()
  best.start(workdir, 1)
  found = {'accuracy': 0.6, f'accuracy@{HALF}': 0.4}
  calls = iter(range(1, 100))

  def dying(real):
    def wrapped(*args):
      if next(calls) == call:
        raise Kill
      return real(*args)

    return wrapped

  with monkeypatch.context() as m, pytest.raises(Kill):
    m.setattr(module, 'save_pretrained', dying(module.save_pretrained))
    m.setattr(BestCells, '_note', dying(BestCells._note))
    m.setattr(BestCells, '_save', dying(BestCells._save))
    best.offer(TrainState(jnp.int32(2), params_at(2), ()), found, {'model': MODEL, 'task': 'adapt'})
  record = read_best(workdir)
  for name in ('1x1', HALF):
    if record[name]['step'] == 2:
      kept = from_pretrained(tmp_path / 'best' / 'cells' / name).params['classifier']['kernel']
      assert float(kept[0, 0]) == 2
  if record[ALL]['step'] == 2:
    assert load_params(tmp_path / 'best')[1]['step'] == 2
  again = keeper()
  again.start(workdir, 1)
  again.offer(TrainState(jnp.int32(2), params_at(2), ()), found, {'model': MODEL, 'task': 'adapt'})
  assert contents(tmp_path) == uninterrupted and load_params(tmp_path / 'best')[1]['step'] == 2


@pytest.fixture(scope='module')
def uninterrupted(tmp_path_factory):
  folder = tmp_path_factory.mktemp('uninterrupted')
  offered(keeper(), epath.Path(folder), [FIRST, (0.6, 0.4)])
  return contents(folder)


@pytest.fixture(scope='module')
def stage(tmp_path_factory):
  """Run directory of a stage that is over, with other steps for the sum and for each cell."""
  folder = tmp_path_factory.mktemp('stages') / 'depth'
  assert offered(keeper(), epath.Path(folder), [(0.5, 0.1), (0.3, 0.4), (0.2, 0.6)])[ALL]['step'] == 3
  return folder


TAKEN = {
  '1x1': {'value': 0.5, 'step': 1, 'stage': 'depth'},
  HALF: {'value': 0.6, 'step': 3, 'stage': 'depth'},
  ALL: {'value': pytest.approx(0.8), 'step': 3, 'stage': 'depth'},
}


def test_a_stage_keeps_what_the_one_before_did_better(stage, tmp_path):
  """Of equal values that of the stage before. A step of the same number takes the place of what was taken over.

  Mutations: start with nothing; copy the checkpoint under its own step; let equal values in.
  """
  workdir, before = epath.Path(tmp_path / 'run'), {'before': str(stage)}
  assert offered(keeper(**before), workdir, [(0.5, 0.1), (0.1, 0.6)], weights=9) == TAKEN
  assert contents(workdir / 'best') == contents(stage / 'best')
  taken, own = load_params(workdir / 'best'), load_params(stage / 'best')
  assert (taken[1]['step'], own[1]['step']) == (0, 3)
  assert np.array_equal(taken[0]['classifier']['kernel'], own[0]['classifier']['kernel'])
  found = offered(keeper(**before), workdir, [(0.1, 0.1), (0.1, 0.1), (0.1, 0.8), (0.4, 0.7)], weights=9)
  assert found == {
    '1x1': TAKEN['1x1'],
    HALF: {'value': 0.8, 'step': 3},
    ALL: {'value': pytest.approx(1.1), 'step': 4},
  }
  assert float(load_params(workdir / 'best')[0]['classifier']['kernel'][0, 0]) == 13
  cells_of = {name: from_pretrained(workdir / 'best' / 'cells' / name).params['classifier'] for name in ('1x1', HALF)}
  assert [float(head['kernel'][0, 0]) for head in cells_of.values()] == [1, 12]
  third = offered(keeper(before=str(workdir)), epath.Path(tmp_path / 'third'), [(0.0, 0.0)])
  assert third['1x1'] == TAKEN['1x1'] and third[HALF] == {'value': 0.8, 'step': 3, 'stage': 'run'}


def test_of_a_stage_with_other_cells_only_those_that_both_have_are_taken_over(stage, tmp_path):
  """Sums over other cells are not compared. Mutation: take over the sum all the same."""
  other = dataclasses.replace(keeper(before=str(stage)), cells=(*GRID, dataclasses.replace(GRID[0], depth=0.5)))
  other.start(epath.Path(tmp_path), 0)
  assert read_best(tmp_path) == {name: TAKEN[name] for name in ('1x1', HALF)}
  assert not (tmp_path / 'best' / 'checkpoints').exists()


def test_killed_while_it_takes_over_it_does_so_again(stage, tmp_path, monkeypatch):
  """best.json names nothing before all is there. Mutations: write it first; leave what is there already."""
  expected = offered(keeper(before=str(stage)), epath.Path(tmp_path / 'whole'), [(0.1, 0.9)], weights=5)
  killed = epath.Path(tmp_path / 'killed')
  for call in (1, 2, 4, 6, 8):
    with killed_at(monkeypatch, call), pytest.raises(Kill):
      keeper(before=str(stage)).start(killed, 0)
    assert not read_best(killed)
  assert offered(keeper(before=str(stage)), killed, [(0.1, 0.9)], weights=5) == expected
  assert contents(killed) == contents(tmp_path / 'whole')


def test_a_record_that_is_gone_is_no_fresh_start(tmp_path):
  """Else a worse network would take the place of the best one. Mutation: take a missing record for an empty one."""
  workdir = epath.Path(tmp_path)
  keeper().start(workdir, 0)
  keeper().start(workdir, 1)  # killed before its first evaluation
  offered(keeper(), workdir, [FIRST])
  (workdir / 'best.json').unlink()
  with pytest.raises(StorageError, match='best.json is gone'):
    keeper().start(workdir, 1)


def test_what_the_stage_before_kept_must_be_there(stage, tmp_path):
  """Mutation: go on without it."""
  shutil.copytree(stage, tmp_path / 'depth')
  shutil.rmtree(tmp_path / 'depth' / 'best' / 'cells' / HALF)
  with pytest.raises(StorageError, match=f'depth/best: what the stage before kept could not be copied .*{HALF}'):
    keeper(before=str(tmp_path / 'depth')).start(epath.Path(tmp_path / 'run'), 0)


def test_rows_of_the_grid():
  """Metrics by cell, of several evaluations; sizes are those of the cut tree. Mutation: count the full network."""
  scores = {'loss': 1.0, 'accuracy': 0.5, f'accuracy@{HALF}': 0.25, 'mm_accuracy': 0.4, f'mm_accuracy@{HALF}': 0.3}
  assert metrics_of_cells(scores, GRID)[GRID[1]] == {'accuracy': 0.25, 'mm_accuracy': 0.3}
  params = params_at(1)
  full, half = grid_rows(scores, GRID, SMALL, jax.eval_shape(lambda: params), 16)
  assert full['metrics'] == {'loss': 1.0, 'accuracy': 0.5, 'mm_accuracy': 0.4}
  assert full['params'] == sum(leaf.size for leaf in jax.tree.leaves(params))
  # Half of query, key, value, output and feed-forward: 4 * 16 * 8 and 2 * 16 * 16 weights, 3 * 8 and 16 biases.
  assert full['params'] - half['params'] == 4 * 16 * 8 + 3 * 8 + 2 * 16 * 16 + 16
  assert full['flops'] == 16 * encoder_flops(SMALL, 16) == 2 * half['flops'] and half['latency_ms'] is None
  rows = {'outputs': np.ones(2), f'outputs@{HALF}': np.zeros(2), 'labels': np.ones(2)}
  assert (half['width'], half['depth'], 'hidden' in half) == (0.5, 1.0, False)
  scored = cell_scores(lambda r: {'hits': float((r['outputs'] == r['labels']).sum())}, GRID)(rows)
  assert scored == {'hits': 2.0, f'hits@{HALF}': 0.0}
  assert json.loads(json.dumps(full)) == full
