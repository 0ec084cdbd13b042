"""One loss over many sub-networks: each cell's gradient is made at once and added up, so that memory is one cell's."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from compactlm_jax.config import AdaptConfig, Cell, EncoderConfig
from compactlm_jax.nn.encoder import look_up
from compactlm_jax.tree import nested, overlaid
from compactlm_jax.types import Batch, LossFn, Metrics, Params

CellLoss = Callable[[Any, Any, Any, Batch, jax.Array, jax.Array], tuple[jax.Array, Metrics]]
"""loss(read, shared, frozen, batch, key, step) -> (value, metrics), of one sub-network.

`read` is what `over_cells(read=...)` makes of the parameters, `shared` what its `share` gives. Metrics have the same
names in every cell.
"""

Read = Callable[[Params, Batch, Any], Any]
"""read(params, batch, shared) -> what the cells read in place of the parameters (a tree of floats)."""

_WORD = 'encoder/embeddings/word/embedding'

Share = Callable[[Params, Any, Batch, jax.Array, jax.Array], tuple[jax.Array, Metrics, Any]]
"""share(params, frozen, batch, key, step) -> (a loss of its own, its metrics, what all cells are given)."""


def over_cells(
  losses: Mapping[Cell, CellLoss], config: AdaptConfig, *, read: Read | None = None, share: Share | None = None
) -> LossFn:
  """The sum or mean of the losses of cells, of all or of a sandwich of them (`config.sampling`, `config.combine`).

  The value and the gradient of a cell are computed together, one cell after another: activations of one cell are alive
  at a time, and all of it is one program. A sandwich is the first cell, the last, and `random_cells` of the others,
  drawn without replacement by the key of the step, which is the same on every device; the cells that are not drawn
  cost nothing, and nothing is compiled anew.

  Metrics are means over the cells of the step, with 'loss_full' (the first cell's), 'loss_smallest' (the last's) and
  those of `share`.

  Args:
    losses: the cells, the full network first, the smallest last.
    config: which of them a step trains, and how they are combined.
    read: computed, and its gradient pulled back, once per step (an embedding lookup); None reads the parameters.
    share: computed once per step (a teacher's forward pass; a generator and its loss). No gradient flows from the cells
      into what it shares; its own loss is added to that of the cells. None shares None.
  """
  functions = tuple(losses.values())

  def loss(params: Params, frozen: Any, batch: Batch, key: jax.Array, step: jax.Array) -> tuple[jax.Array, Metrics]:
    params, attached = jax.lax.stop_gradient(params), params
    keys = jax.random.split(key, len(functions) + 2)
    base, found, shared, grads = _shared(share, params, frozen, batch, keys[-1], step)
    tree, pull_back = jax.vjp(lambda p: p if read is None else read(p, batch, shared), params)

    def add(index: int, total: Any) -> tuple[Any, Any]:
      args = (shared, frozen, batch, keys[index], step)
      out, grad = jax.value_and_grad(functions[index], has_aux=True)(tree, *args)
      return jax.tree.map(jnp.add, total, grad), out

    # A loop, although every cell is a branch of its own: it alone makes the compiler finish a cell before the next
    # one, on every backend (XLA:CPU drops barriers before it puts operations in order).
    branches = [functools.partial(add, index) for index in range(len(functions))]
    indices = _chosen(config, len(functions), keys[-2])
    zeros = jax.tree.map(jnp.zeros_like, tree)
    total, (values, metrics) = jax.lax.scan(lambda total, i: jax.lax.switch(i, branches, total), zeros, indices)
    scale = 1.0 / len(values) if config.combine == 'mean' else 1.0
    (grad,) = pull_back(jax.tree.map(lambda leaf: scale * leaf, total))
    value = _attached(attached, base + scale * values.sum(), jax.tree.map(jnp.add, grads, grad) if share else grad)
    means = {name: each.mean() for name, each in metrics.items()}
    return value, {**means, 'loss_full': values[0], 'loss_smallest': values[-1], **found}

  return loss


def _chosen(config: AdaptConfig, count: int, key: jax.Array) -> jax.Array:
  """Numbers of the cells of a step, of `count` there are."""
  if config.sampling == 'all' or config.random_cells >= count - 2:
    return jnp.arange(count)
  others = 1 + jax.random.permutation(key, count - 2)[: config.random_cells]
  return jnp.concatenate([jnp.array([0]), others, jnp.array([count - 1])])


def with_rows(params: Params, encoder: EncoderConfig, input_ids: jax.Array) -> Params:
  """Parameters with the rows of a batch, [B * T, E], in place of the word table: looked up once for all cells.

  A step then adds one gradient to the table, and not one for each cell.

  Args:
    params: a tree with 'encoder'.
    encoder: the full network.
    input_ids: tokens [B, T] that all cells read.
  """
  rows_BTE = look_up(params, encoder, input_ids)
  return overlaid(params, nested({_WORD: rows_BTE.reshape(-1, rows_BTE.shape[-1])}))


def rows_of(params: Params, input_ids: jax.Array) -> Float[Array, 'B T E']:
  """The rows of `with_rows` in a sub-network of its tree, for `encode(word_BTE=...)`.

  Args:
    params: parameters of a cell.
    input_ids: the tokens [B, T] that they are rows of.
  """
  return params['encoder']['embeddings']['word']['embedding'].reshape(*input_ids.shape, -1)


def _shared(share: Share | None, params: Params, *args: Any) -> tuple[jax.Array, Metrics, Any, Any]:
  """(value, metrics, what is shared, gradient or None) of `share`."""
  if share is None:
    return jnp.float32(0.0), {}, None, None

  def run(params: Params) -> tuple[jax.Array, Any]:
    value, metrics, shared = share(params, *args)
    return jnp.asarray(value, jnp.float32), (metrics, jax.lax.stop_gradient(shared))

  (value, (metrics, shared)), grads = jax.value_and_grad(run, has_aux=True)(params)
  return value, metrics, shared, grads


@jax.custom_vjp
def _attached(params: Params, value: jax.Array, grads: Params) -> jax.Array:
  """`value`, a function of `params` whose gradient is known."""
  return value


_attached.defvjp(
  lambda params, value, grads: (value, grads),
  lambda grads, g: (jax.tree.map(lambda leaf: g * leaf, grads), None, None),
)
