"""Shrinking under arbitrary zeros, against a layer written out in NumPy."""

import dataclasses
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from ragged import ENCODERS

from compactlm_jax.compress.shrink import padded, shrink
from compactlm_jax.compress.structure import kernel_shapes
from compactlm_jax.config import stack_names
from compactlm_jax.nn.encoder import encoder_shapes
from compactlm_jax.tree import named_leaves, nested

ONE = {
  name: dataclasses.replace(ENCODERS[name], num_layers=1)
  for name in ('bert', 'convbert', 'convbert grouped', 'dynamic', 'convolution only')
}
REAL = np.array([1, 1, 1, 1, 0])  # one row, its last position is padding


def softmax(x):
  e = np.exp(x - x.max())
  return e / e.sum()


def sublayers(x, p, config):
  """Mixed attention and feed-forward of one layer on x [T, D], position by position, in float64."""
  size, taps, width = config.head_size, config.conv_kernel_size, config.hidden_size

  def dense(name, h):
    return h @ p[name + '/kernel'] + p[name + '/bias']

  length, merged = len(x), []
  heads = p['attention/query/bias'].size // size if 'attention/query/bias' in p else 0
  if heads and config.self_attention:
    q, k, v = (dense(f'attention/{name}', x).reshape(length, heads, size) for name in ('query', 'key', 'value'))
    hidden = np.where(REAL > 0, 0, -np.inf)
    for h in range(heads):
      merged += [np.stack([softmax(q[t, h] @ k[:, h].T / math.sqrt(size) + hidden) @ v[:, h] for t in range(length)])]
  if heads and taps:
    made = dense('attention/query', x)
    around = np.pad(x * REAL[:, None], ((taps // 2, taps // 2), (0, 0)))
    if config.conv_kind == 'span':
      depthwise = p['attention/conv/depthwise/kernel']
      made = made * dense(
        'attention/conv/pointwise', np.stack([(around[t : t + taps] * depthwise).sum(0) for t in range(length)])
      )
    logits = dense('attention/conv/taps', made).reshape(length, heads, taps)
    values = dense('attention/conv/value', x) * REAL[:, None]
    values = np.pad(values, ((taps // 2, taps // 2), (0, 0))).reshape(-1, heads, size)
    for h in range(heads):
      merged += [np.stack([softmax(logits[t, h]) @ values[t : t + taps, h] for t in range(length)])]
  attended = np.concatenate(merged, 1) @ p['attention/output/kernel'] if merged else np.zeros((length, width))
  out = np.tile(p['ffn_out/bias'], (length, 1))
  if 'ffn_in/kernel' in p:
    into, onto = (
      p[f'ffn_{name}/kernel'].reshape(config.num_groups, -1, p[f'ffn_{name}/kernel'].shape[-1])
      for name in ('in', 'out')
    )
    for g, part in enumerate(np.split(np.arange(width), config.num_groups)):
      h = x[:, part] @ into[g] + np.split(p['ffn_in/bias'], config.num_groups)[g]
      out[:, part] += (0.5 * h * (1 + np.vectorize(math.erf)(h / math.sqrt(2)))) @ onto[g]
  return attended + p['attention/output/bias'], out


def layer_of(params, config):
  """Parameters of the only layer, in float64."""
  (stack,) = stack_names(config)
  leaves = named_leaves(params['encoder'][stack])
  return {name: np.asarray(leaf[0], np.float64) for name, leaf in leaves.items()}


def tree_with_zeros(config, seed):
  """Random parameters, in which rows, columns and biases are zero as if by pruning of all kinds."""
  rng = np.random.default_rng(seed)
  leaves = {
    name: rng.standard_normal(leaf.shape).astype(np.float32)
    for name, leaf in named_leaves(encoder_shapes(config)).items()
  }
  share = rng.uniform(0, 1, 3)
  for name in kernel_shapes(config):
    kernel, bias = leaves[name], leaves[name.removesuffix('kernel') + 'bias']
    if 'taps' in name:
      kernel *= rng.random(kernel.shape) > share[0]
      continue
    kernel *= rng.random(kernel.shape[:-1] + (1,)) > share[1]  # rows
    columns = rng.random((*kernel.shape[:-2], 1, kernel.shape[-1])) > share[2]
    kernel *= columns
    if 'out' not in name:
      bias *= columns.reshape(bias.shape) | (rng.random(bias.shape) > 0.5)
  return nested(leaves)


@pytest.mark.parametrize('name', ONE)
@settings(max_examples=100, deadline=None, derandomize=True)
@given(seed=st.integers(0, 2**31))
def test_any_zeros_leave_the_function_as_it_was(name, seed):
  """Mutation: take a product for constant if one factor is; ignore what the taps of other heads read."""
  config = ONE[name]
  params = tree_with_zeros(config, seed)
  small, smaller = shrink(params, config)
  x = np.random.default_rng(seed).standard_normal((5, config.hidden_size))
  wanted = sublayers(x, layer_of(params, config), config)
  for tree, its in ((small, smaller), padded(small, smaller)):
    for found, reference in zip(sublayers(x, layer_of(tree, its), its), wanted):
      np.testing.assert_allclose(found, reference, rtol=1e-5, atol=1e-5)
  again, same = shrink(small, smaller)
  assert same == smaller and again is small
