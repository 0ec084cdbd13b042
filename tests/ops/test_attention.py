"""Attention and dropout against NumPy loops."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from compactlm_jax.ops import attention as module
from compactlm_jax.ops.attention import attention, mask_bias
from compactlm_jax.ops.dropout import dropout, site_words


def inputs(seed=0, batch=2, length=7, heads=3, size=5):
  rng = np.random.default_rng(seed)
  q, k, v = rng.normal(size=(3, batch, length, heads, size)).astype(np.float32)
  mask = (np.arange(length) < np.array([[length], [4]])).astype(np.int32)
  return q, k, v, mask


def reference(q, k, v, mask, causal=False):
  batch, length, heads, size = q.shape
  out = np.zeros(q.shape, np.float64)
  for b in range(batch):
    for h in range(heads):
      for t in range(length):
        keys = [s for s in range(length) if mask[b, s] and not (causal and s > t)]
        logits = np.array([q[b, t, h].astype(np.float64) @ k[b, s, h] / np.sqrt(size) for s in keys])
        weights = np.exp(logits - logits.max())
        out[b, t, h] = sum(w * v[b, s, h] for w, s in zip(weights / weights.sum(), keys))
  return out


def test_attention_equals_a_loop_over_positions():
  """Mutation: leave out the scale, or add the bias after the softmax."""
  q, k, v, mask = inputs()
  got = attention(*map(jnp.asarray, (q, k, v)), mask_bias(jnp.asarray(mask)))
  np.testing.assert_allclose(got, reference(q, k, v, mask), atol=2e-6)


def test_causal_attention_equals_a_loop_over_earlier_positions():
  """Mutation: compare with < instead of <=, or swap the axes of the comparison."""
  q, k, v, mask = inputs()
  got = attention(*map(jnp.asarray, (q, k, v)), mask_bias(jnp.asarray(mask)), causal=True)
  np.testing.assert_allclose(got, reference(q, k, v, mask, causal=True), atol=2e-6)


@pytest.mark.parametrize('rate', [0.0, 0.5])
def test_causal_gradients_of_later_positions_are_exact_zeros(rate):
  """Mutation: hide later positions with -1 instead of minus infinity."""
  q, k, v, _ = (jnp.asarray(x) for x in inputs(4))
  mask = jnp.ones((2, 7), jnp.int32).at[1, :3].set(0)  # padding in front: its rows see nothing but themselves

  @jax.jit
  @functools.partial(jax.jacrev, argnums=(0, 1, 2))
  def jacobian(q, k, v):
    return attention(q, k, v, mask_bias(mask), causal=True, rate=rate, key=jax.random.key(0)).sum((0, 2, 3))

  for t, (dq, dk, dv) in enumerate(zip(*map(np.asarray, jacobian(q, k, v)), strict=True)):
    assert np.isfinite(dq).all() and not dk[:, t + 1 :].any() and not dv[:, t + 1 :].any()
    assert rate or (dv[0, : t + 1] != 0).all()


@pytest.mark.parametrize('causal', [False, True])
def test_attention_gradient_equals_finite_differences(causal):
  q, k, v, mask = (jnp.asarray(x) for x in inputs(1))
  bias, weight = mask_bias(mask), jnp.asarray(inputs(2)[0])

  def value(q, k, v):
    return (attention(q, k, v, bias, causal=causal) * weight).sum()

  grads = jax.grad(value, argnums=(0, 1, 2))(q, k, v)
  for i, grad in enumerate(grads):
    direction = jnp.asarray(inputs(3 + i)[0])
    step = 1e-2
    moved = [[x + s * step * direction if j == i else x for j, x in enumerate((q, k, v))] for s in (1, -1)]
    slope = (value(*moved[0]) - value(*moved[1])) / (2 * step)
    np.testing.assert_allclose((grad * direction).sum(), slope, rtol=2e-3, atol=2e-3)


@pytest.mark.parametrize('rate', [0.0, 0.5])
@pytest.mark.parametrize('causal', [False, True])
def test_form_for_other_backends_equals_the_one_for_this_one(causal, rate):
  """Outputs, and gradients from what each forward pass saved. Mutation: leave the scale out of dq in one of them."""
  q, k, v, mask = (jnp.asarray(x) for x in inputs(5))
  g, words = jnp.asarray(inputs(6)[0]), site_words(jax.random.key(1), 2) if rate else None
  results = []
  for forward, backward in (
    (module._forward_einsum, module._backward_einsum),
    (module._forward_rows, module._backward_rows),
  ):
    out, *saved = forward(causal, rate, q, k, v, mask_bias(mask), words)
    results.append((out, saved[3:], *backward(rate, g, *saved, out, words)))
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), *results)


def test_padded_keys_get_exactly_no_weight_and_no_gradient():
  q, k, v, mask = (jnp.asarray(x) for x in inputs())
  bias = mask_bias(mask)
  gk, gv = jax.grad(lambda k, v: attention(q, k, v, bias).sum(), argnums=(0, 1))(k, v)
  assert not np.asarray(gk)[1, 4:].any()
  assert not np.asarray(gv)[1, 4:].any()


def test_a_row_of_padding_stays_finite():
  q, k, v, mask = (jnp.asarray(x) for x in inputs())
  assert bool(jnp.isfinite(attention(q, k, v, mask_bias(jnp.zeros_like(mask)))).all())


def test_dropout_rate_scale_and_expectation():
  """Mutation: scale by the rate instead of its complement."""
  x = jnp.ones((64, 512))
  y = np.asarray(dropout(x, 0.1, jax.random.key(0)))
  kept = (y != 0).mean()
  assert abs(kept - 0.9) < 5 * np.sqrt(0.09 / y.size)
  np.testing.assert_allclose(y[y != 0], 1 / 0.9, rtol=1e-3)
  assert abs(y.mean() - 1) < 0.01


def test_dropout_masks_are_independent_between_keys_rows_and_columns():
  a, b = (np.asarray(dropout(jnp.ones((256, 256)), 0.5, jax.random.key(s))) > 0 for s in (0, 1))
  for x, y in ((a, b), (a[1:], a[:-1]), (a[:, 1:], a[:, :-1]), (a[:, 2:], a[:, :-2]), (a[:, 4:], a[:, :-4])):
    assert abs((x == y).mean() - 0.5) < 0.02


@pytest.mark.parametrize(('rate', 'key'), [(0.0, 3), (0.5, None)])
def test_no_dropout_is_the_identity(rate, key):
  x = jnp.arange(6.0)
  assert dropout(x, rate, None if key is None else jax.random.key(key)) is x


def test_dropout_gradient_is_its_mask():
  x = jnp.linspace(1, 2, 999)
  key = jax.random.key(4)
  grad = jax.grad(lambda x: dropout(x, 0.3, key).sum())(x)
  np.testing.assert_allclose(grad * x, dropout(x, 0.3, key), rtol=1e-6)
