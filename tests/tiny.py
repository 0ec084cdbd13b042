"""The smallest jobs that run every part of training, for tests of the step, the mesh, the loop and the jobs."""

import dataclasses
import importlib.util
import pathlib
import re

import jax
import numpy as np

from compactlm_jax.config import (
  DataConfig,
  EncoderConfig,
  FinetuneConfig,
  OptimizerConfig,
  RunConfig,
  from_config_dict,
)
from compactlm_jax.jobs import build_job
from compactlm_jax.parallel import make_mesh, param_shardings, to_global
from compactlm_jax.train.optimizer import make_optimizer
from compactlm_jax.train.step import compile_step, init_state, make_train_step
from compactlm_jax.types import Task

ENCODER = EncoderConfig(
  vocab_size=64, hidden_size=16, num_layers=2, num_heads=2, intermediate_size=32, max_positions=16, scan_unroll=1
)
STILL = dataclasses.replace(ENCODER, hidden_dropout=0.0, attention_dropout=0.0)


def tiny_config(task='distill', **changes):
  """A run of 10 steps of 16 rows of 16 tokens, constant learning rate."""
  fields = {
    'steps': 10,
    'batch_size': 16,
    'checkpoint_every': 5,
    'log_every': 1,
    'encoder': dataclasses.replace(ENCODER, causal=task == 'lm'),
    'data': DataConfig(seq_len=16, eval_rows=24),
    'optimizer': OptimizerConfig(learning_rate=1e-3, decay='constant'),
    'finetune': FinetuneConfig(dropout=0.0),
  }
  return RunConfig(task=task, **{**fields, **changes})


def configured(variant):
  """The run of configs/tiny.py:VARIANT."""
  path = pathlib.Path(__file__).parents[1] / 'configs' / 'tiny.py'
  spec = importlib.util.spec_from_file_location('configs_tiny', path)
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  return from_config_dict(RunConfig, module.get_config(variant))


def place_job(config, devices=None, change=lambda task: task):
  """(job, mesh, fresh state, frozen, compiled step), as the loop sets them up; `change` is made to the step's task."""
  job = build_job(config)
  mesh = make_mesh(config.mesh, devices)
  tx = make_optimizer(config.optimizer, job.total_steps, job.task.trainable, job.task.groups)
  state = init_state(job.task, tx, mesh, config.seed)
  frozen = None if job.task.frozen is None else jax.device_put(job.task.frozen, param_shardings(mesh, job.task.frozen))
  step = make_train_step(change(job.task), tx, config.seed, config.optimizer.accumulate, mesh)
  return job, mesh, state, frozen, compile_step(step, mesh, state, frozen)


def run_steps(config, steps=10, devices=None, change=lambda batch: batch):
  """(losses, last state, last metrics, compiled program) of the first steps of a run."""
  job, mesh, state, frozen, step = place_job(config, devices)
  batches = [to_global(mesh, change(job.batches.batch(i))) for i in range(steps)]
  compiled = step.lower(state, frozen, batches[0]).compile()
  losses = []
  for batch in batches:
    state, metrics = compiled(state, frozen, batch)
    losses.append(float(metrics['loss']))
  return np.array(losses), state, metrics, compiled.as_text()


def toy_task(loss, params, **fields):
  """A Task of a loss(params, batch, key, step) -> (value, metrics) on given parameters."""
  return Task(
    name='toy',
    init=lambda key: jax.tree.map(jax.numpy.asarray, params),
    loss=lambda params, frozen, batch, key, step: loss(params, batch, key, step),
    evaluate=lambda params, frozen, batch: {},
    **fields,
  )


def moved(program):
  """Shapes of what the collectives of a compiled program bring to a device, sums (all-reduce) aside."""
  collectives = r'(?:all-gather|all-to-all|collective-permute|reduce-scatter)(?:-start)?'
  lines = re.findall(rf'= (.*) {collectives}\(', program)
  return [tuple(int(n) for n in dims.split(',') if n) for line in lines for dims in re.findall(r'\[([0-9,]*)\]', line)]
