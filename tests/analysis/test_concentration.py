"""Concentration of attention against loops, and its limits."""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from compactlm_jax.analysis.concentration import (
  AttentionMass,
  attention_mass,
  attention_probabilities,
  concentration,
)
from compactlm_jax.config import EncoderConfig
from compactlm_jax.errors import ConfigError
from compactlm_jax.nn.encoder import encode, encoder_shapes
from compactlm_jax.ops.attention import attention, mask_bias
from compactlm_jax.tree import map_named
from compactlm_jax.types import QKV

PLAIN = EncoderConfig(vocab_size=40, hidden_size=16, num_layers=2, num_heads=2, max_positions=16, scan_unroll=1)
MIXED = EncoderConfig.mixed(
  heads=4, head_ratio=2, hidden_size=16, num_layers=2, vocab_size=40, max_positions=16, scan_unroll=1
)
LENGTHS = np.array([14, 9, 3, 1])

# The programs run for milliseconds and compile for seconds: no optimisation.
fast_jit = functools.partial(jax.jit, compiler_options={'xla_backend_optimization_level': 0})


measure = fast_jit(attention_mass, static_argnums=1, static_argnames='radius')


def random_params(config):
  rng = np.random.default_rng(0)
  return map_named(lambda name, leaf: jnp.asarray(rng.normal(size=leaf.shape), jnp.float32), encoder_shapes(config))


@pytest.fixture(scope='module')
def rows():
  mask = (np.arange(14) < LENGTHS[:, None]).astype(np.int32)
  ids = np.random.default_rng(1).integers(1, 40, size=mask.shape).astype(np.int32) * mask
  return jnp.asarray(ids), jnp.asarray(mask)


def by_loops(q, k, length, radius, causal):
  """(near, far) of one head of one row."""
  near = far = 0.0
  for i in range(length):
    keys = range(i + 1) if causal else range(length)
    exps = {j: math.exp(float(q[i] @ k[j]) / math.sqrt(len(q[i]))) for j in keys}
    for j, value in exps.items():
      if abs(i - j) <= radius:
        near += value / sum(exps.values())
      else:
        far += value / sum(exps.values())
  return near, far


@pytest.mark.parametrize(
  ('config', 'radius'),
  [(PLAIN, 1), (MIXED, 4), (dataclasses.replace(MIXED, causal=True), 4)],
  ids=['bert', 'convbert', 'causal'],
)
def test_mass_and_concentration_match_loops(config, radius, rows):
  """Mutations: < for <= at the radius; padded queries counted."""
  params = random_params(config)
  mass = measure(params, config, *rows, radius=radius)
  qkv = fast_jit(lambda p: encode(p, config, *rows, qkv_layers=(1, 2)).qkv)(params)
  want = np.zeros((2, 2, 4, config.num_heads))
  for layer, one in enumerate(qkv):
    q, k = np.asarray(one.q_BTHK, np.float64), np.asarray(one.k_BTHK, np.float64)
    for row, length in enumerate(LENGTHS):
      for head in range(config.num_heads):
        want[:, layer, row, head] = by_loops(q[row, :, head], k[row, :, head], length, radius, config.causal)
  np.testing.assert_allclose(mass.near_NBH, want[0], rtol=1e-4, atol=1e-5)
  np.testing.assert_allclose(mass.far_NBH, want[1], rtol=1e-4, atol=1e-5)
  np.testing.assert_allclose(
    mass.near_NBH + mass.far_NBH, np.broadcast_to(LENGTHS[None, :, None], want.shape[1:]), rtol=1e-5
  )
  np.testing.assert_allclose(concentration(mass), want[0].sum() / want[1].sum(), rtol=1e-4)


@pytest.mark.parametrize('causal', [False, True])
def test_probabilities_are_those_that_the_encoder_mixes_values_with(causal, rows):
  rng = np.random.default_rng(2)
  q, k = (jnp.asarray(rng.normal(size=(4, 14, 2, 5)), jnp.float32) for _ in range(2))
  identity = jnp.broadcast_to(jnp.eye(14)[None, :, None], (4, 14, 2, 14))
  mixed_BTHS = attention(q, k, identity, mask_bias(rows[1]), causal=causal)
  got = attention_probabilities(QKV(q, k, q), rows[1], causal=causal)
  np.testing.assert_allclose(got, mixed_BTHS.swapaxes(1, 2), atol=1e-6)


def test_uniform_attention_has_the_concentration_of_counting():
  params = jax.tree.map(jnp.zeros_like, random_params(PLAIN))
  ids = jnp.ones((1, 16), jnp.int32)
  pairs = [(abs(i - j) <= 4) for i in range(16) for j in range(16)]
  got = concentration(measure(params, PLAIN, ids))
  np.testing.assert_allclose(got, sum(pairs) / (len(pairs) - sum(pairs)), rtol=1e-5)
  assert concentration(measure(params, PLAIN, ids, radius=15)) == np.inf


def test_batches_add_up_and_padding_does_not_matter(rows):
  params, (ids, mask) = random_params(PLAIN), rows
  whole, parts = (
    measure(params, PLAIN, ids, mask),
    [measure(params, PLAIN, ids[i : i + 2], mask[i : i + 2]) for i in (0, 2)],
  )
  joined = AttentionMass(*(jnp.concatenate(p, 1) for p in zip(*((m.near_NBH, m.far_NBH) for m in parts))))
  np.testing.assert_allclose(concentration(joined), concentration(whole), rtol=1e-5)
  longer = measure(params, PLAIN, jnp.pad(ids, ((0, 0), (0, 2))), jnp.pad(mask, ((0, 0), (0, 2))))
  np.testing.assert_allclose(longer.near_NBH, whole.near_NBH, rtol=1e-4, atol=1e-5)


def test_refusals(rows):
  with pytest.raises(ConfigError, match='encoder.self_attention'):
    attention_mass({}, dataclasses.replace(MIXED, self_attention=False), *rows)
  with pytest.raises(ConfigError, match='radius: -1'):
    attention_mass({}, PLAIN, *rows, radius=-1)
