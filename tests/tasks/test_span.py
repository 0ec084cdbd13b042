"""The span task: what both heads learn and give out, whatever the padding; and what a teacher adds."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from tiny import STILL

from compactlm_jax.config import EncoderConfig, FinetuneConfig, SpanConfig, from_config_dict
from compactlm_jax.errors import ConfigError
from compactlm_jax.interop.bundle import Bundle, save_pretrained
from compactlm_jax.tasks.span import best_places, context_mask, make_span_task, span_logits
from compactlm_jax.types import Batch

MODEL = dataclasses.replace(STILL, num_layers=1, initializer_range=0.3)
# [CLS] 2 question tokens [SEP] context [SEP]
LENGTHS, LABELS = (12, 9, 11), np.array([[5, 6, 0], [0, 0, 1], [9, 9, 0]], np.int32)


def batch(seq_len=14, weights=(1, 1, 1)):
  rng, ids = np.random.default_rng(0), np.zeros((3, seq_len), np.int32)
  types, mask = np.zeros_like(ids), np.zeros_like(ids)
  for row, length in enumerate(LENGTHS):
    ids[row, :length], mask[row, :length], types[row, 4:length] = rng.integers(4, 64, length), 1, 1
  return Batch(*map(jnp.asarray, (ids, mask, types, LABELS, np.asarray(weights, np.float32))))


def task(head='independent', version=2, teacher=None, config=None, **span):
  fields = {'head': head, 'n_best': 3, 'beam': 3, **span}
  return make_span_task(MODEL, SpanConfig(**fields), config or FinetuneConfig(), version=version, teacher=teacher)


@functools.cache
def built(head='independent', version=2):
  """(fresh parameters, compiled (parameters, rows) -> (loss, its parts, outputs of evaluation))."""
  made = task(head, version)

  def run(params, rows):
    return *made.loss(params, None, rows, jax.random.key(0), 0), made.evaluate(params, None, rows)

  return jax.jit(made.init)(jax.random.key(0)), jax.jit(run)


BOTH = pytest.mark.parametrize('head, version', [('independent', 2), ('joint', 2)])
ALL = pytest.mark.parametrize('head, version', [('independent', 1), ('independent', 2), ('joint', 1), ('joint', 2)])


@BOTH
def test_padding_changes_nothing(head, version):
  """Loss and outputs, for rows of 14 and 16. Mutation: let padding compete for start and end."""
  params, run = built(head, version)
  first, second = run(params, batch(14)), run(params, batch(16))
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), first, second)


@ALL
def test_outputs_have_one_shape(head, version):
  """Whatever the row length. Mutation: return what top_k gives."""
  made, lists = task(head, version, n_best=13, beam=13), 13 if head == 'joint' else 1
  params = jax.eval_shape(made.init, jax.random.key(0))
  wanted = {'starts': (3, 13), 'start_logits': (3, 13), 'ends': (3, lists, 13), 'end_logits': (3, lists, 13)}
  if head == 'independent':
    wanted['null'] = (3, 2)
  elif version == 2:
    wanted['impossible'] = (3,)
  for seq_len in (14, 12):
    found = jax.eval_shape(made.evaluate, params, None, batch(seq_len))
    assert {name: value.shape for name, value in found.items() if not isinstance(value, tuple)} == wanted


@BOTH
def test_outputs_lie_in_the_context(head, version):
  """Thirteen asked for, of contexts of 4 to 7 tokens. Mutation: count the last [SEP] as context."""
  made = task(head, version, n_best=13, beam=13)
  found = jax.jit(lambda key: made.evaluate(made.init(key), None, batch()))(jax.random.key(0))
  for row, length in enumerate(LENGTHS):
    context = set(range(4, length - 1))
    assert set(found['starts'][row].tolist()) == context | {0}
    assert all(set(ends) == context | {0} for ends in found['ends'][row].tolist())
    assert np.all(np.diff(found['start_logits'][row]) <= 0)
    assert ((found['starts'][row] == 0) == (found['start_logits'][row] == -1e9)).all()


def test_the_independent_head_gives_its_logits():
  """Mutation: take the ends' places for the starts."""
  (params, run), rows = built(), batch()
  start, end = jax.jit(lambda p: span_logits(p, MODEL, rows))(params)
  found, same = run(params, rows)[2], {'rtol': 1e-5, 'atol': 1e-6}
  np.testing.assert_allclose(found['null'], np.stack([start[:, 0], end[:, 0]], -1), **same)
  np.testing.assert_allclose(found['start_logits'], np.take_along_axis(start, found['starts'], 1), **same)
  np.testing.assert_allclose(found['end_logits'][:, 0], np.take_along_axis(end, found['ends'][:, 0], 1), **same)
  np.testing.assert_array_equal(found['starts'][:, 0], np.where(context_mask(rows), start, -np.inf).argmax(-1))


def test_joint_scores_are_log_probabilities_of_pairs():
  """The loss of a label that is in the beam is made of its scores. Mutation: condition every end on the best start."""
  (params, run), rows = built('joint', 2), batch()
  found = run(params, rows)[2]
  assert (np.exp(np.asarray(found['start_logits'])).sum(-1) <= 1 + 1e-5).all()
  for k in (0, 1):
    labels = np.array([found['starts'][0, 1], found['ends'][0, 1, k], 0])
    one = dataclasses.replace(rows, labels=rows.labels.at[0].set(labels), weights=jnp.array([1.0, 0, 0]))
    spans = run(params, one)[1]['span_loss']
    np.testing.assert_allclose(-2 * spans, found['start_logits'][0, 1] + found['end_logits'][0, 1, k], rtol=1e-5)


def test_answerability_is_weighed():
  """Mutation: weigh the span instead."""
  params, run = built('joint', 2)
  value, parts, _ = run(params, batch())
  np.testing.assert_allclose(value, parts['span_loss'] + 0.5 * parts['answerable_loss'], rtol=1e-5)
  assert parts['answerable_loss'] > 0


@BOTH
def test_rows_of_weight_0_do_not_count(head, version):
  """Mutation: take the mean over all rows."""
  (params, run), rows = built(head, version), batch(weights=(1, 0, 1))
  other = dataclasses.replace(rows, labels=rows.labels.at[1].set(jnp.array([4, 7, 0])))
  (first, _, one), (second, _, two) = run(params, rows), run(params, other)
  np.testing.assert_allclose(first, second, rtol=1e-6)
  for name in (name for name, pair in one.items() if isinstance(pair, tuple)):
    assert float(one[name][1]) == 2
    np.testing.assert_allclose(one[name][0], two[name][0], rtol=1e-6)


@BOTH
def test_both_heads_learn(head, version):
  """Three rows by heart: best span right, and what has no answer known. Mutation: train on swapped labels."""
  (params, run), rows = built(head, version), batch()
  tx = optax.adam(1e-2)
  state = tx.init(params)

  @jax.jit
  def step(params, state):
    value, grads = jax.value_and_grad(lambda p: run(p, rows)[0])(params)
    updates, state = tx.update(grads, state)
    return optax.apply_updates(params, updates), state, value

  for _ in range(40):
    params, state, value = step(params, state)
  assert value < 0.1
  found = run(params, rows)[2]
  assert found['starts'][0, 0] == 5 and found['starts'][2, 0] == 9
  assert found['ends'][0, 0, 0] == 6 and found['ends'][2, 0, 0] == 9
  if head == 'independent':
    assert (found['null'].sum(-1) > found['start_logits'][:, 0] + found['end_logits'][:, 0, 0]).tolist() == [0, 1, 0]
  else:
    assert (found['impossible'] > 0).tolist() == [False, True, False]


def test_a_teacher_adds_its_part():
  """ce_weight and distil_weight; a teacher that is the student adds nothing. Mutation: forget a weight."""
  params, run = built()
  other = jax.tree.map(lambda leaf: leaf[..., ::-1], params)
  taught = task(teacher=(other, MODEL), config=FinetuneConfig(ce_weight=0.25, distil_weight=0.5))
  assert set(taught.frozen) == {'encoder', 'span'}
  learn = jax.jit(lambda frozen, rows: taught.loss(params, frozen, rows, jax.random.key(0), 0))
  value, metrics = learn(other, batch())
  assert metrics['distil_loss'] > 0.01
  np.testing.assert_allclose(metrics['task_loss'], run(params, batch())[0], rtol=1e-5)
  np.testing.assert_allclose(value, 0.25 * metrics['task_loss'] + 0.5 * metrics['distil_loss'], rtol=1e-6)
  np.testing.assert_allclose(learn(params, batch())[1]['distil_loss'], 0, atol=1e-5)
  np.testing.assert_allclose(learn(other, batch(16))[0], value, rtol=1e-5)


def test_teachers_that_do_not_fit():
  params = jax.eval_shape(task('joint').init, jax.random.key(0))
  with pytest.raises(ConfigError, match="config.teacher: distillation compares start and end.*'independent'"):
    task('joint', teacher=(jax.eval_shape(task().init, jax.random.key(0)), MODEL))
  for wrong in (params, {'encoder': params['encoder']}):
    with pytest.raises(ConfigError, match='config.teacher: this model has no trained span head'):
      task(teacher=(wrong, MODEL))


def test_the_description_rebuilds_the_task():
  made = task('joint')
  span = from_config_dict(SpanConfig, made.model['span'])
  assert span.head == 'joint' and span.beam == 3 and made.model['version'] == 2
  assert from_config_dict(EncoderConfig, made.model['encoder']) == MODEL


def test_best_places():
  scores, allowed = jnp.array([[3.0, 1.0, 2.0, 9.0]]), jnp.array([[True, True, True, False]])
  best, places = best_places(scores, allowed, 2)
  assert best.tolist() == [[3.0, 2.0]] and places.tolist() == [[0, 2]]
  best, places = best_places(scores, allowed, 6)
  assert places.tolist() == [[0, 2, 1, 0, 0, 0]] and (best[0, 3:] == -1e9).all()


@pytest.mark.torch
def test_independent_head_and_loss_are_those_of_transformers(tmp_path):
  """BertForQuestionAnswering on rows without padding. Mutation: swap start and end."""
  torch, transformers = pytest.importorskip('torch'), pytest.importorskip('transformers')
  (params, run), rows = built(), batch()
  rows = dataclasses.replace(rows, attention_mask=jnp.ones_like(rows.attention_mask))
  save_pretrained(Bundle(MODEL, params), tmp_path / 'model')
  theirs = transformers.AutoModelForQuestionAnswering.from_pretrained(tmp_path / 'model', attn_implementation='eager')
  ids, types, labels = (torch.tensor(np.asarray(x)).long() for x in (rows.input_ids, rows.token_type_ids, LABELS))
  with torch.no_grad():
    wanted = theirs(ids, token_type_ids=types, start_positions=labels[:, 0], end_positions=labels[:, 1])
  start, end = jax.jit(lambda p: span_logits(p, MODEL, rows))(params)
  np.testing.assert_allclose(start, wanted.start_logits, rtol=1e-4, atol=1e-5)
  np.testing.assert_allclose(end, wanted.end_logits, rtol=1e-4, atol=1e-5)
  np.testing.assert_allclose(run(params, rows)[0], wanted.loss, rtol=1e-5)
