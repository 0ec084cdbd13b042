"""The house: who may import whom, what a plain import loads, what is not allowed anywhere."""

import ast
import pathlib
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parents[1]
PACKAGE = ROOT / 'compactlm_jax'
FILES = sorted(PACKAGE.rglob('*.py'))

BASE = {'errors', 'filenames', 'parse', 'types', 'config', 'tree', 'storage'}
ALLOWED = {
  'errors': set(),
  'filenames': set(),
  'parse': set(),
  'types': set(),
  'config': {'errors'},
  'tree': {'errors'},
  'storage': {'errors'},
  'ops': BASE,
  'data': BASE,
  'parallel': BASE,
  'distributed': BASE,
  'stepdir': BASE,
  'checkpoint': BASE | {'stepdir', 'parallel'},
  'metrics': BASE,
  'nn': BASE | {'ops'},
  'losses': BASE | {'ops'},
  'scoring': BASE,
  'report': BASE | {'metrics'},
  'compress': BASE | {'ops'},
  'tasks': BASE | {'nn', 'losses', 'compress', 'ops'},
  'train': BASE | {'parallel', 'checkpoint', 'metrics', 'stepdir', 'distributed'},
  'plan': BASE | {'nn', 'compress', 'tasks', 'train', 'parallel', 'interop', 'checkpoint', 'data'},
  'interop': BASE | {'compress', 'nn'},
  'analysis': BASE | {'nn', 'ops', 'compress'},
}
ONLY_HERE = {
  'flax': {'nn'},
  'orbax': {'checkpoint'},
  'tensorflow_datasets': {'data'},
  'apache_beam': {'data'},
  'grain': {'data'},
  'tokenizers': {'data', 'interop'},
  'transformers': {'interop'},
  'matplotlib': {'analysis', 'report'},
  'onnx': {'interop'},
  'onnxruntime': {'interop', 'jobs'},
  'sklearn': {'scoring'},
  'scipy': {'scoring'},
  'torch': set(),
  'tensorflow': set(),
  'pickle': set(),
}


def part(path):
  return path.relative_to(PACKAGE).parts[0].removesuffix('.py')


def imports(path):
  for node in ast.walk(ast.parse(path.read_text())):
    if isinstance(node, ast.Import):
      yield from (alias.name for alias in node.names)
    elif isinstance(node, ast.ImportFrom):
      assert node.level == 0, f'{path}: relative import'
      yield node.module
      yield from (f'{node.module}.{alias.name}' for alias in node.names)


@pytest.mark.parametrize('path', FILES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_imports_follow_the_house(path):
  """Mutation: import compactlm_jax.train in a task."""
  here = part(path)
  for name in imports(path):
    top, _, rest = name.partition('.')
    if top in ONLY_HERE:
      assert here in ONLY_HERE[top], f'{path} imports {name}'
    if top == 'compactlm_jax' and rest and here in ALLOWED:
      target = rest.split('.')[0]
      assert target == here or target in ALLOWED[here], f'{path} imports {name}'


@pytest.mark.parametrize('path', FILES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_files_and_functions_stay_small(path):
  text = path.read_text()
  assert text.count('\n') <= 400
  for node in ast.walk(ast.parse(text)):
    if isinstance(node, ast.FunctionDef):
      assert node.end_lineno - node.lineno <= 60, f'{path}: {node.name} has {node.end_lineno - node.lineno} lines'


def test_public_names_have_docstrings():
  missing = [
    f'{path.relative_to(ROOT)}: {node.name}'
    for path in FILES
    for node in ast.parse(path.read_text()).body
    if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and not node.name.startswith('_')
    if not ast.get_docstring(node)
  ]
  assert not missing


def test_a_plain_import_is_light_and_needs_no_other_framework():
  """Public names are imported on first use; torch, tensorflow and tensorboard may be absent altogether.

  Mutations: `import jax` in __init__.py; `import grain` in nn/encoder.py.
  """
  code = """
import sys
for name in ('torch', 'tensorflow', 'tensorboard', 'tensorboardX', 'wandb'):
  sys.modules[name] = None
import compactlm_jax as clm
assert 'jax' not in sys.modules, 'import compactlm_jax loads jax'
clm.encode, clm.EncoderConfig
for name in ('transformers', 'tensorflow_datasets', 'grain', 'orbax.checkpoint'):
  assert name not in sys.modules, f'encode loads {name}'
import compactlm_jax.jobs
"""
  subprocess.run([sys.executable, '-W', 'error::DeprecationWarning:compactlm_jax', '-c', code], check=True, cwd=ROOT)


def test_every_public_name_exists():
  import compactlm_jax

  for name in compactlm_jax.__all__:
    assert getattr(compactlm_jax, name) is not None
  with pytest.raises(AttributeError, match='nothing'):
    getattr(compactlm_jax, 'nothing')  # noqa: B009
