"""Relations against a per-example float64 loop, automatic differentiation, and their own invariances."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from compactlm_jax.errors import ConfigError
from compactlm_jax.ops import relations


def arrays(seed, batch=3, length=7, heads=4, teacher_size=5, student_size=3, scale=2.0):
  rng = np.random.default_rng(seed)
  sizes = (teacher_size, teacher_size, student_size, student_size)
  operands = [rng.normal(scale=scale, size=(batch, length, heads, k)).astype(np.float32) for k in sizes]
  valid = rng.integers(1, length + 1, size=batch)
  mask = (np.arange(length) < valid[:, None]).astype(np.int32)
  return operands, mask


def loop_kl(operands, mask):
  """Sum over heads and valid rows of KL(teacher || student): each example cut to its length, float64."""
  out = []
  for b, length in enumerate(mask.sum(1)):
    total = 0.0
    for h in range(operands[0].shape[2]):
      log_p = []
      for x, y in (operands[:2], operands[2:]):
        x, y = x[b, :length, h].astype(np.float64), y[b, :length, h].astype(np.float64)
        logits = x @ y.T / np.sqrt(x.shape[-1])
        logits -= logits.max(-1, keepdims=True)
        log_p.append(logits - np.log(np.exp(logits).sum(-1, keepdims=True)))
      total += (np.exp(log_p[0]) * (log_p[0] - log_p[1])).sum()
    out.append(total)
  return np.array(out)


def ones_pulled(operands, mask, weight=None):
  """Value per example, and the gradients of its sum with respect to the student's operands."""
  weight = mask.astype(np.float32) if weight is None else weight
  value, pull = jax.vjp(lambda x, y: relations.relation_kl(*operands[:2], x, y, mask, weight), *operands[2:])
  return value, pull(jnp.ones_like(value))


def naive_kl(operands, mask, weight):
  """The same in jax.numpy, all heads at once, for jax.grad."""

  def log_relation(x, y):
    logits = jnp.einsum('bthk,bshk->bhts', x, y) / np.sqrt(x.shape[-1])
    return jax.nn.log_softmax(jnp.where(mask[:, None, None, :] > 0, logits, -1e30), axis=-1)

  teacher, student = log_relation(*operands[:2]), log_relation(*operands[2:])
  return jnp.einsum('bhts,bt->b', jnp.exp(teacher) * (teacher - student), weight)


@pytest.mark.parametrize('chunk', [0, 1, 2, 4])
def test_equals_the_loop_for_every_chunk_size(chunk):
  operands, mask = arrays(0)
  got = relations.relation_kl(*operands, mask, mask.astype(np.float32), chunk=chunk)
  np.testing.assert_allclose(got, loop_kl(operands, mask), rtol=2e-5)


def test_gradient_equals_autodiff_of_the_naive_version():
  operands, mask = arrays(1)
  weight = mask * np.linspace(0.5, 2.0, mask.shape[1], dtype=np.float32)
  bar = np.array([1.0, -0.3, 2.5], np.float32)

  def ours(x, y):
    return (relations.relation_kl(*operands[:2], x, y, mask, weight, chunk=2) * bar).sum()

  def naive(x, y):
    return (naive_kl([*operands[:2], x, y], mask, weight) * bar).sum()

  for got, want in zip(jax.grad(ours, (0, 1))(*operands[2:]), jax.grad(naive, (0, 1))(*operands[2:])):
    np.testing.assert_allclose(got, want, atol=2e-6)


def test_gradient_of_a_self_relation_adds_both_operands():
  operands, mask = arrays(2)
  weight = mask.astype(np.float32)
  ours = jax.grad(lambda v: relations.relation_kl(*operands[:2], v, v, mask, weight).sum())(operands[2])
  naive = jax.grad(lambda v: naive_kl([*operands[:2], v, v], mask, weight).sum())(operands[2])
  np.testing.assert_allclose(ours, naive, atol=2e-6)


def test_no_gradient_to_the_teacher():
  operands, mask = arrays(3)
  grads = jax.grad(lambda x, y: relations.relation_kl(x, y, *operands[2:], mask, mask * 1.0).sum(), (0, 1))(
    *operands[:2]
  )
  assert all(not np.asarray(g).any() for g in grads)


def test_pad_tokens_change_nothing():
  operands, mask = arrays(4)
  rng = np.random.default_rng(5)

  def pad(x):
    return np.concatenate([x, rng.normal(scale=50, size=(x.shape[0], 9, *x.shape[2:])).astype(np.float32)], axis=1)

  longer, long_mask = [pad(x) for x in operands], np.pad(mask, ((0, 0), (0, 9)))

  (short_value, short_grads), (long_value, long_grads) = ones_pulled(operands, mask), ones_pulled(longer, long_mask)
  np.testing.assert_allclose(short_value, long_value, rtol=1e-6)
  for short, long in zip(short_grads, long_grads):
    np.testing.assert_allclose(short, long[:, : mask.shape[1]], atol=1e-6)
    assert not np.asarray(long[:, mask.shape[1] :]).any()


def test_a_student_equal_to_its_teacher_has_loss_and_gradient_zero():
  operands, mask = arrays(6, teacher_size=4, student_size=4)
  same = [operands[0], operands[1], operands[0], operands[1]]
  value, grads = ones_pulled(same, mask)
  assert not np.asarray(value).any()
  for grad in grads:  # the compiler may round the two softmaxes differently
    np.testing.assert_allclose(grad, 0, atol=1e-6)


def test_masked_keys_and_empty_examples_stay_finite_under_huge_logits():
  operands, mask = arrays(7, scale=1e4)
  mask[1] = 0
  value, grads = ones_pulled(operands, mask)
  assert np.isfinite(value).all() and value[1] == 0
  assert all(np.isfinite(g).all() and not np.asarray(g[1]).any() for g in grads)


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 10_000), scale=st.floats(0.01, 30))
def test_kl_is_not_negative(seed, scale):
  operands, mask = arrays(seed, scale=scale)
  rounding = 1e-6 * (1 + scale**2)  # of logits that large
  assert (np.asarray(relations.relation_kl(*operands, mask, mask.astype(np.float32))) >= -rounding).all()


def test_bfloat16_operands_give_float32_values_and_bfloat16_gradients():
  operands, mask = arrays(8)
  half = [jnp.asarray(x, jnp.bfloat16) for x in operands]
  value, grads = ones_pulled(half, mask)
  assert value.dtype == jnp.float32 and {g.dtype for g in grads} == {jnp.dtype(jnp.bfloat16)}
  np.testing.assert_allclose(value, loop_kl([np.asarray(x, np.float32) for x in half], mask), rtol=2e-5)


def test_nothing_of_all_heads_times_length_squared_exists():
  heads, length = 48, 96
  shapes = [jax.ShapeDtypeStruct((2, length, heads, 4), jnp.float32)] * 4
  shapes += [jax.ShapeDtypeStruct((2, length), d) for d in (jnp.int32, jnp.float32)]

  def temp(chunk):
    def f(*a):
      return relations.relation_kl(*a, chunk=chunk).sum()

    return jax.jit(jax.grad(f, (2, 3))).lower(*shapes).compile().memory_analysis().temp_size_in_bytes

  assert temp(1) < 4 * 2 * heads * length**2 < temp(heads)


def test_evaluation_computes_no_gradient():
  operands, mask = arrays(9)
  text = str(jax.make_jaxpr(lambda *a: relations.relation_kl(*a, mask, mask * 1.0))(*operands))
  assert text.count('dot_general') == 2  # the two logits, nothing else


def test_split_heads_concatenates_and_splits_again():
  x = np.arange(2 * 3 * 4 * 6, dtype=np.float32).reshape(2, 3, 4, 6)
  again = relations.split_heads(jnp.asarray(x), 8)
  assert again.shape == (2, 3, 8, 3)
  np.testing.assert_array_equal(np.asarray(again).reshape(2, 3, 24), x.reshape(2, 3, 24))
  assert relations.split_heads(x, 0) is x
  with pytest.raises(ConfigError, match='relation_heads: 7'):
    relations.split_heads(x, 7)


def test_chunks_are_divisors_within_the_bound():
  for heads in (1, 7, 12, 48):
    chunk = relations.heads_per_chunk(8, 512, heads, max_bytes=64 << 20)
    assert heads % chunk == 0 and (chunk == 1 or chunk * 4 * 8 * 512**2 <= 64 << 20)
  assert relations.heads_per_chunk(8, 512, 48, max_bytes=64 << 20) == 8
  assert relations.heads_per_chunk(10_000, 512, 48) == 1


def test_unequal_heads_are_refused():
  operands, mask = arrays(10)
  with pytest.raises(ConfigError, match='4 heads and the student 2'):
    relations.relation_kl(*operands[:2], operands[2][:, :, :2], operands[3][:, :, :2], mask, mask * 1.0)
