"""Maps of one sentence: attention against the formula, kernels against what the convolution does with them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from compactlm_jax.analysis.maps import sentence_maps
from compactlm_jax.analysis.statistics import analysed
from compactlm_jax.config import EncoderConfig
from compactlm_jax.nn.attention import SpanDynamicConv
from compactlm_jax.nn.encoder import encode, encoder_shapes
from compactlm_jax.tree import map_named

SIZES = {'hidden_size': 16, 'vocab_size': 40, 'max_positions': 16, 'conv_kernel_size': 5}
IDS = [3, 9, 9, 27, 14, 30, 8]


def make(num_layers=2, **fields):
  config = EncoderConfig.mixed(heads=4, head_ratio=2, num_layers=num_layers, **SIZES, **fields)
  rng = np.random.default_rng(0)
  shapes = encoder_shapes(config)
  return analysed(
    map_named(lambda _, leaf: jnp.asarray(0.4 * rng.normal(size=leaf.shape), jnp.float32), shapes), config
  )


@pytest.mark.parametrize(('layers', 'causal'), [(2, False), (1, True)])
def test_kernels_are_those_that_the_convolution_applies(layers, causal):
  """Each layer's own; out = sum of tap * value, in loops. Mutations: kernels of the first layer; taps back to front."""
  model = make(layers, causal=causal)
  config, ids = model.config, jnp.asarray([IDS])
  taps = sentence_maps(model, IDS).taps_NHTW
  out = jax.jit(lambda p: encode(p, config, ids, all_hidden=True, qkv_layers=(1, 2)[:layers]))(model.params)
  back = 4 if causal else 2
  for layer in range(layers):
    own = jax.tree.map(lambda leaf: leaf[layer], model.params['encoder']['layers']['attention']['conv'])  # noqa: B023
    x = out.hidden_NBTD[layer]
    want = SpanDynamicConv(config).apply({'params': own}, x, out.qkv[layer].q_BTHK, jnp.ones_like(ids))[0]
    values = np.asarray(x[0] @ own['value']['kernel'] + own['value']['bias'][None]).reshape(len(IDS), 2, 4)
    got = np.zeros_like(want)
    for head, t, j in np.ndindex(taps.shape[1:]):
      read = t + j - back
      assert np.isnan(taps[layer, head, t, j]) == (not 0 <= read < len(IDS))
      if 0 <= read < len(IDS):
        got[t, head] += taps[layer, head, t, j] * values[read, head]
    np.testing.assert_allclose(got, want, rtol=1e-3, atol=1e-5)


def test_attention_and_value_relations_are_distributions_of_the_formula():
  """Mutation: value relations of queries."""
  model = make(1)
  maps = sentence_maps(model, IDS)
  qkv = jax.jit(lambda p: encode(p, model.config, jnp.asarray([IDS]), qkv_layers=(1,)).qkv[0])(model.params)
  for left, right, got in (
    (qkv.q_BTHK, qkv.k_BTHK, maps.attention_NHTT[0]),
    (qkv.v_BTHK, qkv.v_BTHK, maps.values_NTT[0]),
  ):
    e = np.exp(np.einsum('thk,shk->hts', left[0], right[0]) / 2)
    want = e / e.sum(-1, keepdims=True)
    np.testing.assert_allclose(got, want if got.ndim == 3 else want.mean(0), rtol=1e-4)


def test_a_model_without_convolution_has_no_kernels():
  config = EncoderConfig(hidden_size=8, num_layers=1, num_heads=2, vocab_size=40, max_positions=8)
  params = map_named(lambda _, leaf: jnp.ones(leaf.shape), encoder_shapes(config))
  assert sentence_maps(analysed(params, config), [1, 2]).taps_NHTW is None
