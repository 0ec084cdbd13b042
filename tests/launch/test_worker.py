"""launch/worker.sh: which exit codes start a run again, one run at a time, installing, copying checkpoints."""

import os
import pathlib
import re
import shutil
import signal
import subprocess
import sys
import time

import pytest
from checkpointing import equal, make_state, restore, write
from launch_standin import WORKER, Cloud, Host, detached, tool

from compactlm_jax.errors import ConfigError, DataError, LockedError, NumericsError, PreemptedError, StorageError

AGAIN, STORAGE = PreemptedError.exit_code, StorageError.exit_code


@pytest.fixture
def host(tmp_path):
  found = Host(tmp_path / 'compactlm')
  yield found
  found.worker('stop')


@pytest.mark.parametrize(
  'codes,attempts,end',
  [
    ([AGAIN] * 12 + [0], 13, 0),
    ([STORAGE] * 4, 4, STORAGE),
    ([STORAGE, AGAIN, STORAGE, AGAIN, STORAGE, STORAGE], 6, STORAGE),
    ([STORAGE, 0], 2, 0),
    *[([error.exit_code], 1, error.exit_code) for error in (ConfigError, DataError, LockedError, NumericsError)],
    ([0], 1, 0),
    ([1], 1, 1),
    ([AGAIN, 137], 2, 137),
  ],
)
def test_restarts_by_exit_code(host, codes, attempts, end):
  """75 always, 74 three times, others never. Mutation: 74 four times; 70 as 75; 75 at most ten times."""
  (host.folder / 'codes').write_text(' '.join(map(str, [*codes, 99])))
  result = host.worker('supervise', 'compactlm', 'train')
  assert result.returncode == end
  assert host.exits() == [[str(i + 1), str(code)] for i, code in enumerate(codes)]
  assert len(codes) == attempts
  assert (host.folder / 'run.log').read_text().count('words: train') == attempts
  assert host.worker('status').stdout.split()[2:] == ['exited', str(end)]


def test_pauses_grow_after_storage_errors(host, tmp_path):
  """Mutation: the pause stays what it was."""
  reads = tmp_path / 'reads.sh'
  count = f'echo "$(wc -l <{host.folder}/exits)" >> {tmp_path}/pauses'
  reads.write_text(f'read() {{ [[ "$*" == "-r -t 1 -u 8" ]] || {{ builtin read "$@"; return; }}; {count}; }}\n')
  (host.folder / 'codes').write_text('74 75 74 74 74')
  host.worker('supervise', 'compactlm', BASH_ENV=str(reads), COMPACTLM_PAUSE='10')
  after = [int(line) for line in (tmp_path / 'pauses').read_text().splitlines()]
  assert [after.count(attempt) for attempt in range(6)] == [0, 10, 10, 20, 40, 0]  # seconds


@pytest.mark.parametrize('tmux', [True, False])
def test_a_run_is_started_once_and_stopped(host, tmp_path, tmux):
  """Detached; what it saved on request is not continued. Mutation: 75 after a stop restarts; start does not look."""
  if tmux:
    detached(tmp_path)
    host.env['PATH'] = f'{tmp_path}:{os.environ["PATH"]}'
  else:
    host.without_tmux()
    (host.folder / 'tools' / 'flock').symlink_to(shutil.which('flock'))
  assert host.worker('status').stdout.endswith(' absent\n')
  (host.folder / 'codes').write_text('75 wait 0')
  started = host.worker('start', 'compactlm', 'train', "--a=it's;", '--b=x y;')
  assert started.returncode == 0, started.stderr
  host.wait_for('waits')
  assert host.worker('status').stdout.endswith(' running attempt=2\n')
  again = host.worker('start', 'compactlm', 'train', "--a=it's;", '--b=x y;')
  assert (again.returncode, again.stdout) == (0, 'already running\n')
  assert host.worker('start', 'compactlm', 'train').returncode == LockedError.exit_code
  assert "words: train --a=it's; --b=x y;" in (host.folder / 'run.log').read_text()
  stopped = host.worker('stop')
  assert (stopped.returncode, stopped.stdout.endswith(' exited 75\n')) == (0, True), stopped
  assert host.exits() == [['1', '75'], ['2', '75']]
  assert host.worker('stop').stdout == 'nothing runs\n'


def test_a_second_supervisor_is_refused(host):
  """The first is still known, stopped and told. Mutation: it takes the place of the first."""
  (host.folder / 'codes').write_text('wait 0')
  first = subprocess.Popen(['bash', WORKER, 'supervise', 'compactlm'], env=host.env)
  host.wait_for('waits')
  second = host.worker('supervise', 'compactlm')
  assert (second.returncode, second.stderr) == (77, 'worker.sh: another command runs; stop it first\n')
  assert host.worker('status').stdout.endswith(' running attempt=1\n')
  assert host.worker('stop').stdout.endswith(' exited 75\n') and first.wait(60) == 75


def debug(path, condition, action):
  """For BASH_ENV: does `action` before every line of worker.sh of which `condition` is true."""
  path.write_text(f"set -T\ntrap 'if [[ -n ${{root-}} && {condition} ]]; then {action}; fi' DEBUG\n")
  return {'BASH_ENV': str(path)}


def shim(folder, name, line):
  """PATH with a program that does something else first."""
  path = folder / name
  folder.mkdir(exist_ok=True)
  path.write_text(f'#!/bin/bash\n{line}\nexec {shutil.which(name)} "$@"\n')
  path.chmod(0o755)
  return f'{folder}:{os.environ["PATH"]}'


def test_two_supervisors_at_once(host, tmp_path):
  """The first has looked and not yet written its process id when the second comes. Mutation: no flock."""
  (host.folder / 'codes').write_text('wait 0')
  held, asked, go = (tmp_path / name for name in ('held', 'asked', 'go'))
  hold = f'touch {held}; until [[ -e {go} ]]; do sleep 0.02; done'
  holding = debug(tmp_path / 'hold.sh', '$BASH_COMMAND == "echo \\$\\$ "*', hold)
  asking = {'PATH': shim(tmp_path / 'bin', 'flock', f'touch {asked}')}
  command = ['bash', WORKER, 'supervise', 'compactlm']
  first = subprocess.Popen(command, env=host.env | holding)
  host.wait_for(held)
  second = subprocess.Popen(command, env=host.env | asking)
  try:
    deadline = time.monotonic() + 60
    while not asked.exists() and not (host.folder / 'waits').exists():
      assert time.monotonic() < deadline
      time.sleep(0.02)
    go.touch()
    assert second.wait(60) == LockedError.exit_code
    host.wait_for('waits')
    assert host.worker('status').stdout.endswith(' running attempt=1\n')
    assert (host.folder / 'run.log').read_text().count(' attempt 1: ') == 1
    assert host.worker('stop').stdout.endswith(' exited 75\n') and first.wait(60) == 75
  finally:
    go.touch()
    for started in (first, second):
      started.terminate()
      started.wait(60)


def test_a_start_beside_a_supervisor(host, tmp_path):
  """One that came after the look of `start` stays the only one. Mutation: `start` removes supervisor.pid."""
  (host.folder / 'codes').write_text('wait 0')
  beside = f'bash {WORKER} supervise compactlm </dev/null >/dev/null 2>&1 &'
  waits = f'until [[ -e {host.folder}/waits ]]; do sleep 0.02; done'
  path = shim(tmp_path / 'bin', 'rm', f'if mkdir {tmp_path}/once 2>/dev/null; then {beside} {waits}; fi')
  tmux = tmp_path / 'bin' / 'tmux'
  tmux.write_text(f'#!/bin/bash\nshift 4\n("$@"; echo $? >{tmp_path}/code; touch {tmp_path}/end) >/dev/null 2>&1 &\n')
  tmux.chmod(0o755)
  assert host.worker('start', 'compactlm', PATH=path).returncode == 0
  host.wait_for(tmp_path / 'end')
  assert (tmp_path / 'code').read_text() == f'{LockedError.exit_code}\n'
  assert host.worker('status').stdout.endswith(' running attempt=1\n')
  assert host.worker('stop').stdout.endswith(' exited 75\n')


def test_a_supervisor_leaves_the_process_id_of_another(host):
  """As of a machine with the same home. Mutation: remove supervisor.pid whatever it holds."""
  (host.folder / 'codes').write_text('wait 0')
  first = subprocess.Popen(['bash', WORKER, 'supervise', 'compactlm'], env=host.env)
  host.wait_for('waits')
  (host.folder / 'supervisor.pid').write_text('999999999\n')
  (host.folder / 'stop').touch()
  first.terminate()
  assert first.wait(60) == 75
  assert (host.folder / 'supervisor.pid').read_text() == '999999999\n'


def test_a_supervisor_with_the_process_id_of_the_one_before(host):
  """As in a container that is started again. Mutation: refuse whatever process id the file holds."""
  (host.folder / 'codes').write_text('0')
  again = f'echo $$ >{host.folder}/supervisor.pid; exec bash {WORKER} supervise compactlm'
  assert subprocess.run(['bash', '-c', again], env=host.env, timeout=60, check=False).returncode == 0
  assert host.exits() == [['1', '0']]


@pytest.fixture
def ordinary_signals():
  """Tests under `nohup` or in the background ignore a hang-up or Ctrl-C, and with them what they start."""
  numbers = (signal.SIGHUP, signal.SIGINT)
  before = [signal.getsignal(number) for number in numbers]
  for number, handler in zip(numbers, (signal.SIG_DFL, signal.default_int_handler)):
    signal.signal(number, handler)
  yield
  for number, handler in zip(numbers, before):
    signal.signal(number, handler)


@pytest.mark.usefixtures('ordinary_signals')
@pytest.mark.parametrize(
  'number,state', [(signal.SIGTERM, 'lost'), (signal.SIGHUP, 'lost'), (signal.SIGINT, 'exited 75')]
)
def test_a_signal_during_a_pause(host, number, state):
  """Ctrl-C means it, others come from a shutdown. Mutation: it is noticed at the end of the pause only."""
  (host.folder / 'codes').write_text('75 0')
  started = subprocess.Popen(
    ['bash', WORKER, 'supervise', 'compactlm'], env=host.env | {'COMPACTLM_PAUSE': '500'}, text=True
  )
  host.wait_for('exits')
  time.sleep(0.2)
  started.send_signal(number)
  assert started.wait(60) == 75
  assert host.exits() == [['1', '75']]
  assert host.worker('status').stdout.endswith(f' {state}\n')


def signalled(host, path, number, when):
  """Supervises a run, and sends the signal before the first line of worker.sh of which `when` is true."""
  (host.folder / 'codes').write_text('0')
  hook = debug(path, f'-z ${{sent-}} && {when}', f'sent=yes; kill -{number} $$')
  return host.worker('supervise', 'compactlm', **hook).returncode


@pytest.mark.usefixtures('ordinary_signals')
@pytest.mark.parametrize('number,state', [('TERM', 'lost'), ('HUP', 'lost'), ('INT', 'exited 75')])
def test_a_signal_before_the_first_attempt(host, tmp_path, number, state):
  """As in a pause, from the moment that the process id is known. Mutation: `attempt` does not look before it starts."""
  assert signalled(host, tmp_path / 'hook.sh', number, '-s $root/supervisor.pid') == 75
  assert host.exits() == [['1', '75']]
  assert host.worker('status').stdout.endswith(f' {state}\n')
  assert 'words:' not in (host.folder / 'run.log').read_text()


def test_a_signal_before_the_command_is_known(host, tmp_path):
  """Between the fork and the note of its process id. Mutation: `attempt` does not look after `child=$!`."""
  code = signalled(host, tmp_path / 'hook.sh', 'TERM', '$BASH_COMMAND == "child=\\$!"')
  assert code in (75, 143)  # 143: it has no handler yet
  assert host.exits() == [['1', str(code)]]
  assert host.worker('status').stdout.endswith(' lost\n')
  assert (host.folder / 'codes').read_text() == '0'


@pytest.mark.parametrize('code,state', [(75, 'lost'), (143, 'lost'), (70, 'exited 70'), (0, 'exited 0')])
def test_a_shutdown_that_ends_a_run(host, code, state):
  """What ended by itself has a result. Mutation: every run that a signal meets is lost."""
  (host.folder / 'codes').write_text('wait')
  program = host.folder / 'venv' / 'bin' / 'compactlm'
  program.write_text(program.read_text().replace('sys.exit(75)', f'sys.exit({code})'))
  started = subprocess.Popen(['bash', WORKER, 'supervise', 'compactlm'], env=host.env, start_new_session=True)
  host.wait_for('waits')
  os.killpg(started.pid, signal.SIGTERM)  # systemd tells all processes
  assert started.wait(60) == code
  assert host.worker('status').stdout.endswith(f' {state}\n')


def test_a_run_goes_on_after_a_shutdown(tmp_path, monkeypatch):
  """`watch` starts it again. Mutations: stop leaves no file; the file of the last stop stays; ps without -ww."""
  home, folder = tmp_path / 'home', tmp_path / 'bin'
  monkeypatch.setenv('COLUMNS', '20')  # ps would cut its lines to that
  host = Host(home / 'compactlm', 'wait')
  shutil.copy(WORKER, host.folder)
  (host.folder / 'stop').touch()  # of an earlier run
  folder.mkdir()
  detached(folder)
  cloud = Cloud(folder)
  cloud.set(vm=['READY', 'v3-8', 'tpu-ubuntu2204-base'], home=str(home))
  assert cloud.tpu('run', '--', 'compactlm', 'train').returncode == 0
  host.wait_for('waits')
  supervisor = int((host.folder / 'supervisor.pid').read_text())
  os.kill(supervisor, signal.SIGTERM)
  deadline = time.monotonic() + 60
  while not host.worker('status').stdout.endswith(' lost\n'):
    assert time.monotonic() < deadline, host.worker('status').stdout
  (host.folder / 'codes').write_text('0')
  watched = cloud.tpu('watch', '--poll=0.2', '--', 'compactlm', 'train')
  assert watched.returncode == 0, watched.stderr
  assert 'lost (READY' in watched.stderr and host.exits() == [['1', '0']]


def test_after_a_reboot(host):
  """The process id of a supervisor that is gone may be another process's. Mutation: kill -0 instead of ps."""
  other = subprocess.Popen(['sleep', '600'])
  try:
    (host.folder / 'supervisor.pid').write_text(f'{other.pid}\n')
    assert host.worker('status').stdout.endswith(' lost\n')
    assert host.worker('stop').stdout == 'nothing runs\n'
    assert other.poll() is None
  finally:
    (host.folder / 'supervisor.pid').unlink()
    other.kill()
    other.wait()


def git(folder, *words):
  identity = ('-c', 'user.name=a', '-c', 'user.email=a@example.org')
  subprocess.run(['git', *identity, *words], cwd=folder, check=True, capture_output=True)


def test_installing_a_tag(host, tmp_path):
  """Configurations and versions are those of the tag. Mutations: the newest commit is fetched; no --constraint."""
  repository = tmp_path / 'repository'
  (repository / 'configs').mkdir(parents=True)
  (repository / 'launch').mkdir()
  git(repository, 'init', '--quiet')
  for tag in ('v1', 'v2'):
    (repository / 'configs' / 'a.py').write_text(tag)
    (repository / 'launch' / 'constraints.txt').write_text(tag)
    git(repository, 'add', '.')
    git(repository, 'commit', '--quiet', '-m', tag)
    git(repository, 'tag', tag)
  tool(host.folder / 'uv' / 'bin', 'uv')
  for tag in ('v1', 'v2', 'v1'):
    result = host.worker('install', f'git+file://{repository}@{tag}')
    assert result.returncode == 0, result.stderr
    assert (host.folder / 'configs' / 'a.py').read_text() == tag
    assert (host.folder / 'constraints.txt').read_text() == tag
  calls = (host.folder / 'uv' / 'bin' / 'uv.calls').read_text().splitlines()
  assert calls[0].startswith('venv --quiet --python 3.12')
  assert f' --constraint {host.folder}/constraints.txt ' in calls[1]
  assert calls[1].endswith(f'--reinstall-package compactlm-jax compactlm-jax[tpu,gcs] @ file://{host.folder}/src')
  assert host.worker('install', f'git+file://{repository}@v3').returncode == STORAGE


def test_an_installation_that_did_not_end(host, tmp_path):
  """Told by `status`, unless there is a run or its result. Mutations: the mark stays; it comes before the rows."""
  uv, mark, wheel = host.folder / 'uv' / 'bin', host.folder / 'installed', 'compactlm_jax-0.1.0-py3-none-any.whl'
  tool(uv, 'uv')
  tool(tmp_path, 'gcloud')
  host.env['PATH'] = f'{tmp_path}:{os.environ["PATH"]}'
  for path in (uv / 'uv', tmp_path / 'gcloud'):
    works = path.read_text()
    path.write_text(works + 'exit 1\n')
    assert host.worker('install', wheel, 'gs://bucket/data/pairs').returncode == STORAGE
    assert host.worker('status').stdout.endswith(' bare\n')
    path.write_text(works)
    assert host.worker('install', wheel, 'gs://bucket/data/pairs').returncode == 0
    assert host.worker('status').stdout.endswith(' absent\n')
  mark.unlink()
  (host.folder / 'supervisor.pid').write_text('999999999\n')
  assert host.worker('status').stdout.endswith(' bare\n')
  (host.folder / 'codes').write_text('wait')
  running = subprocess.Popen(['bash', WORKER, 'supervise', 'compactlm'], env=host.env)
  host.wait_for('waits')
  assert host.worker('status').stdout.endswith(' running attempt=1\n')
  assert host.worker('stop').stdout.endswith(' exited 75\n') and running.wait(60) == 75


def test_one_installation_at_a_time(host):
  """One that an interrupted tpu.sh left behind is waited for. Mutation: no flock."""
  tool(host.folder / 'uv' / 'bin', 'uv')
  lock = host.folder / 'install.lock'
  left = subprocess.Popen(['flock', lock, 'bash', '-c', f'touch {lock}.held; sleep 1; touch {host.folder}/ended'])
  host.wait_for('install.lock.held')
  assert host.worker('install', 'compactlm_jax-0.1.0-py3-none-any.whl').returncode == 0
  assert (host.folder / 'ended').exists() and left.wait(60) == 0


def test_installing_a_wheel(host, tmp_path):
  """By the name that scp gives it. uv is fetched once, in one version. Mutation: fetch it although it is there."""
  tools, uv = tmp_path / 'tools', host.folder / 'uv' / 'bin' / 'uv'
  tool(tools, 'python3')
  with (tools / 'python3').open('a') as file:
    file.write(f'mkdir -p {uv.parent}; echo "#!/bin/bash" > {uv}; chmod +x {uv}\n')
  path = f'{tools}:{os.environ["PATH"]}'
  for _ in range(2):
    result = host.worker('install', 'dist/compactlm_jax-0.1.0-py3-none-any.whl', PATH=path)
    assert result.returncode == 0, result.stderr
  (call,) = (tools / 'python3.calls').read_text().splitlines()
  assert re.fullmatch(rf'-m pip install --quiet --target {host.folder}/uv uv==\d+\.\d+\.\d+', call)
  assert host.worker('install', 'compactlm').returncode == ConfigError.exit_code
  assert host.worker('install').returncode == ConfigError.exit_code


def test_a_checkpoint_to_a_bucket_and_back(tmp_path):
  """What says that a checkpoint is whole arrives last. Mutation: all files at once; parts or inner locks go."""
  run = tmp_path / 'run'
  write(run / 'checkpoints', [3])
  shutil.copytree(run / 'checkpoints' / '3', run / 'checkpoints' / '5.orbax-checkpoint-tmp-1')
  for held in (run, run / 'seed-0', run / 'stages' / 'depth'):
    held.mkdir(parents=True, exist_ok=True)
    (held / 'lock').write_text('held')
  (run / 'block').touch()
  (run / 'metrics.jsonl').write_text('{}\n')
  folder = tmp_path / 'bin'
  folder.mkdir()
  cloud = Cloud(folder)
  result = cloud.tpu('copy', str(run), 'gs://bucket/run', where=())
  assert result.returncode == 0, result.stderr
  bucket = folder / 'buckets' / 'bucket' / 'run'
  first, last = (re.compile(call[-1].removeprefix('--exclude=')) for call in cloud.calls())
  assert first.match('checkpoints/3/commit_success.txt') and not last.match('checkpoints/3/commit_success.txt')
  assert sorted(path.name for path in bucket.iterdir()) == ['block', 'checkpoints', 'metrics.jsonl']
  assert [path.name for path in (bucket / 'checkpoints').iterdir()] == ['3']
  assert equal(restore(bucket / 'checkpoints', commit_file=True)[0], make_state(3))
  assert cloud.tpu('copy', 'gs://bucket/run', str(tmp_path / 'back'), where=()).returncode == 0
  assert equal(restore(tmp_path / 'back' / 'checkpoints')[0], make_state(3))


def test_from_nothing_to_an_end(tmp_path):
  """tpu.sh and worker.sh together: create, install, run, watch. Mutations: scp to another folder; no constraints."""
  home, folder = tmp_path / 'home', tmp_path / 'bin'
  host = Host(home / 'compactlm', '75 74 0')
  tool(home / 'compactlm' / 'uv' / 'bin', 'uv')
  (home / 'compactlm' / 'venv' / 'bin' / 'python').symlink_to(sys.executable)
  folder.mkdir()
  wheel = tmp_path / 'compactlm_jax-0.1.0-py3-none-any.whl'
  wheel.touch()
  detached(folder)
  cloud = Cloud(folder)
  cloud.set(home=str(home))
  env = {'COMPACTLM_PAUSE': '0'}
  assert cloud.tpu('create', '--type=v3-8').returncode == 0
  installed = cloud.tpu('install', f'--source={wheel}')
  assert installed.returncode == 0, installed.stderr
  assert (home / 'compactlm' / 'configs' / 'convbert.py').is_file()
  assert (home / 'compactlm' / 'constraints.txt').is_file()
  watched = cloud.tpu('watch', '--poll=0.2', '--', 'compactlm', 'train', env=env)
  assert watched.returncode == 0, watched.stderr
  assert [code for _, code in host.exits()] == ['75', '74', '0']
  assert 'exited 0' in cloud.tpu('status').stdout
  assert pathlib.Path(host.folder / 'run.log').read_text().count('words: train') == 3
