"""launch/constraints.txt: the versions that a worker and the image install."""

import tomllib

import pytest
from launch_standin import ROOT
from packaging.markers import default_environment
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name


@pytest.mark.parametrize('python', ['3.11', '3.12'])
def test_every_dependency_has_a_version_that_fits(python):
  """On Linux. Mutations: jax==0.9.0 in the file; a line without a version; a dependency that is not in the file."""
  machine = {'sys_platform': 'linux', 'platform_system': 'Linux', 'platform_machine': 'x86_64'}
  environment = default_environment() | machine | {'python_version': python, 'python_full_version': f'{python}.0'}
  pinned = {}
  for line in (ROOT / 'launch' / 'constraints.txt').read_text().splitlines():
    if line.startswith('#'):
      continue
    found = Requirement(line)
    (version,) = found.specifier
    assert found.url is None and version.operator == '==' and '*' not in version.version, line
    if not found.marker or found.marker.evaluate(environment):
      assert pinned.setdefault(canonicalize_name(found.name), version.version) == version.version, line
  project = tomllib.loads((ROOT / 'pyproject.toml').read_text())['project']
  extras = project['optional-dependencies']
  for wanted in map(Requirement, [*project['dependencies'], *extras['tpu'], *extras['gcs']]):
    assert wanted.specifier.contains(pinned[canonicalize_name(wanted.name)]), wanted
  assert {'jaxlib', 'libtpu', 'tensorstore'} <= set(pinned)  # what comes along
