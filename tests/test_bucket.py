"""Everything on gs://: dataset, run directory, checkpoints, export. The clients are real, the bucket is an emulator."""

import json

import jax
import numpy as np
import pytest
from bucket import emulated, refuse  # before gcsfs is imported
from checkpointing import METADATA, abstract, equal, make_state
from etils import epath
from tiny import ENCODER, tiny_config

import compactlm_jax as clm
from compactlm_jax.checkpoint import Checkpoints, load_params
from compactlm_jax.cli.main import main
from compactlm_jax.config import DataConfig
from compactlm_jax.data.parts import Spread
from compactlm_jax.data.prepare import prepare
from compactlm_jax.data.source import open_dataset
from compactlm_jax.data.wordpiece import train_wordpiece
from compactlm_jax.errors import DataError, LockedError, PreemptedError, StorageError
from compactlm_jax.interop.writing import write_export
from compactlm_jax.jobs import run_export, run_train
from compactlm_jax.jobs.evaluate import run_evaluate
from compactlm_jax.metrics import read_metrics
from compactlm_jax.train import rundir
from compactlm_jax.train.signals import StopRequest

pytest.importorskip('gcsfs')
pytest.importorskip('gcp_storage_emulator')

# The clients' own.
pytestmark = [
  pytest.mark.filterwarnings('ignore::ResourceWarning'),
  pytest.mark.filterwarnings('ignore::DeprecationWarning'),
]
WORDS = 'the a small large river house tree runs stands falls under over near and cold warm light blue'.split()


@pytest.fixture(scope='module')
def bucket(tmp_path_factory):
  root = tmp_path_factory.mktemp('bucket')
  with pytest.MonkeyPatch.context() as patch, emulated(root / 'objects') as url:
    patch.setenv('XDG_CACHE_HOME', str(root / 'cache'))
    patch.setattr(rundir, '_SETTLE_SECONDS', 0.05)
    yield epath.Path(url)


def text(seed, lines=150):
  rng = np.random.default_rng(seed)
  return '\n'.join(' '.join(rng.choice(WORDS, rng.integers(2, 15))) + ('\n' * (i % 5 == 0)) for i in range(lines))


@pytest.fixture(scope='module')
def data(bucket):
  """Texts, a tokenizer and rows in the bucket."""
  for i in range(3):
    (bucket / 'text' / f'{i}.txt').write_bytes(text(i).encode())
  train_wordpiece(str(bucket / 'text' / '*.txt'), 90, bucket / 'tokenizer')
  prepare(
    str(bucket / 'text' / '*.txt'), str(bucket / 'tokenizer'), bucket / 'rows', 16, holdout_rows=20, shard_rows=80
  )
  return bucket


def config_of(path):
  encoder = ENCODER.__class__(**{**ENCODER.__dict__, 'vocab_size': 90})
  data = DataConfig(path=str(path), seq_len=16)
  return tiny_config('mlm', encoder=encoder, data=data, steps=6, checkpoint_every=2, keep=2)


def names(folder):
  return sorted(p.name for p in folder.iterdir())


def test_rows_are_those_of_a_disk_and_read_from_a_copy(data, tmp_path):
  """Mutation: write the manifest first; leave the digest of a copied file unread."""
  for i in range(3):
    (tmp_path / f'{i}.txt').write_text(text(i))
  local = prepare(f'{tmp_path}/*.txt', str(data / 'tokenizer'), tmp_path / 'rows', 16, holdout_rows=20, shard_rows=80)
  remote = data / 'rows'
  assert names(remote) == names(epath.Path(tmp_path / 'rows'))
  for file in names(remote):
    if file != 'tokenizer':
      assert (remote / file).read_bytes() == (tmp_path / 'rows' / file).read_bytes()
  again = prepare(str(data / 'text' / '*.txt'), str(data / 'tokenizer'), remote, 16, holdout_rows=20, shard_rows=80)
  assert again == local
  indices = np.arange(30)
  ours, theirs = open_dataset(remote).fetch(indices), open_dataset(tmp_path / 'rows').fetch(indices)
  assert all((ours[name] == theirs[name]).all() for name in theirs)
  assert open_dataset(remote, verify='full').size == local.rows('train')


def test_parts_in_a_bucket_are_those_of_a_disk(data, tmp_path):
  """Mutation: leave the marks there."""
  spec, tokenizer = str(data / 'text' / '*.txt'), str(data / 'tokenizer')
  prepare(spec, tokenizer, tmp_path / 'here', 16, spread=Spread(2), holdout_rows=7)
  prepare(spec, tokenizer, data / 'parts', 16, spread=Spread(2), holdout_rows=7)
  assert names(data / 'parts') == names(epath.Path(tmp_path / 'here'))
  for file in names(data / 'parts'):
    if file != 'tokenizer':
      assert (data / 'parts' / file).read_bytes() == (tmp_path / 'here' / file).read_bytes()


def test_what_a_stopped_preparation_left_is_replaced_and_a_damaged_file_noticed(data):
  """Mutation: refuse a folder without a manifest; compare the sizes of copied files alone."""
  target = data / 'left'
  (target / 'compactlm_rows-train.array_record-00007').write_bytes(b'half')
  options = {'holdout_rows': 3, 'seed': 5}
  prepare(str(data / 'text' / '0.txt'), str(data / 'tokenizer'), target, 16, **options)
  assert 'compactlm_rows-train.array_record-00007' not in names(target)
  shard = target / 'compactlm_rows-train.array_record-00000'
  content = bytearray(shard.read_bytes())
  content[len(content) // 2] ^= 1
  shard.write_bytes(bytes(content))
  with pytest.raises(DataError, match='gs://.*00000: its content is not what was written'):
    open_dataset(target)


def test_a_run_in_a_bucket_is_the_run_on_a_disk(data, tmp_path, monkeypatch):
  """Mutation: open metrics.jsonl for appending (the lines before the resume are lost)."""
  config, run = config_of(data / 'rows'), data / 'run'
  whole = run_train(config, str(tmp_path / 'run'))
  answers = iter([False, False, False, True])  # before the first step, then after each
  with monkeypatch.context() as patch:
    patch.setattr(StopRequest, 'requested', lambda self: next(answers))
    with pytest.raises(PreemptedError, match='gs://.*/run'):
      run_train(config, str(run))
  assert not (run / 'lock').exists()
  results = run_train(config, str(run))
  assert results['metrics'] == whole['metrics'] == json.loads((run / 'results.json').read_text())['metrics']
  ours, theirs = read_metrics(run), read_metrics(tmp_path / 'run')
  assert [line['step'] for line in ours] == list(range(1, 7)) and [m['loss'] for m in ours] == [
    m['loss'] for m in theirs
  ]
  (a, _), (b, _) = load_params(run), load_params(tmp_path / 'run')
  assert jax.tree.all(jax.tree.map(lambda x, y: x.tobytes() == y.tobytes(), a, b))
  assert names(run / 'checkpoints') == ['4', '6']  # 2 and 3 made room

  evaluated = run_evaluate(config, str(run), output=str(data / 'scores'))
  assert json.loads((data / 'scores' / 'results.json').read_text())['metrics'] == evaluated['metrics']
  write_export({'model.sparse.safetensors': b'of an earlier export'}, data / 'exported')
  run_export(str(run), str(data / 'exported'), latency=False)
  assert 'model.sparse.safetensors' not in names(data / 'exported')
  bundle = clm.from_pretrained(data / 'exported')
  assert bundle.tokenizer is not None
  ours, theirs = (params['encoder']['embeddings']['word'] for params in (bundle.params, load_params(run)[0]))
  assert jax.tree.all(jax.tree.map(np.array_equal, ours, theirs))


def test_of_two_runs_that_start_at_once_one_goes_on(bucket, monkeypatch):
  """Mutation: do not read the lock back."""
  run = bucket / 'contended'
  first, second = rundir._Lock(run), rundir._Lock(run)
  monkeypatch.setattr(rundir.time, 'sleep', lambda _: (monkeypatch.undo(), (run / 'lock').write_text(other)))
  other = json.dumps({'host': 'elsewhere', 'pid': 1, 'process_start': '', 'started': '', 'token': 'other'})
  with pytest.raises(LockedError, match='another run is just starting here'):
    first.take(False)
  with pytest.raises(LockedError, match='elsewhere'):
    second.take(False)
  assert json.loads((run / 'lock').read_text())['token'] == 'other'


def test_a_step_without_its_commit_file_does_not_count(bucket):
  """Mutation: go by names in `StepDirectory._counts`."""
  directory = bucket / 'steps'
  with Checkpoints(directory, 3) as checkpoints:
    for step in (1, 2):
      checkpoints.save(step, make_state(step), METADATA, wait=True)
  (directory / '2' / 'commit_success.txt').unlink()
  (directory / '2' / 'state' / '_METADATA').unlink()
  with Checkpoints(directory, 3) as checkpoints:
    assert checkpoints.all_steps() == [1] == [int(n) for n in names(directory)]
    restored, _ = checkpoints.restore(abstract(make_state(0)))
  assert equal(restored, make_state(1))


@pytest.mark.parametrize('methods', [('GET', 'POST', 'PUT'), ('POST', 'PUT')], ids=['nothing', 'reading'])
def test_without_permission_a_command_ends_with_74_and_says_what_to_do(methods, data, monkeypatch, capsys):
  """Mutation: drop `own_error` from `main`."""
  refuse(monkeypatch, *methods)
  spec = str(data / 'text' / '0.txt')
  arguments = [f'--input={spec}', f'--tokenizer={data}/tokenizer', f'--output={data}/refused', '--seq_len=16']
  assert main(['prepare', *arguments]) == 74
  said = capsys.readouterr().err
  assert 'gs://compactlm-test/' in said and ('permission' in said or 'cannot be written' in said)


def test_a_run_without_permission(data, monkeypatch):
  refuse(monkeypatch, 'POST', 'PUT')
  with pytest.raises(StorageError, match='gs://compactlm-test/.*no permission.*Storage Object Admin'):
    run_train(tiny_config('mlm', steps=1), f'{data}/refused')
