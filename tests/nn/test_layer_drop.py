"""LayerDrop: whole layers are skipped in training, and some are left out for good afterwards."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny import STILL, tiny_config

from compactlm_jax.config import FinetuneConfig
from compactlm_jax.errors import ConfigError
from compactlm_jax.jobs import build_job
from compactlm_jax.jobs.models import load_model
from compactlm_jax.nn.encoder import encode, init_encoder
from compactlm_jax.tasks.finetune import make_finetune_task
from compactlm_jax.train.loop import train
from compactlm_jax.tree import named_leaves
from compactlm_jax.types import Batch

ENCODER = dataclasses.replace(STILL, num_layers=6)
IDS = jnp.arange(24, dtype=jnp.int32).reshape(2, 12)


def hidden(encoder, params, key):
  """Embeddings and the output of each layer."""
  return encode(params, encoder, IDS, dropout_key=key, all_hidden=True).hidden_NBTD


def test_layers_are_skipped_whole_and_as_often_as_asked():
  """A skipped layer gives back its input bit for bit. Mutation: draw one decision for all layers, or for each token."""
  encoder = dataclasses.replace(ENCODER, layer_drop=0.3)
  params = init_encoder(encoder, jax.random.key(0))
  run = jax.jit(lambda key: hidden(encoder, params, key))
  skipped = []
  for seed in range(60):
    x_NBTD = np.asarray(run(jax.random.key(seed)))
    same = [(x_NBTD[i] == x_NBTD[i + 1]) for i in range(6)]
    assert all(each.all() or not each.all(axis=-1).any() for each in same)
    skipped.append([each.all() for each in same])
  share = np.mean(skipped, axis=0)
  assert 0.23 < np.mean(share) < 0.37 and share.min() > 0.1 and len({tuple(row) for row in skipped}) > 20


def test_evaluation_runs_all_layers():
  """Mutation: drop without a key too."""
  params = init_encoder(ENCODER, jax.random.key(0))
  dropping = dataclasses.replace(ENCODER, layer_drop=0.5)
  np.testing.assert_array_equal(hidden(ENCODER, params, None), hidden(dropping, params, None))


def test_kept_layers_are_the_finished_model():
  """Training has all layers, evaluation and export those that are kept. Mutation: evaluate with all of them."""
  config = FinetuneConfig(keep_layers=(2, 5))
  task = make_finetune_task(ENCODER, ('a', 'b'), config)
  params = task.init(jax.random.key(0))
  batch = Batch(IDS, jnp.ones_like(IDS), jnp.zeros_like(IDS), labels=jnp.array([0, 1]))
  finished = task.finished(params)
  assert {leaf.shape[0] for name, leaf in named_leaves(finished['encoder']['layers']).items()} == {2}
  shallow = make_finetune_task(dataclasses.replace(ENCODER, num_layers=2), ('a', 'b'), FinetuneConfig())
  expected = shallow.evaluate(finished, None, batch)
  np.testing.assert_array_equal(task.evaluate(finished, None, batch)['outputs'], expected['outputs'])
  assert task.loss(params, None, batch, jax.random.key(1), jnp.int32(0))[0] > 0


def test_a_run_is_loaded_with_the_layers_that_it_kept(tmp_path):
  encoder = dataclasses.replace(STILL, num_layers=3, layer_drop=0.2)
  config = tiny_config('finetune', encoder=encoder, steps=4, finetune=FinetuneConfig(keep_layers=(1, 3)))
  train(build_job(config), str(tmp_path))
  bundle = load_model(tmp_path)
  assert bundle.config.num_layers == 2
  assert bundle.params['encoder']['layers']['ffn_in']['kernel'].shape[0] == 2


@pytest.mark.parametrize('layers', [(2, 7), (3, 2), (0, 1)])
def test_layers_that_are_not_there(layers):
  with pytest.raises(ConfigError, match='keep_layers'):
    make_finetune_task(ENCODER, ('a', 'b'), FinetuneConfig(keep_layers=layers))
