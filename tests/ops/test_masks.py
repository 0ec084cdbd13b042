"""Masks from scores and the straight-through estimator."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from compactlm_jax.config import EncoderConfig
from compactlm_jax.nn.layers import GroupedDense, MaskedDense
from compactlm_jax.ops.dropout import site_words
from compactlm_jax.ops.masks import (
  hard_concrete,
  masked_weight,
  prox_reweighted_l1,
  soft_cuts,
  uniform_noise,
)
from compactlm_jax.ops.threshold import keep_mask, local_cuts


@jax.jit
def top(scores, keep):
  """1 for the highest scores of one matrix, so many, 0 for the others."""
  layer = scores[None]
  (cut,) = local_cuts({'scores': layer}, {'scores': jnp.reshape(keep, 1)}).values()
  return keep_mask(layer, cut)[0].astype(scores.dtype)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(-3, 3), min_size=30, max_size=30), st.integers(0, 30))
def test_the_count_is_exact_with_ties(values, keep):
  """Mutation: keep every score >= the threshold."""
  scores = np.array(values, np.float32)
  mask = np.asarray(top(jnp.asarray(scores), keep))
  assert mask.sum() == keep
  assert set(np.unique(mask)) <= {0.0, 1.0}
  if 0 < keep < len(values):
    assert scores[mask == 1].min() >= scores[mask == 0].max()


def test_straight_through_gradients():
  """dL/dS = dL/dW' * W everywhere, dL/dW = dL/dW' * M. Mutation: multiply the former by the mask."""
  rng = np.random.default_rng(0)
  w, s, g = (jnp.asarray(rng.normal(size=(4, 5)).astype('f4')) for _ in range(3))
  mask = top(s, 6)
  gw, gs = jax.grad(lambda w, s: (masked_weight(w, s, top(s, 6)) * g).sum(), argnums=(0, 1))(w, s)
  np.testing.assert_array_equal(gs, g * w)
  np.testing.assert_array_equal(gw, g * mask)


def test_masked_dense_without_scores_is_dense_bit_for_bit():
  """Mutation: without scores, mask by those of the weights themselves."""
  config, x = EncoderConfig(), jax.random.normal(jax.random.key(0), (3, 7, 8))
  layer = MaskedDense(5, config, mask_fn=lambda s: top(s, 20))
  variables = layer.init(jax.random.key(1), x)
  np.testing.assert_array_equal(layer.apply(variables, x), nn.Dense(5).apply(variables, x))


def test_masked_dense_with_scores_drops_the_lowest():
  config, x = EncoderConfig(), jax.random.normal(jax.random.key(0), (2, 8))
  layer = MaskedDense(5, config, mask_fn=lambda s: top(s, 20))
  params = layer.init(jax.random.key(1), x)['params']
  scores = jax.random.normal(jax.random.key(2), (8, 5))
  got = layer.apply({'params': params, 'scores': {'kernel': scores}}, x)
  kernel = np.where(np.asarray(scores) >= np.sort(np.asarray(scores).ravel())[20], params['kernel'], 0)
  np.testing.assert_allclose(got, np.asarray(x) @ kernel, atol=1e-5)


def test_grouped_dense_with_scores_drops_the_lowest():
  """Mutation: ignore the collection of scores."""
  x = jax.random.normal(jax.random.key(0), (2, 8))
  layer = GroupedDense(6, 2, EncoderConfig(), mask_fn=lambda s: (s > 0).astype(s.dtype))
  params = layer.init(jax.random.key(1), x)['params']
  scores = jax.random.normal(jax.random.key(2), (2, 4, 3))
  got = layer.apply({'params': params, 'scores': {'kernel': scores}}, x)
  kernel = np.where(np.asarray(scores) > 0, params['kernel'], 0)
  want = np.concatenate([np.asarray(x)[:, 4 * g : 4 * g + 4] @ kernel[g] for g in range(2)], axis=-1)
  np.testing.assert_allclose(got, want, atol=1e-5)


def test_grouped_dense_is_a_block_diagonal_dense():
  """Mutation: interleave the groups (channel shuffle)."""
  x = jax.random.normal(jax.random.key(0), (2, 3, 8))
  layer = GroupedDense(12, 4, EncoderConfig())
  params = layer.init(jax.random.key(1), x)['params']
  dense = np.zeros((8, 12), 'f4')
  for g in range(4):
    dense[2 * g : 2 * g + 2, 3 * g : 3 * g + 3] = params['kernel'][g]
  np.testing.assert_allclose(layer.apply({'params': params}, x), np.asarray(x) @ dense, atol=1e-6)


def published_soft_mask(scores, tau, on):
  """PyTorch, one matrix at a time: strictly above tau; at least a floor, by the k-th smallest score."""
  torch = pytest.importorskip('torch')
  layers = []
  for layer in torch.from_numpy(scores):
    compared = torch.sigmoid(layer) if on == 'sigmoid' else layer
    mask, least = compared > tau, int(0.005 * layer.numel()) + 1
    if int(mask.sum()) < least:
      mask = layer > torch.sort(layer.flatten()).values[max(layer.numel() - least, 1) - 1]
    layers.append(mask.float())
  return torch.stack(layers).numpy()


@functools.partial(jax.jit, static_argnames='on')
def soft(scores, tau, on='sigmoid'):
  return keep_mask(scores, soft_cuts({'': scores}, tau, on)[0]['']).astype(scores.dtype)


@pytest.mark.torch
@pytest.mark.parametrize('on', ['sigmoid', 'scores'])
def test_soft_mask_is_the_published_one(on):
  """Every layer by itself, with the floor and its ties. Mutation: keep the ties at the floor."""
  rng = np.random.default_rng(0)
  shape = (3, 20, 30)
  cases = {
    'normal': rng.normal(size=shape),
    'coarse': np.round(rng.normal(size=shape), 1),
    'equal': np.full(shape, 0.5),
    'zero': np.zeros(shape),
    'one layer is low': rng.normal(size=shape) - np.array([0, 30, 0])[:, None, None],
    'ties at the floor': np.minimum(np.round(rng.normal(size=shape), 1), 1.5),
  }
  for name, values in cases.items():
    scores = values.astype(np.float32)
    for tau in (0.0, 0.1, 0.5, 0.93, 1.0, 2.0):
      got = soft(scores, np.float32(tau), on=on)
      np.testing.assert_array_equal(got, published_soft_mask(scores, np.float32(tau), on), err_msg=f'{name} {tau}')


@pytest.mark.torch
def test_soft_mask_of_layers_with_few_entries():
  """Heads: one entry cannot be above itself. Mutation: keep `least` entries where n - least < 1."""
  for scores in (np.array([[0.5], [-3.0]], np.float32), np.array([[0.1, -2.0], [-9.0, -9.0]], np.float32)):
    np.testing.assert_array_equal(soft(scores, 0.9), published_soft_mask(scores, 0.9, 'sigmoid'))


def test_soft_cuts_of_a_tree_are_those_of_its_leaves():
  """Mutation: take the floor of the first leaf for all."""
  rng = np.random.default_rng(1)
  leaves = {
    name: (rng.normal(size=shape) - 9).astype(np.float32) for name, shape in {'a': (2, 20, 30), 'b': (3, 40)}.items()
  }
  cuts, kept = jax.jit(soft_cuts)(leaves, 0.4)
  for name, cut in cuts.items():
    np.testing.assert_array_equal(keep_mask(leaves[name], cut), soft(leaves[name], 0.4) == 1)
    assert keep_mask(leaves[name], cut).sum() == len(leaves[name]) * (4 if name == 'a' else 1)
    np.testing.assert_array_equal(kept[name], 4 if name == 'a' else 1)


def test_soft_cuts_count_what_they_keep():
  """Mutation: return what passes the threshold where the floor acts."""
  scores = np.random.default_rng(2).normal(size=(3, 20, 30)).astype(np.float32)
  scores[1] -= 9
  cuts, kept = jax.jit(soft_cuts)({'a': scores}, 0.4)
  found = keep_mask(scores, cuts['a']).sum((1, 2))
  np.testing.assert_array_equal(kept['a'], found)
  assert found[1] == 4 and found.min() == 4 and found.max() > 300


@pytest.mark.torch
@pytest.mark.parametrize('kind', ['top', 'soft'])
def test_gradients_are_those_of_a_mask_taken_for_the_identity(kind):
  """A PyTorch layer whose mask hands its gradient on unchanged: mask, dL/dW, dL/dS. Mutation: half of dL/dS."""
  torch = pytest.importorskip('torch')
  rng = np.random.default_rng(2)
  w, s, x = (rng.normal(size=shape).astype(np.float32) for shape in ((1, 6, 8), (1, 6, 8), (5, 6)))

  def mask_of(scores):
    if kind == 'soft':
      return soft(scores, 0.6)
    return top(scores, 17)

  def loss(w, s):
    return jnp.sin(x @ masked_weight(w, s, mask_of(jax.lax.stop_gradient(s)))[0]).sum()

  class Identity(torch.autograd.Function):
    @staticmethod
    def forward(ctx, scores):
      if kind == 'soft':
        return (torch.sigmoid(scores) > 0.6).float()
      order = scores.flatten().sort(descending=True).indices
      return torch.zeros(scores.numel()).index_fill(0, order[:17], 1.0).reshape(scores.shape)

    @staticmethod
    def backward(ctx, gradient):
      return gradient

  tw, ts = (torch.from_numpy(a.copy()).requires_grad_() for a in (w, s))
  mask = Identity.apply(ts)
  torch.sin(torch.from_numpy(x) @ (tw * mask)[0]).sum().backward()
  np.testing.assert_array_equal(mask_of(s), mask.detach().numpy())
  gw, gs = jax.grad(loss, argnums=(0, 1))(w, s)
  np.testing.assert_allclose(gw, tw.grad.numpy(), rtol=1e-5, atol=1e-6)
  np.testing.assert_allclose(gs, ts.grad.numpy(), rtol=1e-5, atol=1e-6)


@pytest.mark.torch
def test_hard_concrete_is_the_published_one():
  """Training form with the same noise, evaluation form, gradients of both. Mutation: divide by b in evaluation."""
  torch = pytest.importorskip('torch')
  scores, key = np.random.default_rng(3).normal(size=(2, 30, 40)).astype(np.float32) * 3, jax.random.key(4)
  u = torch.from_numpy(np.array(uniform_noise(site_words(key, 0), scores.shape)))
  for chosen in (key, None):
    s = torch.from_numpy(scores.copy()).requires_grad_()
    inner = torch.sigmoid((u.log() - (1 - u).log() + s) / (2 / 3)) if chosen is not None else torch.sigmoid(s)
    gates = (inner * 1.2 - 0.1).clamp(min=0.0, max=1.0)
    torch.sin(gates).sum().backward()
    gradient = jax.jit(jax.grad(lambda x, k=chosen: jnp.sin(hard_concrete(x, k)).sum()))(scores)
    np.testing.assert_allclose(hard_concrete(scores, chosen), gates.detach().numpy(), atol=2e-6)
    np.testing.assert_allclose(gradient, s.grad.numpy(), atol=5e-6)
  extreme = np.array([[-1e4, -200.0, 200.0, 1e4]], np.float32)
  np.testing.assert_array_equal(hard_concrete(extreme, key), [[0, 0, 1, 1]])
  assert np.isfinite(jax.grad(lambda x: hard_concrete(x, key).sum())(extreme)).all()


def test_noise_is_uniform_within_its_bounds_and_a_function_of_the_key():
  """Mutation: shift the bits by one more."""
  words = site_words(jax.random.key(0), 0)
  u = np.asarray(uniform_noise(words, (4, 100, 250)))
  assert u.min() == np.float32(1e-4) and u.max() == np.float32(0.9999)
  counts = np.histogram(u, bins=20, range=(0, 1))[0]
  assert np.abs(counts - 5000).max() < 5 * 5000**0.5
  np.testing.assert_array_equal(u, uniform_noise(words, (4, 100, 250)))
  assert (u != np.asarray(uniform_noise(site_words(jax.random.key(1), 0), (4, 100, 250)))).mean() > 0.99


@settings(max_examples=40, deadline=None)
@given(st.lists(st.floats(-2, 2, width=32), min_size=6, max_size=6), st.floats(0, 0.5))
def test_the_proximal_step_minimises_its_objective(values, strength):
  """(x - w)^2 / 2 + strength / (|old| + epsilon) |x|, against a grid. Mutation: weigh by the new weights."""
  w, old = np.array(values, np.float32), np.array([0, 0.01, 0.1, 1, -1, 2], np.float32)
  got = np.asarray(prox_reweighted_l1(jnp.asarray(w), jnp.asarray(old), strength, 0.1))
  reach = strength / (np.abs(old) + 0.1)

  def objective(x):
    return (x - w) ** 2 / 2 + reach * np.abs(x)

  grid = np.linspace(-2.2, 2.2, 441)[:, None]
  assert (objective(got) <= objective(grid).min(0) + 1e-6).all()
  np.testing.assert_array_equal(got[np.abs(w) <= reach * (1 - 1e-6)], 0)
