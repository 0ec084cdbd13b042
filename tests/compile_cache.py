"""JAX's persistent compile cache on virtual CPU devices: for programs of one device only.

XLA:CPU runs the collectives of a program in one order on all devices because they share one resource of its graph. A
program that comes from the cache has lost that: each collective gets a resource of its own (jaxlib 0.10.2 to 0.12.0),
devices may start with different ones, and wait for each other until XLA aborts. TPUs and GPUs are not concerned.
"""

import functools

from jax._src import compiler


def only_of_one_device():
  """Programs of several devices are compiled each time."""
  cached = compiler.compile_or_get_cached

  @functools.wraps(cached)
  def compiled(backend, computation, devices, options, callbacks, executable_devices, *rest):
    if devices.size == 1:
      return cached(backend, computation, devices, options, callbacks, executable_devices, *rest)
    return compiler.backend_compile_and_load(backend, computation, executable_devices, options, callbacks)

  compiler.compile_or_get_cached = compiled
