"""Ahead-of-time compilation for a TPU that is not here."""

from __future__ import annotations

import importlib.util
import os
from typing import Any

import jax
from jax.experimental import topologies

from compactlm_jax.errors import ConfigError
from compactlm_jax.plan.program import Overflow, Program, overflow_of, read_program
from compactlm_jax.plan.topology import Topology

# What libtpu would otherwise ask a metadata server for, log about, or lock. Compiling needs no TPU, so it may go on
# beside a process that uses one.
_ENVIRONMENT = {
  'TPU_SKIP_MDS_QUERY': '1',
  'TPU_ACCELERATOR_TYPE': 'v3-8',
  'TPU_WORKER_HOSTNAMES': 'localhost',
  'TPU_MIN_LOG_LEVEL': '3',
  'TPU_STDERR_LOG_LEVEL': '3',
  'ALLOW_MULTIPLE_LIBTPU_LOAD': '1',
}

FULL, QUICK = 'full', 'quick'
"""How hard the compiler tries. `QUICK` takes a third of the time.

On two layers of ConvBERT-base (v3-8, libtpu 0.0.42) its time estimate was 2 % higher, the temporaries 10 % larger. It
skips the search for tile sizes, so that the cycles of single instructions say little.
"""


def tpu_devices(topology: Topology) -> list[jax.Device]:
  """The devices of a slice, as placeholders: arrays cannot be put there, programs can be compiled for them.

  Raises:
    ConfigError: libtpu is not installed, or does not know the slice.
  """
  if importlib.util.find_spec('libtpu') is None:
    raise ConfigError("compactlm plan needs libtpu's compiler: pip install 'compactlm-jax[plan]' (Linux, x86-64)")
  for name, value in _ENVIRONMENT.items():
    os.environ.setdefault(name, value)
  name, options = topology.request()
  try:
    return list(topologies.get_topology_desc(platform='tpu', topology_name=name, **options).devices)
  except (jax.errors.JaxRuntimeError, NotImplementedError) as e:
    reason = str(e).splitlines()[0]
    raise ConfigError(f'--topology: libtpu does not accept {topology.name} as {name} ({reason})') from e


def _least_effort() -> dict[str, Any]:
  """The compiler option, which has another name since JAX 0.11."""
  if hasattr(jax.config, 'jax_exec_time_optimization_effort'):
    return {'exec_time_optimization_effort': -1.0}
  return {'optimization_level': 'O1'}


def compile_program(jitted: Any, *args: Any, effort: str = FULL) -> Program | Overflow:
  """Compiles a jitted function for the devices on which its abstract arguments lie.

  Args:
    jitted: from `jax.jit`.
    args: trees of ShapeDtypeStructs whose shardings name devices of `tpu_devices`.
    effort: `FULL` as a run compiles, or `QUICK`.

  Returns:
    What the compiler says of the program, or by how much it does not fit.
  """
  try:
    compiled = jitted.lower(*args).compile(compiler_options=_least_effort() if effort == QUICK else None)
  except jax.errors.JaxRuntimeError as e:
    if (overflow := overflow_of(str(e))) is None:
      raise
    return overflow
  return read_program(compiled)
