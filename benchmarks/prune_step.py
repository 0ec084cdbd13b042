"""Cost of a pruning step relative to a dense fine-tuning step, for every method, BERT-base by default.

TPU (--only=tpu): the whole step compiled for a v3-8, as `compactlm plan` does (libtpu, no TPU needed; bfloat16);
estimates of the compiler, not measurements. 'masks', on both, is the step minus the same step with masks that cost
nothing to find (a comparison of the scores with a constant). The search for thresholds is a loop, whose body the
compiler counts once: benchmarks/prune_masks.py says what a pass costs and how many there are.
CPU (--only=cpu): measured in float32, the step, the dense one and that with free masks take turns, the quickest of each
counts.

The dense step trains all weights; pruning leaves the embeddings alone, as published, and trains the scores.

Usage: python benchmarks/prune_step.py [--only=tpu|cpu] [--batches=32,256] [--methods=...] [--layers=12] [--rounds=3]
"""

from __future__ import annotations

import argparse
import contextlib
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from speed import best_of

from compactlm_jax.compress import masks
from compactlm_jax.config import (
  DataConfig,
  EncoderConfig,
  FinetuneConfig,
  MeshConfig,
  OptimizerConfig,
  PruneConfig,
  RunConfig,
)
from compactlm_jax.cpu import keep_memory
from compactlm_jax.jobs.prune import pruned
from compactlm_jax.ops.threshold import Cut
from compactlm_jax.parallel import make_mesh
from compactlm_jax.plan.abstract import abstract_step, resolve
from compactlm_jax.plan.compile import QUICK, compile_program, tpu_devices
from compactlm_jax.plan.program import Program
from compactlm_jax.plan.topology import parse_topology
from compactlm_jax.tasks.finetune import make_finetune_task
from compactlm_jax.train.optimizer import make_optimizer
from compactlm_jax.train.step import compile_step, init_state, make_train_step
from compactlm_jax.types import Batch

UNIFORM: dict[str, Any] = {'scores_init': 'uniform', 'scores_scale': 0.01, 'initial_density': 0.1}
FREE = 'free masks'
METHODS = {
  FREE: {'method': 'hard_movement', **UNIFORM},
  'hard movement': {'method': 'hard_movement', **UNIFORM},
  'hard movement globally': {'method': 'hard_movement', 'scope': 'global', **UNIFORM},
  'soft movement': {'method': 'soft_movement', 'regularization': 400.0, **UNIFORM},
  'controlled soft movement': {'method': 'soft_movement', 'control': 'density', **UNIFORM},
  'magnitude': {'method': 'magnitude', 'initial_density': 0.1},
  'l0': {'method': 'l0', 'regularization': 125.0, 'scores_scale': 2.197},
  'rpp': {'method': 'rpp', 'regularization': 1e-3},
  'heads + neurons': {'method': 'hard_movement', 'structure': 'heads+neurons', **UNIFORM},
  'blocks + neurons': {'method': 'hard_movement', 'structure': 'block+neurons', **UNIFORM},
}


def run_config(method: str, batch_size: int, layers: int, dtype: str) -> RunConfig:
  """The step of a method, or with '' the dense one."""
  return RunConfig(
    task='prune' if method else 'finetune',
    steps=1000,
    batch_size=batch_size,
    encoder=EncoderConfig(num_layers=layers, dtype=dtype, scan_unroll=0 if dtype == 'bfloat16' else 1),
    data=DataConfig(seq_len=128),
    finetune=FinetuneConfig(num_classes=2),
    optimizer=OptimizerConfig(learning_rate=3e-5, weight_decay=0.0, warmup_fraction=0.1),
    prune=PruneConfig(**METHODS[method]) if method else PruneConfig(),
  )


def free_cuts(leaves: Mapping[str, Any], keeps: Any) -> dict[str, Cut]:
  """In place of a search: everything above zero."""
  return {name: Cut(jnp.zeros(leaf.shape[0]), jnp.full(leaf.shape[0], -1)) for name, leaf in leaves.items()}


@contextlib.contextmanager
def search_of(method: str) -> Iterator[None]:
  """What is traced here finds its masks by searching, or for FREE without."""
  search, masks.local_cuts = masks.local_cuts, free_cuts if method == FREE else masks.local_cuts
  try:
    yield
  finally:
    masks.local_cuts = search


def compiled(method: str, batch_size: int, layers: int, mesh: Mesh) -> Program:
  """The program of a step for one core."""
  with search_of(method):
    step, arguments = abstract_step(resolve(run_config(method, batch_size, layers, 'bfloat16')), mesh)
    program = compile_program(step, *arguments, effort=QUICK)
  assert isinstance(program, Program), f'{method} does not fit'
  return program


def on_tpu(args: argparse.Namespace) -> None:
  """The compiler's estimates."""
  topology = parse_topology('v3-8')
  mesh = make_mesh(MeshConfig(), tpu_devices(topology))
  print('v3-8, bfloat16: estimates of the compiler, not measurements\n')
  print(
    '| rows x length | step | ms | to dense | masks ms | to dense | GB moved | exchanges |\n|---|---|' + '---:|' * 6
  )
  for batch_size in args.batches:
    programs = {name: compiled(name, batch_size, args.layers, mesh) for name in ('', FREE)}
    dense, free = (1e3 * program.optimal_seconds for program in programs.values())
    for method in ['', *args.methods]:
      program = programs.get(method) or compiled(method, batch_size, args.layers, mesh)
      ms = 1e3 * program.optimal_seconds
      cells = [f'{batch_size} x 128', method or 'dense', f'{ms:.2f}', f'{ms / dense:.2f}']
      cells += [f'{ms - free:.2f}', f'{(ms - free) / dense:.2f}'] if method else ['', '']
      cells += [f'{program.bytes_accessed / 1e9:.2f}', str(len(program.collectives))]
      print('| ' + ' | '.join(cells) + ' |', flush=True)


def stepper(method: str, batch_size: int, layers: int) -> Callable[[], None]:
  """One call is one step."""
  config = run_config(method, batch_size, layers, 'float32')
  task = make_finetune_task(config.encoder, ('a', 'b'), config.finetune)
  task = pruned(task, config, config.steps) if config.task == 'prune' else task
  mesh = make_mesh(MeshConfig(), jax.devices()[:1])
  tx = make_optimizer(config.optimizer, config.steps, task.trainable, task.groups)
  state = init_state(task, tx, mesh, 0)
  step = compile_step(make_train_step(task, tx, 0, mesh=mesh), mesh, state, None)
  rng, shape = np.random.default_rng(0), (config.batch_size, config.data.seq_len)
  ids = rng.integers(1000, 30000, shape).astype(np.int32)
  labels = rng.integers(0, 2, config.batch_size).astype(np.int32)
  batch = Batch(ids, np.ones(shape, np.int32), np.zeros(shape, np.int32), labels=labels)
  box = [state]

  def call() -> None:
    box[0], metrics = step(box[0], None, batch)
    metrics['loss'].block_until_ready()

  with search_of(method):
    call()
  return call


def on_cpu(args: argparse.Namespace) -> None:
  """Measured on this machine."""
  print('CPU, float32, measured: the quickest of interleaved steps\n')
  print('| rows x length | step | dense ms | ms | to dense | masks ms | to dense |\n|---|---|' + '---:|' * 5)
  for batch_size in args.batches:
    for method in args.methods:
      steps = [stepper(name, batch_size, args.layers) for name in ('', FREE, method)]
      dense, free, ms = (1e3 * seconds for seconds in best_of(steps, args.rounds))
      cells = [f'{batch_size} x 128', method, f'{dense:.0f}', f'{ms:.0f}', f'{ms / dense:.2f}']
      print('| ' + ' | '.join([*cells, f'{ms - free:.0f}', f'{(ms - free) / dense:.2f}']) + ' |', flush=True)
      del steps


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument('--only', choices=['tpu', 'cpu'], default='')
  parser.add_argument('--batches', type=lambda text: [int(each) for each in text.split(',')], default=[32])
  parser.add_argument('--methods', type=lambda text: text.split(','), default=list(METHODS))
  parser.add_argument('--layers', type=int, default=12)
  parser.add_argument('--rounds', type=int, default=3)
  args = parser.parse_args()
  keep_memory()
  started = time.monotonic()
  if args.only != 'tpu':
    on_cpu(args)
  if args.only != 'cpu':
    on_tpu(args)
  print(f'\n{time.monotonic() - started:.0f} s')


if __name__ == '__main__':
  main()
