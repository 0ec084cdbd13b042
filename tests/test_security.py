"""No code from outside, nothing of the machine in what is written, permissions of the user, known dependencies."""

import ast
import contextlib
import getpass
import importlib.metadata
import os
import pathlib
import re
import socket
import stat
import subprocess
import sys
import tomllib

import jax.numpy as jnp
import pytest
from foreign_readers import bundle
from packaging.requirements import Requirement
from packaging.version import Version

from compactlm_jax.checkpoint import Checkpoints
from compactlm_jax.config import RunConfig
from compactlm_jax.interop.bundle import from_pretrained, save_pretrained
from compactlm_jax.interop.sparse import save_sparse
from compactlm_jax.storage import whole_file
from compactlm_jax.train.rundir import open_run
from compactlm_jax.types import TrainState

ROOT = pathlib.Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / 'pyproject.toml').read_text())

# --- code from outside ----------------------------------------------------------------------------------------------

_LOADERS = {'load', 'loads', 'load_all', 'full_load', 'unsafe_load'}
_MODULES = {'pickle', 'cPickle', 'dill', 'cloudpickle', 'joblib', 'shelve', 'marshal', 'torch', 'yaml'}


def forbidden(source):
  """What in a source may run code of a file: 'name, line n'."""
  found = []
  for node in ast.walk(ast.parse(source)):
    if not isinstance(node, ast.Call):
      continue
    name = ast.unparse(node.func)
    module, _, last = name.rpartition('.')
    bare = name in ('eval', 'exec', 'compile', '__import__') or name in ('os.system', 'os.popen')
    loader = last in _LOADERS and module in _MODULES
    array = name in ('np.load', 'numpy.load', 'jnp.load')
    true = {k.arg for k in node.keywords if not (isinstance(k.value, ast.Constant) and k.value.value is False)}
    if bare or loader or array or true & {'shell', 'allow_pickle', 'trust_remote_code'}:
      found.append(f'{name}, line {node.lineno}')
  return found


@pytest.mark.parametrize('path', sorted((ROOT / 'compactlm_jax').rglob('*.py')), ids=lambda p: p.name)
def test_the_package_runs_no_code_of_files(path):
  """Mutation: np.load(file) in any module."""
  assert not forbidden(path.read_text())


@pytest.mark.parametrize(
  'line',
  ['pickle.loads(x)', 'eval(x)', 'exec(x)', 'yaml.load(x)', 'np.load(x)', 'numpy.load(x, allow_pickle=True)',
   'torch.load(x)', 'subprocess.run(x, shell=True)', 'os.system(x)', 'f(x, trust_remote_code=flag)', 'joblib.load(x)'],
)  # fmt: skip
def test_the_rule_catches(line):
  assert forbidden(line)
  assert not forbidden('json.loads(x); re.compile(x); f(x, shell=False, trust_remote_code=False); model.eval()')


RUFF = {
  'S102': 'exec(x)',
  'S202': 'import tarfile\ntarfile.open(x).extractall(y)',
  'S301': 'import pickle\npickle.loads(x)',
  'S302': 'import marshal\nmarshal.loads(x)',
  'S306': 'import tempfile\ntempfile.mktemp()',
  'S307': 'eval(x)',
  'S506': 'import yaml\nyaml.load(x)',
  'S602': 'import subprocess\nsubprocess.run(x, shell=True)',
  'S605': 'import os\nos.system(x)',
}


def test_ruff_catches_it_too():
  """Each rule of the linter's security set, on a line that it is for. Mutation: take one out of pyproject.toml."""
  ruff = pathlib.Path(sys.executable).with_name('ruff')
  if not ruff.exists():
    pytest.skip('needs the extra lint')
  source = '\n'.join(RUFF.values())
  command = [ruff, 'check', '--output-format=concise', '--stdin-filename=x.py', '-']
  told = subprocess.run(command, input=source, capture_output=True, text=True, cwd=ROOT).stdout
  assert not [rule for rule in RUFF if rule not in told], told


# --- what is written ------------------------------------------------------------------------------------------------

MARKER = 'QmarkerQ'


@pytest.fixture
def written(tmp_path, monkeypatch):
  """What a run and its exports write, in a folder whose name is a marker, with secrets in the environment."""
  monkeypatch.setenv('HF_TOKEN', 'hunter2')
  monkeypatch.setenv('WANDB_API_KEY', 'hunter2')
  monkeypatch.setenv('AWS_SECRET_ACCESS_KEY', 'hunter2')
  monkeypatch.setattr(sys, 'argv', ['compactlm', 'train', '--config=configs/tiny.py:distill'])

  def write():
    home = tmp_path / MARKER
    home.mkdir()
    save_pretrained(bundle(), home / 'source')
    model = from_pretrained(home / 'source')
    save_pretrained(model, home / 'dense')
    save_sparse(model, home / 'sparse', 'int8')
    with open_run(home / 'run', RunConfig(task='distill', steps=1), {'data': 'rows'}):
      with Checkpoints(home / 'run/checkpoints', keep=1) as checkpoints:
        checkpoints.save(1, TrainState(jnp.int32(1), {'a': jnp.ones(300)}, ()), {'task': 'distill'}, wait=True)
    with whole_file(home / 'run/predictions.jsonl') as file:
      file.write_text('{}\n')
    return home

  return write


def test_nothing_of_the_machine_or_the_user_is_written(written):
  """Paths that a user gives (data.path, the command line) stand in run records; where a run or an export lies does not.

  Mutation: add the folder's path to config.json of an export, or os.environ to the record of a run.
  """
  names = [MARKER.encode(), b'hunter2', os.path.expanduser('~').encode() + b'/', socket.gethostname().encode()]
  user = getpass.getuser().encode()
  if user != b'root':  # also a word
    names.append(user)
  # Orbax's mark of a checkpoint says where it was written; an export takes nothing of it.
  files = [p for p in written().rglob('*') if p.is_file() and p.name != 'commit_success.txt']
  assert len(files) > 20
  for file in files:
    for name in names:
      assert name not in file.read_bytes(), (file, name)


@contextlib.contextmanager
def umask(mask):
  before = os.umask(mask)
  try:
    yield
  finally:
    os.umask(before)


@pytest.mark.parametrize('mask', [0o022, 0o077, 0o027])
def test_permissions_are_those_of_the_umask(mask, written):
  """Neither closed to a group that may read, nor open to others. Mutation: tempfile.mkstemp in `whole_file`."""
  with umask(mask):
    home = written()
  for path in home.rglob('*'):
    wanted = (0o777 if path.is_dir() else 0o666) & ~mask
    assert stat.S_IMODE(path.stat().st_mode) == wanted, (path, oct(path.stat().st_mode))


# --- dependencies ---------------------------------------------------------------------------------------------------

UNBOUNDED = {
  'absl-py': 'flags alone; no release broke them in years',
  'array-record': 'below 1.0, its file format is fixed',
  'datasets': 'optional; load_dataset alone',
  'etils': 'epath alone; versions are small and frequent',
  'gcp-storage-emulator': 'tests alone: a bucket on this machine',
  'gcsfs': 'optional; versions are dates',
  'importlib-resources': 'for tensorflow-datasets, which does not bound it',
  'jaxtyping': 'annotations alone',
  'ml-collections': 'ConfigDict alone; its releases are additions',
  'numpy': 'JAX bounds it',
  'tensorboardX': 'optional; add_scalar alone',
  'tqdm': 'a progress bar',
}
PERMISSIVE = re.compile(r'\b(Apache|MIT|BSD|0BSD|ISC|PSF|MPL|Zlib|CC0|CNRI-Python)\b', re.IGNORECASE)


def _requirements():
  groups = [PROJECT['project']['dependencies'], *PROJECT['project']['optional-dependencies'].values()]
  return [Requirement(line) for group in groups for line in group]


def test_every_dependency_has_a_bound_or_a_reason():
  """Mutation: drop '<7' behind hypothesis."""
  free = {r.name for r in _requirements() if not any(s.operator in ('<', '<=', '==', '~=') for s in r.specifier)}
  assert free == set(UNBOUNDED)


FIRST_SAFE = {
  'numpy': ('1.22', 'CVE-2021-41496: a buffer that overflows'),
  'onnx': ('1.21', 'CVE-2025-51480, CVE-2026-27489 and others: files outside of the folder'),
  'pytest': ('9.0.3', 'CVE-2025-71176: its folder in /tmp'),
  'scikit-learn': ('1.5', 'CVE-2024-5206: words of the training data kept'),
  'torch': ('2.6', 'CVE-2025-32434: code run by torch.load'),
  'tqdm': ('4.66.3', 'CVE-2024-34062: eval of command line options'),
  'transformers': ('5.3', 'CVE-2026-4372: code run by a configuration; CVE-2025-14920 and others before'),
}
"""The first version without a vulnerability that we know of (November 2026); `pip-audit` knows more."""


def test_no_dependency_may_be_of_a_version_that_is_known_to_be_vulnerable():
  """Of what pyproject.toml allows. Mutation: tqdm>=4.66."""
  for name, (safe, why) in FIRST_SAFE.items():
    bounds = [r.specifier for r in _requirements() if r.name == name]
    assert bounds, name
    for bound in bounds:
      (least,) = [s.version for s in bound if s.operator in ('>=', '==')]
      assert Version(least) >= Version(safe), (name, str(bound), why)


def test_every_licence_is_permissive():
  """Of what `pip install` brings, as its metadata says. Mutation: take MPL out of the list: tqdm and certifi."""
  licences = {}

  def walk(requirement):
    if requirement.name in licences:
      return
    try:
      found = importlib.metadata.distribution(requirement.name)
    except importlib.metadata.PackageNotFoundError:
      return
    about = found.metadata
    said = [about.get('License-Expression'), about.get('License'), *about.get_all('Classifier', [])]
    licences[requirement.name] = ' '.join(s for s in said if s and (not s[:3].islower()) and 'Language' not in s)
    for line in found.requires or ():
      if (needed := Requirement(line)).marker is None or needed.marker.evaluate({'extra': ''}):
        walk(needed)

  for line in PROJECT['project']['dependencies']:
    walk(Requirement(line))
  assert len(licences) > 30
  assert not {name: said for name, said in licences.items() if not PERMISSIVE.search(said)}
