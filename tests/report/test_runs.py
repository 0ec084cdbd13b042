"""Which runs stand in one table: the same but for the seed; anything else is told or refused."""

import dataclasses
import json
import math

import pytest
from finished_runs import IDENTITY, finished, series

from compactlm_jax.config import AdaptConfig, DataConfig, FinetuneConfig, OptimizerConfig
from compactlm_jax.errors import ConfigError
from compactlm_jax.report import collect
from compactlm_jax.report.runs import Group
from compactlm_jax.train.rundir import FREE_FIELDS, read_run


def gather(*folders):
  return collect([str(f) for f in folders], read_run, FREE_FIELDS)


def test_seeds_of_a_parent_form_a_group_by_seed(tmp_path):
  """Eleven, so that seed-10 follows seed-9.

  Mutations: leave runs in the order of their names, or group by the whole configuration.
  """
  parent = series(tmp_path / 'sst2', [0.1 * i for i in range(11)])
  (parent / 'seed-old').mkdir()
  report = gather(parent)
  assert [group.name for group in report.groups] == ['sst2'] and not report.left_out and not report.notes
  runs = report.groups[0].runs
  assert [run.config.seed for run in runs] == list(range(11))
  assert report.groups[0].values('accuracy') == [0.1 * i for i in range(11)]
  record = json.loads((parent / 'seed-3' / 'config.json').read_text())
  run = runs[3]
  assert (run.command, run.config_hash) == (record['command'], record['config_hash']) and run.command
  assert run.code == f'{record["code"]["version"]} ({record["code"]["sources"]})'
  assert (run.steps, run.seconds, run.identity) == (10, 1.5, IDENTITY)


def test_runs_named_one_by_one_and_twice(tmp_path):
  """Two parents, as two machines leave them. Mutation: count a directory that is named twice, twice."""
  a, b = series(tmp_path / 'a', [0.5, 0.7], seeds=(0, 2)), series(tmp_path / 'b', [0.6], seeds=(1,))
  other = tmp_path / 'other'
  other.mkdir()
  finished(other, {'accuracy': 0.9}, optimizer=OptimizerConfig(learning_rate=1e-5))
  report = gather(a, b, a / 'seed-0', b / '..' / 'a' / 'seed-2', b / '..' / 'a', other)
  assert [(g.name, [r.config.seed for r in g.runs]) for g in report.groups] == [('a', [0, 1, 2]), ('other', [0])]


def test_groups_of_the_same_name_are_told_apart(tmp_path):
  """Mutation: the last part of the path always."""
  for name, rate in (('x', 1e-5), ('y', 1e-4)):
    series(tmp_path / name / 'sst2', [0.5], optimizer=OptimizerConfig(learning_rate=rate))
  report = gather(tmp_path / 'x' / 'sst2', tmp_path / 'y' / 'sst2')
  assert [group.name for group in report.groups] == ['x/sst2', 'y/sst2']


def test_fields_that_do_not_alter_the_curve_may_differ(tmp_path):
  """So may the teacher that a run without one generates. Mutation: compare every field, or every fingerprint."""
  series(tmp_path, [0.5], seeds=(0,), log_every=3, identity={**IDENTITY, 'teacher': 'x'})
  series(tmp_path, [0.6], seeds=(1,), keep=9, identity={**IDENTITY, 'teacher': 'y'})
  assert len(gather(tmp_path).groups) == 1
  named = tmp_path / 'named'
  series(named, [0.5], seeds=(0,), teacher='t', identity={**IDENTITY, 'teacher': 'x'})
  series(named, [0.6], seeds=(1,), teacher='t', identity={**IDENTITY, 'teacher': 'y'})
  with pytest.raises(ConfigError, match="identity.teacher is 'x' and 'y'"):
    gather(named)


@pytest.mark.parametrize(
  ('change', 'message'),
  [
    ({'batch_size': 64}, 'seed-0 and .*seed-1 differ in more than the seed: config.batch_size is 32 and 64'),
    ({'identity': {**IDENTITY, 'data': 'more rows'}}, "identity.data is 'rows' and 'more rows'"),
    ({'task': 'mlm'}, 'seed-0 is a run of task finetune, .*seed-1 of mlm: .* Report them apart'),
    ({'seed': 0}, 'seed-0 and .*seed-1 are the same run, seed 0'),
  ],
)
def test_seeds_that_do_not_belong_together_are_refused(tmp_path, change, message):
  """Mutations: make two groups of them; mix tasks; count a copy of a run."""
  series(tmp_path, [0.5])
  (tmp_path / 'seed-1').mkdir()
  finished(tmp_path / 'seed-1', {'accuracy': 0.6}, **{'seed': 1, **change})
  with pytest.raises(ConfigError, match=message) as refused:
    gather(tmp_path)
  assert refused.value.exit_code == 78


def test_runs_of_different_tasks_named_one_by_one_are_refused(tmp_path):
  """Mutation: look at runs of one parent only."""
  a, b = series(tmp_path / 'a', [0.5]), series(tmp_path / 'b', [0.5], task='lm')
  with pytest.raises(ConfigError, match=r'a/seed-0 is a run of task finetune, .*b/seed-0 of lm'):
    gather(a, b)


def test_unfinished_runs_are_named_and_left_out(tmp_path, caplog):
  """Mutation: drop them in silence."""
  series(tmp_path, [0.5, 0.6, 0.7, 0.8, 0.9])
  (tmp_path / 'seed-1' / 'results.json').unlink()
  (tmp_path / 'seed-2' / 'results.json').unlink()
  (tmp_path / 'seed-2' / 'failure.json').write_text('{}')
  (tmp_path / 'seed-3' / 'config.json').unlink()
  results = json.loads((tmp_path / 'seed-4' / 'results.json').read_text())
  (tmp_path / 'seed-4' / 'results.json').write_text(json.dumps({**results, 'steps': 5}))
  report = gather(tmp_path)
  assert [run.config.seed for run in report.groups[0].runs] == [0]
  reasons = {folder.rpartition('/')[2]: why for folder, why in report.left_out}
  assert set(reasons) == {'seed-1', 'seed-2', 'seed-3', 'seed-4'}
  assert 'unfinished' in reasons['seed-1'] and 'failed' in reasons['seed-2'] and 'not started' in reasons['seed-3']
  assert 'after 5 steps and is to have 10' in reasons['seed-4']
  assert all(f'{folder} is left out' in caplog.text for folder, _ in report.left_out)
  (tmp_path / 'seed-0' / 'results.json').unlink()
  with pytest.raises(ConfigError, match='no finished run: .*seed-0: it is unfinished'):
    gather(tmp_path)


@pytest.mark.parametrize(
  ('file', 'damage', 'message'),
  [
    ('config.json', lambda t: t.replace('"batch_size": 32', '"batch_size": 33'), 'config.json was edited or damaged'),
    ('config.json', lambda t: t[:-40], 'config.json is damaged'),
    ('config.json', lambda t: json.dumps(json.loads(t) | {'identity': 'x'}), 'config.json is damaged .identity'),
    ('results.json', lambda t: t[:-4], 'results.json is damaged'),
    ('results.json', lambda t: t.replace('0.5', '"high"'), 'results.json is damaged'),
    ('results.json', lambda t: '[]', 'results.json is damaged'),
  ],
)
def test_edited_and_damaged_files_are_refused(tmp_path, file, damage, message):
  """Mutation: read config.json without its hash; take a score for 0 that is no number."""
  series(tmp_path, [0.5, 0.6])
  path = tmp_path / 'seed-0' / file
  path.write_text(damage(path.read_text()))
  with pytest.raises(ConfigError, match=message):
    gather(tmp_path)


def test_folders_that_are_none_are_named(tmp_path):
  """Mutation: skip them."""
  with pytest.raises(ConfigError, match='/none: there is no such directory'):
    gather('/none')
  with pytest.raises(ConfigError, match='holds neither config.json nor seed-'):
    gather(tmp_path)


def test_what_a_reader_should_know_is_noted(tmp_path):
  """Mutation: drop a note."""
  runs = list(gather(series(tmp_path, [0.5, 0.6, math.nan])).groups[0].runs)
  assert gather(tmp_path).notes == (
    f'{tmp_path.name}: accuracy of seed 2 is not finite',
    f'{tmp_path.name}: loss of seed 2 is not finite',
  )
  runs[0] = dataclasses.replace(runs[0], code='older', scores={'accuracy': 0.5})
  group = Group('g', tuple(runs[:2]))
  assert group.metrics == ('accuracy', 'loss') and group.values('loss') == [0.4]
  from compactlm_jax.report.runs import _notes

  assert _notes(group) == ['g: its runs were made by different versions of the code', 'g: no loss from seed 0']


def held_out(folder, dev, accuracy=0.5, **fields):
  folder.mkdir(parents=True)
  return finished(folder, {'accuracy': accuracy}, data=DataConfig(train='t.tsv', dev=dev), **fields)


def test_files_of_one_name_are_different_subjects(tmp_path):
  """Titles are as short as tells them apart. Mutations: the name of the file; whole paths; paths as written."""
  one, same = held_out(tmp_path / 'a', 'my/data/dev.tsv'), held_out(tmp_path / 'b', './my/data/dev.tsv', batch_size=8)
  assert list(gather(one, same).subjects()) == ['finetune on dev.tsv']
  other, test = held_out(tmp_path / 'c', 'my/other/dev.tsv'), held_out(tmp_path / 'd', 'my/test.tsv')
  found = {title: [g.name for g in groups] for title, groups in gather(one, other, test, same).subjects().items()}
  assert found == {
    'finetune on data/dev.tsv': ['a', 'b'], 'finetune on other/dev.tsv': ['c'], 'finetune on test.tsv': ['d'],
  }  # fmt: skip
  short = held_out(tmp_path / 'e', 'dev.tsv')
  assert list(gather(short, one).subjects()) == ['finetune on dev.tsv', 'finetune on data/dev.tsv']


def test_rows_decide_where_they_were_recorded(tmp_path):
  """Mutations: the path alone; a benchmark's name alone."""
  rows = [{**IDENTITY, 'eval': digest} for digest in ('a' * 64, 'b' * 64)]
  one, changed = (held_out(tmp_path / name, 'x/dev.tsv', identity=i) for name, i in zip('ab', rows))
  moved = held_out(tmp_path / 'c', 'y/dev.tsv', identity=rows[0])
  found = {title: [g.name for g in groups] for title, groups in gather(one, changed, moved).subjects().items()}
  assert found == {'finetune on dev.tsv (rows aaaaaaaa)': ['a', 'c'], 'finetune on dev.tsv (rows bbbbbbbb)': ['b']}
  glue = [tmp_path / name for name in 'ef']
  for folder, identity in zip(glue, rows):
    folder.mkdir()
    finished(folder, {'accuracy': 0.5}, finetune=FinetuneConfig(benchmark='sst2'), identity=identity)
  assert list(gather(*glue).subjects()) == ['sst2 (rows aaaaaaaa)', 'sst2 (rows bbbbbbbb)']


@pytest.mark.parametrize('name', ['eval', 'start'])
def test_seeds_are_told_apart_by_rows_and_weights(tmp_path, name):
  """Of equal configurations. Mutation: leave the entry out."""
  for seed, digest in enumerate('xxy'):
    held_out(tmp_path / f'seed-{seed}', 'dev.tsv', seed=seed, model='m', identity=IDENTITY | {name: digest})
  assert [len(group.runs) for group in gather(tmp_path / 'seed-0', tmp_path / 'seed-1').groups] == [2]
  assert [len(group.runs) for group in gather(tmp_path / 'seed-1', tmp_path / 'seed-2').groups] == [1, 1]
  with pytest.raises(ConfigError, match=f'identity.{name} is '):
    gather(tmp_path)


def test_weights_made_from_the_seed_may_differ(tmp_path):
  """An adaptive run's last stage starts from what the stage before made. Mutation: compare every fingerprint."""
  stages = {'task': 'adapt', 'adapt': AdaptConfig(stages=('width', 'final')), 'model': 'm', 'teacher': 't'}
  for name, fields in (('staged', stages), ('fresh', {})):
    for seed in range(2):
      weights = {'start': f'w{seed}', **({'teacher': f'v{seed}'} if name == 'staged' else {})}
      series(tmp_path / name, [0.5], seeds=(seed,), identity=IDENTITY | weights, **fields)
    assert [len(group.runs) for group in gather(tmp_path / name).groups] == [2]
