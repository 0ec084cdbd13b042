"""The notebooks: run from top to bottom in their small setting, and what the repository holds of them."""

import ast
import base64
import importlib
import io
import json
import pathlib
import re
import runpy
import types

import jax
import numpy as np
import pytest
from etils import epath
from packaging.requirements import Requirement

from compactlm_jax.demo import assets
from compactlm_jax.errors import StorageError

ROOT = pathlib.Path(__file__).parents[2]
NAMES = ('quickstart', 'compress')
PICTURES = {
  'quickstart': {'attention-teacher', 'loss', 'attention-student'},
  'compress': {'layers', 'grid', 'trade'},
}
"""Cells that show a picture, and no others do."""

USABLE = {'config', 'cpu', 'jobs', 'demo', 'metrics', 'analysis', 'compress', 'report'}
"""Parts of the package that a user calls, beside the names of the package itself."""

pytestmark = pytest.mark.filterwarnings(
  'ignore::DeprecationWarning:jupyter_client', 'ignore::DeprecationWarning:jupyter_core'
)


def cells_of(name):
  """The code cells of a notebook as it is stored, by id."""
  stored = json.loads((ROOT / f'colab/{name}.ipynb').read_text())
  return {cell['id']: cell for cell in stored['cells'] if cell['cell_type'] == 'code'}


def python_of(name):
  """Cell -> its source with magics as Python calls."""
  transform = importlib.import_module('IPython.core.inputtransformer2').TransformerManager().transform_cell
  return {ident: transform(''.join(cell['source'])) for ident, cell in cells_of(name).items()}


@pytest.fixture(scope='module')
def fetched():
  """The demo's files, fetched once into the folder that `make demo` uses."""
  try:
    return [assets.fetch(asset, epath.Path(ROOT / 'demo_run/assets')) for asset in (assets.TEACHER, assets.SENTENCES)]
  except StorageError as e:
    pytest.skip(f'needs the files of the demo: {e}')


def executed(name, folder, files, monkeypatch):
  """Cell -> outputs of the notebook, run in an empty folder by a kernel of its own; raises if a cell fails."""
  nbclient, nbformat = importlib.import_module('nbclient'), importlib.import_module('nbformat')
  for variable in ('IPYTHONDIR', 'JUPYTER_DATA_DIR', 'JUPYTER_RUNTIME_DIR', 'JUPYTER_CONFIG_DIR'):
    monkeypatch.setenv(variable, str(folder / 'jupyter'))
  monkeypatch.setenv('COMPACTLM_SMALL', '1')
  monkeypatch.setenv('JAX_NUM_CPU_DEVICES', '1')  # as in Colab; eight virtual ones take turns on two cores
  monkeypatch.setenv('PYTHONPATH', str(ROOT))
  (folder / f'{name}_run/assets').mkdir(parents=True)
  for file in files:
    (folder / f'{name}_run/assets' / file.name).symlink_to(file)
  notebook = nbformat.read(ROOT / f'colab/{name}.ipynb', 4)
  nbclient.NotebookClient(notebook, timeout=1500, resources={'metadata': {'path': str(folder)}}).execute()
  return {cell.id: cell.outputs for cell in notebook.cells if cell.cell_type == 'code'}


def text_of(outputs, stream='stdout'):
  """What a cell printed, and texts that it returned."""
  printed = ''.join(out.text for out in outputs if out.output_type == 'stream' and out.name == stream)
  return printed + ''.join(out.data.get('text/markdown', '') for out in outputs if 'data' in out)


def check_pictures(name, outputs):
  """Each named cell shows a PNG that decodes, and has something on it."""
  imread = importlib.import_module('matplotlib.image').imread
  shown = {i: [o.data['image/png'] for o in out if 'image/png' in o.get('data', {})] for i, out in outputs.items()}
  assert {ident for ident, pictures in shown.items() if pictures} == PICTURES[name]
  for ident in PICTURES[name]:
    (png,) = shown[ident]
    pixels = imread(io.BytesIO(base64.b64decode(png)))[..., :3]
    assert min(pixels.shape[:2]) >= 200, ident
    coloured = np.ptp(pixels, axis=-1) > 0.2  # what is plotted; frames and letters are grey
    assert coloured.mean() > 1e-3, f'{ident} shows no data'


def test_quickstart_distils_and_the_student_loads_in_transformers(tmp_path, fetched, monkeypatch):
  """Mutation: train the student for no relation (`relations=()`); leave `plt.show()` without a plot."""
  outputs = executed('quickstart', tmp_path, fetched, monkeypatch)
  check_pictures('quickstart', outputs)
  assert re.search(r'^Running on CPU: 1 x cpu, JAX \d+\.\d+', text_of(outputs['device']), re.MULTILINE)
  before, after = map(float, re.findall(r'(\d\.\d+) (?:before|after)', text_of(outputs['loss'])))
  assert after < 0.7 * before
  assert '6/6' in text_of(outputs['distill'], 'stderr'), 'no progress bar'
  loaded = text_of(outputs['load'])
  if importlib.util.find_spec('torch'):
    assert float(re.search(r'largest difference of an output (\S+)', loaded)[1]) < 1e-4
  else:
    assert 'BertConfig' in loaded and 'encoder.layer.2.' in loaded


@pytest.mark.slow
def test_compress_prunes_and_adapts_and_compares(tmp_path, fetched, monkeypatch):
  """Mutation: export with `layout='padded'`; export the same sub-network four times."""
  outputs = executed('compress', tmp_path, fetched, monkeypatch)
  check_pictures('compress', outputs)
  assert re.search(r'^Running on CPU: 1 x cpu, JAX \d+\.\d+', text_of(outputs['device']), re.MULTILINE)
  lines = text_of(outputs['compare']).split('\n')[2:]
  table = {line.split('|')[1].strip(): [cell.strip() for cell in line.split('|')[2:-1]] for line in lines if line}
  assert len(table) == 6 and all(re.fullmatch(r'\d+\.\d%', row[0]) for row in table.values())
  millions = {name: float(row[1]) for name, row in table.items()}
  assert millions['pruned'] < millions['dense'] == millions['width 1, depth 1']
  assert millions['width 0.5, depth 0.5'] < millions['width 0.5, depth 1'] < millions['dense']
  assert all(float(row[2]) > 40 and float(row[3]) > 0 for row in table.values())


@pytest.mark.parametrize('name', NAMES)
def test_what_is_stored_was_not_executed(name):
  """Mutation: save a notebook with its outputs."""
  stored = json.loads((ROOT / f'colab/{name}.ipynb').read_text())
  assert (stored['nbformat'], stored['nbformat_minor']) == (4, 5) and 'widgets' not in stored['metadata']
  for cell in cells_of(name).values():
    assert cell['outputs'] == [] and cell['execution_count'] is None
  assert cells_of(name)['parameters']['metadata'] == {'tags': ['parameters']}  # papermill's


@pytest.mark.parametrize('name', NAMES)
def test_only_what_a_user_may_call_is_imported(name):
  """Mutation: import from compactlm_jax.train, or a name with an underscore."""
  found = set()
  for source in python_of(name).values():
    for node in ast.walk(ast.parse(source)):
      if isinstance(node, ast.Attribute):
        assert not node.attr.startswith('_') or node.attr == '__version__' or node.attr == '__name__', node.attr
      if isinstance(node, ast.Import):
        assert not [a.name for a in node.names if a.name.startswith('compactlm_jax.')], 'import names of modules'
      if isinstance(node, ast.ImportFrom) and node.module.split('.')[0] == 'compactlm_jax':
        found.add(node.module)
        module = importlib.import_module(node.module)
        for alias in node.names:
          assert not alias.name.startswith('_')
          assert hasattr(module, alias.name) or importlib.import_module(f'{node.module}.{alias.name}')
  assert found and {module.split('.')[1] for module in found} <= USABLE


def install(name, installed, versions, folder, monkeypatch):
  """Runs the cell that installs, where the package is not there yet: (magics that were called, its variables)."""
  asked = []
  shell = types.SimpleNamespace(run_line_magic=lambda magic, line: asked.append((magic, line)))
  known = [types.SimpleNamespace(name=package, version=version) for package, version in installed.items()]
  monkeypatch.setattr(importlib.util, 'find_spec', lambda package: None)
  monkeypatch.setattr(importlib.metadata, 'distributions', lambda: known)
  monkeypatch.setattr(importlib.metadata, 'version', lambda package: versions.get(package, '1.0'))
  file = folder / 'cell.py'
  file.write_text(python_of(name)['install'])
  given = {'get_ipython': lambda: shell, 'REPOSITORY': 'https://host/repository'}
  return asked, runpy.run_path(str(file), given)


LOADED = {'jax': jax.__version__, 'numpy': np.__version__}


@pytest.mark.parametrize(
  'installed, wanted',
  [
    ({}, 'jax[]>=0.10.2,<0.13'),
    ({'jax': '0.10.2', 'libtpu': '0.0.40'}, 'jax==0.10.2'),
    ({'jax': '0.12.0.1', 'jax-cuda12-plugin': '0.12.0'}, 'jax==0.12.0.1'),
    ({'jax': '0.13.0'}, 'jax[]>=0.10.2,<0.13'),
    ({'jax': '0.7.2', 'libtpu': '0.0.21'}, 'jax[tpu]>=0.10.2,<0.13'),
    ({'jax': '0.9.0', 'jax_cuda12_plugin': '0.9.0'}, 'jax[cuda12]>=0.10.2,<0.13'),
  ],
)
@pytest.mark.parametrize('name', NAMES)
def test_a_usable_jax_is_kept_and_another_is_replaced_with_its_plugin(name, installed, wanted, tmp_path, monkeypatch):
  """Mutation: name no JAX (pip then takes the newest for the newest Flax, and libtpu stays behind)."""
  asked, space = install(name, installed, LOADED, tmp_path, monkeypatch)
  assert asked == [('pip', 'install --quiet "compactlm-jax[plots] @ git+{REPOSITORY}" "{wanted_jax}"')]
  assert space['wanted_jax'] == wanted
  Requirement(wanted)


@pytest.mark.parametrize('name', NAMES)
def test_a_package_that_was_replaced_under_the_kernel_asks_for_a_restart(name, tmp_path, monkeypatch):
  """Mutation: compare the version of jax alone."""
  with pytest.raises(RuntimeError, match='Restart session'):
    install(name, {}, {**LOADED, 'numpy': '0.1'}, tmp_path, monkeypatch)


@pytest.mark.parametrize('name', NAMES)
def test_the_usable_jax_is_that_of_the_package(name):
  """Mutation: raise the minimum in pyproject.toml alone."""
  project = (ROOT / 'pyproject.toml').read_text()
  usable = re.search(r'"jax(>=[^"]+)"', project)[1]
  assert f"USABLE_JAX = '{usable}'" in ''.join(cells_of(name)['install']['source'])
