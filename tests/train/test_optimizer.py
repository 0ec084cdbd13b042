"""AdamW against PyTorch and NumPy, the schedules, and which parameters decay, move or have moments."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from compactlm_jax.config import OptimizerConfig
from compactlm_jax.errors import ConfigError
from compactlm_jax.train.optimizer import learning_rate_schedule, make_optimizer
from compactlm_jax.tree import named_leaves

ALL = (('.*', True),)
PLAIN = {'decay': 'constant', 'weight_decay': 0.0, 'clip_norm': 0.0, 'learning_rate': 0.01}


def tree(seed, dtype=np.float32):
  rng = np.random.default_rng(seed)
  return {
    'encoder': {'kernel': rng.normal(size=(3, 4)).astype(dtype), 'bias': rng.normal(size=(4,)).astype(dtype)},
    'norm': {'scale': rng.normal(size=(4,)).astype(dtype)},
    'mlm_head': {'output_bias': rng.normal(size=(5,)).astype(dtype)},
  }


GRADS = [tree(100 + i) for i in range(10)]


def trajectory(config, params, grads, trainable=ALL, total=10):
  """Parameters after each step, and the last state."""
  tx = make_optimizer(config, total, trainable)
  update = jax.jit(tx.update)
  state, out = tx.init(params), []
  for g in grads:
    updates, state = update(g, state, params)
    params = optax.apply_updates(params, updates)
    out.append(params)
  return out, state


def numpy_adamw(params, grads, *, rate, b1=0.9, b2=0.999, eps=1e-6, decay=0.0, corrected=True):
  """The update rule of the papers in float64, one array at a time."""
  p, m, v = params.astype(np.float64), 0.0, 0.0
  for t, g in enumerate(grads, 1):
    m, v = b1 * m + (1 - b1) * g, b2 * v + (1 - b2) * g.astype(np.float64) ** 2
    c1, c2 = (1 - b1**t, 1 - b2**t) if corrected else (1, 1)
    p = p - rate(t - 1) * ((m / c1) / (np.sqrt(v / c2) + eps) + decay * p)
  return p


@pytest.mark.parametrize('corrected', [True, False])
def test_trajectory_is_that_of_a_numpy_loop(corrected):
  """Mutation: leave c1, c2 at 1, or decay the bias as well (both seen to fail)."""
  config = OptimizerConfig(
    learning_rate=0.02, warmup_steps=3, weight_decay=0.1, clip_norm=0.0, bias_correction=corrected, beta2=0.98
  )
  rate = lambda step: 0.02 * min(1, step / 3) * min(1, (10 - step) / 7)  # noqa: E731
  start = tree(0)
  last = named_leaves(trajectory(config, start, GRADS)[0][-1])
  for name, leaf in named_leaves(start).items():
    decay = 0.1 if name.endswith('kernel') else 0.0
    grads = [named_leaves(g)[name] for g in GRADS]
    expected = numpy_adamw(leaf, grads, rate=rate, b2=0.98, decay=decay, corrected=corrected)
    np.testing.assert_allclose(last[name], expected, rtol=2e-6, atol=2e-6)


@pytest.mark.torch
def test_trajectory_is_that_of_torch_adamw():
  """Mutation: apply weight decay before Adam's moments (L2 instead of decoupled)."""
  torch = pytest.importorskip('torch')
  config = OptimizerConfig(**{**PLAIN, 'weight_decay': 0.05, 'epsilon': 1e-8}, no_decay='(?!)')
  start = tree(1)
  ours = trajectory(config, start, GRADS)[0]
  names = list(named_leaves(start))
  theirs = {name: torch.nn.Parameter(torch.tensor(leaf)) for name, leaf in named_leaves(start).items()}
  adamw = torch.optim.AdamW(theirs.values(), lr=0.01, eps=1e-8, weight_decay=0.05)
  for mine, grads in zip(ours, GRADS, strict=True):
    for name in names:
      theirs[name].grad = torch.tensor(named_leaves(grads)[name])
    adamw.step()
    for name in names:
      np.testing.assert_allclose(named_leaves(mine)[name], theirs[name].detach().numpy(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
  ('fields', 'expected'),
  [
    ({'warmup_steps': 10}, {0: 0.0, 5: 0.5, 10: 1.0, 55: 0.5, 99: 1 / 90, 100: 0.0, 150: 0.0}),
    ({'warmup_steps': 10, 'decay_from': 'start'}, {0: 0.0, 5: 0.5 * 0.95, 10: 0.9, 50: 0.5, 100: 0.0, 150: 0.0}),
    ({'warmup_fraction': 0.2}, {0: 0.0, 10: 0.5, 20: 1.0, 60: 0.5, 100: 0.0}),
    ({'warmup_fraction': 0.2, 'warmup_steps': 10}, {5: 0.5, 10: 1.0}),  # steps win
    ({}, {0: 1.0, 50: 0.5, 100: 0.0}),
    ({'decay': 'constant'}, {0: 1.0, 50: 1.0, 100: 1.0, 1000: 1.0}),
    ({'decay': 'constant', 'warmup_steps': 10}, {0: 0.0, 5: 0.5, 10: 1.0, 100: 1.0}),
    ({'warmup_steps': 200}, {0: 0.0, 50: 0.25, 99: 0.495}),  # longer than the run: it never peaks
  ],
)
def test_schedule_at_its_named_points(fields, expected):
  """Mutation: start the decay of decay_from='warmup' at step 0, or warm up from 1 / warmup instead of 0."""
  schedule = learning_rate_schedule(OptimizerConfig(learning_rate=2.0, **fields), 100)
  for step, value in expected.items():
    np.testing.assert_allclose(schedule(step), 2.0 * value, rtol=1e-6, atol=1e-7)
    np.testing.assert_allclose(jax.jit(schedule)(jnp.int32(step)), 2.0 * value, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize('decay_from', ['start', 'warmup'])
def test_schedule_rises_and_then_falls(decay_from):
  """Mutation: drop jnp.maximum / jnp.clip: after the last step the rate turns negative."""
  schedule = learning_rate_schedule(OptimizerConfig(warmup_steps=7, decay_from=decay_from), 40)
  rates = np.array([schedule(step) for step in range(45)])
  peak = rates.argmax()
  assert (np.diff(rates[: peak + 1]) > 0).all() and (np.diff(rates[peak:]) <= 0).all() and (rates >= 0).all()


def test_only_kernels_decay():
  """Mutation: re.match instead of re.fullmatch lets 'bias_kernel' escape decay."""
  params = {**tree(2), 'bias_kernel': {'kernel': np.ones((2, 2), np.float32)}}
  zeros = jax.tree.map(np.zeros_like, params)
  config = OptimizerConfig(**{**PLAIN, 'weight_decay': 0.5})
  after = named_leaves(trajectory(config, params, [zeros])[0][-1])
  for name, before in named_leaves(params).items():
    expected = before * (1 - 0.01 * 0.5) if name.endswith('kernel') else before
    np.testing.assert_allclose(after[name], expected, rtol=1e-6)


def test_untrained_parameters_have_no_moments_and_never_move():
  """Mutation: label every parameter 'train'."""
  trainable = (('encoder/.*', True), ('(norm|mlm_head)/.*', False))
  config = OptimizerConfig(**{**PLAIN, 'weight_decay': 0.5, 'no_decay': '(?!)'})
  params = tree(3)
  after, state = trajectory(config, params, GRADS, trainable)
  for name in ('norm/scale', 'mlm_head/output_bias'):
    assert named_leaves(after[-1])[name].tobytes() == named_leaves(params)[name].tobytes()
  assert not np.array_equal(after[-1]['encoder']['kernel'], params['encoder']['kernel'])
  moments = [name for name, leaf in named_leaves(state).items() if leaf.ndim]
  assert len(moments) == 4 and all('/encoder/' in name for name in moments), moments


def test_layers_that_are_not_trained_do_not_decay():
  """Mutation: ignore the tuple in `decay_weights`."""
  kernel = np.ones((3, 2, 2), np.float32)
  params, trainable = {'layers': {'kernel': kernel}}, (('.*', (True, False, True)),)
  config = OptimizerConfig(**{**PLAIN, 'weight_decay': 0.5})
  (after,), _ = trajectory(config, params, [jax.tree.map(np.zeros_like, params)], trainable)
  np.testing.assert_allclose(
    after['layers']['kernel'], kernel * np.array([0.995, 1, 0.995]).reshape(3, 1, 1), rtol=1e-6
  )
  assert np.array_equal(after['layers']['kernel'][1], kernel[1])


@pytest.mark.parametrize(
  ('trainable', 'message'),
  [
    ((('encoder/.*', True),), 'parameter mlm_head/output_bias: no trainable rule matches it'),
    ((('.*', True), ('norm/.*', False)), 'parameter norm/scale: 2 trainable rules match it (.*, norm/.*); make'),
  ],
)
def test_every_parameter_needs_exactly_one_rule(trainable, message):
  """Mutation: take the first rule that matches, or False without one."""
  with pytest.raises(ConfigError, match=re.escape(message)):
    make_optimizer(OptimizerConfig(), 10, trainable).init(tree(0))


def test_gradients_are_clipped_by_their_global_norm():
  """Mutation: clip each leaf by itself. Without second moment's memory (beta2 = 0) Adam would hide the scale."""
  config = OptimizerConfig(**{**PLAIN, 'clip_norm': 0.5, 'beta1': 0.0, 'epsilon': 1e6, 'bias_correction': False})
  grads, zeros = tree(4), jax.tree.map(np.zeros_like, tree(4))
  (after,), _ = trajectory(config, zeros, [grads])
  norm = np.sqrt(sum((g.astype(np.float64) ** 2).sum() for g in jax.tree.leaves(grads)))
  assert norm > 1
  for name, leaf in named_leaves(after).items():  # a huge epsilon makes the step linear in the gradient
    np.testing.assert_allclose(leaf, -0.01 * 0.5 / norm * named_leaves(grads)[name] / 1e6, rtol=1e-4)
  small = jax.tree.map(lambda g: g * np.float32(0.1 / norm), grads)
  (after,), _ = trajectory(config, zeros, [small])
  for name, leaf in named_leaves(after).items():
    np.testing.assert_allclose(leaf, -0.01 * named_leaves(small)[name] / 1e6, rtol=1e-4)


@pytest.mark.parametrize(
  ('rule', 'wanted'),
  [
    # depth: embeddings 0, layer i (from 0) i + 1, head L + 2; L = 3 (electra:model/optimization.py).
    ('published', {'embeddings': 0.5**5, 'layers': [0.5**4, 0.5**3, 0.5**2], 'classifier': 1.0, 'pooler': 1.0}),
    ('corrected', {'embeddings': 0.5**4, 'layers': [0.5**3, 0.5**2, 0.5**1], 'classifier': 1.0, 'pooler': 1.0}),
  ],
)
def test_learning_rates_fall_from_the_head_down(rule, wanted):
  """Decay included. Mutation: apply the factors before the decay of weights, or count layers from 1."""
  params = {
    'encoder': {
      'embeddings': {'word': {'embedding': np.ones((4, 2), np.float32)}},
      'layers': {'ffn_in': {'kernel': np.ones((3, 2, 2), np.float32)}},
      'pooler': {'kernel': np.ones((2, 2), np.float32)},
    },
    'classifier': {'kernel': np.ones((2, 2), np.float32)},
  }
  grads = jax.tree.map(np.ones_like, params)
  fields = {**PLAIN, 'weight_decay': 0.1}
  plain, _ = trajectory(OptimizerConfig(**fields), params, [grads])
  scaled, _ = trajectory(OptimizerConfig(**fields, layer_decay=0.5, layer_decay_rule=rule), params, [grads])
  ratios = {
    name: (1 - np.asarray(leaf)) / (1 - np.asarray(named_leaves(plain[0])[name]))
    for name, leaf in named_leaves(scaled[0]).items()
  }
  np.testing.assert_allclose(ratios['encoder/embeddings/word/embedding'], wanted['embeddings'], rtol=1e-4)
  np.testing.assert_allclose(ratios['encoder/layers/ffn_in/kernel'][:, 0, 0], wanted['layers'], rtol=1e-4)
  np.testing.assert_allclose(ratios['classifier/kernel'], wanted['classifier'], rtol=1e-4)
  np.testing.assert_allclose(ratios['encoder/pooler/kernel'], wanted['pooler'], rtol=1e-4)


@pytest.mark.parametrize('rule', ['published', 'corrected'])
def test_layers_of_different_sizes_decay_by_their_place(rule):
  """Mutation: count layers from the start of each run."""
  stack = {'encoder': {'layers': {'b': np.ones(12, np.float32)}, 'embeddings': {'w': np.ones(1, np.float32)}}}
  parts = {f'layers_{i}': {'b': np.ones(1, np.float32)} for i in range(12)}
  runs = {'encoder': {**parts, 'embeddings': {'w': np.ones(1, np.float32)}}}
  fields = {**PLAIN, 'layer_decay': 0.5, 'layer_decay_rule': rule}
  config = OptimizerConfig(**fields)
  one, many = (trajectory(config, tree, [jax.tree.map(np.ones_like, tree)])[0][0]['encoder'] for tree in (stack, runs))
  np.testing.assert_array_equal(one['layers']['b'], np.concatenate([many[f'layers_{i}']['b'] for i in range(12)]))
  np.testing.assert_array_equal(one['embeddings']['w'], many['embeddings']['w'])
