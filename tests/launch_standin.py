"""A gcloud for tests of launch/: records its arguments, remembers which machines exist, fails on request."""

import dataclasses
import json
import os
import pathlib
import shlex
import subprocess
import sys

ROOT = pathlib.Path(__file__).parents[1]
TPU = ROOT / 'launch' / 'tpu.sh'
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
  if flag['command'].endswith('worker.sh status') and cloud['statuses']:
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
    shutil.copytree(source, target) if os.path.isdir(source) else shutil.copy(source, target)
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
