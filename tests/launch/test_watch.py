"""launch/watch.sh: what `tpu.sh watch` makes of machines on which an installation was interrupted, and its dry run."""

import os
import shutil
import signal
import subprocess
import time

import pytest
from launch_standin import TPU, WHERE, WORKER, Cloud, detached

READY = ['READY', 'v3-8', 'tpu-ubuntu2204-base']
WHEEL = 'compactlm_jax-0.1.0-py3-none-any.whl'
TRAIN = ('compactlm', 'train', '--config=configs/convbert.py:small', '--workdir=gs://bucket/runs/small')
BARE, RUNNING, LOST, DONE = (
  f'compactlm-status w-0 {state}' for state in ('bare', 'running attempt=1', 'lost', 'exited 0')
)

# `python3 -m pip install uv` puts a uv there, whose `uv venv` makes a compactlm that ends well. `pip` counts.
PYTHON = """#!/bin/bash
mkdir -p "$HOME/compactlm/uv/bin"
cat >"$HOME/compactlm/uv/bin/uv" <<'END'
#!/bin/bash
place=${*: -1}
case $1 in
  venv)
    mkdir -p "$place/bin"
    printf '#!/bin/bash\\n' | tee "$place/bin/python" >"$place/bin/compactlm"
    chmod +x "$place"/bin/*
    ;;
  pip) echo "$2" >>"$HOME/pip.calls" ;;
esac
END
chmod +x "$HOME/compactlm/uv/bin/uv"
"""


@pytest.fixture
def cloud(tmp_path):
  """One with a worker that is as a new VM is; `home` is its home folder."""
  folder = tmp_path / 'bin'
  folder.mkdir()
  (tmp_path / 'home').mkdir()
  (tmp_path / WHEEL).touch()
  detached(folder)
  (folder / 'python3').write_text(PYTHON)
  (folder / 'python3').chmod(0o755)
  return Cloud(folder)


@pytest.fixture
def again(tmp_path):
  return ('--type=v3-8', '--recreate', f'--source={tmp_path / WHEEL}', '--', *TRAIN)


def asked(cloud):
  """What the workers were asked to do with worker.sh, less the looks."""
  lines = [word for call in cloud.calls() for word in call if word.startswith('--command=')]
  words = [line.split()[-1] if 'bash -c' in line else line.split()[2] for line in lines if 'worker.sh' in line]
  return [word for word in words if word != 'status']


def prepare(home, found):
  if found != 'nothing':
    (home / 'compactlm').mkdir()
    shutil.copy(WORKER, home / 'compactlm')
  if found == 'a supervisor that a reboot ended':
    (home / 'compactlm' / 'supervisor.pid').write_text('999999999\n')


FOUND = ('nothing', 'worker.sh alone', 'a supervisor that a reboot ended')


@pytest.mark.parametrize('found', FOUND)
def test_an_interrupted_installation_is_made_up_for(cloud, again, tmp_path, found):
  """On the same VM. Mutations: bare counts as lost; a worker without worker.sh counts as lost ssh."""
  home = tmp_path / 'home'
  prepare(home, found)
  cloud.set(vm=READY, home=str(home))
  result = cloud.tpu('watch', '--poll=0.2', *again)
  assert result.returncode == 0, result.stderr
  assert (home / 'pip.calls').read_text().split() == ['install', 'freeze']
  assert (home / 'compactlm' / 'exits').read_text().split()[1:] == ['1', '0']
  assert (home / 'compactlm' / 'configs' / 'convbert.py').is_file()
  assert not {'create', 'delete'} & set(cloud.verbs())
  assert '--steal_lock' not in (home / 'compactlm' / 'command').read_text()  # nobody saw its machine go


@pytest.mark.parametrize('found', FOUND)
def test_without_the_flags_of_an_installation(cloud, tmp_path, found):
  """Says what to do. Mutation: the run is started anyway."""
  home = tmp_path / 'home'
  prepare(home, found)
  cloud.set(vm=READY, home=str(home))
  result = cloud.tpu('watch', '--', *TRAIN)
  assert (result.returncode, '`tpu.sh install`' in result.stderr) == (78, True), result.stderr
  assert cloud.verbs() == ['describe', 'ssh']
  assert f' {os.uname().nodename} bare' in cloud.tpu('status').stdout


@pytest.mark.parametrize(
  'other,verbs',
  [
    ('running attempt=1', ['stop', 'install', 'start']),
    ('absent', ['install', 'start']),
    ('lost', ['install', 'start']),
    ('exited 75', ['install', 'start']),
  ],
)
def test_a_pod_with_one_bare_worker(cloud, again, other, verbs):
  """Nothing is installed under a run: it is stopped at the second look. Mutations: at the first; not at all."""
  both = f'compactlm-status w-1 {other}\n{BARE}'
  looks = [both, both] if 'stop' in verbs else [both]
  cloud.set(vm=READY, statuses=[*looks, DONE])
  result = cloud.tpu('watch', *again)
  assert result.returncode == 0, result.stderr
  assert asked(cloud) == verbs
  assert '--steal_lock' not in str(cloud.calls())  # the machine is the same
  cloud.set(vm=READY, statuses=[both, both.replace('bare', 'running attempt=1'), DONE])
  result = cloud.tpu('watch', '--', *TRAIN)
  assert (result.returncode, asked(cloud)) == (78, [])
  if 'stop' in verbs:
    cloud.set(vm=READY, statuses=[both, both.replace('bare', 'running attempt=1'), DONE])
    assert cloud.tpu('watch', *again).returncode == 0
    assert asked(cloud) == []


def test_a_machine_that_went_before_anything_ran(cloud, again):
  """Its successor steals no lock: another run may hold it. Mutation: bare counts as seen running."""
  cloud.set(vm=READY, states=['READY', 'NOT_FOUND'], statuses=[BARE, DONE])
  result = cloud.tpu('watch', *again)
  assert result.returncode == 0, result.stderr
  assert (cloud.verbs().count('create'), asked(cloud)) == (1, ['install', 'start'])
  assert '--steal_lock' not in str(cloud.calls())


def test_a_dry_run_prints_all_that_may_follow(cloud, again, tmp_path):
  """Once each. Mutations: rehearse without install; without the start that steals the lock; it calls gcloud."""
  printed = cloud.dry('watch', *again)
  text = cloud.tpu('watch', '--dry_run', *again).stdout
  assert not cloud.calls()
  assert text.count(' tpu-vm create ') == text.count(' tpu-vm scp ') == text.count(' tpu-vm delete ') == 1
  assert text.count('worker.sh start ') == 2 and text.count('--steal_lock') == 2  # one in the line that explains it
  unlike = 'compactlm-status w-1 exited 70'
  scenes = [
    {'statuses': [DONE]},
    {'vm': READY, 'statuses': [LOST, DONE]},
    {'vm': READY, 'statuses': [f'{RUNNING}\n{unlike}'] * 2},
    {'vm': READY, 'statuses': [BARE, DONE]},
    {'vm': READY, 'states': ['READY', 'PREEMPTED', 'PREEMPTED'], 'statuses': [RUNNING, DONE]},
  ]
  for scene in scenes:
    cloud.set(**scene)
    cloud.tpu('watch', *again)
    assert cloud.calls() and all(call in printed for call in cloud.calls()), scene
  less = cloud.dry('watch', '--', *TRAIN)
  assert [call[3] for call in less] == ['describe', 'ssh', 'describe', 'ssh', 'ssh']
  assert all(call in printed for call in less)
  queued = cloud.dry('watch', '--queued', *again)
  assert [call[2] for call in queued if call[3] in ('create', 'delete')] == ['queued-resources'] * 2


def test_interrupted_while_a_machine_is_replaced(cloud, again):
  """The next watch does not know whose lock it finds, so this one tells. Mutations: no trap; it always tells."""
  told, waits = 'end the command with --steal_lock', cloud.folder / 'waits'
  (cloud.folder / 'sleep').write_text(
    f'#!/bin/bash\n[[ $1 == 0 ]] || touch {waits}\nexec {shutil.which("sleep")} "$@"\n'
  )
  (cloud.folder / 'sleep').chmod(0o755)
  for states, wanted in ((['PREEMPTED', 'PREEMPTED'], True), ([], False)):
    cloud.set(vm=READY if states else None, states=states, refuse=['create'])
    environment = os.environ | {'PATH': f'{cloud.folder}:{os.environ["PATH"]}'}
    watching = subprocess.Popen(
      [TPU, 'watch', *WHERE, '--poll=60', *again],
      env=environment,
      stderr=subprocess.PIPE,
      text=True,
      start_new_session=True,
    )
    deadline = time.monotonic() + 60
    while not waits.exists():
      assert time.monotonic() < deadline
      time.sleep(0.05)
    waits.unlink()
    assert cloud.verbs()[-1] == 'create'
    os.killpg(watching.pid, signal.SIGTERM)  # as a terminal does: its sleep, too
    assert (told in watching.communicate(timeout=60)[1], watching.returncode != 0) == (wanted, True)
    result = cloud.tpu('watch', '--attempts=1', *again)
    assert (result.returncode, told in result.stderr) == (75, False)
  cloud.set(vm=READY, states=['PREEMPTED', 'PREEMPTED'], statuses=[DONE])
  result = cloud.tpu('watch', *again)
  assert (result.returncode, told in result.stderr) == (0, False)
