"""Depthwise and dynamic convolution against NumPy loops."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from compactlm_jax.ops import dynamic_conv as module
from compactlm_jax.ops.dynamic_conv import depthwise_conv, dynamic_conv, tap_reads


def taps_last(v, taps, causal=False):
  return dynamic_conv(v, jnp.moveaxis(taps, -1, 0), causal=causal)


def loop_depthwise(x, kernel, causal=False):
  out = np.zeros(x.shape, np.float64)
  half = len(kernel) - 1 if causal else len(kernel) // 2
  for b, t, d in np.ndindex(x.shape):
    for j in range(len(kernel)):
      if 0 <= t + j - half < x.shape[1]:
        out[b, t, d] += float(kernel[j, d]) * x[b, t + j - half, d]
  return out


def loop_dynamic(v, taps, causal=False):
  out = np.zeros(v.shape, np.float64)
  half = taps.shape[-1] - 1 if causal else taps.shape[-1] // 2
  for b, t, h in np.ndindex(v.shape[:3]):
    for j in range(taps.shape[-1]):
      if 0 <= t + j - half < v.shape[1]:
        out[b, t, h] += float(taps[b, t, h, j]) * v[b, t + j - half, h].astype(np.float64)
  return out


@pytest.mark.parametrize('causal', [False, True])
@pytest.mark.parametrize('width', [1, 3, 9])
@pytest.mark.parametrize('length', [1, 4, 20])
def test_depthwise_equals_a_loop(width, length, causal):
  """Mutation: pad W // 2 zeros in front of a causal convolution too."""
  rng = np.random.default_rng(0)
  x, kernel = rng.normal(size=(2, length, 6)).astype('f4'), rng.normal(size=(width, 6)).astype('f4')
  got = depthwise_conv(jnp.asarray(x), jnp.asarray(kernel), causal=causal)
  np.testing.assert_allclose(got, loop_depthwise(x, kernel, causal), atol=1e-5)


@pytest.mark.parametrize('causal', [False, True])
@pytest.mark.parametrize('width', [1, 3, 9])
@pytest.mark.parametrize('length', [1, 4, 20])
def test_dynamic_equals_a_loop(width, length, causal):
  """Mutation: reverse the taps (a true convolution)."""
  rng = np.random.default_rng(1)
  v = rng.normal(size=(2, length, 3, 4)).astype('f4')
  taps = rng.normal(size=(2, length, 3, width)).astype('f4')
  got = taps_last(jnp.asarray(v), jnp.asarray(taps), causal)
  np.testing.assert_allclose(got, loop_dynamic(v, taps, causal), atol=1e-5)


@pytest.mark.parametrize('causal', [False, True])
@pytest.mark.parametrize('op', ['depthwise', 'dynamic'])
def test_gradients_equal_those_of_a_dense_operator(op, causal):
  """Both are bilinear: the gradient follows from the loops applied to basis vectors.

  Mutation: pad the gradient like the values.
  """
  rng = np.random.default_rng(2)
  if op == 'depthwise':
    fn, loop, a, b = depthwise_conv, loop_depthwise, rng.normal(size=(1, 6, 2)), rng.normal(size=(3, 2))
  else:
    fn, loop, a, b = taps_last, loop_dynamic, rng.normal(size=(1, 6, 2, 2)), rng.normal(size=(1, 6, 2, 3))
  a, b = a.astype('f4'), b.astype('f4')
  weight = rng.normal(size=a.shape).astype('f4')

  def value(a, b):
    return (fn(a, b, causal=causal) * weight).sum()

  grads = jax.grad(value, argnums=(0, 1))(jnp.asarray(a), jnp.asarray(b))
  for which, grad in enumerate(grads):
    for index in np.ndindex(grad.shape):
      unit = np.zeros(grad.shape, 'f4')
      unit[index] = 1
      want = (loop(unit, b, causal) if which == 0 else loop(a, unit, causal)) * weight
      np.testing.assert_allclose(grad[index], want.sum(), atol=1e-5)


def test_uniform_taps_keep_a_constant_inside():
  v = jnp.full((1, 20, 2, 3), 1.5)
  out = taps_last(v, jnp.full((1, 20, 2, 9), 1 / 9))
  np.testing.assert_allclose(out[:, 4:-4], 1.5, rtol=1e-6)


@pytest.mark.parametrize('causal', [False, True])
def test_masked_taps_equal_masked_values(causal):
  """Mutation: read the mask at position t instead of at the position that the tap reads."""
  rng = np.random.default_rng(4)
  v, taps = (rng.normal(size=(2, 11, 3, size)).astype('f4') for size in (4, 5))
  mask = (rng.random((2, 11)) < 0.7).astype('f4')
  seen = taps * np.moveaxis(np.asarray(tap_reads(jnp.asarray(mask), 5, causal=causal)), 0, -1)[:, :, None]
  got = taps_last(jnp.asarray(v), jnp.asarray(seen), causal)
  np.testing.assert_allclose(got, loop_dynamic(v * mask[..., None, None], taps, causal), atol=1e-5)


@pytest.mark.parametrize('causal', [False, True])
@pytest.mark.parametrize('length', [1, 4, 20])
def test_forms_for_other_backends_equal_those_for_this_one(length, causal):
  """The grouped convolution and the band of a TPU, run here, forward and backward.

  Mutations: swap s and t in `_tap`, or pad the grouped convolution alike on both sides.
  """
  rng, width = np.random.default_rng(3), 5
  back = module._back(width, causal)

  def draw(*shape):
    return jnp.asarray(rng.normal(size=shape).astype('f4'))

  x, kernel, g = draw(2, length, 6), draw(width, 6), draw(2, length, 6)
  v, taps, gv = draw(2, length, 3, 4), draw(width, 2, length, 3), draw(2, length, 3, 4)
  pairs = [
    (module.depthwise_grouped, module.depthwise_slices, (x, kernel, back)),
    (module._depthwise_grouped_kernel, module._depthwise_slices_kernel, (x, g, width, back)),
    (module.dynamic_band, module.dynamic_slices, (v, taps, back)),
    (module._dynamic_band_bwd, module._dynamic_slices_bwd, (v, taps, gv, back)),
  ]
  for there, here, args in pairs:
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-5), there(*args), here(*args))
