"""Span heads against loops in NumPy, and where their parameters lie."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.special import erf
from tiny import STILL

from compactlm_jax.config import EncoderConfig, MeshConfig
from compactlm_jax.nn.heads import RtdHead
from compactlm_jax.nn.span import CLOSED, HIDDEN, JointSpanHead, SpanHead
from compactlm_jax.parallel import PARAM_RULES, make_mesh, param_shardings
from compactlm_jax.tree import match_one, named_leaves

RNG = np.random.default_rng(0)
B, T, D = 2, 5, STILL.hidden_size
X = RNG.normal(size=(B, T, D)).astype(np.float32)
OPEN = np.array([[1, 0, 1, 1, 1], [1, 0, 0, 1, 0]], bool)


def gelu(x):
  return x * 0.5 * (1 + erf(x / np.sqrt(2)))


def wide(tree):
  """Random values in place of fresh ones, so that biases count too."""
  return jax.tree.map(lambda leaf: jnp.asarray(RNG.normal(size=leaf.shape) * 0.3, jnp.float32), tree)


def joint(answerable=True):
  head = JointSpanHead(STILL, answerable)
  params = wide(head.init(jax.random.key(0), jnp.zeros((1, 1, D)), jnp.ones((1, 1), bool)))
  return head, params, jax.tree.map(np.float64, params['params'])


def test_independent_head():
  head = SpanHead(STILL)
  params = wide(head.init(jax.random.key(0), jnp.zeros((1, 1, D))))
  start, end = head.apply(params, X)
  wanted = X @ np.asarray(params['params']['kernel']) + np.asarray(params['params']['bias'])
  np.testing.assert_allclose(np.stack([start, end], -1), wanted, rtol=1e-5, atol=1e-5)
  assert set(named_leaves(params['params'])) == {'kernel', 'bias'}


def test_joint_head_is_electras():
  """Pair by pair, with the two vectors side by side. Mutation: put the token before the start; drop the bias."""
  head, params, tree = joint()
  start = head.apply(params, X, OPEN, method='starts')
  wanted = (X @ tree['start']['kernel'] + tree['start']['bias'])[..., 0] + np.where(OPEN, 0, -1000.0)
  np.testing.assert_allclose(start, wanted, rtol=1e-5, atol=1e-4)
  places = np.array([[2, 0, 4], [3, 3, 1]], np.int32)
  found = head.apply(params, X, OPEN, places, method='ends')
  for b in range(B):
    for k in range(3):
      for t in range(T):
        both = np.concatenate([X[b, places[b, k]], X[b, t]]).astype(np.float64)
        hidden = gelu(both @ tree['end_hidden']['kernel'] + tree['end_hidden']['bias'])
        logit = (hidden @ tree['end_output']['kernel'] + tree['end_output']['bias'])[0]
        np.testing.assert_allclose(found[b, k, t], logit + (0 if OPEN[b, t] else CLOSED), rtol=1e-4, atol=1e-4)


def test_answerability_reads_the_first_token_and_the_expected_start():
  """Mutation: take the likeliest start instead of the mean; forget the softmax."""
  head, params, tree = joint()
  start = RNG.normal(size=(B, T)).astype(np.float32)
  found = head.apply(params, X, start, method='impossible')
  probs = np.exp(start) / np.exp(start).sum(-1, keepdims=True)
  both = np.concatenate([X[:, 0], (probs[..., None] * X).sum(1)], -1).astype(np.float64)
  hidden = gelu(both @ tree['answerable_hidden']['kernel'] + tree['answerable_hidden']['bias'])
  wanted = (hidden @ tree['answerable_output']['kernel'] + tree['answerable_output']['bias'])[:, 0]
  np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize('answerable', [True, False])
def test_parameters_of_the_joint_head(answerable):
  """Mutation: drop a row of PARAM_RULES, or let two rows overlap."""
  _, params, _ = joint(answerable)
  tree = {'span': params['params']}
  parts = {'end': True, 'answerable': answerable}
  shapes = {'span/start/kernel': (D, 1), 'span/start/bias': (1,)}
  for part in (name for name, there in parts.items() if there):
    shapes |= {
      f'span/{part}_hidden/kernel': (2 * D, HIDDEN), f'span/{part}_hidden/bias': (HIDDEN,),
      f'span/{part}_output/kernel': (HIDDEN, 1), f'span/{part}_output/bias': (1,),
    }  # fmt: skip
  assert {name: leaf.shape for name, leaf in named_leaves(tree).items()} == shapes
  independent = {'span': SpanHead(STILL).init(jax.random.key(0), jnp.zeros((1, 1, D)))['params']}
  for name in (*shapes, *named_leaves(independent)):
    match_one(PARAM_RULES, name, 'sharding')
  for sizes in ((1, 8, 1), (1, 4, 2), (2, 2, 2)):
    for params in (tree, independent):
      param_shardings(make_mesh(MeshConfig(*sizes)), params)


def test_logits_of_half_precision_states_are_not_rounded_to_it():
  """Ties between neighbours would decide answers. Mutation: multiply in the dtype of the states."""
  config = EncoderConfig(hidden_size=64, num_heads=4, num_layers=1)
  x = 4 * jax.random.normal(jax.random.key(0), (1, 384, 64)).astype(jnp.bfloat16)
  heads = {SpanHead(config): lambda out: out[0], RtdHead(config): lambda out: out}
  for head, read in heads.items():
    variables = jax.tree.map(lambda leaf: 20 * leaf, head.init(jax.random.key(1), x))
    logits = read(head.apply(variables, x))
    assert logits.dtype == jnp.float32 and len(np.unique(logits)) > 360
