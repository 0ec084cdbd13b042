"""A gcloud for tests of launch/: records its arguments, remembers which machines exist, fails on request."""

import dataclasses
import json
import os
import pathlib
import shlex
import shutil
import subprocess
import sys
import time

ROOT = pathlib.Path(__file__).parents[1]
TPU = ROOT / 'launch' / 'tpu.sh'
WORKER = ROOT / 'launch' / 'worker.sh'
WHERE = ('--name=convbert', '--zone=us-central1-a', '--project=my-project')

# vm, queue: [state, type, version] or null. states: what following descriptions of the VM say, one each.
# queue_states: the same for the request. refuse: verbs that fail. unreachable: how many descriptions fail.
# lost: how many ssh fail with 255. statuses: what worker.sh status prints, one text each (the last stays). home: where
# ssh runs its commands; without one it does nothing.
FRESH = {
  'vm': None,
  'queue': None,
  'states': [],
  'queue_states': [],
  'refuse': [],
  'unreachable': 0,
  'lost': 0,
  'statuses': [],
  'home': None,
}

GCLOUD = """#!{python} -SE
import json, os, pathlib, sys
here = pathlib.Path(__file__).parent
words, flags = [w for w in sys.argv[1:] if not w.startswith('--')], [w for w in sys.argv[1:] if w.startswith('--')]
flag = dict(w[2:].partition('=')[::2] for w in flags)
with open(here / 'calls.jsonl', 'a') as f:
  f.write(json.dumps(sys.argv[1:]) + '\\n')
cloud = json.loads((here / 'cloud.json').read_text())

def leave(code=0, message=''):
  (here / 'cloud.json').write_text(json.dumps(cloud))
  if message:
    print(message, file=sys.stderr)
  sys.exit(code)

def storage(source, target):
  import re, shutil
  place = lambda name: here / 'buckets' / name[5:] if name.startswith('gs://') else pathlib.Path(name)
  source, target = place(source), place(target)
  for path in sorted(source.rglob('*')):
    name = str(path.relative_to(source))
    if path.is_file() and not re.match(flag['exclude'], name):
      (target / name).parent.mkdir(parents=True, exist_ok=True)
      shutil.copyfile(path, target / name)

def ssh():
  if cloud['lost']:
    cloud['lost'] -= 1
    leave(255, 'ssh: connect to host 203.0.113.7 port 22: Connection timed out')
  if flag['command'].endswith(' status') and cloud['statuses']:
    print(cloud['statuses'].pop(0) if len(cloud['statuses']) > 1 else cloud['statuses'][0])
  elif cloud['home']:
    (here / 'cloud.json').write_text(json.dumps(cloud))
    import subprocess
    sys.exit(subprocess.run(['bash', '-c', flag['command']], cwd=cloud['home'],
                            env=os.environ | dict(HOME=cloud['home'])).returncode)

if words[0] == 'storage':
  storage(*words[2:])
  leave()
kind, verb = words[2:4]
key = 'vm' if kind == 'tpu-vm' else 'queue'
if verb in cloud['refuse']:
  leave(1, f'ERROR: (gcloud.compute.tpus.{{kind}}.{{verb}}) RESOURCE_EXHAUSTED: Quota limit exceeded')
if verb == 'describe':
  if cloud['unreachable']:
    cloud['unreachable'] -= 1
    leave(1, 'ERROR: (gcloud.compute.tpus.tpu-vm.describe) There was a problem refreshing your tokens')
  states = cloud['states' if key == 'vm' else 'queue_states']
  if states and cloud[key]:
    cloud[key][0] = states.pop(0)
    if key == 'queue' and cloud[key][0] == 'ACTIVE':
      cloud['vm'] = ['READY', *cloud['queue'][1:]]
    if cloud[key][0] == 'NOT_FOUND':
      cloud[key] = None
  if not cloud[key]:
    leave(1, f'ERROR: (gcloud.compute.tpus.{{kind}}.describe) NOT_FOUND: Resource was not found')
  print('\\t'.join(cloud[key]))
elif verb == 'create':
  if cloud[key]:
    leave(1, 'ERROR: ALREADY_EXISTS')
  cloud[key] = ['READY', flag['accelerator-type'], flag.get('version') or flag['runtime-version']]
  if key == 'queue':
    cloud['queue'][0] = 'ACTIVE'
    if not cloud['queue_states']:
      cloud['vm'] = ['READY', *cloud['queue'][1:]]
elif verb == 'delete':
  cloud['vm'] = None
  cloud[key] = None
elif verb == 'start':
  cloud['vm'][0] = 'READY'
elif verb == 'ssh':
  ssh()
elif verb == 'scp' and cloud['home']:
  import shutil
  for source in words[4:-1]:
    target = pathlib.Path(cloud['home'], words[-1].partition(':')[2], pathlib.Path(source).name)
    shutil.copytree(source, target, dirs_exist_ok=True) if os.path.isdir(source) else shutil.copy(source, target)
leave()
"""


@dataclasses.dataclass
class Cloud:
  """The stand-in in a folder of its own, and what was asked of it."""

  folder: pathlib.Path

  def __post_init__(self):
    program = self.folder / 'gcloud'
    program.write_text(GCLOUD.format(python=sys.executable))
    program.chmod(0o755)
    self.set()

  def set(self, **changes):
    (self.folder / 'cloud.json').write_text(json.dumps(FRESH | changes))
    (self.folder / 'calls.jsonl').write_text('')

  def state(self):
    return json.loads((self.folder / 'cloud.json').read_text())

  def calls(self):
    return [json.loads(line) for line in (self.folder / 'calls.jsonl').read_text().splitlines()]

  def verbs(self):
    return [call[3] for call in self.calls() if call[0] == 'compute']

  def tpu(self, verb, *words, answer=None, where=WHERE, env=None):
    """Runs `tpu.sh VERB FLAGS WORDS`, with a pause of no length."""
    result = subprocess.run(
      [TPU, verb, *where, '--poll=0', *words],
      input=answer,
      stdin=subprocess.DEVNULL if answer is None else None,
      capture_output=True,
      text=True,
      timeout=120,
      env=os.environ | {'PATH': f'{self.folder}:{os.environ["PATH"]}'} | (env or {}),
    )
    return result

  def dry(self, verb, *words):
    """The argument lists of the gcloud commands that a dry run prints."""
    result = self.tpu(verb, '--dry_run', *words)
    assert result.returncode == 0, result.stderr
    lines = [shlex.split(line) for line in result.stdout.splitlines()]
    return [line[1:] for line in lines if line[0] == 'gcloud']


# Leaves with the next of the codes in `codes`; asked to stop, once or twice, it saves and leaves with 75 as compactlm.
COMPACTLM = f"""#!{sys.executable} -SE
import pathlib, signal, sys, time
here = pathlib.Path.cwd()
def stop(*_):
  signal.signal(signal.SIGTERM, signal.SIG_IGN)
  time.sleep(0.5)
  sys.exit(75)
signal.signal(signal.SIGTERM, stop)
print('words:', *sys.argv[1:], flush=True)
codes = here / 'codes'
left = codes.read_text().split()
if left[0] == 'wait':
  (here / 'waits').touch()
  time.sleep(600)
codes.write_text(' '.join(left[1:]))
sys.exit(int(left[0]))
"""


class Host:
  """A worker's ~/compactlm as installed, with a stand-in for compactlm that leaves with given codes."""

  def __init__(self, folder, codes=''):
    self.folder = folder
    program = folder / 'venv' / 'bin' / 'compactlm'
    program.parent.mkdir(parents=True)
    program.write_text(COMPACTLM)
    program.chmod(0o755)
    (folder / 'codes').write_text(codes)
    (folder / 'installed').touch()
    self.env = os.environ | {'COMPACTLM_ROOT': str(folder), 'COMPACTLM_PAUSE': '0'}

  def worker(self, *words, **env):
    return subprocess.run(
      ['bash', WORKER, *words], capture_output=True, text=True, timeout=120, env=self.env | env, check=False
    )

  def exits(self):
    return [line.split()[1:] for line in (self.folder / 'exits').read_text().splitlines()]

  def wait_for(self, name):
    deadline = time.monotonic() + 60
    while not (self.folder / name).exists():
      assert time.monotonic() < deadline, name
      time.sleep(0.02)

  def without_tmux(self):
    """PATH with everything that worker.sh needs except tmux."""
    tools = self.folder / 'tools'
    tools.mkdir()
    names = (
      'bash basename dirname cat ps grep rm mkdir mkfifo setsid nohup seq sleep date hostname wc tail cut env touch'
    )
    for name in names.split():
      (tools / name).symlink_to(shutil.which(name))
    self.env['PATH'] = str(tools)


def tool(folder, name):
  """A program that records its arguments."""
  path = folder / name
  path.parent.mkdir(parents=True, exist_ok=True)
  path.write_text(f'#!/bin/bash\necho "$@" >> {folder}/{path.name}.calls\n')
  path.chmod(0o755)


def detached(folder):
  """A tmux that leaves no server behind."""
  path = folder / 'tmux'
  path.write_text('#!/bin/bash\n[[ $1 == new-session ]] && shift 4 && exec setsid "$@" >/dev/null 2>&1 &\n')
  path.chmod(0o755)
