"""GLUE's recipes: every variant is valid, and has the published settings."""

import dataclasses
import importlib.util
import pathlib

import pytest

from compactlm_jax.config import RunConfig, from_config_dict
from compactlm_jax.data.glue_tasks import glue_task
from compactlm_jax.errors import ConfigError

_SPEC = importlib.util.spec_from_file_location(
  'glue_configs', pathlib.Path(__file__).parents[2] / 'configs' / 'glue.py'
)
glue = importlib.util.module_from_spec(_SPEC)
_SPEC.loader.exec_module(glue)


def load(variant):
  return from_config_dict(RunConfig, glue.get_config(variant))


@pytest.mark.parametrize('recipe', glue.RECIPES)
@pytest.mark.parametrize('task', glue.TASKS)
def test_every_variant_is_valid(recipe, task):
  """Mutation: score_scale for every task."""
  config = load(f'{recipe}-{task}')
  assert config.task == 'finetune' and config.finetune.benchmark == task and glue_task(task)
  assert (config.batch_size, config.data.seq_len, config.finetune.dropout) == (32, 128, 0.1)
  optimizer = config.optimizer
  assert (optimizer.warmup_fraction, optimizer.weight_decay, optimizer.clip_norm) == (0.1, 0.01, 1.0)
  assert config.finetune.score_scale == 1 or not glue_task(task).classes
  assert f'{recipe} ' in glue.__doc__
  if recipe != 'minilm-cpu':
    assert config.data.buckets == () and not config.data.group_by_length


@pytest.mark.parametrize(
  ('recipe', 'learning_rate', 'layer_decay'),
  [
    ('electra-small', 3e-4, 0.8),
    ('electra-base', 1e-4, 0.8),
    ('electra-large', 5e-5, 0.9),
    ('convbert-small', 3e-4, 0.8),
    ('convbert-medium-small', 3e-4, 0.8),
    ('convbert-base', 1e-4, 0.8),
    ('bert', 2e-5, 1.0),
    ('minilm', 5e-5, 1.0),
  ],
)
def test_published_settings(recipe, learning_rate, layer_decay):
  """Mutation: large with a layer decay of .8; 10 epochs for MRPC."""
  first_token = recipe not in ('bert', 'minilm')
  for task in glue.TASKS:
    config = load(f'{recipe}-{task}')
    optimizer = config.optimizer
    assert (optimizer.learning_rate, optimizer.layer_decay) == (learning_rate, layer_decay)
    assert optimizer.layer_decay_rule == 'published' and config.finetune.pooled == (not first_token)
    assert optimizer.bias_correction == (recipe == 'minilm') == (optimizer.decay_from == 'warmup')
    assert config.finetune.swap_pairs == (first_token and task in ('mrpc', 'stsb'))
    assert config.finetune.score_scale == (5 if first_token and task == 'stsb' else 1)
    if recipe != 'minilm':
      assert config.epochs == (10 if first_token and task in ('rte', 'stsb') else 3)


def test_defaults_lie_in_the_grids():
  for recipe, grid in glue.GRIDS.items():
    config = load(f'{recipe}-sst2')
    assert config.optimizer.learning_rate in grid['optimizer.learning_rate'] and config.epochs in grid['epochs']
  assert {load(f'minilm-{task}').epochs for task in ('cola', 'mrpc', 'rte')} == {10}


def test_the_variant_for_cpus_differs_in_its_batches_only():
  plain, fast = load('minilm-rte'), load('minilm-cpu-rte')
  assert fast.data.buckets == (16, 32, 64, 128) and fast.data.group_by_length
  assert dataclasses.replace(fast, data=plain.data) == plain


@pytest.mark.parametrize(
  'variant, message',
  [
    ('electra-small-sst', "no variant 'electra-small-sst'; did you mean electra-small-sst2"),
    ('minlm-rte', 'did you mean minilm-rte'),
    ('sick', "no variant 'sick'; use RECIPE-TASK with a recipe of electra-small, .* and a task of cola, sst2, "),
  ],
)
def test_an_unknown_variant_is_suggested(variant, message):
  with pytest.raises(ConfigError, match=message):
    glue.get_config(variant)
