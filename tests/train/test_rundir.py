"""Who may start in a run directory, with which configuration, and what it leaves on record."""

import dataclasses
import json
import os
import pathlib
import signal
import subprocess
import sys
import time

import pytest

from compactlm_jax.config import EncoderConfig, MeshConfig, OptimizerConfig, RunConfig, to_json
from compactlm_jax.errors import ConfigError, LockedError, StorageError
from compactlm_jax.train import rundir
from compactlm_jax.train.rundir import open_run, read_run

CONFIG = RunConfig(task='finetune', steps=10, encoder=EncoderConfig(hidden_size=64, num_heads=4, num_layers=2))
IDENTITY = {'tokenizer': 'aaaa', 'data': 'bbbb'}

HOLDER = """
import sys, time
from compactlm_jax.config import RunConfig
from compactlm_jax.train.rundir import open_run
with open_run(sys.argv[1], RunConfig(task='finetune', steps=10), {}):
  print('held', flush=True)
  time.sleep(60)
"""


@pytest.fixture
def holder(tmp_path):
  """A live process that holds tmp_path."""
  process = subprocess.Popen(
    [sys.executable, '-c', HOLDER, str(tmp_path)], stdout=subprocess.PIPE, env={**os.environ, 'JAX_PLATFORMS': 'cpu'}
  )
  assert process.stdout.readline() == b'held\n'
  yield process
  process.kill()
  process.wait()
  process.stdout.close()


def trained(workdir, config=CONFIG, identity=IDENTITY, **kwargs):
  """A run that got as far as a checkpoint."""
  with open_run(workdir, config, identity, **kwargs):
    (workdir / 'checkpoints' / '5').mkdir(parents=True, exist_ok=True)


def lock_text(workdir, **changes):
  """A lock file, as of this process with some fields changed."""
  with open_run(workdir, CONFIG, IDENTITY):
    lock = json.loads((workdir / 'lock').read_text())
  return json.dumps({**lock, **changes})


def test_second_run_is_refused_fast_and_the_first_goes_on(tmp_path, holder):
  """Mutation: return from `_check_holder` at once."""
  before = (tmp_path / 'lock').read_text(), (tmp_path / 'config.json').read_text()
  for steal in (False, True):  # a live holder on this host is not stolen from
    started = time.monotonic()
    with pytest.raises(LockedError, match=f'process {holder.pid} on host .*--workdir') as refused:
      with open_run(tmp_path, CONFIG, IDENTITY, steal_lock=steal):
        pytest.fail('opened')
    assert time.monotonic() - started < 2 and refused.value.exit_code == 77
  assert holder.poll() is None
  assert ((tmp_path / 'lock').read_text(), (tmp_path / 'config.json').read_text()) == before


def test_lock_of_a_killed_run_is_taken_over(tmp_path, holder):
  """Mutations: treat a zombie as alive in `_process_start`; let it raise for a missing pid."""
  held = (tmp_path / 'lock').read_text()
  holder.send_signal(signal.SIGKILL)
  while (pathlib.Path('/proc') / str(holder.pid) / 'stat').read_text().rpartition(')')[2].split()[0] != 'Z':
    time.sleep(0.01)  # not reaped yet: a zombie, as under a launcher that is slow to wait
  for reap in (lambda: None, holder.wait):
    reap()
    (tmp_path / 'lock').write_text(held)
    with open_run(tmp_path, CONFIG, IDENTITY):
      assert json.loads((tmp_path / 'lock').read_text())['pid'] == os.getpid()
    assert not (tmp_path / 'lock').exists()


def test_lock_of_a_reused_pid_is_taken_over(tmp_path):
  """Mutation: compare only the pid, not the start time of the process."""
  (tmp_path / 'lock').write_text(lock_text(tmp_path, process_start='some-boot:1'))
  with open_run(tmp_path, CONFIG, IDENTITY):
    pass


def test_a_holder_that_cannot_be_seen_here_holds_the_directory(tmp_path):
  """As in another container with this host's name. Mutation: end `_kernel_lock` when the lock is taken."""
  gone = lock_text(tmp_path, process_start='some-boot:1')
  with open_run(tmp_path, CONFIG, IDENTITY):
    (tmp_path / 'lock').write_text(gone)
    for steal in (False, True):
      with pytest.raises(LockedError, match=r'is held by process \d+ on host .*wait for it'):
        with open_run(tmp_path, CONFIG, IDENTITY, steal_lock=steal):
          pytest.fail('opened')
  with open_run(tmp_path, CONFIG, IDENTITY):
    pass


def test_a_model_folder_is_no_run_directory(tmp_path):
  """Mutation: write config.json wherever there are no checkpoints."""
  content = '{"model_type": "bert"}'
  (tmp_path / 'config.json').write_text(content)
  with pytest.raises(ConfigError, match='--workdir: .* is not the record of a run'):
    with open_run(tmp_path, CONFIG, IDENTITY):
      pytest.fail('opened')
  assert (tmp_path / 'config.json').read_text() == content and not (tmp_path / 'lock').exists()


def test_what_is_over_is_not_changed(tmp_path):
  """Its record would name values that nothing was trained with. Mutation: compare with `<` only."""
  trained(tmp_path)
  changed = dataclasses.replace(CONFIG, optimizer=OptimizerConfig(learning_rate=1e-3))
  allowed = {'allow_change': ('optimizer.learning_rate',)}
  before = (tmp_path / 'config.json').read_text()
  for total in (4, 5):
    with pytest.raises(ConfigError, match=f'config.optimizer.learning_rate: .* has done 5 of {total} steps'):
      with open_run(tmp_path, changed, IDENTITY, total_steps=total, **allowed):
        pytest.fail('opened')
  assert (tmp_path / 'config.json').read_text() == before
  trained(tmp_path, total_steps=5)
  trained(tmp_path, changed, total_steps=6, **allowed)


@pytest.mark.parametrize('text', ['other host', '', '{"pid": 3'])
def test_lock_of_another_host_or_unreadable_needs_steal_lock(tmp_path, text):
  """Mutation: ignore the host (its pid is not alive here, so the lock would be taken over)."""
  other = lock_text(tmp_path, host='elsewhere', pid=2**22 + 1) if text == 'other host' else text
  (tmp_path / 'lock').write_text(other)
  with pytest.raises(LockedError, match='--steal_lock'), open_run(tmp_path, CONFIG, IDENTITY):
    pytest.fail('opened')
  assert (tmp_path / 'lock').read_text() == other
  with open_run(tmp_path, CONFIG, IDENTITY, steal_lock=True):
    pass


def test_a_stolen_lock_is_not_removed_by_its_former_holder(tmp_path):
  """Mutation: unlink in `release` without looking at the token."""
  with open_run(tmp_path, CONFIG, IDENTITY):
    (tmp_path / 'lock').write_text('{"token": "of another run"}')
  assert (tmp_path / 'lock').exists()


def test_of_many_that_start_at_once_one_gets_the_lock(tmp_path):
  """Mutation: `_kernel_lock` yields True at once (with a stale lock, several take it over)."""
  (tmp_path / 'lock').write_text(lock_text(tmp_path, process_start='some-boot:1'))
  code = (
    'import sys, time, pathlib; from compactlm_jax.train.rundir import _Lock\n'
    'from compactlm_jax.errors import LockedError\n'
    'from compactlm_jax.train import rundir; from etils import epath\n'
    'real = rundir.write_whole\n'
    'rundir.write_whole = lambda *a: (time.sleep(0.2), real(*a))\n'
    'print("ready", flush=True); sys.stdin.readline()\n'
    'try:\n  _Lock(epath.Path(sys.argv[1])).take(False); print("taken", flush=True); sys.stdin.readline()\n'
    'except LockedError:\n  print("refused", flush=True)\n'
  )
  runs = [
    subprocess.Popen(
      [sys.executable, '-c', code, str(tmp_path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
      env={**os.environ, 'JAX_PLATFORMS': 'cpu'},
    )
    for _ in range(3)
  ]  # fmt: skip
  assert [r.stdout.readline() for r in runs] == ['ready\n'] * 3
  for r in runs:
    r.stdin.write('\n')
    r.stdin.flush()
  assert sorted(r.stdout.readline() for r in runs) == ['refused\n', 'refused\n', 'taken\n']
  for r in runs:
    r.communicate('\n')


@pytest.mark.parametrize(
  ('field', 'changed'),
  [
    ('config.seed: was 0, now 1', dataclasses.replace(CONFIG, seed=1)),
    ('config.steps: was 10, now 20', dataclasses.replace(CONFIG, steps=20)),
    ('config.batch_size: was 32, now 64', dataclasses.replace(CONFIG, batch_size=64)),
    (
      'config.optimizer.learning_rate: was 0.0005, now 0.001',
      dataclasses.replace(CONFIG, optimizer=OptimizerConfig(learning_rate=1e-3)),
    ),
    (
      'config.encoder.intermediate_size: was 256, now 128',
      dataclasses.replace(CONFIG, encoder=dataclasses.replace(CONFIG.encoder, intermediate_size=128)),
    ),
    ("identity.tokenizer: was 'aaaa', now 'cccc'", None),
    ("identity.teacher: was None, now 'dddd'", 'teacher'),
  ],
)
def test_drift_is_refused_unless_allowed_then_recorded(tmp_path, field, changed):
  """Mutation: leave `refused` empty."""
  identity = IDENTITY
  if changed is None:
    identity = {**IDENTITY, 'tokenizer': 'cccc'}
  elif changed == 'teacher':
    identity = {**IDENTITY, 'teacher': 'dddd'}
  config = changed if isinstance(changed, RunConfig) else CONFIG
  trained(tmp_path)
  before = (tmp_path / 'config.json').read_text()
  with pytest.raises(ConfigError) as refused, open_run(tmp_path, config, identity):
    pytest.fail('opened')
  name = field.partition(':')[0].removeprefix('config.')
  assert field in str(refused.value) and f'--allow_change={name}' in str(refused.value)
  assert (tmp_path / 'config.json').read_text() == before and not (tmp_path / 'lock').exists()

  with pytest.raises(ConfigError), open_run(tmp_path, config, identity, allow_change=('data',)):
    pytest.fail('opened by another field')
  trained(tmp_path, config, identity, allow_change=(name,))
  found, record = read_run(tmp_path)
  assert found == config and [c['field'] for c in record['changes']] == [name]
  trained(tmp_path, config, identity)  # from now on the new value is the run's
  assert [c['field'] for c in read_run(tmp_path)[1]['changes']] == [name]


def test_free_fields_change_silently_and_the_mesh_with_a_word(tmp_path, caplog):
  """Mutation: empty ROUNDING_FIELDS (refused), or add its fields to FREE_FIELDS (no word)."""
  trained(tmp_path)
  trained(tmp_path, dataclasses.replace(CONFIG, log_every=3, keep=9, checkpoint_every=7, eval_every=2))
  assert 'identical' not in caplog.text and read_run(tmp_path)[1]['changes'] == []
  assert read_run(tmp_path)[0].keep == 9
  trained(tmp_path, dataclasses.replace(CONFIG, mesh=MeshConfig(data=2, fsdp=2)))
  assert 'not be identical in bits' in caplog.text
  assert [c['field'] for c in read_run(tmp_path)[1]['changes']] == ['mesh.data', 'mesh.fsdp']


def test_other_code_or_libraries_are_recorded(tmp_path, caplog, monkeypatch):
  """Mutation: drop the loop over ('code', 'libraries', 'jax')."""
  trained(tmp_path)
  versions = rundir._versions()
  monkeypatch.setattr(rundir, '_versions', lambda: {**versions, 'libraries': {'jax': '99'}})
  trained(tmp_path)
  assert [c['field'] for c in read_run(tmp_path)[1]['changes']] == ['libraries']
  assert 'not be identical in bits' in caplog.text


def test_without_a_checkpoint_nothing_is_resumed_and_anything_may_change(tmp_path):
  """Mutation: compare always (a run that failed before its first save would block its directory)."""
  with open_run(tmp_path, CONFIG, IDENTITY):
    pass
  with open_run(tmp_path, dataclasses.replace(CONFIG, seed=5), IDENTITY):
    pass
  assert read_run(tmp_path)[0].seed == 5


def test_unknown_allow_change_is_refused(tmp_path):
  """Mutation: drop `_check_names`."""
  with pytest.raises(ConfigError, match='allow_change=optimizer.lerning_rate'):
    with open_run(tmp_path, CONFIG, IDENTITY, allow_change=('optimizer.lerning_rate',)):
      pytest.fail('opened')


def test_record_holds_what_a_reader_needs_and_nothing_about_the_user(tmp_path, monkeypatch):
  """Mutation: record all of os.environ, or XLA_FLAGS without replacing the home directory."""
  monkeypatch.setenv('HOME', '/home/somebody')
  monkeypatch.setenv('XLA_FLAGS', '--xla_dump_to=/home/somebody/dump')
  monkeypatch.setenv('SECRET_TOKEN', 'hunter2')
  trained(tmp_path)
  config, record = read_run(tmp_path)
  assert config == CONFIG and record['config'] == to_json(CONFIG) and record['identity'] == IDENTITY
  assert record['libraries']['jax'] and record['code']['sources']
  assert record['jax']['XLA_FLAGS'] == '--xla_dump_to=~/dump'
  text = (tmp_path / 'config.json').read_text()
  assert 'somebody' not in text and 'hunter2' not in text


@pytest.mark.parametrize('damage', [lambda t: t[:-40], lambda t: t.replace('"seed": 0', '"seed": 7'), lambda t: ''])
def test_damaged_or_edited_config_is_refused(tmp_path, damage):
  """Mutation: do not compare the hash (the edited seed passes)."""
  trained(tmp_path)
  path = tmp_path / 'config.json'
  path.write_text(damage(path.read_text()))
  with pytest.raises(ConfigError, match=r'config.json (is damaged|was edited)'):
    read_run(tmp_path)
  with pytest.raises(ConfigError, match=r'config.json'), open_run(tmp_path, CONFIG, IDENTITY):
    pytest.fail('opened')


@pytest.mark.parametrize(
  'entry', [{'identity': None}, {'identity': []}, {'changes': 5}, {'changes': ['x']}, {'code': 1}]
)
def test_other_damage_to_a_record_is_refused(tmp_path, entry):
  """The hash covers the configuration alone. Mutation: take what is there."""
  trained(tmp_path)
  path = tmp_path / 'config.json'
  path.write_text(
    json.dumps({name: x for name, x in {**json.loads(path.read_text()), **entry}.items() if x is not None})
  )
  with pytest.raises(ConfigError, match=r'config.json is damaged .*bring it back'):
    read_run(tmp_path)


def test_a_home_at_the_root_hides_nothing(tmp_path, monkeypatch):
  """As of a user without one. Mutation: replace '/' wherever it stands."""
  monkeypatch.setenv('HOME', '/')
  monkeypatch.setenv('XLA_FLAGS', '--xla_dump_to=/data/dump')
  trained(tmp_path)
  assert read_run(tmp_path)[1]['jax']['XLA_FLAGS'] == '--xla_dump_to=/data/dump'


def test_config_of_an_older_version_gets_the_defaults_of_new_fields(tmp_path):
  """Mutation: compare the stored JSON instead of the parsed configuration (absent differs from the default)."""
  trained(tmp_path)
  record = json.loads((tmp_path / 'config.json').read_text())
  del record['config']['optimizer']['max_bad_steps']
  record['config_hash'] = rundir._hash(record['config'])
  (tmp_path / 'config.json').write_text(json.dumps(record))
  trained(tmp_path)


def test_missing_run_and_unwritable_directory(tmp_path):
  """Mutation: drop `except OSError` in `open_run`."""
  with pytest.raises(ConfigError, match='config.json is absent'):
    read_run(tmp_path)
  (tmp_path / 'file').write_text('')
  with pytest.raises(StorageError, match='cannot be written'), open_run(tmp_path / 'file' / 'run', CONFIG, IDENTITY):
    pytest.fail('opened')


@pytest.mark.parametrize(
  ('argv', 'line'),
  [
    (['/opt/bin/compactlm', 'train', '--workdir=a b'], "compactlm train '--workdir=a b'"),
    (['/x/compactlm_jax/__main__.py', 'train'], 'python -m compactlm_jax train'),
    (['mine.py', '$(id)'], "python mine.py '$(id)'"),
    (['compactlm', '--workdir=/home/me/runs', '--x=/home/me y'], "compactlm --workdir=$HOME/runs '--x='\"$HOME\"' y'"),
    (['compactlm', '/home/meta', '/data/home/me/x'], 'compactlm /home/meta /data/home/me/x'),
    ([''], 'python'),
  ],
)
def test_the_command_is_told_as_a_shell_takes_it(argv, line, monkeypatch):
  """Mutations: join by blanks; replace the home directory wherever its letters stand."""
  monkeypatch.setenv('HOME', '/home/me')
  assert rundir._command(argv) == line


def test_the_command_that_started_a_run_is_kept_when_it_is_resumed(tmp_path, monkeypatch):
  """Another command line is no reason to refuse. Mutation: record the newest command."""
  monkeypatch.setattr(sys, 'argv', ['compactlm', 'train', '--workdir=runs/a b'])
  trained(tmp_path)
  monkeypatch.setattr(sys, 'argv', ['compactlm', 'train', '--config.log_every=3'])
  trained(tmp_path, dataclasses.replace(CONFIG, log_every=3))
  record = read_run(tmp_path)[1]
  assert record['command'] == "compactlm train '--workdir=runs/a b'" and record['changes'] == []
  del record['command']  # as an older version left it
  (tmp_path / 'config.json').write_text(json.dumps(record))
  trained(tmp_path)
  assert read_run(tmp_path)[1]['command'] == 'compactlm train --config.log_every=3'
