"""Where XLA's CPU compiler has to be told to write an array down."""

from __future__ import annotations

from typing import TypeVar

import jax

_X = TypeVar('_X')


def materialize(x: _X) -> _X:
  """`x` itself. On a CPU it is computed once and stored, instead of again inside each loop that reads it.

  Elsewhere this is nothing at all: TPU and GPU compilers choose well by themselves.

  Args:
    x: any tree of arrays.
  """
  return jax.lax.platform_dependent(x, cpu=jax.lax.optimization_barrier, default=lambda x: x)
