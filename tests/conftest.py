"""Strict settings for every test: eight virtual CPU devices, no silent rank promotion, warnings are errors."""

import os
import pathlib

os.environ.setdefault('JAX_PLATFORMS', 'cpu')
os.environ.setdefault('JAX_NUM_CPU_DEVICES', '8')
os.environ.setdefault('HF_HUB_OFFLINE', '1')
# Tests compile hundreds of tiny programs: LLVM's optimiser would take most of their time. Eight devices share few
# cores: on a loaded machine one of them may come to a collective later than the 40 s after which XLA aborts.
os.environ.setdefault(
  'XLA_FLAGS', '--xla_backend_optimization_level=0 --xla_cpu_collective_call_terminate_timeout_seconds=300'
)
# Compiled programs are shared by all processes of the tests, and kept for the next run (`make clean` removes them);
# those of one device, see compile_cache.py.
os.environ.setdefault('JAX_COMPILATION_CACHE_DIR', str(pathlib.Path(__file__).parents[1] / '.cache' / 'jax'))
os.environ.setdefault('JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS', '0.2')

import jax
import pytest
from compile_cache import only_of_one_device

jax.config.update('jax_numpy_rank_promotion', 'raise')
only_of_one_device()


@pytest.fixture(autouse=True, scope='module')
def _forget_programs():
  """What a module compiled goes with it: otherwise a worker of the whole suite grows to 7 GB."""
  yield
  jax.clear_caches()


def pytest_runtest_setup(item):
  """What is compared with torch needs it; it is not there for every Python."""
  if item.get_closest_marker('torch'):
    pytest.importorskip('torch')
