"""Masks from scores and the straight-through estimator."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from compactlm_jax.config import EncoderConfig
from compactlm_jax.nn.layers import GroupedDense, MaskedDense
from compactlm_jax.ops.masks import masked_weight, top_fraction_mask


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(-3, 3), min_size=1, max_size=50), st.floats(0, 1))
def test_the_count_is_exact_with_ties(values, density):
  """Mutation: keep every score >= the threshold."""
  scores = np.array(values, np.float32)
  mask = np.asarray(top_fraction_mask(jnp.asarray(scores), np.float32(density)))
  keep = int(np.floor(np.float32(density) * np.float32(len(values))))
  assert mask.sum() == keep
  assert set(np.unique(mask)) <= {0.0, 1.0}
  if 0 < keep < len(values):
    assert scores[mask == 1].min() >= scores[mask == 0].max()


def test_straight_through_gradients():
  """dL/dS = dL/dW' * W everywhere, dL/dW = dL/dW' * M. Mutation: multiply the former by the mask."""
  rng = np.random.default_rng(0)
  w, s, g = (jnp.asarray(rng.normal(size=(4, 5)).astype('f4')) for _ in range(3))
  mask = top_fraction_mask(s, 0.3)
  gw, gs = jax.grad(lambda w, s: (masked_weight(w, s, top_fraction_mask(s, 0.3)) * g).sum(), argnums=(0, 1))(w, s)
  np.testing.assert_array_equal(gs, g * w)
  np.testing.assert_array_equal(gw, g * mask)


def test_masked_dense_without_scores_is_dense_bit_for_bit():
  config, x = EncoderConfig(), jax.random.normal(jax.random.key(0), (3, 7, 8))
  layer = MaskedDense(5, config, mask_fn=lambda s: top_fraction_mask(s, 0.5))
  variables = layer.init(jax.random.key(1), x)
  np.testing.assert_array_equal(layer.apply(variables, x), nn.Dense(5).apply(variables, x))


def test_masked_dense_with_scores_drops_the_lowest():
  config, x = EncoderConfig(), jax.random.normal(jax.random.key(0), (2, 8))
  layer = MaskedDense(5, config, mask_fn=lambda s: top_fraction_mask(s, 0.5))
  params = layer.init(jax.random.key(1), x)['params']
  scores = jax.random.normal(jax.random.key(2), (8, 5))
  got = layer.apply({'params': params, 'scores': {'kernel': scores}}, x)
  kernel = np.where(np.asarray(scores) >= np.sort(np.asarray(scores).ravel())[20], params['kernel'], 0)
  np.testing.assert_allclose(got, np.asarray(x) @ kernel, atol=1e-5)


def test_grouped_dense_is_a_block_diagonal_dense():
  """Mutation: interleave the groups (channel shuffle)."""
  x = jax.random.normal(jax.random.key(0), (2, 3, 8))
  layer = GroupedDense(12, 4, EncoderConfig())
  params = layer.init(jax.random.key(1), x)['params']
  dense = np.zeros((8, 12), 'f4')
  for g in range(4):
    dense[2 * g : 2 * g + 2, 3 * g : 3 * g + 3] = params['kernel'][g]
  np.testing.assert_allclose(layer.apply({'params': params}, x), np.asarray(x) @ dense, atol=1e-6)
