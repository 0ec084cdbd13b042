"""Cost of a distillation step, relative to teacher forward + student training step, in one run on this machine.

The distillation step is the library's own (`make_train_step` of the task, with AdamW and clipping). The two
parts it is compared with run as programs of their own: the whole teacher's forward pass, and a training step of the
student with the same optimiser and a plain loss on its last hidden state. The calls take turns; the quickest counts.

Usage: python benchmarks/distill_step.py [--rounds=10]
"""

from __future__ import annotations

import argparse
import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from speed import best_of

from compactlm_jax.config import DistillConfig, EncoderConfig, MeshConfig, OptimizerConfig
from compactlm_jax.cpu import keep_memory
from compactlm_jax.nn.encoder import encode, init_encoder
from compactlm_jax.parallel import make_mesh
from compactlm_jax.tasks.distill import make_distill_task
from compactlm_jax.train.optimizer import make_optimizer
from compactlm_jax.train.step import compile_step, init_state, make_train_step
from compactlm_jax.types import Batch, Task

CASES = {
  'v1, L6-H384 to L3-H384, 16 x 128': (6, 3, 384, DistillConfig()),
  'v2 (48 relation heads), L6-H384 to L3-H384, 16 x 128': (
    6,
    3,
    384,
    DistillConfig(relations=('qq', 'kk', 'vv'), relation_heads=48),
  ),
  'v1, L12-H768 to L6-H768, 16 x 128': (12, 6, 768, DistillConfig()),
}


def plain_task(student: EncoderConfig) -> Task:
  """Trains the student on nothing in particular."""

  def loss(params: Any, frozen: Any, batch: Batch, key: jax.Array, step: jax.Array) -> Any:
    out = encode(params, student, batch.input_ids, batch.attention_mask, dropout_key=key)
    return jnp.mean(jnp.square(out.last_BTD - 1)), {'weight': jnp.float32(1)}

  return Task('plain', lambda key: init_encoder(student, key), loss, lambda *_: {})


def trainer(task: Task, batch: Batch) -> Any:
  """One call is one step."""
  mesh = make_mesh(MeshConfig(), jax.devices()[:1])
  tx = make_optimizer(OptimizerConfig(), 1000, task.trainable)
  state = init_state(task, tx, mesh, 0)
  step = compile_step(make_train_step(task, tx, 0), mesh, state, task.frozen)
  box = [state]

  def call() -> None:
    box[0], metrics = step(box[0], task.frozen, batch)
    metrics['loss'].block_until_ready()

  return call


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument('--rounds', type=int, default=10)
  args = parser.parse_args()
  keep_memory()
  print('| case | teacher forward ms | student step ms | distillation step ms | ratio |\n|---|---:|---:|---:|---:|')
  for name, (deep, shallow, width, config) in CASES.items():
    teacher = EncoderConfig(hidden_size=width, num_layers=deep, num_heads=12)
    student = dataclasses.replace(teacher, num_layers=shallow)
    params = init_encoder(teacher, jax.random.key(1))
    ids = jnp.asarray(np.random.default_rng(0).integers(0, 30522, (16, 128)), jnp.int32)
    batch = Batch(ids, jnp.ones_like(ids), jnp.zeros_like(ids))
    forward = jax.jit(lambda p, b, teacher=teacher: encode(p, teacher, b.input_ids, b.attention_mask).last_BTD)
    calls = [
      lambda forward=forward, params=params, batch=batch: forward(params, batch).block_until_ready() is None,
      trainer(plain_task(student), batch),
      trainer(make_distill_task(student, teacher, params, config), batch),
    ]
    first, second, whole = best_of(calls, args.rounds)
    print(f'| {name} | {first * 1e3:.0f} | {second * 1e3:.0f} | {whole * 1e3:.0f} | {whole / (first + second):.2f} |')


if __name__ == '__main__':
  main()
