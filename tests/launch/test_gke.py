"""launch/gke-jobset.yaml, filled in by gke.sh: the exit codes are those of the package, and nothing breaks the YAML."""

import re
import subprocess

import pytest
from launch_standin import ROOT

from compactlm_jax import errors

yaml = pytest.importorskip('yaml')  # comes with ml-collections and orbax

FLAGS = (
  '--name=convbert',
  '--image=us-docker.pkg.dev/p/r/compactlm@sha256:0a',
  '--accelerator=tpu-v5-lite-podslice',
  '--topology=4x4',
  '--chips=4',
  '--hosts=4',
)
TRAIN = ('train', '--config=configs/convbert.py:small', '--workdir=gs://bucket/runs/small')


def render(*words):
  return subprocess.run([ROOT / 'launch' / 'gke.sh', *words], capture_output=True, text=True, timeout=60)


def filled(*words):
  result = render(*words)
  assert result.returncode == 0, result.stderr
  (only,) = yaml.safe_load_all(result.stdout)
  return only


def job_of(manifest):
  (replicated,) = manifest['spec']['replicatedJobs']
  return replicated['template']['spec']


def decision(policy, code=None, condition=None):
  """What Kubernetes does: the action of the first rule that fits; without one, the failure counts."""
  for rule in policy['rules']:
    on = rule.get('onExitCodes')
    if on is None:
      fits = condition in [c['type'] for c in rule['onPodConditions']]
    else:
      fits = code is not None and (code in on['values']) == {'In': True, 'NotIn': False}[on['operator']]
    if fits:
      return rule['action']
  return 'Count'


def test_exit_codes_are_those_of_the_package():
  """Mutation: 75 counts; 70 is left out of the rules; a code of errors.py changes."""
  job = job_of(filled(*FLAGS, '--', *TRAIN))
  policy = job['podFailurePolicy']
  again, storage = errors.PreemptedError.exit_code, errors.StorageError.exit_code
  ours = {kind.exit_code for kind in vars(errors).values() if isinstance(kind, type)} | {1, 2, 137, 143}
  for code in ours:
    wanted = {again: 'Ignore', storage: 'Count'}.get(code, 'FailJob')
    assert decision(policy, code) == wanted, code
  assert decision(policy, 137, 'DisruptionTarget') == 'Ignore'
  assert (job['backoffLimitPerIndex'], job['maxFailedIndexes'], job['completionMode']) == (3, 0, 'Indexed')
  (container,) = job['template']['spec']['containers']
  assert {rule['onExitCodes']['containerName'] for rule in policy['rules'][1:]} == {container['name']}
  assert job['template']['spec']['restartPolicy'] == 'Never'  # else Kubernetes refuses the policy


def test_values_are_filled_in():
  """Mutation: --hosts is left out of completions."""
  manifest = filled(*FLAGS, '--service_account=trainer', '--', *TRAIN)
  job = job_of(manifest)
  pod = job['template']['spec']
  assert manifest['metadata']['name'] == 'convbert'
  assert (job['completions'], job['parallelism']) == (4, 4)
  assert pod['nodeSelector'] == {
    'cloud.google.com/gke-tpu-accelerator': 'tpu-v5-lite-podslice',
    'cloud.google.com/gke-tpu-topology': '4x4',
  }
  assert pod['serviceAccountName'] == 'trainer'
  (container,) = pod['containers']
  assert container['resources'] == {'requests': {'google.com/tpu': 4}, 'limits': {'google.com/tpu': 4}}
  assert container['args'] == list(TRAIN)
  assert '${' not in render(*FLAGS, '--', *TRAIN).stdout
  spot = job_of(filled(*FLAGS, '--spot', '--', *TRAIN))['template']['spec']['nodeSelector']
  assert spot['cloud.google.com/gke-spot'] == 'true'


def test_arguments_arrive_as_they_are():
  """Mutation: no quotes in the YAML list; & is not escaped for sed."""
  odd = ["--a=it's", '--b=x: y # z', '--c=${NAME} & | \\ "q"', '- d', '*', '', "''"]
  assert job_of(filled(*FLAGS, '--', *odd))['template']['spec']['containers'][0]['args'] == odd


@pytest.mark.parametrize(
  'words',
  [
    (*FLAGS,),
    (*FLAGS, '--'),
    (*FLAGS, 'x', '--', 'train'),
    (*FLAGS, '--', 'train', 'a\nb'),
    (*FLAGS, '--topology=2', '--', 'train'),
    (*FLAGS, '--image=a|b', '--', 'train'),
    (*FLAGS, '--chips=0', '--', 'train'),
    ('--name=a', '--', 'train'),
  ],
)
def test_what_cannot_be_filled_in_is_refused(words):
  """Mutation: the check of --topology is left out."""
  result = render(*words)
  assert (result.returncode, result.stdout) == (errors.ConfigError.exit_code, '')


def test_the_image_has_what_a_run_needs():
  """The build copies what exists, and takes the versions of the release. Mutations: no configs; no --constraint."""
  text = (ROOT / 'launch' / 'Dockerfile').read_text()
  copied = [name for line in re.findall(r'^COPY (.*)$', text, re.M) for name in line.split()[:-1]]
  assert {'pyproject.toml', 'compactlm_jax', 'configs', 'launch/constraints.txt'} <= set(copied)
  assert "pip install --no-cache-dir --constraint constraints.txt '.[tpu,gcs]'" in text
  assert all((ROOT / name).exists() for name in copied)
