"""configs/prune.py: what the published commands and papers.md 4.5 and 4.8 say."""

import importlib.util
import pathlib

import numpy as np
import pytest

from compactlm_jax.compress.schedule import cubic_schedule
from compactlm_jax.config import RunConfig, from_config_dict
from compactlm_jax.errors import ConfigError

_PATH = pathlib.Path(__file__).parents[2] / 'configs' / 'prune.py'
_SPEC = importlib.util.spec_from_file_location('configs_prune', _PATH)
module = importlib.util.module_from_spec(_SPEC)
_SPEC.loader.exec_module(module)


def run(variant):
  return from_config_dict(RunConfig, module.get_config(variant))


def test_what_all_published_runs_share():
  """Mutation: the optimiser's own defaults (decay .01, epsilon 1e-6), or the textbook's."""
  for task, (batch, length, epochs, warmup, multiples) in {
    'squad': (16, 384, 10, 5400, (1, 2)),
    'mnli': (32, 128, 6, 12000, (1, 1)),
    'qqp': (32, 128, 10, 11000, (2, 3)),
  }.items():
    for method in ('hard', 'soft', 'magnitude'):
      found = run(f'{task}-{method}')
      assert found.task == 'prune'
      assert (found.batch_size, found.data.seq_len, found.epochs) == (batch, length, epochs)
      optimizer = found.optimizer
      assert (optimizer.learning_rate, optimizer.weight_decay, optimizer.epsilon) == (3e-5, 0.0, 1e-8)
      assert optimizer.warmup_steps == warmup and optimizer.clip_norm == 1.0 and optimizer.bias_correction
      assert (found.prune.initial_warmup, found.prune.final_warmup) == multiples
      assert found.prune.freeze_embeddings and found.prune.scores_learning_rate == 1e-2
      assert found.prune.first_step == (task == 'squad')


def test_published_commands_for_squad():
  """README of the original. Mutation: any of these numbers."""
  hard, soft, gates, magnitude = (run(f'squad-{name}').prune for name in ('hard', 'soft', 'l0', 'magnitude'))
  assert (hard.method, hard.initial_density, hard.density, hard.scores_scale) == ('hard_movement', 1.0, 0.15, 0.0)
  assert (soft.method, soft.initial_threshold, soft.threshold, soft.regularization) == ('soft_movement', 0.0, 0.1, 400)
  assert (soft.threshold_on, soft.penalty, soft.floor) == ('sigmoid', 'mean', 0.005)
  assert (gates.method, gates.scores_scale, gates.scores_learning_rate, gates.regularization) == ('l0', 2.197, 0.1, 125)
  assert (gates.initial_warmup, gates.final_warmup) == (1, 1)
  assert (magnitude.method, magnitude.initial_density, magnitude.density) == ('magnitude', 1.0, 0.15)


def test_hybrid_is_nn_prunings():
  """32 x 32 blocks, neurons, 20 epochs on SQuAD and 12 on GLUE; multiples 1 and 10, or 1 and 4.

  Mutation: blocks in the feed-forward too; the multiples of hard movement on the same task.
  """
  for task, epochs, final in (('squad', 20, 10), ('mnli', 12, 4), ('qqp', 12, 4)):
    found = run(f'{task}-hybrid')
    assert found.epochs == epochs
    assert (found.prune.structure, found.prune.block, found.prune.regularization) == ('block+neurons', (32, 32), 10)
    assert (found.prune.initial_warmup, found.prune.final_warmup) == (1, final)


def test_schedules_fit_runs_of_the_published_length():
  """Optimiser steps of the tasks' training sets. Mutation: a warm-up of another task."""
  for task, rows in (('squad', 88_000), ('mnli', 392_702), ('qqp', 363_846)):
    for found in (run(f'{task}-hard'), run(f'{task}-hybrid')):
      steps = int(found.epochs * rows / found.batch_size)
      values = cubic_schedule(1.0, found.prune.density, steps, found.optimizer.warmup_steps, found.prune)
      assert values[0] == 1 and values[-2] == found.prune.density and np.all(np.diff(values) <= 0)


def test_dense_base_lines_do_not_prune():
  """Mutation: leave task 'prune'."""
  assert run('minibert-qqp').task == run('layerdrop-qqp').task == 'finetune'
  assert run('layerdrop-squad').encoder.layer_drop == 0.2


def test_unknown_variants_are_refused():
  with pytest.raises(ConfigError, match='squad-soft'):
    module.get_config('nothing')
