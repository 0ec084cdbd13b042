"""What making the masks of BERT-base costs (six kernels of twelve layers, 84.9 M scores), by method.

CPU: measured, the methods take turns and the quickest call of each counts; 'read' adds all scores up once. 'passes'
are reads of the scores until the cuts are found. Scores are normal; `--data` shows passes for other distributions.
TPU: the compiler's estimates for one core of a slice on which the scores lie in equal slices (libtpu, no TPU needed).
It counts the body of a loop once, so that a method is estimated as its parts: the sample, counting passes times their
number on the CPU, one noting pass, and the mask itself, which each core makes for the whole kernel.

Usage: python benchmarks/prune_masks.py [--only=cpu,tpu,data] [--topology=v3-8] [--density=0.1] [--rounds=5]
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import time
from collections.abc import Callable
from typing import Any

os.environ.setdefault('JAX_PLATFORMS', 'cpu')

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from compactlm_jax.cpu import keep_memory
from compactlm_jax.losses.prune import l0_penalty, soft_penalty
from compactlm_jax.ops.counting import count_above, extremes
from compactlm_jax.ops.masks import hard_concrete, soft_cuts
from compactlm_jax.ops.threshold import Cut, global_cut, keep_mask, local_cuts, passes, sample_local

Leaves = dict[str, jax.Array]

LAYERS, HIDDEN, FEED_FORWARD = 12, 768, 3072
SHAPES = {name: (LAYERS, HIDDEN, HIDDEN) for name in ('query', 'key', 'value', 'output')} | {
  'ffn_in': (LAYERS, HIDDEN, FEED_FORWARD),
  'ffn_out': (LAYERS, FEED_FORWARD, HIDDEN),
}
HEADS = {'heads': (LAYERS, 12), 'neurons': (LAYERS, FEED_FORWARD)}


def keeps_of(leaves: Leaves, density: float) -> Leaves:
  return {name: jnp.full(leaf.shape[0], int(density * leaf[0].size), jnp.int32) for name, leaf in leaves.items()}


def masked(weights: Leaves, leaves: Leaves, cuts: dict[str, Cut]) -> Leaves:
  return {name: weights[name] * keep_mask(leaf, cuts[name]) for name, leaf in leaves.items()}


def methods(density: float) -> dict[str, Callable[[Leaves, Leaves], Any]]:
  """Method -> what it computes from weights and scores beyond a dense step: cuts, penalty and masked weights."""

  def hard(weights: Leaves, scores: Leaves) -> Any:
    return masked(weights, scores, local_cuts(scores, keeps_of(scores, density)))

  def hard_global(weights: Leaves, scores: Leaves) -> Any:
    keep = jnp.int32(density * sum(leaf.size for leaf in scores.values()))
    return masked(weights, scores, global_cut(scores, keep))

  def soft(weights: Leaves, scores: Leaves) -> Any:
    return masked(weights, scores, soft_cuts(scores, 0.1)[0]), soft_penalty(scores)

  def magnitude(weights: Leaves, scores: Leaves) -> Any:
    sizes = {name: jnp.abs(leaf) for name, leaf in weights.items()}
    return masked(weights, sizes, local_cuts(sizes, keeps_of(sizes, density)))

  def l0(weights: Leaves, scores: Leaves) -> Any:
    gates = {n: hard_concrete(x, jax.random.fold_in(jax.random.key(0), i)) for i, (n, x) in enumerate(scores.items())}
    return {name: weights[name] * gate for name, gate in gates.items()}, l0_penalty(scores)

  def structured(weights: Leaves, scores: Leaves) -> Any:
    small = {name: scores['ffn_in'].reshape(LAYERS, -1)[:, : shape[1]] for name, shape in HEADS.items()}
    cuts = local_cuts(small, keeps_of(small, density))
    return {name: keep_mask(leaf, cuts[name]) for name, leaf in small.items()}

  return {
    'read': lambda weights, scores: [leaf.sum((1, 2)) for leaf in scores.values()],
    'weights * scores': lambda weights, scores: {name: weights[name] * leaf for name, leaf in scores.items()},
    'hard or random, local': hard,
    'hard, global': hard_global,
    'soft, with its penalty': soft,
    'magnitude': magnitude,
    'l0, with its penalty': l0,
    'heads and neurons': structured,
  }


def normal(seed: int) -> Leaves:
  rng = np.random.default_rng(seed)
  return {name: jnp.asarray(rng.standard_normal(shape, np.float32) * 0.02) for name, shape in SHAPES.items()}


def cpu_table(density: float, rounds: int) -> None:
  weights, scores = normal(0), normal(1)
  calls = {name: jax.jit(fn).lower(weights, scores).compile() for name, fn in methods(density).items()}
  best = dict.fromkeys(calls, float('inf'))
  for turn in range(rounds + 1):
    for name, call in calls.items():
      start = time.perf_counter()
      jax.block_until_ready(call(weights, scores))
      best[name] = min(best[name], time.perf_counter() - start) if turn else best[name]
  local = int(jax.jit(passes)(scores, keeps_of(scores, density)))
  every = int(jax.jit(passes)(scores, jnp.int32(density * sum(leaf.size for leaf in scores.values()))))
  print(f'CPU, float32, measured; density {density:g}; passes: local {local}, global {every}\n')
  print('| method | ms | above weights * scores, ms |')
  print('|---|---:|---:|')
  for name, seconds in best.items():
    print(f'| {name} | {seconds * 1e3:.0f} | {(seconds - best["weights * scores"]) * 1e3:.0f} |', flush=True)
  print()


def data_table() -> None:
  """Passes for scores of other kinds."""
  base, rng = normal(1), np.random.default_rng(2)
  run = jax.jit(lambda scores, density: passes(scores, {
    name: jnp.full(leaf.shape[0], jnp.floor(density * leaf[0].size), jnp.int32) for name, leaf in scores.items()
  }))  # fmt: skip
  kinds: dict[str, Callable[[jax.Array], jax.Array]] = {
    'normal': lambda x: x,
    'moved a little': lambda x: x + 1e-4 * jnp.roll(x, 1, 1),
    'heavy tails': lambda x: jnp.sign(x) * jnp.exp(jnp.abs(x) * 400),
    'rows differ': lambda x: x + 0.1 * jnp.asarray(rng.standard_normal((*x.shape[:-1], 1)), x.dtype),
    'columns differ': lambda x: x + 0.1 * jnp.asarray(rng.standard_normal((x.shape[0], 1, x.shape[2])), x.dtype),
    'bfloat16 values': lambda x: x.astype(jnp.bfloat16).astype(jnp.float32),
    'two values': jnp.sign,
    'all equal': jnp.zeros_like,
  }
  densities = (1.0, 0.9, 0.5, 0.1, 0.03, 0.005)
  print('Passes over all scores until every layer of every matrix has its cut (ties at a cut: up to two more)\n')
  print('| scores | ' + ' | '.join(f'{d:g}' for d in densities) + ' |')
  print('|---|' + '---:|' * len(densities))
  for name, change in kinds.items():
    scores = jax.tree.map(change, base)
    print(f'| {name} | ' + ' | '.join(str(int(run(scores, d))) for d in densities) + ' |', flush=True)
  print()


def tpu_table(topology: str, number: int) -> None:
  """Estimates for one core; the scores lie in slices along their rows."""
  from compactlm_jax.plan.compile import compile_program, tpu_devices
  from compactlm_jax.plan.program import Overflow
  from compactlm_jax.plan.topology import parse_topology

  chip, devices = parse_topology(topology).chip, tpu_devices(parse_topology(topology))
  mesh = jax.make_mesh((len(devices),), ('data',), axis_types=(AxisType.Auto,), devices=devices)
  everywhere, slices = NamedSharding(mesh, P()), NamedSharding(mesh, P(None, 'data'))

  def of(shapes: dict[str, tuple[int, ...]], place: NamedSharding, dtype: Any = jnp.float32) -> dict[str, Any]:
    return {name: jax.ShapeDtypeStruct(shape, dtype, sharding=place) for name, shape in shapes.items()}

  layers = dict.fromkeys(SHAPES, (LAYERS,))
  scores, whole, keys = of(SHAPES, slices), of(SHAPES, everywhere), of(layers, everywhere, jnp.int32)
  cuts = {name: Cut(x, keys[name]) for name, x in of(layers, everywhere).items()}

  def half(tree: Leaves) -> Leaves:
    return {name: leaf.astype(jnp.bfloat16) for name, leaf in tree.items()}

  parts: dict[str, tuple[Callable[..., Any], tuple[Any, ...]]] = {
    'sample': (lambda x: sample_local([x[name] for name in sorted(x)]), (scores,)),
    'counting pass': (
      lambda x, t: {name: count_above(x[name], t[name]) for name in x},
      (scores, of(dict.fromkeys(SHAPES, (LAYERS, 7)), everywhere, jnp.int32)),
    ),
    'noting pass': (lambda x, a, b: {name: extremes(x[name], a[name], b[name]) for name in x}, (scores, keys, keys)),
    'weights in bfloat16': (half, (whole,)),
    'masked weights in bfloat16': (lambda w, x, c: half(masked(w, x, c)), (whole, whole, cuts)),
  }
  print(f'TPU {topology}, one core: estimates of the compiler, not measurements\n')
  print('| part | ms | ms by cycles | MB moved | MB exchanged |')
  print('|---|---:|---:|---:|---:|')
  found: dict[str, float] = {}
  for name, (fn, shapes) in parts.items():
    program = compile_program(jax.jit(fn, out_shardings=everywhere), *shapes)
    assert not isinstance(program, Overflow)
    found[name] = program.optimal_seconds * 1e3
    cycles = program.cycles / chip.clock * 1e3 if chip.clock else float('nan')
    print(
      f'| {name} | {found[name]:.3f} | {cycles:.3f} | {program.bytes_accessed / 1e6:.0f} '
      f'| {sum(each.bytes for each in program.collectives) / 1e6:.2f} |',
      flush=True,
    )
  search = found['sample'] + (number - 1) * found['counting pass'] + found['noting pass']
  mask = found['masked weights in bfloat16'] - found['weights in bfloat16']
  print(
    f'\ncuts ({number - 1} counting passes, one noting): {search:.2f} ms; masks beyond plain weights: {mask:.2f} ms'
  )


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument('--only', default='cpu,data,tpu')
  parser.add_argument('--topology', default='v3-8')
  parser.add_argument('--density', type=float, default=0.1)
  parser.add_argument('--passes', type=int, default=4, help='reads of the scores that the estimate counts')
  parser.add_argument('--rounds', type=int, default=5)
  args = parser.parse_args()
  keep_memory()
  if 'cpu' in args.only:
    cpu_table(args.density, args.rounds)
  if 'data' in args.only:
    data_table()
  if 'tpu' in args.only:
    if importlib.util.find_spec('libtpu'):
      tpu_table(args.topology, args.passes)
    else:
      print("no TPU estimates: install the compiler with pip install 'compactlm-jax[plan]' (libtpu)")


if __name__ == '__main__':
  main()
