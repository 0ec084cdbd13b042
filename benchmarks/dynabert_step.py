"""Cost of a step that trains all sub-networks, relative to the sum of steps of separate models of their sizes.

The step is the library's own (`make_train_step` of the stage, with AdamW and clipping), in one process with the steps
of separate models: each cell as a model of its own with an optimiser of its own, fine-tuned on labels. Stage 'final'
is compared with their sum; stage 'depth', which distils, with their sum and one forward pass of the teacher, although
those steps compare no hidden states. A sandwich is compared with the cells that it trains, on average. The calls take
turns; the quickest counts. Memory is what the compiler reserves for temporaries beside parameters, optimiser and batch.

Usage: python benchmarks/dynabert_step.py [--layers=4] [--hidden=256] [--heads=4] [--rows=16] [--length=64] [--rounds=5]
  [--cases=final,depth,sandwich]
"""

from __future__ import annotations

import argparse
import dataclasses
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from speed import best_of

from compactlm_jax.compress.subnet import subnet, subnet_config
from compactlm_jax.config import (
  AdaptConfig,
  Cell,
  DistillConfig,
  EncoderConfig,
  FinetuneConfig,
  MeshConfig,
  OptimizerConfig,
  cells,
)
from compactlm_jax.cpu import keep_memory
from compactlm_jax.parallel import make_mesh
from compactlm_jax.tasks.adapt import make_adapt_task
from compactlm_jax.tasks.finetune import classify, make_finetune_task
from compactlm_jax.train.optimizer import make_optimizer
from compactlm_jax.train.step import compile_step, init_state, make_train_step
from compactlm_jax.types import Batch, Params, Task

CLASSES, RECIPE = ('a', 'b'), FinetuneConfig()


@dataclasses.dataclass
class Stepper:
  """A compiled step: one call is one step.

  Attributes:
    call: makes a step and waits for it.
    compile_seconds: of tracing and compiling.
    temporaries: MB.
    programs: how many were compiled; asked for after the steps.
  """

  call: Callable[[], None]
  compile_seconds: float
  temporaries: float
  programs: Callable[[], int]


def stepper(task: Task, batch: Batch) -> Stepper:
  """The training step of a task on one device."""
  mesh = make_mesh(MeshConfig(), jax.devices()[:1])
  tx = make_optimizer(OptimizerConfig(), 1000, task.trainable)
  state = init_state(task, tx, mesh, 0)
  step = compile_step(make_train_step(task, tx, 0, mesh=mesh), mesh, state, task.frozen)
  started = time.perf_counter()
  memory: Any = step.lower(state, task.frozen, batch).compile().memory_analysis()
  seconds, box = time.perf_counter() - started, [state]

  def call() -> None:
    box[0], metrics = step(box[0], task.frozen, batch)
    metrics['loss'].block_until_ready()

  return Stepper(call, seconds, memory.temp_size_in_bytes / 1e6, step._cache_size)


def separate(encoder: EncoderConfig, start: Params, grid: tuple[Cell, ...], batch: Batch) -> list[Stepper]:
  """The steps of the cells as models of their own."""
  return [
    stepper(
      make_finetune_task(subnet_config(encoder, cell), CLASSES, RECIPE, start=subnet(start, encoder, cell)), batch
    )
    for cell in grid
  ]


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  for name, value in (('layers', 4), ('hidden', 256), ('heads', 4), ('rows', 16), ('length', 64), ('rounds', 5)):
    parser.add_argument(f'--{name}', type=int, default=value)
  parser.add_argument('--cases', default='final,depth,sandwich')
  args = parser.parse_args()
  keep_memory()
  encoder = EncoderConfig(
    vocab_size=8000, hidden_size=args.hidden, num_layers=args.layers, num_heads=args.heads, scan_unroll=1
  )
  rng, shape = np.random.default_rng(0), (args.rows, args.length)
  ids = rng.integers(0, 8000, shape).astype(np.int32)
  labels = rng.integers(0, 2, args.rows).astype(np.int32)
  batch = Batch(ids, np.ones(shape, np.int32), np.zeros(shape, np.int32), labels=labels)
  start = make_finetune_task(encoder, CLASSES, RECIPE).init(jax.random.key(0))
  forward = jax.jit(lambda params: classify(params, encoder, batch))
  every, sandwich = AdaptConfig(), AdaptConfig(sampling='sandwich')
  grid = cells(every, encoder)
  others = separate(encoder, start, grid, batch)
  known = {'final': ('final', every), 'depth': ('depth', every), 'sandwich': ('final', sandwich)}
  cases = [(name, *known[name]) for name in args.cases.split(',')]
  steps = []
  for _, stage, adapt in cases:
    given: dict[str, Any] = {'start': start, 'teacher': (start, encoder), 'distill': DistillConfig()}
    steps.append(stepper(make_adapt_task(encoder, CLASSES, RECIPE, adapt, stage, **given), batch))
  calls = [each.call for each in (*others, *steps)] + [lambda: jnp.asarray(forward(start)).block_until_ready() is None]
  seconds = best_of(calls, args.rounds)
  alone, together, teacher = seconds[: len(grid)], seconds[len(grid) : -1], seconds[-1]
  drawn = alone[0] + alone[-1] + sandwich.random_cells * sum(alone[1:-1]) / (len(grid) - 2)
  sums = {'final': sum(alone), 'depth': sum(alone) + teacher, 'sandwich': drawn}
  print(f'L{args.layers} H{args.hidden} A{args.heads}, {args.rows} x {args.length}, {len(grid)} cells, float32')
  print(
    f'separate steps: {sum(each.compile_seconds for each in others):.0f} s to compile, {len(others)} programs, ', end=''
  )
  print(
    f'largest {max(each.temporaries for each in others):.0f} MB; forward pass of the teacher {teacher * 1e3:.0f} ms\n'
  )
  print('| step | ms | sum of separate ms | ratio | compile s | programs | temporaries MB |\n|---|' + '---:|' * 6)
  for (name, *_), own, one in zip(cases, together, steps):
    whole = sums[name]
    numbers = [f'{own * 1e3:.0f}', f'{whole * 1e3:.0f}', f'{own / whole:.2f}', f'{one.compile_seconds:.0f}']
    print('| ' + ' | '.join([name, *numbers, str(one.programs()), f'{one.temporaries:.0f}']) + ' |')


if __name__ == '__main__':
  main()
