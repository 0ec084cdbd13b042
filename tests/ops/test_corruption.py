"""Hiding, sampling and writing tokens: counts, places and rates against loops and frequencies."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from compactlm_jax.config import MaskConfig
from compactlm_jax.ops.corruption import mask_tokens, sample_tokens, take_positions, write_tokens
from compactlm_jax.types import SpecialTokens

SPECIAL = SpecialTokens(pad=0, cls=2, sep=3, mask=4)
V = 50


def rows(lengths, seq_len, seed=0):
  """[CLS] text [SEP] text [SEP] padding; one ordinary [MASK] in the text of the first row."""
  rng = np.random.default_rng(seed)
  ids = rng.integers(5, V, (len(lengths), seq_len))
  ids[:, 0] = SPECIAL.cls
  for row, length in zip(ids, lengths):
    row[length // 2] = row[length - 1] = SPECIAL.sep
    row[length:] = SPECIAL.pad
  ids[0, 2] = SPECIAL.mask
  mask = (np.arange(seq_len) < np.array(lengths)[:, None]).astype(np.int32)
  return jnp.asarray(ids, jnp.int32), jnp.asarray(mask)


def hide(ids, mask, seed=0, **options):
  return jax.tree.map(np.asarray, mask_tokens(jax.random.key(seed), ids, mask, MaskConfig(**options), SPECIAL, V))


@pytest.mark.parametrize(('seq_len', 'slots'), [(128, 19), (512, 79)])
def test_slots_as_published(seq_len, slots):
  assert MaskConfig().slots(seq_len) == slots


@pytest.mark.parametrize('with_replacement', [False, True])
def test_number_and_place_of_the_slots(with_replacement):
  """Mutations: count without [CLS] and [SEP], leave out a special token, truncate instead of rounding, min of one."""
  lengths = [40, 37, 17, 10, 4, 3]
  ids, mask = rows(lengths, 40)
  for seed in range(20):
    out = hide(ids, mask, seed, with_replacement=with_replacement)
    for b, length in enumerate(lengths):
      ordinary = [t for t in range(length) if int(ids[b, t]) not in (2, 3, 4)]
      expected = max(1, min(6, round(0.15 * length))) if ordinary else 0
      used = out.positions_BP[b][out.weights_BP[b] == 1]
      assert out.positions_BP.shape[1] == 6 and len(used) == min(expected, len(ordinary) or 0)
      assert set(used) <= set(ordinary) and (with_replacement or len(set(used)) == len(used))
      assert (out.positions_BP[b][out.weights_BP[b] == 0] == 0).all()
      np.testing.assert_array_equal(out.ids_BP[b], np.asarray(ids)[b, out.positions_BP[b]])
      changed = np.flatnonzero(out.input_ids_BT[b] != np.asarray(ids)[b])
      assert set(changed) <= set(used)


def test_a_row_without_ordinary_tokens_has_no_slot():
  ids = jnp.array([[2, 3, 0, 0], [2, 4, 3, 0]])
  out = hide(ids, (ids > 0).astype(jnp.int32), probability=0.5)
  assert not out.weights_BP.any()
  np.testing.assert_array_equal(out.input_ids_BT, ids)


@pytest.mark.parametrize(('rates', 'shares'), [((0.85, 0.0), (0.85, 0.0)), ((0.8, 0.1), (0.8, 0.1 * (V - 1) / V))])
def test_shares_of_mask_random_and_unchanged(rates, shares):
  """Within four deviations over 25,600 slots. Mutation: compare the random rate alone."""
  ids, mask = rows([64] * 512, 64)
  ids = jnp.where((ids == 4) | (ids == 3), 7, ids)
  out = hide(ids, mask, probability=0.75, mask_rate=rates[0], random_rate=rates[1])
  used = out.weights_BP == 1
  seen = np.take_along_axis(out.input_ids_BT, out.positions_BP, 1)[used]
  masked, same = (seen == SPECIAL.mask), (seen == out.ids_BP[used])
  for share, expected in ((masked.mean(), shares[0]), ((~masked & ~same).mean(), shares[1])):
    assert abs(share - expected) <= 4 * np.sqrt(max(expected * (1 - expected), 1e-9) / used.sum()) + 4 / V / used.sum()


@pytest.mark.parametrize('with_replacement', [False, True])
def test_each_candidate_is_as_likely(with_replacement):
  """Mutation: order positions by anything but the draw."""
  ids, mask = rows([20] * 2000, 20)
  out = hide(ids, mask, with_replacement=with_replacement)
  counts = np.bincount(out.positions_BP[1:][out.weights_BP[1:] == 1], minlength=20)
  assert counts[0] == counts[10] == counts[19] == 0
  expected = counts.sum() / 17
  assert np.abs(counts[np.r_[1:10, 11:19]] - expected).max() < 4.5 * np.sqrt(expected)


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 2**31), st.integers(1, 6))
def test_written_tokens_against_a_loop(seed, slots):
  """Double draws give the integer mean, as in the original. Mutation: last write wins."""
  rng = np.random.default_rng(seed)
  ids, new = rng.integers(0, V, (3, 8)), rng.integers(0, V, (3, slots))
  positions, on = rng.integers(0, 8, (3, slots)), rng.random((3, slots)) < 0.7
  expected, written = ids.copy(), np.zeros_like(ids, bool)
  for b in range(3):
    for t in range(8):
      values = [new[b, p] for p in range(slots) if on[b, p] and positions[b, p] == t]
      if values:
        expected[b, t], written[b, t] = sum(values) // len(values), True
  out = write_tokens(*map(jnp.asarray, (ids, positions, new, on)))
  np.testing.assert_array_equal(out[0], expected)
  np.testing.assert_array_equal(out[1], written)


def test_taken_positions_are_copies_and_their_gradient_goes_back():
  """Mutation: precision of the product below float32."""
  rng = np.random.default_rng(0)
  x, positions = jnp.asarray(rng.normal(size=(2, 7, 5)), jnp.float32), jnp.array([[3, 3, 0], [6, 1, 2]])
  np.testing.assert_array_equal(take_positions(x, positions), np.take_along_axis(x, positions[..., None], 1))
  grad = jax.grad(lambda x: (take_positions(x, positions) * jnp.arange(1.0, 4.0)[None, :, None]).sum())(x)
  assert grad[0, 3, 0] == 3 and grad[0, 0, 0] == 3 and grad[0, 1, 0] == 0 and grad[1, 2, 4] == 3


def test_samples_follow_the_softmax():
  """Frequencies of 40,000 draws. Mutations: multiply by the temperature, forget the noise."""
  logits = jnp.array([0.0, 1.0, 2.0, -1.0])
  for temperature in (1.0, 0.5):
    draws = sample_tokens(jax.random.key(1), jnp.broadcast_to(logits, (1, 40_000, 4)), temperature=temperature)
    found = np.bincount(np.asarray(draws)[0], minlength=4) / 40_000
    expected = np.asarray(jax.nn.softmax(logits / temperature))
    assert np.abs(found - expected).max() < 4.5 * np.sqrt(0.25 / 40_000)


def test_forbidden_tokens_are_never_drawn_and_no_gradient_flows():
  logits = jnp.zeros((1, 500, 3)).at[..., 1].set(3.0)
  draws = sample_tokens(jax.random.key(0), logits, forbidden_BP=jnp.ones((1, 500), jnp.int32))
  assert set(np.unique(draws)) == {0, 2}
  grad = jax.grad(lambda x: sample_tokens(jax.random.key(0), x).astype(jnp.float32).sum())(logits)
  assert not np.asarray(grad).any()
