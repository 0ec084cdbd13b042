"""Rewiring: the same function, the most important heads and neurons first."""

import dataclasses
import functools

import jax
import numpy as np
import pytest
from ragged import ENCODERS, IDS, MASK, masked, random_tree, run

from compactlm_jax.compress.rewire import rewire
from compactlm_jax.compress.shrink import shrink
from compactlm_jax.compress.subnet import subnet, subnet_config
from compactlm_jax.config import Cell
from compactlm_jax.errors import ConfigError, NumericsError
from compactlm_jax.nn.encoder import encoder_shapes
from compactlm_jax.tree import named_leaves


@functools.cache
def drawn(name):
  """(configuration, parameters on the host, importance of heads, of neurons); 8 neurons, all values different."""
  config = dataclasses.replace(ENCODERS[name], intermediate_size=8)
  rng = np.random.default_rng(4)
  heads, neurons = (np.stack([rng.permutation(n) for _ in range(3)]).astype(np.float32) for n in (config.num_heads, 8))
  heads[0] = np.arange(config.num_heads)  # whatever was drawn, the first layer turns round
  return config, jax.tree.map(np.asarray, random_tree(config)), heads, neurons


def order_of(importance, groups=1):
  """By Python's sort: numbers of the pieces in their new order, each group for itself."""
  size = len(importance) // groups
  return [i for g in range(groups) for i in sorted(range(g * size, (g + 1) * size), key=lambda i: -importance[i])]


def of_heads(order, width):
  return [head * width + i for head in order for i in range(width)]


@pytest.mark.parametrize('name', ENCODERS)
def test_every_parameter_is_the_indexed_one(name):
  """Mutation: leave the columns of taps; sort the second branch of the output otherwise; neurons across groups."""
  config, params, heads, neurons = drawn(name)
  before, after = (named_leaves(t['encoder']['layers']) for t in (params, rewire(params, config, heads, neurons)))
  for n in range(3):
    order, ffn = order_of(heads[n]), order_of(neurons[n], config.num_groups)
    channels, taps = of_heads(order, config.head_size), of_heads(order, config.conv_kernel_size)
    second = [config.num_heads * config.head_size + i for i in channels]
    for leaf in before:
      old, new = before[leaf][n], after[leaf][n]
      if leaf == 'attention/output/kernel':
        old = old[channels + second * (len(old) > len(channels))]
      elif leaf.startswith('attention/conv/taps/'):
        old = old[channels][:, taps] if leaf.endswith('kernel') else old[taps]
      elif leaf.startswith('attention/') and leaf not in ('attention/output/bias', 'attention/conv/depthwise/kernel'):
        old = old[..., channels]
      elif leaf == 'ffn_in/bias':
        old = old[ffn]
      elif leaf in ('ffn_in/kernel', 'ffn_out/kernel'):
        rows = leaf == 'ffn_out/kernel'
        size = 8 // config.num_groups
        for g in range(config.num_groups):
          own = [i - g * size for i in ffn[g * size : (g + 1) * size]]
          part, found = (old, new) if config.num_groups == 1 else (old[g], new[g])
          np.testing.assert_array_equal(found, part[own] if rows else part[:, own], err_msg=leaf)
        continue
      np.testing.assert_array_equal(new, old, err_msg=leaf)


@pytest.mark.parametrize('name', ['bert', 'convbert grouped'])
def test_the_function_stays(name):
  """Bit-equal up to permutation: queries, keys and values of the first layer, head by head. Outputs up to rounding,
  since sums over heads and neurons run in another order.

  Mutation: sort the values and not the rows of the output.
  """
  config, params, heads, neurons = drawn(name)
  small = jax.tree.map(lambda leaf: 0.2 * leaf, params)
  sorted_ = rewire(small, config, heads, neurons)
  old, new = (run(tree, config, IDS, MASK, all_hidden=True, qkv_layers=(1,)) for tree in (small, sorted_))
  order = order_of(heads[0])
  for part in ('q_BTHK', 'k_BTHK', 'v_BTHK'):
    before, after = (np.asarray(getattr(out.qkv[0], part)) for out in (old, new))
    np.testing.assert_array_equal(after, before[:, :, order])
    assert not np.array_equal(after, before)
  np.testing.assert_allclose(new.hidden_NBTD, old.hidden_NBTD, rtol=0, atol=1e-6)
  if config.pooler:
    np.testing.assert_allclose(new.pooled_BD, old.pooled_BD, rtol=0, atol=1e-6)


def test_rewiring_back_gives_the_same_bits_on_host_and_device():
  """Mutation: normalise, average or recompute anything on the way."""
  config, params, heads, neurons = drawn('convbert grouped')
  there = jax.jit(lambda tree: rewire(tree, config, heads, neurons))(params)
  assert jax.tree.all(jax.tree.map(np.array_equal, there, rewire(params, config, heads, neurons)))
  numbers = [-np.array([order_of(row, g) for row in x], np.float32) for x, g in ((heads, 1), (neurons, 2))]
  back = rewire(jax.tree.map(np.asarray, there), config, *numbers)
  assert jax.tree.all(jax.tree.map(np.array_equal, back, params))


def test_equal_importance_changes_nothing():
  """Mutation: an unstable sort, or the reverse of an ascending one."""
  config, params, heads, neurons = drawn('bert')
  same = rewire(params, config, np.ones_like(heads), np.zeros_like(neurons))
  assert jax.tree.all(jax.tree.map(np.array_equal, same, params))
  two = np.array([[1, 2, 1, 2]] * 3)
  first = rewire({**params, 'classifier': {}}, config, two, neurons)['encoder']['layers']['attention']['query']['bias']
  expected = params['encoder']['layers']['attention']['query']['bias'][:, of_heads([1, 3, 0, 2], config.head_size)]
  np.testing.assert_array_equal(first, expected)
  wide = dataclasses.replace(config, intermediate_size=200)  # many equals: a short sort is stable whatever its kind
  tree = jax.tree.map(lambda like: np.zeros(like.shape, np.float32), encoder_shapes(wide))
  tree['encoder']['layers']['ffn_in']['bias'] = np.tile(np.arange(200.0), (3, 1))
  found = rewire(tree, wide, heads, np.tile(np.arange(200) % 2, (3, 1)))['encoder']['layers']['ffn_in']['bias']
  np.testing.assert_array_equal(found, np.tile([*range(1, 200, 2), *range(0, 200, 2)], (3, 1)))


def test_a_sub_network_of_the_rewired_one_keeps_the_best():
  """It is the network before with the less important half of heads and of each group's neurons masked.

  Mutation: sort ascending.
  """
  config, params, heads, neurons = drawn('convbert grouped')
  best = rewire(params, config, heads, neurons)
  groups = neurons.reshape(3, 2, 4)
  masks = {
    'encoder/layers/attention/heads': heads >= np.sort(heads)[:, 1:],
    'encoder/layers/neurons': (groups >= np.sort(groups)[..., 2:3]).reshape(3, 8),
  }
  kept = [x[mask].reshape(3, -1) for x, mask in zip((heads, neurons), masks.values())]
  half, smaller = shrink(masked(params, config, masks), config)
  found = subnet(best, config, Cell(0.5))
  assert smaller == subnet_config(config, Cell(0.5))
  assert jax.tree.all(jax.tree.map(np.array_equal, found, rewire(half, smaller, *kept)))


def test_what_cannot_be_sorted():
  """Mutation: let NaN sort to either end, or broadcast importance of one layer."""
  config, params, heads, neurons = drawn('bert')
  with pytest.raises(NumericsError, match='importance of heads: not finite'):
    rewire(params, config, np.where(heads > 2, np.nan, heads), neurons)
  with pytest.raises(ConfigError, match=r'importance of neurons: shape \(1, 8\), expected \(3, 8\)'):
    rewire(params, config, heads, neurons[:1])
  with pytest.raises(ConfigError, match='parameter scores'):
    rewire({**params, 'scores': {}}, config, heads, neurons)
  with pytest.raises(ConfigError, match='adapt.rewire: the layers of the encoder differ'):
    rewire(params, dataclasses.replace(config, heads_per_layer=(4, 2, 4)), heads, neurons)
