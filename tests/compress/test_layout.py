"""The axes of parameters: every parameter of every encoder has them, in its shape, and folding loses nothing."""

import math

import jax
import numpy as np
import pytest
from ragged import ENCODERS

from compactlm_jax.compress.layout import LAYERS, checked_leaves, folded, layer_axes, outer_axes, places, unfolded
from compactlm_jax.errors import ConfigError
from compactlm_jax.nn.encoder import encoder_shapes
from compactlm_jax.tree import named_leaves


@pytest.mark.parametrize('name', ENCODERS)
def test_letters_multiply_to_the_shape_of_every_parameter(name):
  """Mutation: exchange two letters of different sizes in any row of the tables, or leave a row out."""
  config = ENCODERS[name]
  sizes = {
    'B': config.branches,
    'H': config.num_heads,
    'K': config.head_size,
    'W': config.conv_kernel_size,
    'G': config.num_groups,
    'F': config.intermediate_size // config.num_groups,
    'd': config.hidden_size // config.num_groups,
    'D': config.hidden_size,
    'E': config.embedding_size,
  }
  for leaf, like in named_leaves(encoder_shapes(config)).items():
    stacked = leaf.startswith(LAYERS)
    axes = layer_axes(leaf.removeprefix(LAYERS), config) if stacked else outer_axes(leaf)
    shape = like.shape[stacked:]
    assert len(axes) == len(shape), leaf
    for letters, size in zip(axes, shape):
      assert letters == '.' or math.prod(sizes[letter] for letter in letters) == size, (leaf, letters)
    values = np.arange(math.prod(like.shape)).reshape(like.shape)
    parts = folded(values, axes, config, stacked=stacked)
    expected = [size if letters == '.' else sizes[x] for letters, size in zip(axes, shape) for x in letters]
    assert parts.shape == (*like.shape[:stacked], *expected)
    np.testing.assert_array_equal(unfolded(parts, axes, stacked=stacked), values)


def test_places_of_letters():
  """Mutation: count from 0 in a stack."""
  assert places(('HK', 'HW'), 'H') == (0, 2)
  assert places(('HK', 'HW'), 'H', stacked=True) == (1, 3)
  assert places(('D', 'HK'), 'F') == ()


def test_folding_counts_heads_by_the_parameter_and_not_by_the_configuration():
  """Mutation: take the number of heads from the configuration."""
  config = ENCODERS['convbert grouped']  # 2 heads of 2 channels in 2 branches
  rows = np.arange(6 * 2 * 2 * 8).reshape(-1, 8)
  assert folded(rows, layer_axes('attention/output/kernel', config), config).shape == (2, 6, 2, 8)


def test_unknown_parameters_and_wrong_trees_are_refused():
  config = ENCODERS['bert']
  with pytest.raises(ConfigError, match='encoder/layers/attention/gate/kernel: the layers .* nothing of this name'):
    layer_axes('attention/gate/kernel', config)
  with pytest.raises(ConfigError, match='parameter head/kernel: what its axes are made of'):
    outer_axes('head/kernel')
  params = jax.tree.map(lambda leaf: np.zeros(leaf.shape), encoder_shapes(config))
  assert set(checked_leaves(params, config)) == set(named_leaves(params['encoder']))
  del params['encoder']['layers']['ffn_out']
  with pytest.raises(ConfigError, match='ffn_out/kernel: it is missing, expected'):
    checked_leaves(params, config)
