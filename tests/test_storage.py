"""What differs between a disk and a bucket; the bucket is a fake behind epath."""

import json

import numpy as np
import pytest
from etils import epath
from fake_bucket import FakeBucket, fake_bucket
from tiny import tiny_config

from compactlm_jax import storage
from compactlm_jax.cli.main import main
from compactlm_jax.data.parts import Spread
from compactlm_jax.data.prepare import prepare
from compactlm_jax.data.source import open_dataset
from compactlm_jax.data.wordpiece import train_wordpiece
from compactlm_jax.errors import ConfigError, LockedError, StorageError
from compactlm_jax.metrics import MetricsWriter, read_metrics
from compactlm_jax.train import rundir
from compactlm_jax.train.rundir import open_run


@pytest.fixture
def bucket(tmp_path, monkeypatch):
  monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path / 'cache'))
  monkeypatch.setattr(rundir, '_SETTLE_SECONDS', 0)
  with fake_bucket() as path:
    yield path


@pytest.fixture(params=['disk', 'bucket'])
def place(request, tmp_path):
  return request.getfixturevalue('bucket') if request.param == 'bucket' else epath.Path(tmp_path)


def test_files_appear_whole(place):
  """Mutation: drop the try of `whole_file`, or hand out the bucket's own file."""
  storage.write_whole(place / 'a', 'one')
  storage.write_whole(place / 'a', b'two')
  with pytest.raises(KeyError), storage.whole_file(place / 'b') as draft:
    draft.write_text('half')
    raise KeyError
  with storage.whole_file(place / 'c', shared=True) as draft:
    draft.write_text('all')
    assert not (place / 'c').exists()
  assert (place / 'a').read_text() == 'two' and (place / 'c').read_text() == 'all'
  assert sorted(p.name for p in storage.children(place)) == ['a', 'c']
  assert storage.children(place / 'none') == []


def test_what_cannot_take_its_place_leaves_nothing(tmp_path):
  """A folder stands there. Mutation: no `finally` in `whole_file`."""
  (tmp_path / 'a').mkdir()
  with pytest.raises(IsADirectoryError):
    storage.write_whole(tmp_path / 'a', 'text')
  assert [p.name for p in tmp_path.iterdir()] == ['a']


def test_lines_are_added_to_a_file(place, monkeypatch):
  """Mutation: open a bucket's file for appending."""
  for line in ('one\n', 'two\n'):
    file = storage.GrowingFile(place / 'lines')
    file.write(line)
    file.sync()
    assert (place / 'lines').read_text().endswith(line)
    file.close()
  assert (place / 'lines').read_text() == 'one\ntwo\n'
  monkeypatch.setattr(storage, '_REWRITE_SECONDS', -1)
  file = storage.GrowingFile(place / 'lines')
  file.write('three\n')
  assert (place / 'lines').read_text() == 'one\ntwo\nthree\n'
  file.close()


def test_a_resumed_run_keeps_its_lines(place):
  """Mutation: leave `sync` empty, or start with an empty text."""
  first = MetricsWriter(place / 'run', 9, bar=False, tensorboard=False)
  for step in (1, 2, 3):
    first.write(step, {'loss': 1.0 / step})
  first.sync()  # killed afterwards
  with MetricsWriter(place / 'run', 9, start_step=2, bar=False, tensorboard=False) as again:
    again.write(3, {'loss': 5.0})
  assert [(line['step'], line['loss']) for line in read_metrics(place / 'run')] == [(1, 1.0), (2, 0.5), (3, 5.0)]
  if not storage.is_remote(place):
    first.close()


def test_a_run_directory_is_held_by_one(bucket, monkeypatch):
  """Mutation: do not read the lock back."""
  with open_run(bucket / 'run', tiny_config(), {}), pytest.raises(LockedError, match='gs://bucket/run is held by'):
    with open_run(bucket / 'run', tiny_config(), {}):
      pass
  assert not (bucket / 'run' / 'lock').exists() and (bucket / 'run' / 'config.json').exists()
  other = json.dumps({'host': 'elsewhere', 'pid': 1, 'process_start': '', 'started': 'now', 'token': 'other'})
  monkeypatch.setattr(rundir.time, 'sleep', lambda _: (bucket / 'run' / 'lock').write_text(other))
  with pytest.raises(LockedError, match='another run is just starting'), open_run(bucket / 'run', tiny_config(), {}):
    pass
  assert json.loads((bucket / 'run' / 'lock').read_text())['token'] == 'other'


def test_datasets_are_those_of_a_disk(bucket, tmp_path):
  """Mutation: write the manifest before the shards; leave the marks of parts."""
  words = 'the cold river runs under a small house near trees'.split()
  rng = np.random.default_rng(0)
  for i in range(2):
    text = '\n'.join(' '.join(rng.choice(words, 9)) + '\n' * (n % 4 == 0) for n in range(60))
    (tmp_path / f'{i}.txt').write_text(text)
    (bucket / 'text' / f'{i}.txt').write_text(text)
  train_wordpiece(f'{tmp_path}/*.txt', 60, bucket / 'tokenizer')
  for parts in (0, 2):
    options = {'spread': Spread(parts), 'holdout_rows': 5, 'shard_rows': 0 if parts else 20}
    here = prepare(f'{tmp_path}/*.txt', str(bucket / 'tokenizer'), tmp_path / f'rows{parts}', 16, **options)
    (bucket / f'rows{parts}' / 'compactlm_rows-train.array_record-00099').write_bytes(b'of a run that was stopped')
    there = prepare('gs://bucket/text/*.txt', 'gs://bucket/tokenizer', bucket / f'rows{parts}', 16, **options)
    assert here == there
    files = {p.name for p in (bucket / f'rows{parts}').iterdir()}
    assert files == {p.name for p in (tmp_path / f'rows{parts}').iterdir()}
    assert all(name.startswith('compactlm_rows-') or '-' not in name for name in files)  # no marks of parts
    a, b = (open_dataset(place / f'rows{parts}').fetch(np.arange(20)) for place in (bucket, epath.Path(tmp_path)))
    assert all((a[name] == b[name]).all() for name in b)


def test_without_permission_a_command_ends_with_74(bucket, tmp_path, monkeypatch, capsys):
  """Mutation: drop `own_error` from the command line, or from `open_run`."""
  (tmp_path / 'a.txt').write_text('the cold river\n' * 50)
  train_wordpiece(f'{tmp_path}/a.txt', 40, tmp_path / 'tokenizer')
  monkeypatch.setattr(FakeBucket, 'refused', True)
  command = [
    f'--input={tmp_path}/a.txt',
    f'--tokenizer={tmp_path}/tokenizer',
    '--output=gs://bucket/out',
    '--seq_len=16',
  ]
  assert main(['prepare', *command]) == 74
  assert 'gs://bucket/out' in capsys.readouterr().err
  assert main(['tokenizer', f'--input={tmp_path}/a.txt', '--vocab_size=40', '--output=gs://bucket/tok']) == 74
  assert (
    'gs://bucket/tok/tokenizer_config.json: no permission' in (said := capsys.readouterr().err)
    and 'Storage Object Admin' in said
  )
  with pytest.raises(StorageError, match='gs://bucket/run/lock: no permission.* gcloud auth application-default login'):
    with open_run(bucket / 'run', tiny_config(), {}):
      pass


DISCONNECTED = type('ServerDisconnectedError', (Exception,), {'__module__': 'aiohttp.client_exceptions'})


@pytest.mark.parametrize(
  ('error', 'kind', 'said'),
  [
    (ImportError('Please install gcsfs to access Google Storage'), ConfigError, r'compactlm-jax\[gcs\]'),
    (ValueError('PERMISSION_DENIED: Error reading "gs://b/x"'), StorageError, 'PERMISSION_DENIED'),
    (Exception('Anonymous caller does not have storage.objects.get access, 401'), StorageError, 'Anonymous caller'),
    (PermissionError(13, 'Permission denied', '/data/x'), StorageError, '^/data/x: no permission'),
    (OSError('Forbidden: b/my/o/a%2Fb\nno'), StorageError, '^gs://my/a/b: no permission'),
    (DISCONNECTED('Server disconnected'), StorageError, '^Server disconnected: .* check the network'),
    (ValueError("UNAVAILABLE: CURL error[6] Couldn't resolve host name"), StorageError, 'check the network, the name'),
  ],
)
def test_what_clients_of_buckets_say(error, kind, said):
  """Mutation: look at the error itself only, not at what caused it; leave out `_UNREACHED`."""
  outer = RuntimeError('save failed')
  outer.__cause__ = error
  for e in (error, outer):
    own = storage.own_error(e)
    assert type(own) is kind
    with pytest.raises(kind, match=said):
      raise own


def test_the_space_on_a_disk(tmp_path):
  """Of a folder that is not there yet, too. Mutation: compare the wrong way round."""
  storage.require_space(tmp_path / 'not' / 'yet', 1, 'rows', 'wait')
  with pytest.raises(StorageError, match=r'^rows: \d+ MiB free, at least 4398046511104 MiB needed; free .* or wait$'):
    storage.require_space(tmp_path / 'not' / 'yet', 2**62, 'rows', 'wait')
  storage.require_space('gs://bucket/run', 2**62, 'rows', 'wait')  # not known there


def test_where_a_file_can_be_made(tmp_path):
  """Mutations: ask a bucket for the folder; let a folder through."""
  (tmp_path / 'taken').mkdir()
  for path in ('', 'new.md', f'{tmp_path}/new.md', 'gs://bucket/none/new.md'):
    storage.require_file_place('output', path)
  for path, said in (
    (f'{tmp_path}/none/new.md', '--output: the folder of .*/none/new.md is not there'),
    (f'{tmp_path}/taken', '--output: .*/taken is a folder; name a table'),
    ('gs://bucket/new.md', '--output: gs://bucket/new.md is in a bucket, .*; name a path on a disk'),
  ):
    with pytest.raises(ConfigError, match=said):
      storage.require_file_place('output', path, buckets=False, name='a table')


def test_other_errors_are_left_alone():
  """Another host that is gone is no bucket. Mutation: look for `_UNREACHED` whoever raises."""
  assert storage.own_error(ConnectionResetError(104, 'Connection reset by peer')) is None
  assert storage.own_error(OSError(28, 'No space left on device')) is None
  assert storage.own_error(ImportError('No module named matplotlib')) is None
  assert storage.free_bytes('gs://bucket') is None and storage.free_bytes('/') > 0
