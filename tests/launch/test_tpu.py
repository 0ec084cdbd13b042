"""launch/tpu.sh against a stand-in gcloud: what it asks for, what it never asks for twice, and how it fails."""

import shlex
import shutil

import pytest
from launch_standin import WHERE, Cloud

READY = ['READY', 'v3-8', 'tpu-ubuntu2204-base']
SOURCE = '--source=git+https://example.org/compactlm.git@v0.1.0'
TRAIN = ('compactlm', 'train', '--config=configs/convbert.py:small', '--workdir=gs://bucket/runs/small')
AGAIN = ('--type=v3-8', '--recreate', SOURCE, '--', *TRAIN)
LOST = 'compactlm-status host lost'
BARE = 'compactlm-status host bare'
RUNNING = 'compactlm-status host running attempt=1'
DONE = 'compactlm-status host exited 0'


@pytest.fixture
def cloud(tmp_path):
  folder = tmp_path / 'bin'
  folder.mkdir()
  return Cloud(folder)


def commands(cloud):
  return [word.removeprefix('--command=') for call in cloud.calls() for word in call if word.startswith('--command=')]


CASES = {
  'create': ({}, 'create', '--type=v3-8'),
  'spot': ({}, 'create', '--type=v5p-8', '--spot'),
  'queued': ({}, 'create', '--type=v5e-8', '--queued', '--spot', '--valid_until=6h'),
  'install': ({'vm': READY}, 'install', SOURCE),
  'install rows': ({'vm': READY}, 'install', SOURCE, '--data=gs://bucket/data/pairs'),
  'run': ({'vm': READY}, 'run', '--', *TRAIN, "--note=it's $HOME; a `b`"),
  'logs': ({'vm': READY}, 'logs', '--worker=all'),
  'status': ({'vm': READY, 'queue': ['ACTIVE', *READY[1:]]}, 'status'),
  'stop': ({'vm': READY}, 'stop'),
  'delete': ({'vm': READY}, 'delete', '--yes'),
  'delete queued': ({'vm': READY, 'queue': ['ACTIVE', *READY[1:]]}, 'delete', '--queued', '--yes'),
  'copy from': ({}, 'copy', 'gs://bucket/runs/small', 'TMP/small'),
  'copy to': ({}, 'copy', 'TMP', 'gs://bucket/runs/small'),
  'copy on the VM': ({'vm': READY}, 'copy', '--on_vm', '--worker=all', 'runs/small', 'gs://bucket/runs/small'),
}


@pytest.mark.parametrize('case', CASES.values(), ids=CASES)
def test_a_dry_run_prints_what_a_run_does_and_does_nothing(cloud, tmp_path, case):
  """Mutation: --spot is left out of a dry run's line; a dry run calls gcloud."""
  state, *words = case
  words = [word.replace('TMP', str(tmp_path)) for word in words]
  cloud.set(**state)
  printed = cloud.dry(*words)
  assert not cloud.calls()
  result = cloud.tpu(*words)
  assert result.returncode == 0, result.stderr
  assert cloud.calls() == printed
  assert printed


def test_what_is_asked_of_gcloud(cloud):
  """The lines themselves, as of gcloud's reference. Mutation: --version for a queued resource."""
  where = '--zone=us-central1-a --project=my-project --quiet'
  cloud.tpu('create', '--type=v3-8', '--spot')
  made = f'compute tpus tpu-vm create convbert --accelerator-type=v3-8 --version=tpu-ubuntu2204-base --spot {where}'
  assert cloud.calls()[-1] == made.split()
  cloud.set()
  cloud.tpu('create', '--type=v5e-16', '--queued', '--valid_until=6h')
  made = 'compute tpus queued-resources create convbert --node-id=convbert --accelerator-type=v5litepod-16'
  made += f' --runtime-version=v2-alpha-tpuv5-lite --valid-until-duration=6h {where}'
  assert cloud.calls()[2] == made.split()
  cloud.set(vm=READY)
  cloud.tpu('run', '--', 'compactlm', 'demo')
  ssh = ['compute', 'tpus', 'tpu-vm', 'ssh', 'convbert', '--worker=all']
  assert cloud.calls()[-1][:7] == [*ssh, '--command=bash compactlm/worker.sh start compactlm demo']


@pytest.mark.parametrize('queued', [(), ('--queued',)])
def test_nothing_is_created_twice(cloud, queued):
  """Mutation: create without asking first."""
  for _ in range(2):
    assert cloud.tpu('create', '--type=v3-8', *queued).returncode == 0
  assert cloud.verbs().count('create') == 1
  assert cloud.tpu('create', '--type=v3-8').returncode == 0  # made as a request, found as a VM
  assert cloud.verbs().count('create') == 1


def test_a_request_that_waits_is_found_again(cloud):
  """Mutation: create_queued asks once only."""
  cloud.set(queue=['WAITING_FOR_RESOURCES', *READY[1:]], queue_states=['PROVISIONING', 'PROVISIONING', 'ACTIVE'])
  assert cloud.tpu('create', '--type=v3-8', '--queued').returncode == 0
  assert 'create' not in cloud.verbs()
  assert cloud.state()['vm'] == READY


@pytest.mark.parametrize(
  'state,words,code,message',
  [
    ({'vm': ['READY', 'v2-8', READY[2]]}, (), 78, 'take another --name'),
    ({'vm': ['READY', 'v3-8', 'v2-alpha']}, (), 78, 'exists as v3-8 with v2-alpha'),
    ({'vm': ['PREEMPTED', *READY[1:]]}, (), 75, 'delete it'),
    ({'vm': ['CREATING', *READY[1:]]}, (), 74, 'again in a minute'),
    ({'refuse': ['create']}, (), 74, 'Quota'),
    ({'refuse': ['create']}, ('--queued',), 74, 'refused'),
    ({'unreachable': 1}, (), 74, 'gcloud auth login'),
    ({'queue': ['SUSPENDED', *READY[1:]]}, ('--queued',), 74, 'delete it'),
    ({'queue': ['WAITING_FOR_RESOURCES', 'v3-32', READY[2]]}, ('--queued',), 78, 'exists as v3-32'),
    ({}, ('--type=v9-8',), 78, '--version'),
    ({}, ('--type=',), 78, 'empty flag --type='),
    ({}, ('more',), 78, 'not more'),
    ({}, ('--colour=red',), 78, '--colour=red'),
  ],
)
def test_a_machine_that_cannot_be_had(cloud, state, words, code, message):
  """gcloud's own words are passed on. Mutation: a failed description counts as absent."""
  cloud.set(**state)
  result = cloud.tpu('create', '--type=v3-8', *words)
  assert (result.returncode, message in result.stderr) == (code, True), result.stderr
  assert cloud.verbs().count('create') == ('refuse' in state)
  assert ('RESOURCE_EXHAUSTED' in result.stderr) == ('refuse' in state)


def test_a_stopped_machine_is_started(cloud):
  cloud.set(vm=['STOPPED', *READY[1:]])
  assert cloud.tpu('create', '--type=v3-8').returncode == 0
  assert cloud.verbs() == ['describe', 'start']


@pytest.mark.parametrize(
  'answer,deleted,code', [('n\n', 0, 0), ('\n', 0, 0), ('y\n', 1, 0), ('Yes\n', 1, 0), (None, 0, 78)]
)
def test_deleting_asks(cloud, answer, deleted, code):
  """Without a terminal nobody can answer. Mutation: an empty answer means yes."""
  cloud.set(vm=READY)
  result = cloud.tpu('delete', answer=answer)
  assert result.returncode == code
  assert 'convbert (us-central1-a, project my-project)' in result.stderr
  assert cloud.verbs().count('delete') == deleted
  assert cloud.state()['vm'] == (None if deleted else READY)


def test_deleting_takes_the_request_along(cloud):
  """Also without --queued: a request that is left behind would make a VM again. Mutation: look for it with --queued."""
  cloud.set(vm=READY, queue=['ACTIVE', *READY[1:]])
  assert cloud.tpu('delete', '--yes').returncode == 0
  assert cloud.calls()[-1][1:6] == ['tpus', 'queued-resources', 'delete', 'convbert', '--force']
  assert cloud.tpu('delete', '--yes').returncode == 0  # nothing is left
  assert cloud.verbs().count('delete') == 1


@pytest.mark.parametrize('verb', [('run', '--', 'compactlm', 'demo'), ('install', SOURCE), ('logs',), ('stop',)])
@pytest.mark.parametrize('vm,code', [(None, 78), (['PREEMPTED', *READY[1:]], 75), (['REPAIRING', *READY[1:]], 74)])
def test_a_machine_that_is_not_ready(cloud, verb, vm, code):
  """Mutation: ready() lets every state pass."""
  cloud.set(vm=vm)
  result = cloud.tpu(*verb)
  assert result.returncode == code
  assert cloud.verbs() == ['describe']


def test_ssh_that_fails(cloud):
  """A start says so; a look at the log connects again. Mutation: logs ends at the first lost connection."""
  cloud.set(vm=READY, lost=1)
  result = cloud.tpu('run', '--', 'compactlm', 'demo')
  assert (result.returncode, 'Connection timed out' in result.stderr) == (74, True)
  cloud.set(vm=READY, lost=2)
  assert cloud.tpu('logs').returncode == 0
  assert cloud.verbs().count('ssh') == 3


def test_watching_a_run_to_its_end(cloud):
  """ssh is lost in between. Mutation: a lost connection is a lost machine; the code of the run is not passed on."""
  cloud.set(vm=READY, statuses=[RUNNING, RUNNING, DONE], lost=3)
  result = cloud.tpu('watch', '--', *TRAIN)
  assert (result.returncode, cloud.verbs().count('ssh')) == (0, 6), result.stderr
  assert 'create' not in cloud.verbs()


@pytest.mark.parametrize(
  'statuses,code,stops',
  [
    (['{b} running attempt=1\n{a} exited 70', '{b} exited 70\n{a} exited 70'], 70, 0),  # one is slower than the other
    (['{b} running attempt=1\n{a} exited 70', '{b} running attempt=2\n{a} exited 70'], 70, 1),
    (['{a} exited 137\n{b} running attempt=1'] * 2, 137, 1),
    (['{a} exited 70\n{b} running attempt=1', '{a} running attempt=1'] * 2 + ['{a} exited 0'], 0, 0),
    (['{a} exited 75\n{b} exited 70'], 70, 0),
    (['{a} lost\n{b} exited 70'], 70, 0),
    (['{a} exited 75\n{b} exited 0'], 75, 0),
    (['{a} exited 0\n{b} exited 75'], 75, 0),
  ],
)  # fmt: skip
def test_workers_that_end_differently(cloud, statuses, code, stops):
  """One that ends for good leaves others that restart. Mutations: stop never, or at the first look; the first code."""
  said = [text.format(a='compactlm-status w-0', b='compactlm-status w-1') for text in statuses]
  cloud.set(vm=READY, statuses=said)
  result = cloud.tpu('watch', '--', *TRAIN)
  assert (result.returncode, cloud.verbs().count('ssh')) == (code, len(said) + stops), result.stderr
  assert [line.endswith(' stop') for line in commands(cloud) if not line.endswith(' status')] == [True] * stops


def test_ssh_that_does_not_come_back(cloud):
  """Mutation: watch waits for ever."""
  cloud.set(vm=READY, lost=1000)
  result = cloud.tpu('watch', *AGAIN)
  assert (result.returncode, 'did not answer 20 times' in result.stderr) == (74, True)
  assert set(cloud.verbs()) == {'describe', 'ssh'}


def test_preempted_while_running(cloud):
  """Only --recreate (or --queued) makes a new one. Mutation: watch recreates always; the old lock stays."""
  states = {'vm': READY, 'states': ['READY', 'PREEMPTED', 'PREEMPTED'], 'statuses': [RUNNING, DONE]}
  cloud.set(**states)
  result = cloud.tpu('watch', '--', *TRAIN)
  assert (result.returncode, '--recreate' in result.stderr) == (75, True)
  assert not {'create', 'delete'} & set(cloud.verbs())
  cloud.set(**states)
  result = cloud.tpu('watch', *AGAIN)
  assert result.returncode == 0, result.stderr
  verbs = [verb for verb in cloud.verbs() if verb != 'describe']
  assert verbs == ['ssh', 'delete', 'create', 'ssh', 'scp', 'ssh', 'ssh', 'ssh']
  assert commands(cloud)[-2] == f'bash compactlm/worker.sh start {shlex.join(TRAIN)} --steal_lock'


def test_a_preempted_request_is_made_anew(cloud):
  """Mutation: only the VM is deleted."""
  cloud.set(
    vm=READY,
    queue=['ACTIVE', *READY[1:]],
    states=['READY', 'PREEMPTED', 'PREEMPTED'],
    statuses=[RUNNING, DONE],
  )
  result = cloud.tpu('watch', '--queued', '--spot', '--type=v3-8', SOURCE, '--', *TRAIN)
  assert result.returncode == 0, result.stderr
  changed = [call[2:4] for call in cloud.calls() if call[3] in ('create', 'delete')]
  assert changed == [['queued-resources', 'delete'], ['queued-resources', 'create']]


def test_only_what_is_lost_is_removed(cloud):
  """An installation that fails is repeated on the same machine, a request that waits keeps its place.

  Mutation: watch removes before every creation.
  """
  cloud.set(vm=READY, states=['PREEMPTED', 'PREEMPTED'], statuses=[BARE], refuse=['scp'])
  result = cloud.tpu('watch', '--attempts=3', *AGAIN)
  assert result.returncode == 75
  assert (cloud.verbs().count('delete'), cloud.verbs().count('create'), cloud.verbs().count('scp')) == (1, 1, 3)
  states = ['WAITING_FOR_RESOURCES', 'WAITING_FOR_RESOURCES', 'ACTIVE']
  cloud.set(queue=['WAITING_FOR_RESOURCES', *READY[1:]], queue_states=states, statuses=[DONE])
  assert cloud.tpu('watch', '--queued', *AGAIN).returncode == 0
  assert not {'delete', 'create'} & set(cloud.verbs())


def test_attempts_are_bounded(cloud):
  """A refused creation counts as well. Mutation: made is not counted."""
  cloud.set(refuse=['create'])
  result = cloud.tpu('watch', '--attempts=3', *AGAIN)
  assert (result.returncode, 'more than 3 times' in result.stderr) == (75, True)
  assert cloud.verbs().count('create') == 3


def test_a_first_machine_takes_no_lock_over(cloud):
  """Who says that a lock in the bucket belongs to a machine that was never seen? Mutation: --steal_lock always."""
  cloud.set(statuses=[DONE])
  assert cloud.tpu('watch', *AGAIN).returncode == 0
  assert cloud.verbs().count('create') == 1
  assert '--steal_lock' not in ' '.join(commands(cloud))


def test_a_machine_that_was_rebooted(cloud):
  """The run starts again on the same machine. Mutation: lost is ignored."""
  cloud.set(vm=READY, statuses=[RUNNING, LOST, RUNNING, DONE])
  assert cloud.tpu('watch', '--', *TRAIN).returncode == 0
  started = [line for line in commands(cloud) if ' start ' in line]
  assert started == [f'bash compactlm/worker.sh start {shlex.join(TRAIN)}']
  assert 'create' not in cloud.verbs()


def test_rows_come_along(cloud, tmp_path):
  """To where the run starts, so that --config.data.path=data/pairs finds them. Mutation: the home folder instead."""
  rows = cloud.folder / 'buckets' / 'bucket' / 'data' / 'pairs'
  rows.mkdir(parents=True)
  (rows / 'rows.json').write_text('{}')
  home = tmp_path / 'home'
  uv = home / 'compactlm' / 'uv' / 'bin' / 'uv'
  uv.parent.mkdir(parents=True)
  uv.write_text('#!/bin/bash\n')
  uv.chmod(0o755)
  wheel = tmp_path / 'compactlm_jax-0.1.0-py3-none-any.whl'
  wheel.touch()
  cloud.set(vm=READY, home=str(home))
  result = cloud.tpu('install', f'--source={wheel}', '--data=gs://bucket/data/pairs')
  assert result.returncode == 0, result.stderr
  assert (home / 'compactlm' / 'data' / 'pairs' / 'rows.json').is_file()


def test_without_gcloud(tmp_path):
  """Mutation: the check is left out."""
  for name in ('bash', 'dirname', 'basename', 'mktemp', 'rm', 'env', 'sed', 'date', 'grep'):
    (tmp_path / name).symlink_to(shutil.which(name))
  folder = tmp_path / 'bin'
  folder.mkdir()
  result = Cloud(folder).tpu('create', '--type=v3-8', env={'PATH': str(tmp_path)})
  assert (result.returncode, 'https://cloud.google.com/sdk' in result.stderr) == (78, True), result.stderr


@pytest.mark.parametrize(
  'flag',
  ['--name=a b', '--name=x;reboot', '--name=-x', '--zone=$(id)', '--project=a/b', '--type=v3-8 x', '--version=`id`',
   '--worker=0;id', '--valid_until=6 h', '--poll=x'],
)  # fmt: skip
def test_odd_names_are_refused(cloud, flag):
  """Mutation: check_flags is not called."""
  result = cloud.tpu('create', '--type=v3-8', flag)
  assert (result.returncode, flag.partition('=')[0] in result.stderr) == (78, True)
  assert not cloud.calls()


def test_arguments_arrive_as_they_are(cloud, tmp_path):
  """Through two shells. Mutation: the words are joined by spaces only."""
  (tmp_path / 'compactlm').mkdir()
  (tmp_path / 'compactlm' / 'worker.sh').write_text('printf "%s\\n" "$@" > told\n')
  odd = ["--a=it's", '--b=$HOME `id` $(id)', '--c="x" \\ y', '--d=*', '', 'é;&|', '--']
  cloud.set(vm=READY, home=str(tmp_path))
  assert cloud.tpu('run', '--', 'compactlm', *odd).returncode == 0
  assert (tmp_path / 'told').read_text().split('\n')[:-1] == ['start', 'compactlm', *odd]
  assert cloud.tpu('run', '--', 'compactlm', 'a\nb').returncode == 78


def test_no_secret_is_shown(cloud):
  """Mutation: set -x; the refused address is part of the message."""
  cloud.set(vm=READY, statuses=[DONE])
  secret = {'HF_TOKEN': 'hf_secret', 'GOOGLE_APPLICATION_CREDENTIALS': '/secret.json'}
  outputs = [cloud.tpu(*words, env=secret) for words in (('status',), ('run', *AGAIN[-5:]), ('watch', *AGAIN))]
  refused = cloud.tpu('install', '--source=git+https://user:secret@example.org/x.git@v1')
  assert refused.returncode == 78
  assert 'secret' not in ''.join(o.stdout + o.stderr for o in [*outputs, refused])
  assert 'secret' not in str(cloud.calls())


@pytest.mark.parametrize('source', ['--source=compactlm', '--source=no_file.whl', '--source=git+https://x.org/y'])
def test_a_source_that_is_none(cloud, source):
  cloud.set(vm=READY)
  assert cloud.tpu('install', source).returncode == 78
  assert not cloud.calls()


def test_help(cloud):
  result = cloud.tpu('--help', where=())
  assert result.returncode == 78
  assert '--dry_run' in result.stderr
  assert all(f'tpu.sh {verb}' in result.stderr for verb in ('create', 'install', 'run', 'watch', 'logs', 'copy'))
  assert WHERE[0].partition('=')[0] in result.stderr
