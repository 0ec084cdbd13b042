"""How much each head and feed-forward neuron matters to a loss, from its gradient: the first order of what is lost.

A head's importance is the derivative of the loss by a mask of ones on the heads. With out = sum_h mask_h context_h W_h,
W_h the rows of head h in the output projection, that derivative is the inner product of W_h and its gradient, exactly;
so that no mask is needed in the model. A neuron's is |sum W1 dW1 + b1 db1| + |sum W2 dW2| over its column and bias of
`ffn_in` and its row of `ffn_out`. Absolute values are taken per batch, then added up (Hou et al. 2020,
huawei-noah/Pretrained-Language-Model `DynaBERT/run_glue.py: compute_neuron_head_importance`).

ConvBERT's head h is one head: one mask multiplies what both of its branches bring to the output projection. That its
query also enters the convolution kernels of the other heads does not count: such a mask leaves them alone.
"""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float

from compactlm_jax.compress.layout import LAYERS, checked_leaves, folded, layer_axes
from compactlm_jax.config import EncoderConfig
from compactlm_jax.errors import ConfigError
from compactlm_jax.types import Params, struct


@struct
class _Terms:
  """Inner products of parameters with a gradient; linear in the gradient, so that they add up over batches as it does.

  Attributes:
    heads_NH: over the rows of the output projection.
    into_NF: over the columns and biases of `ffn_in`; neurons in the order of the model, group after group.
    onto_NF: over the rows of `ffn_out`.
  """

  heads_NH: Float[Array, 'N H']
  into_NF: Float[Array, 'N F']
  onto_NF: Float[Array, 'N F']


@struct
class Importance:
  """Importance of heads and neurons over the batches so far.

  Attributes:
    heads_NH: of heads, not negative.
    neurons_NF: of neurons, not negative.
    running: sums over the batches so far without absolute values: what the published sum adds each time.
  """

  heads_NH: Float[Array, 'N H']
  neurons_NF: Float[Array, 'N F']
  running: _Terms


def no_importance(encoder: EncoderConfig) -> Importance:
  """The sum over no batch, to start from.

  Args:
    encoder: an encoder whose layers are of equal size.
  """
  heads_NH = jnp.zeros((encoder.num_layers, encoder.num_heads))
  neurons_NF = jnp.zeros((encoder.num_layers, encoder.intermediate_size))
  return Importance(heads_NH, neurons_NF, _Terms(heads_NH, neurons_NF, neurons_NF))


def add_importance(
  total: Importance, params: Params, grads: Params, encoder: EncoderConfig, importance_sum: str = 'cleared'
) -> Importance:
  """The sum with one more batch. Works under `jax.jit`, `encoder` and `importance_sum` static.

  The original never clears gradients between batches, so that batch i adds the importance by the gradient of batches 1
  to i. These products are linear in the gradient: the sum is kept of them and not of whole gradients.

  Args:
    total: over the batches before; `no_importance` for none.
    params: a tree with 'encoder', the same for all batches.
    grads: the gradient of this batch's loss by it.
    encoder: its configuration.
    importance_sum: 'cleared' for each batch's own gradient, 'published' for the running sum.

  Raises:
    ConfigError: another `importance_sum`, an encoder whose layers differ in size, scores in the tree, or shapes that
      are not the encoder's.
  """
  if importance_sum not in ('cleared', 'published'):
    raise ConfigError(f"config.adapt.importance_sum: {importance_sum!r}; use 'cleared' or 'published'")
  new, old = _terms(params, grads, encoder), total.running
  running = _Terms(old.heads_NH + new.heads_NH, old.into_NF + new.into_NF, old.onto_NF + new.onto_NF)
  counted = running if importance_sum == 'published' else new
  return Importance(total.heads_NH + jnp.abs(counted.heads_NH), total.neurons_NF + _neurons(counted), running)


def _neurons(terms: _Terms) -> Float[Array, 'N F']:
  return jnp.abs(terms.into_NF) + jnp.abs(terms.onto_NF)


def _terms(params: Params, grads: Params, encoder: EncoderConfig) -> _Terms:
  if encoder.ragged:
    raise ConfigError('config.adapt.rewire: the layers of the encoder differ in size; take the padded export of it')
  weights, slopes = checked_leaves(params, encoder), checked_leaves(grads, encoder)

  def product(name: str) -> Any:
    """Parameter times gradient, folded, behind the axis of layers."""
    leaves = [jnp.asarray(tree[LAYERS.removeprefix('encoder/') + name], jnp.float32) for tree in (weights, slopes)]
    return folded(leaves[0] * leaves[1], layer_axes(name, encoder), encoder, stacked=True)

  shape = (encoder.num_layers, encoder.intermediate_size)
  return _Terms(
    heads_NH=product('attention/output/kernel').sum((1, 3, 4)),  # [N, B, H, K, D]
    into_NF=(product('ffn_in/kernel').sum(2) + product('ffn_in/bias')).reshape(shape),  # [N, G, d, F], [N, G, F]
    onto_NF=product('ffn_out/kernel').sum(3).reshape(shape),  # [N, G, F, d]
  )
