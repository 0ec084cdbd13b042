"""Series of seeds: one run each, continued after a kill, spread over machines, with a table at the end."""

import json
import pathlib
import shutil
import signal

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from compactlm_jax import cli
from compactlm_jax.errors import ConfigError, LockedError, NumericsError
from compactlm_jax.jobs import seeds as module
from compactlm_jax.jobs.seeds import parse_seeds, shard_of
from compactlm_jax.metrics import read_metrics
from compactlm_jax.train.rundir import read_run

CONFIG = pathlib.Path(__file__).parents[2] / 'configs' / 'tiny.py'
SMALL = [
  '--config.steps=4', '--config.batch_size=8', '--config.checkpoint_every=2', '--config.log_every=1',
  '--config.data.seq_len=16', '--config.encoder.vocab_size=64', '--config.encoder.hidden_size=16',
  '--config.encoder.intermediate_size=32', '--config.encoder.embedding_size=16', '--config.encoder.head_size=4',
  '--config.encoder.num_layers=1',
]  # fmt: skip


def train(workdir, *flags):
  return cli.main(['train', f'--config={CONFIG}:finetune', f'--workdir={workdir}', *SMALL, *flags])


def scores(workdir):
  """Seed -> metrics of the finished runs."""
  return {
    int(p.parent.name[5:]): json.loads(p.read_text())['metrics'] for p in sorted(workdir.glob('seed-*/results.json'))
  }


def contents(workdir):
  return {p: p.read_bytes() for p in workdir.rglob('*') if p.is_file()}


@pytest.fixture(scope='module')
def series(tmp_path_factory):
  """Three finished seeds."""
  workdir = tmp_path_factory.mktemp('series')
  assert train(workdir, '--seeds=3') == 0
  return workdir


@pytest.fixture
def fake(monkeypatch):
  """Runs that only leave results; `fake[seed]` is what happens instead. Holds the seeds that ran under 'ran'."""
  happens = {'ran': []}

  def run(config, workdir, **options):
    happens['ran'].append(config.seed)
    if config.seed in happens:
      happens[config.seed]()
    return {'metrics': {'accuracy': 0.5}, 'steps': 4}

  monkeypatch.setattr(module, 'run_train', run)
  return happens


def failing(error):
  def fail():
    raise error

  return fail


def test_each_seed_is_a_run_of_its_own_and_the_table_is_numpys(series, tmp_path, capsys):
  """Mutations: hand all runs the same seed; take the standard deviation of a population."""
  assert sorted(p.name for p in series.iterdir()) == ['seed-0', 'seed-1', 'seed-2']
  assert [read_run(series / f'seed-{i}')[0].seed for i in range(3)] == [0, 1, 2]
  found = scores(series)
  losses = np.array([found[i]['loss'] for i in range(3)])
  assert len(set(losses)) == 3
  assert cli.main(['report', str(series), f'--output={tmp_path}/r.json']) == 0
  assert f'written: {tmp_path}/r.json' in capsys.readouterr().out
  (group,) = json.loads((tmp_path / 'r.json').read_text())['groups']
  expected = {
    'n': 3,
    'median': np.median(losses),
    'mean': losses.mean(),
    'std': losses.std(ddof=1),
    'stderr': losses.std(ddof=1) / np.sqrt(3),
    'best': losses.min(),
    'worst': losses.max(),
  }
  assert group['metrics']['loss'] == pytest.approx(expected, rel=1e-12)
  assert [run['steps'] for run in group['runs']] == [4, 4, 4]
  assert [run['config_hash'] for run in group['runs']] == [
    read_run(series / f'seed-{i}')[1]['config_hash'] for i in range(3)
  ]


@pytest.mark.slow
def test_seeds_of_an_adaptive_network_have_stages_and_grids_of_their_own(tmp_path):
  """The same command again trains nothing. Mutation: one folder of stages for all seeds."""
  two_layers = ['--config.encoder.num_layers=2', '--config.adapt.stages=width,depth']
  argv = ['train', f'--config={CONFIG}:adapt', f'--workdir={tmp_path}', *SMALL[:-1], *two_layers, '--seeds=2']
  assert cli.main(argv) == 0
  runs = [tmp_path / f'seed-{seed}' for seed in range(2)]
  grids = [json.loads((run / 'results.json').read_text())['grid'] for run in runs]
  assert [len(grid) for grid in grids] == [4, 4] and grids[0] != grids[1]
  assert all(read_run(run / 'stages' / 'width')[0].seed == seed for seed, run in enumerate(runs))
  before = contents(tmp_path)
  assert cli.main(argv) == 0 and contents(tmp_path) == before


def test_finished_seeds_are_kept_without_loading_anything(series, capsys, monkeypatch):
  """Mutation: run them again, or leave the table out."""
  before = contents(series)
  monkeypatch.setattr(module, 'run_train', lambda *args, **kwargs: pytest.fail('ran'))
  assert train(series, '--seeds=0,2') == 0
  said = capsys.readouterr().out
  losses = np.array([scores(series)[seed]['loss'] for seed in (0, 2)])
  assert f'| 2 | {np.median(losses):.4f} | {losses.mean():.4f} |' in said and '2 runs are done' in said
  assert contents(series) == before


def test_a_stopped_series_continues_to_the_same_scores(series, tmp_path, capsys, monkeypatch):
  """SIGTERM while the data of the second seed are loaded: it does not begin. Mutation: forget what was asked before."""
  real = module.run_train

  def interrupted(config, workdir, **options):
    if config.seed == 1:
      signal.raise_signal(signal.SIGTERM)
    return real(config, workdir, **options)

  shutil.copytree(series / 'seed-0', tmp_path / 'seed-0')  # done before
  with monkeypatch.context() as m:
    m.setattr(module, 'run_train', interrupted)
    assert train(tmp_path, '--seeds=2') == 75
  said = capsys.readouterr().err
  assert 'asked to stop before step 1; the same command continues' in said and 'Traceback' not in said
  assert set(scores(tmp_path)) == {0} and not read_metrics(tmp_path / 'seed-1')
  assert train(tmp_path, '--seeds=2') == 0
  assert scores(tmp_path) == {seed: found for seed, found in scores(series).items() if seed < 2}


def test_a_signal_between_two_seeds_ends_the_series(fake, tmp_path, capsys):
  """As one during the last evaluation of a run. Mutation: do not ask between runs."""
  fake[1] = lambda: signal.raise_signal(signal.SIGTERM)
  assert train(tmp_path, '--seeds=4') == 75
  assert 'asked to stop before seed 2; the same command continues' in capsys.readouterr().err and fake['ran'] == [0, 1]


def test_a_failed_seed_does_not_stop_the_others(fake, tmp_path, capsys):
  """The code is that of the first. Mutation: end with 0, or with the last."""
  fake[0], fake[2] = failing(NumericsError('3 non-finite updates')), failing(LockedError('held by process 7'))
  assert train(tmp_path, '--seeds=4') == 70 and fake['ran'] == [0, 1, 2, 3]
  said = capsys.readouterr().err
  assert 'compactlm train: seed 0: 3 non-finite updates; seed 2 failed too' in said and 'Traceback' not in said


def test_what_every_seed_would_meet_ends_the_series_at_once(fake, tmp_path, capsys):
  """A wrong field before any success; after one it is that seed's own. Mutation: treat both alike."""
  fake[0] = failing(ConfigError('config.model: name the model'))
  assert train(tmp_path, '--seeds=4') == 78 and fake['ran'] == [0]
  fake['ran'], fake[0], fake[1] = [], lambda: None, failing(ConfigError('config.steps: was 3'))
  assert train(tmp_path, '--seeds=3') == 78 and fake['ran'] == [0, 1, 2]
  fake['ran'], fake[1] = [], failing(ZeroDivisionError('oops'))
  capsys.readouterr()
  assert train(tmp_path, '--seeds=3') == 70 and fake['ran'] == [0, 1, 2]
  said = capsys.readouterr().err
  assert 'in the run of seed 1' in said and 'this is a bug' in said


@given(st.lists(st.integers(0, 99), min_size=1, max_size=20, unique=True), st.integers(1, 8))
def test_shards_cover_every_seed_once(seeds, n):
  """Mutation: start every shard at the first seed."""
  parts = [shard_of(seeds, f'{i}/{n}') for i in range(n)]
  assert sorted(seed for part in parts for seed in part) == sorted(seeds)
  assert max(map(len, parts)) - min(map(len, parts)) <= 1 and shard_of(seeds, '') == tuple(seeds)


def test_a_shard_runs_its_own_and_reports_what_is_there(series, capsys, monkeypatch):
  """Mutation: report only the seeds of the shard."""
  monkeypatch.setattr(module, 'run_train', lambda *args, **kwargs: pytest.fail('ran'))
  assert train(series, '--seeds=3', '--seed_shard=1/2') == 0
  said = capsys.readouterr().out
  assert '| 3 | ' in said and '1 runs are done' in said


@pytest.mark.parametrize(
  ('flags', 'message'),
  [
    (['--seeds=many'], '--seeds=many: write how many (9) or which (0,3,7)'),
    (['--seeds=1,x'], '--seeds=1,x: write how many'),
    (['--seeds=0'], '--seeds=0: seeds must be different numbers'),
    (['--seeds='], '--seeds=: write how many'),
    (['--seeds=3,3'], '--seeds=3,3: seeds must be different'),
    (['--seeds=-1,2'], '--seeds=-1,2: seeds must be different numbers in [0, 2^31)'),
    (['--seeds=3', '--seed_shard=2/2'], '--seed_shard=2/2: write I/N with I from 0 to N-1'),
    (['--seeds=3', '--seed_shard=half'], '--seed_shard=half: write I/N'),
    (['--seed_shard=0/2'], '--seed_shard: name the seeds of the whole series'),
    (['--seeds=3', '--config.seed=4'], 'config.seed: 4 and --seeds are both given'),
  ],
)
def test_wrong_seeds_are_refused(fake, tmp_path, flags, message, capsys):
  """Mutation: let one through."""
  assert train(tmp_path, *flags) == 78 and not fake['ran']
  assert f'compactlm train: {message}' in capsys.readouterr().err


def test_a_directory_is_a_run_or_a_series(fake, tmp_path, capsys):
  """Mutation: put seed-0 into a run directory."""
  (tmp_path / 'config.json').write_text('{}')
  assert train(tmp_path, '--seeds=2') == 78 and 'holds a single run' in capsys.readouterr().err


def test_seeds_are_a_count_or_a_list():
  """Mutation: take 5 for the seed 5."""
  assert parse_seeds('3') == (0, 1, 2) and parse_seeds('0,3, 7') == (0, 3, 7) and parse_seeds('5,') == (5,)


def test_reports_of_the_command_line_name_what_is_wrong(series, tmp_path, capsys):
  """Mutation: let an edited configuration through, or an argument before the flags swallow them."""
  assert cli.main(['report']) == 78 and 'runs are missing. For example: compactlm report' in capsys.readouterr().err
  assert cli.main(['report', '--help']) == 0 and '\n  RUNS ...\n      Run directories' in capsys.readouterr().out
  assert cli.main(['report', str(series), '--output', f'{tmp_path}/a.csv', '--curve']) == 78
  assert "Unknown command line flag 'curve'. Did you mean: curves?" in capsys.readouterr().err
  assert cli.main(['report', str(series / 'seed-0'), '--output', f'{tmp_path}/a.csv', str(series / 'seed-2')]) == 0
  assert ',2,loss,' in (tmp_path / 'a.csv').read_text() and '| 2 | ' in capsys.readouterr().out
  copy = tmp_path / 'seed-0'
  copy.mkdir()
  for name in ('config.json', 'results.json'):
    (copy / name).write_text((series / 'seed-0' / name).read_text().replace('"batch_size": 8', '"batch_size": 9'))
  assert cli.main(['report', str(copy)]) == 78
  assert 'config.json was edited or damaged' in capsys.readouterr().err
  assert cli.main(['report', str(series)]) == 0
  said = capsys.readouterr().out
  assert 'Commands:' in said and read_run(series / 'seed-0')[1]['command'] in said
