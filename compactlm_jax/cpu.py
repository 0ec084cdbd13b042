"""Settings of a process that computes on a CPU."""

from __future__ import annotations

import ctypes
import sys

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3


def keep_memory() -> bool:
  """Lets the C library keep freed memory for the next step instead of returning it to the system.

  XLA's CPU backend allocates its temporary arrays anew in each step. By default glibc maps and unmaps them each time,
  and the page faults cost up to a third of a step. Steps also run on the calling thread, so that one heap serves them
  all. Call it before JAX is used. Memory use stays at its peak; an accelerator is not affected.

  Returns:
    False where the C library is not glibc; nothing has changed then.
  """
  if not sys.platform.startswith('linux'):
    return False
  try:
    mallopt = ctypes.CDLL('libc.so.6').mallopt
  except (OSError, AttributeError):
    return False
  import jax

  jax.config.update('jax_cpu_enable_async_dispatch', False)
  limit = 2**31 - 1
  return all(mallopt(option, limit) == 1 for option in (_M_MMAP_THRESHOLD, _M_TRIM_THRESHOLD))
