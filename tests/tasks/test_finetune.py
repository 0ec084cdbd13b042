"""Fine-tuning: scores in their own units, and a fine-tuned teacher."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny import STILL

from compactlm_jax.config import FinetuneConfig
from compactlm_jax.data.batches import Batches
from compactlm_jax.data.synthetic import synthetic_table
from compactlm_jax.errors import ConfigError
from compactlm_jax.losses.classification import cross_entropy, soft_kl
from compactlm_jax.tasks.finetune import classify, make_finetune_task

ROWS = synthetic_table(rows=32, seq_len=16, vocab_size=64)
BATCH = Batches(ROWS, 8, 0).batch(0)
PLAIN = FinetuneConfig(dropout=0.0)
KEY = jax.random.key(0)


def value(task, params, batch=BATCH):
  return task.loss(params, task.frozen, batch, KEY, jnp.int32(0))


@pytest.fixture(scope='module')
def teacher():
  task = make_finetune_task(STILL, ROWS.classes, PLAIN)
  params = task.init(jax.random.key(5))
  # Louder than at the start, so that softened distributions differ from even ones.
  return {**params, 'classifier': jax.tree.map(lambda x: 20 * x + 0.3, params['classifier'])}, STILL


def test_a_teacher_adds_its_softened_classes(teacher):
  """Mutation: drop a weight, take the temperature for 1, or let gradients into the teacher."""
  config = dataclasses.replace(PLAIN, ce_weight=0.25, distil_weight=0.75, temperature=3.0)
  task = make_finetune_task(STILL, ROWS.classes, config, teacher=teacher)
  params = task.init(KEY)
  loss, metrics = value(task, params)
  outputs, target = classify(params, STILL, BATCH), classify(*teacher, BATCH)
  hard = cross_entropy(outputs, jnp.asarray(BATCH.labels)).mean()
  soft = soft_kl(target, outputs, 3.0).mean()
  np.testing.assert_allclose(loss, 0.25 * hard + 0.75 * soft, rtol=1e-5)
  np.testing.assert_allclose((metrics['task_loss'], metrics['distil_loss']), (hard, soft), rtol=1e-5)
  gradient = jax.grad(lambda frozen: task.loss(params, frozen, BATCH, KEY, jnp.int32(0))[0])(task.frozen)
  assert not any(np.asarray(leaf).any() for leaf in jax.tree.leaves(gradient))


def test_the_weights_of_distillation_need_a_teacher():
  """Without a teacher the loss is the task's own, whatever the weights."""
  task = make_finetune_task(STILL, ROWS.classes, dataclasses.replace(PLAIN, ce_weight=0.1))
  params = task.init(KEY)
  loss, metrics = value(task, params)
  np.testing.assert_allclose(loss, cross_entropy(classify(params, STILL, BATCH), jnp.asarray(BATCH.labels)).mean())
  assert 'distil_loss' not in metrics and task.frozen is None


def test_scores_are_trained_scaled_and_given_in_their_own_units(teacher):
  """Mutation: scale the labels in evaluation too, or not at all."""
  labels = np.linspace(0, 5, 8).astype(np.float32)
  batch = dataclasses.replace(BATCH, labels=labels, weights=np.ones(8, np.float32))
  task = make_finetune_task(STILL, (), dataclasses.replace(PLAIN, score_scale=5.0))
  params = task.init(KEY)
  raw = np.asarray(classify(params, STILL, batch))
  assert raw.shape == (8, 1)
  loss, metrics = value(task, params, batch)
  np.testing.assert_allclose(loss, np.mean((raw[:, 0] - labels / 5) ** 2), rtol=1e-5)
  assert 'accuracy' not in metrics
  found = task.evaluate(params, None, batch)
  np.testing.assert_allclose(found['outputs'], 5 * raw, rtol=1e-6)
  np.testing.assert_array_equal(found['labels'], labels)
  np.testing.assert_allclose(found['loss'][0] / found['loss'][1], loss, rtol=1e-6)
  # A teacher of scores speaks in units of the labels.
  params_of_teacher = {**params, 'classifier': jax.tree.map(lambda x: 5 * x, params['classifier'])}
  same = make_finetune_task(STILL, (), dataclasses.replace(PLAIN, score_scale=5.0), teacher=(params_of_teacher, STILL))
  assert float(value(same, params, batch)[1]['distil_loss']) < 1e-10


def test_rows_without_labels_are_predicted():
  """Mutation: ask for labels in evaluation."""
  task = make_finetune_task(STILL, ROWS.classes, PLAIN)
  found = task.evaluate(task.init(KEY), None, dataclasses.replace(BATCH, labels=None, weights=np.ones(8, np.float32)))
  assert set(found) == {'outputs'} and found['outputs'].shape == (8, 2)


def test_teachers_that_do_not_fit_are_refused(teacher):
  params, config = teacher
  with pytest.raises(ConfigError, match='config.teacher: this model has no classifier; fine-tune it'):
    make_finetune_task(STILL, ROWS.classes, PLAIN, teacher=({'encoder': params['encoder']}, config))
  with pytest.raises(ConfigError, match=r'config.teacher: its head has 2 output\(s\), the task needs 3'):
    make_finetune_task(STILL, ('a', 'b', 'c'), PLAIN, teacher=teacher)
  with pytest.raises(ConfigError, match='found 1 class'):
    make_finetune_task(STILL, ('a',), PLAIN)


def test_a_left_to_right_encoder_is_refused():
  """Its first token sees nothing. Mutation: drop the check of SentenceModel."""
  with pytest.raises(ConfigError, match='config.encoder.causal: the head reads the first token'):
    make_finetune_task(dataclasses.replace(STILL, causal=True), ('a', 'b'), FinetuneConfig())
