"""Maps of one sentence: attention against the formula, kernels against what the convolution does with them."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from compactlm_jax.analysis.maps import Maps, cut_heads, matched_heads, sentence_maps
from compactlm_jax.analysis.statistics import analysed
from compactlm_jax.compress.subnet import subnet_config
from compactlm_jax.config import Cell, EncoderConfig
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


def test_heads_that_are_left_are_compared_with_those_of_their_own_layer():
  """Two of four layers (the first and the third) and one of three heads, which mixes two of them: half of each.

  Mutations: the first two layers; overlap of keys in place of queries; rows and columns exchanged.
  """
  rng = np.random.default_rng(0)
  before = rng.dirichlet(np.full(5, 0.05), (4, 3, 5))  # [N, H, T, T]: each query has a key or two of its own
  mixed = 0.5 * before[[0, 2], 0] + 0.5 * before[[0, 2], 2]
  after = np.stack([mixed, before[[0, 2], 1]], 1)
  blank = np.zeros((4, 5, 5))
  found = matched_heads(Maps(before, blank), Maps(after, blank[:2]))
  assert [(match.layer, match.small_layer) for match in found] == [(1, 1), (3, 2)]
  for match in found:
    for head, other in np.ndindex(2, 3):
      own, whole = after[match.small_layer - 1, head], before[match.layer - 1, other]
      shared = np.mean([sum(min(p, q) for p, q in zip(*rows)) for rows in zip(own, whole)])
      np.testing.assert_allclose(match.overlap_gH[head, other], shared, rtol=1e-6)
    assert match.overlap_gH[1].argmax() == 1 and match.overlap_gH[1, 1] == pytest.approx(1)
    assert min(match.overlap_gH[0, [0, 2]]) >= 0.5 - 1e-9 > match.overlap_gH[0, 1]


def test_what_could_have_been_cut_out_of_what():
  """Mutations: equal sizes; layers alone; heads of another size; more layers, neurons or, in one layer, heads; any
  hidden size."""
  full = EncoderConfig(hidden_size=16, num_layers=4, num_heads=4, vocab_size=40, max_positions=8)

  def changed(**fields):
    return dataclasses.replace(full, **fields)

  assert cut_heads(full, changed(num_heads=2)) and cut_heads(full, changed(num_heads=2, num_layers=3))
  assert cut_heads(full, subnet_config(full, Cell(0.5, 0.5))) and cut_heads(full, subnet_config(full, Cell(0.5, 1, 8)))
  assert not cut_heads(full, full) and not cut_heads(changed(num_heads=2), full)
  assert not cut_heads(full, changed(num_layers=3))
  assert not cut_heads(full, changed(num_heads=2, head_size=8))
  assert not cut_heads(full, changed(num_heads=2, num_layers=5))
  assert not cut_heads(full, changed(num_heads=2, intermediate_size=65))
  assert not cut_heads(full, changed(num_heads=2, hidden_size=12)) and not cut_heads(
    full, changed(num_heads=2, hidden_size=8)
  )
  student = EncoderConfig(hidden_size=12, num_layers=2, num_heads=2, head_size=4, vocab_size=40, max_positions=8)
  assert not cut_heads(full, student) and not cut_heads(changed(hidden_size=8, num_heads=8), full)


def test_layers_of_different_sizes_may_have_been_cut():
  """Mutations: the largest layer alone; a layer that gained heads."""
  full = EncoderConfig(hidden_size=16, num_layers=3, num_heads=4, vocab_size=40, max_positions=8)
  ragged = dataclasses.replace(full, heads_per_layer=(4, 1, 0))
  assert cut_heads(full, ragged) and not cut_heads(ragged, full) and not cut_heads(ragged, ragged)
  assert cut_heads(ragged, dataclasses.replace(full, heads_per_layer=(4, 0, 0)))
  assert not cut_heads(ragged, dataclasses.replace(full, heads_per_layer=(1, 2, 0)))
