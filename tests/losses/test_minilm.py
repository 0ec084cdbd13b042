"""MiniLM's losses against float64 loops over examples, and the three normalisations against each other."""

import dataclasses

import jax
import numpy as np
import pytest

from compactlm_jax.config import DistillConfig
from compactlm_jax.errors import ConfigError
from compactlm_jax.losses.minilm import part_names, relation_loss
from compactlm_jax.losses.reduce import masked_mean
from compactlm_jax.types import QKV

LENGTHS = (5, 2, 7)


def qkv(seed, heads, size, length=7):
  rng = np.random.default_rng(seed)
  return QKV(*(rng.normal(size=(len(LENGTHS), length, heads, size)).astype(np.float32) for _ in range(3)))


def mask(length=7):
  return (np.arange(length) < np.array(LENGTHS)[:, None]).astype(np.int32)


def example_kl(teacher, student, relation, b, relation_heads, rows=None):
  """[heads, rows] of KL(teacher || student) of example `b`, cut to its length, in float64."""
  length, logs = LENGTHS[b], []
  rows = length if rows is None else rows
  for side in (teacher, student):
    x, y = (getattr(side, f'{name}_BTHK')[b].astype(np.float64) for name in relation)
    if relation_heads:
      x, y = (z.reshape(len(z), relation_heads, -1) for z in (x, y))
    logits = np.einsum('thk,shk->hts', x[:rows], y[:length]) / np.sqrt(x.shape[-1])
    logits -= logits.max(-1, keepdims=True)
    logs.append(logits - np.log(np.exp(logits).sum(-1, keepdims=True)))
  return (np.exp(logs[0]) * (logs[0] - logs[1])).sum(-1)


@pytest.mark.parametrize(
  ('relations', 'relation_heads', 'student_heads'),
  [(('qk', 'vv'), 0, 4), (('qq', 'kk', 'vv'), 6, 2), (('qk', 'vv', 'qq', 'kk'), 2, 3)],
)
def test_normalisations_equal_loops(relations, relation_heads, student_heads):
  teacher, student = qkv(0, 4, 6), qkv(1, student_heads, 12 // student_heads)
  config = DistillConfig(relations=relations, relation_heads=relation_heads)
  want = dict.fromkeys(('tokens', 'examples', 'padded'), 0.0)
  for r in relations:
    each = [example_kl(teacher, student, r, b, relation_heads) for b in range(3)]
    padded = [example_kl(teacher, student, r, b, relation_heads, rows=7) for b in range(3)]
    want['tokens'] += np.concatenate(each, axis=1).mean()
    want['examples'] += np.mean([e.mean() for e in each])
    want['padded'] += np.concatenate(padded, axis=1).mean()
  for normalize, value in want.items():
    parts, weights = relation_loss(teacher, student, mask(), dataclasses.replace(config, normalize=normalize))
    assert tuple(parts) == relations == part_names(config)
    np.testing.assert_allclose(masked_mean(sum(parts.values()), weights), value, rtol=2e-5)


def test_value_mse_equals_a_loop_and_replaces_the_value_relation():
  teacher, student = qkv(0, 4, 6), qkv(1, 3, 8)
  config = DistillConfig(relations=('vv',), value_loss='mse')
  parts, weights = relation_loss(teacher, student, mask(), config)
  rows = [
    (teacher.v_BTHK[b, :n].reshape(n, -1) - student.v_BTHK[b, :n].reshape(n, -1)) ** 2 for b, n in enumerate(LENGTHS)
  ]
  assert list(parts) == ['value_mse']
  np.testing.assert_allclose(masked_mean(parts['value_mse'], weights), np.concatenate(rows).mean(), rtol=1e-6)
  with pytest.raises(ConfigError, match='value_loss'):
    relation_loss(teacher, qkv(1, 4, 5), mask(), config)


@pytest.mark.parametrize('normalize', ['tokens', 'examples'])
@pytest.mark.parametrize('value_loss', ['relation', 'mse'])
def test_pad_tokens_and_fill_rows_change_nothing(normalize, value_loss):
  config = DistillConfig(normalize=normalize, value_loss=value_loss)
  teacher, student = qkv(0, 4, 6), qkv(1, 4, 6)
  parts, weights = relation_loss(teacher, student, mask(), config)
  rng = np.random.default_rng(2)

  def grow(x):  # five more pad tokens, and a fourth row of weight 0
    out = rng.normal(scale=30, size=(4, 12, *x.shape[2:])).astype(np.float32)
    out[:3, :7] = x
    return out

  long_mask = np.ones((4, 12), np.int32)
  long_mask[:3] = mask(12)
  long_parts, long_weights = relation_loss(
    *(jax.tree.map(grow, side) for side in (teacher, student)), long_mask, config, np.array([1.0, 1, 1, 0], np.float32)
  )
  np.testing.assert_allclose(long_weights, [*weights, 0])
  for name in parts:
    np.testing.assert_allclose(long_parts[name][:3], parts[name], rtol=1e-6)


def test_an_empty_row_weighs_nothing():
  empty = mask()
  empty[1] = 0
  for normalize in ('tokens', 'examples'):
    parts, weights = relation_loss(qkv(0, 4, 6), qkv(1, 4, 6), empty, DistillConfig(normalize=normalize))
    assert weights[1] == 0 and all(part[1] == 0 for part in parts.values())


@pytest.mark.parametrize('value_loss', ['relation', 'mse'])
def test_gradient_reaches_the_student_only(value_loss):
  def value(teacher, student, config):
    parts, weights = relation_loss(teacher, student, mask(), config)
    return masked_mean(sum(parts.values()), weights)

  config = DistillConfig(relations=('qk', 'vv', 'qq', 'kk'), value_loss=value_loss)
  teacher, student = jax.grad(value, (0, 1))(qkv(0, 4, 6), qkv(1, 4, 6), config)
  assert all(not np.asarray(g).any() for g in jax.tree.leaves(teacher))
  assert all(np.asarray(g).any() for g in jax.tree.leaves(student))
