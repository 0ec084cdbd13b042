"""Elastic pre-training: every cell has the loss of a network of its own, and what is shared runs once."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny import STILL

from compactlm_jax.compress.subnet import subnet, subnet_config
from compactlm_jax.config import AdaptConfig, DistillConfig, ElectraConfig, MaskConfig, cells
from compactlm_jax.data.batches import Batches
from compactlm_jax.data.synthetic import synthetic_table
from compactlm_jax.errors import ConfigError
from compactlm_jax.nn.encoder import init_encoder
from compactlm_jax.tasks import elastic_pretrain
from compactlm_jax.tasks.distill import make_distill_task
from compactlm_jax.tasks.elastic_pretrain import (
  make_elastic_distill_task,
  make_elastic_electra_task,
  make_elastic_mlm_task,
)
from compactlm_jax.tasks.mlm import make_mlm_task
from compactlm_jax.tree import map_named
from compactlm_jax.types import SpecialTokens

NARROW = AdaptConfig(base='mlm', widths=(1.0,), depths=(1.0,), hidden_sizes=(8, 16), combine='mean')
SHALLOW = AdaptConfig(base='distill', widths=(1.0,), depths=(0.5, 1.0), combine='mean')
CELLS = cells(NARROW, STILL)
NAMES = ['1x1-h16', '0.5x1-h8']
SPECIAL = SpecialTokens(pad=0, cls=1, sep=2, mask=3)
MASK = MaskConfig(probability=0.3)
ELECTRA = ElectraConfig(generator_size=0.5)
ROWS = synthetic_table(rows=32, seq_len=16, vocab_size=64)
BATCH = dataclasses.replace(Batches(ROWS, 8, 0).batch(0), labels=None, weights=np.ones(8, np.float32))
KEY = jax.random.key(4)
KEYS = list(jax.random.split(KEY, len(CELLS) + 2))  # of the cells, in order; then of a sandwich, and of what is shared


def run(task, params):
  gradient = jax.jit(jax.value_and_grad(task.loss, has_aux=True))
  return gradient(params, task.frozen, BATCH, KEY, jnp.int32(0))


def weights(task):
  """Of a trained model, as it were; nothing is compiled."""
  rng = np.random.default_rng(0)
  noise = jax.tree.map(lambda x: 0.2 * rng.normal(size=x.shape).astype(np.float32), jax.eval_shape(task.init, KEY))
  return map_named(lambda name, leaf: leaf + np.float32('norm/scale' in name), noise)


def assert_same(found, wanted):
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-5), found, wanted)


def test_masked_models_of_every_size():
  """The mean of what separate models lose, each with masks of its own. Mutation: give every cell the same key."""
  task = make_elastic_mlm_task(STILL, MASK, SPECIAL, NARROW)
  params = weights(task)
  own = [make_mlm_task(subnet_config(STILL, cell), MASK, SPECIAL) for cell in CELLS]

  def wanted(params):
    pairs = zip(own, CELLS, KEYS)
    return sum(each.loss(subnet(params, STILL, cell), None, BATCH, key, 0)[0] for each, cell, key in pairs) / 2

  (value, metrics), grads = run(task, params)
  expected, expected_grads = jax.jit(jax.value_and_grad(wanted))(params)
  np.testing.assert_allclose(value, expected, rtol=1e-5)
  assert_same(grads, expected_grads)
  assert 'mlm_accuracy' in metrics and task.model['cells'] == NAMES and task.model['stage'] == 'pretrain'
  found = jax.jit(task.evaluate)(params, None, BATCH)
  assert found['loss'] == found['loss@1x1-h16'] and found['mlm_accuracy'] == found['mlm_accuracy@1x1-h16']
  assert found['loss@0.5x1-h8'][1] == found['loss'][1] and found['loss@0.5x1-h8'][0] != found['loss'][0]


def test_discriminators_of_every_size_read_what_one_generator_wrote(monkeypatch):
  """It learns from its own loss alone, once. Mutation: let each cell run the generator, or flow back into it."""
  calls, corrupt = [], elastic_pretrain.corrupt
  monkeypatch.setattr(elastic_pretrain, 'corrupt', lambda *args: calls.append(1) or corrupt(*args))
  task = make_elastic_electra_task(STILL, ELECTRA, MASK, SPECIAL, NARROW)
  params = weights(task)
  (value, metrics), grads = run(task, params)
  assert len(calls) == 1
  np.testing.assert_allclose(value, metrics['mlm_loss'] + 50 * metrics['rtd_loss'], rtol=1e-5)

  def generator_loss(params):
    mask_key, sample_key, dropout_key = jax.random.split(KEYS[-1], 3)
    rows = corrupt(params, STILL, ELECTRA, MASK, SPECIAL, BATCH, (mask_key, sample_key, dropout_key))
    return (rows.losses_BP * rows.slots_BP).sum() / rows.slots_BP.sum()

  expected, expected_grads = jax.jit(jax.value_and_grad(generator_loss))(params)
  np.testing.assert_allclose(metrics['mlm_loss'], expected, rtol=1e-5)
  assert_same(grads['generator'], expected_grads['generator'])
  assert not np.allclose(*(g['encoder']['embeddings']['word']['embedding'] for g in (grads, expected_grads)))
  assert np.asarray(grads['rtd_head']['dense']['kernel']).all()


def test_evaluation_of_discriminators():
  """They read what ELECTRA's task writes. Mutation: draw other replacements for the cells."""
  task = make_elastic_electra_task(STILL, ELECTRA, MASK, SPECIAL, NARROW)
  found = jax.jit(task.evaluate)(weights(task), None, BATCH)
  np.testing.assert_allclose(found['rtd_loss@1x1-h16'], found['rtd_loss'], rtol=1e-5)
  means = {name: float(total / count) for name, (total, count) in found.items()}
  losses = task.summarize(means)
  assert losses['loss'] == pytest.approx(means['mlm_loss'] + 50 * means['rtd_loss'])
  assert losses['loss@0.5x1-h8'] == pytest.approx(means['mlm_loss'] + 50 * means['rtd_loss@0.5x1-h8'])
  assert len({round(means[f'rtd_loss@{name}'], 6) for name in NAMES}) == 2


def test_students_of_every_size_learn_the_relations_of_one_teacher():
  """The mean of what separate students lose. Mutation: compare with the layer of another depth."""
  config = DistillConfig(relations=('qq', 'kk', 'vv'), relation_heads=4, layers='uniform')
  teacher = dataclasses.replace(STILL, num_layers=4, num_heads=4, hidden_size=32, head_size=8)
  taught = init_encoder(teacher, jax.random.key(9))
  task = make_elastic_distill_task(STILL, teacher, taught, config, SHALLOW)
  params = weights(task)
  own = [make_distill_task(subnet_config(STILL, cell), teacher, taught, config) for cell in cells(SHALLOW, STILL)]

  def wanted(params):
    pairs = zip(own, cells(SHALLOW, STILL))
    return sum(each.loss(subnet(params, STILL, c), each.frozen, BATCH, KEY, 0)[0] for each, c in pairs) / 2

  (value, metrics), grads = run(task, params)
  expected, expected_grads = jax.jit(jax.value_and_grad(wanted))(params)
  np.testing.assert_allclose(value, expected, rtol=1e-4)
  assert_same(grads, expected_grads)
  assert {'relation_qq', 'relation_kk', 'relation_vv'} < set(metrics)
  found = jax.jit(task.evaluate)(params, task.frozen, BATCH)
  np.testing.assert_allclose(found['loss@1x1'], found['loss'], rtol=1e-4)
  assert 'loss@1x0.5' in found
  with pytest.raises(ConfigError, match=r'relation_heads: 16 does not divide the student.* width 8'):
    make_elastic_distill_task(STILL, teacher, taught, dataclasses.replace(config, relation_heads=16), NARROW)
