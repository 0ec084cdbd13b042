"""One pass over a text: against NumPy on what `encode` returns, and what batching and padding may not change."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from compactlm_jax.analysis.concentration import RADIUS
from compactlm_jax.analysis.statistics import analysed, examine, value_relation
from compactlm_jax.config import EncoderConfig
from compactlm_jax.errors import ConfigError, DataError
from compactlm_jax.nn.encoder import encode, encoder_shapes
from compactlm_jax.tree import map_named

SMALL = {'vocab_size': 40, 'max_positions': 24}
PLAIN = EncoderConfig(hidden_size=16, num_layers=2, num_heads=4, **SMALL)
MIXED = EncoderConfig.mixed(heads=4, head_ratio=2, hidden_size=24, num_layers=1, conv_sees_padding=True, **SMALL)
LENGTHS = np.array([11, 12, 7, 2])


def model(config, seed):
  rng = np.random.default_rng(seed)
  params = map_named(
    lambda name, leaf: jnp.asarray(0.3 * rng.normal(size=leaf.shape), jnp.float32), encoder_shapes(config)
  )
  return analysed(params, config)


@pytest.fixture(scope='module')
def models():
  return model(PLAIN, 0), model(MIXED, 1)


def rows(width=12, lengths=LENGTHS):
  """The same rows whatever the width; padding holds other tokens each time."""
  mask = (np.arange(width) < lengths[:, None]).astype(np.int32)
  ids = np.random.default_rng(3).integers(1, 40, size=(len(LENGTHS), 24)).astype(np.int32)[:, :width]
  return np.where(mask, ids, width % 7), mask


def softmax(logits):
  e = np.exp(logits - logits.max(-1, keepdims=True))
  return e / e.sum(-1, keepdims=True)


def row_by_row(one):
  """(attention [N, H, T, T], values [N, H, T, T], hidden [N + 1, T, D]) of each row, its padding cut off, in NumPy."""
  layers, found = tuple(range(1, one.config.num_layers + 1)), []
  out = jax.jit(lambda p: encode(p, one.config, *rows(), all_hidden=True, qkv_layers=layers))(one.params)
  for row, length in enumerate(LENGTHS):
    cut = [
      [np.asarray(a[row, :length], np.float64).swapaxes(0, 1) for a in (x.q_BTHK, x.k_BTHK, x.v_BTHK)] for x in out.qkv
    ]
    root = np.sqrt(one.config.head_size)
    attention = np.stack([softmax(q @ k.swapaxes(1, 2) / root) for q, k, _ in cut])
    values = np.stack([softmax(v @ v.swapaxes(1, 2) / root) for _, _, v in cut])
    found.append((attention, values, np.asarray(out.hidden_NBTD[:, row, :length], np.float64)))
  return found


def mean_kl(p, q):
  """Mean over all queries of KL(p || q), rows of p's layers, columns of q's."""
  sums = sum(np.einsum('nts,nmts->nm', a, np.log(a[:, None] / b[None])) for a, b in zip(p, q))
  return sums / LENGTHS.sum()


def cka(x, y):
  x, y = x - x.mean(0), y - y.mean(0)
  return ((y.T @ x) ** 2).sum() / np.sqrt(((x.T @ x) ** 2).sum() * ((y.T @ y) ** 2).sum())


def test_two_models_match_numpy(models):
  """Different heads, layers and widths.

  Mutations: KL of (first, second); the first head instead of the mean.
  """
  first, second = models
  got = examine(first, second, [rows()])
  mine, theirs = row_by_row(first), row_by_row(second)
  for name, index in (('attention_kl_MN', 0), ('value_kl_MN', 1)):
    p, q = ([row[index].mean(1) for row in side] for side in (theirs, mine))
    np.testing.assert_allclose(getattr(got, name), mean_kl(p, q), rtol=2e-3, atol=1e-5)
  x, y = (np.concatenate([row[2] for row in side], 1) for side in (mine, theirs))
  np.testing.assert_allclose(got.cka_MN, [[cka(a, b) for a in x] for b in y], rtol=1e-3)
  assert got.tokens == LENGTHS.sum() and got.attention_kl_MN.shape == (1, 2) and got.cka_MN.shape == (2, 3)
  for heads, side in ((got.heads, mine), (got.other_heads, theirs)):
    near = np.zeros(heads.near_NH.shape)
    entropy = np.zeros(heads.near_NH.shape)
    for attention, *_ in side:
      distance = np.abs(np.subtract.outer(*2 * [np.arange(attention.shape[-1])]))
      near += np.where(distance <= RADIUS, attention, 0).sum((2, 3))
      entropy -= (attention * np.log(attention)).sum((2, 3))
    np.testing.assert_allclose(heads.near_NH, near, rtol=1e-3)
    np.testing.assert_allclose(heads.near_NH + heads.far_NH, np.full(near.shape, LENGTHS.sum()), rtol=1e-4)
    np.testing.assert_allclose(heads.entropy_NH, entropy, rtol=1e-3)


def test_neither_padding_nor_batches_matter(models):
  """Longer rows, rows of nothing but padding, one batch or several; a ConvBERT in parity mode.

  Mutations: drop the weights of `moments`; keep `conv_sees_padding`.
  """
  first, second = models
  whole = examine(first, second, [rows()])
  ids, mask = rows(20)
  empty = np.zeros((1, 20), np.int32)
  batches = [(np.concatenate([ids[i : i + 2], empty]), np.concatenate([mask[i : i + 2], empty])) for i in (2, 0)]
  parts = examine(first, second, batches)
  assert parts.tokens == whole.tokens
  for a, b in zip(jax.tree.leaves(dataclasses.astuple(parts)), jax.tree.leaves(dataclasses.astuple(whole))):
    np.testing.assert_allclose(a, b, rtol=2e-3, atol=1e-5)


def test_a_model_beside_itself(models):
  """Mutation: compare with the second model's heads where there is none."""
  alone = examine(models[0], None, [rows()])
  np.testing.assert_allclose(np.diag(alone.attention_kl_MN), 0, atol=1e-5)
  np.testing.assert_allclose(np.diag(alone.value_kl_MN), 0, atol=1e-5)
  np.testing.assert_allclose(np.diag(alone.cka_MN), 1, rtol=1e-4)
  np.testing.assert_allclose(alone.cka_MN, alone.cka_MN.T, rtol=1e-4)
  assert alone.attention_kl_MN[0, 1] > 1e-4 and (alone.attention_kl_MN >= 0).all()


def test_value_relation_of_a_causal_model_reads_no_later_position():
  causal = dataclasses.replace(PLAIN, causal=True)
  params, (ids, mask) = model(causal, 2).params, rows()
  qkv = encode(params, causal, ids, mask, qkv_layers=(1,)).qkv[0]
  relation = np.asarray(value_relation(qkv, mask, causal=True))
  assert (np.triu(relation, 1) == 0).all()
  np.testing.assert_allclose(relation.sum(-1), 1, rtol=1e-5)


def test_refusals(models):
  with pytest.raises(ConfigError, match='self_attention'):
    analysed({}, dataclasses.replace(MIXED, self_attention=False))
  with pytest.raises(ConfigError, match='--layout=padded'):
    analysed({}, dataclasses.replace(MIXED, heads_per_layer=(1,) * MIXED.num_layers))
  nothing = (np.zeros((2, 8), np.int32),) * 2
  for batches in ([], [nothing]):
    with pytest.raises(DataError, match='no tokens'):
      examine(models[0], None, batches)
