"""One block of ConvBERT's mixed attention against one of self-attention, forward + backward, on a TPU and on a CPU.

A block is the projections, both branches and the output projection, 768 wide: 12 heads of self-attention, or 6 heads of
each branch with 9 taps. 'paper' is mixed attention as the paper writes it (grouped convolution, unfolding, einsums),
'plain' is self-attention as one would write it; both without a backward pass of their own. The convolution reads
padding, as the original's (`conv_sees_padding`).

TPU: estimates of XLA's compiler for one core of a v3-8 (libtpu, no TPU needed; bfloat16), not measurements. Roofline is
its `optimal_seconds`: the larger of arithmetic and memory, operation by operation. Cycles are those that its scheduler
assigns to each operation, added up at 940 MHz; they count vector work and copies too.
CPU: measured in float32; the blocks take turns and the quickest call of each counts.

Usage: python benchmarks/kernel.py [--only=tpu,cpu] [--lengths=128,512] [--tokens=4096] [--cpu_tokens=1024]
  [--rounds=20] [--dropout=0,0.1]
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib.util
import os
import re
import time
from collections.abc import Callable
from typing import Any

os.environ.setdefault('TPU_SKIP_MDS_QUERY', '1')
os.environ.setdefault('JAX_PLATFORMS', 'cpu')
os.environ.setdefault('ALLOW_MULTIPLE_LIBTPU_LOAD', '1')

import jax
import jax.numpy as jnp
import numpy as np

from compactlm_jax.config import EncoderConfig
from compactlm_jax.cpu import keep_memory
from compactlm_jax.nn.attention import MixedAttention

SELF = EncoderConfig()
MIXED = EncoderConfig.mixed(heads=12, head_ratio=2, hidden_size=768, conv_sees_padding=True)
CLOCK = 940e6
"""Hz of a TPU v3."""

Apply = Callable[[Any, jax.Array, jax.Array, jax.Array | None], jax.Array]
"""(parameters, x [B, T, D], mask [B, T], dropout key) -> [B, T, D]."""


@dataclasses.dataclass(frozen=True)
class Block:
  """One row of the tables: what runs, and the configuration whose parameters it takes."""

  config: EncoderConfig
  apply: Callable[[EncoderConfig], Apply]


def module(config: EncoderConfig) -> Apply:
  """This library's block."""
  return lambda params, x, mask, key: MixedAttention(config).apply({'params': params}, x, mask, key, 0)[0]


def plain(config: EncoderConfig) -> Apply:
  """Self-attention by einsum and softmax; with a convolution, the paper's shape beside it. Dropout is left out."""

  def project(params: Any, x: jax.Array) -> jax.Array:
    return x @ params['kernel'].astype(x.dtype) + params['bias'].astype(x.dtype)

  def split(x: jax.Array, parts: int) -> jax.Array:
    return x.reshape(*x.shape[:2], parts, -1)

  def apply(params: Any, x: jax.Array, mask: jax.Array, key: jax.Array | None) -> jax.Array:
    q, k, v = (split(project(params[name], x), config.num_heads) for name in ('query', 'key', 'value'))
    bias = jnp.where(mask > 0, 0.0, jnp.finfo(jnp.float32).min)[:, None, None]
    scaled = q * np.asarray(config.head_size**-0.5, q.dtype)
    logits = jnp.einsum('bthk,bshk->bhts', scaled, k, preferred_element_type=jnp.float32) + bias
    heads = jnp.einsum('bhts,bshk->bthk', jax.nn.softmax(logits).astype(x.dtype), v)
    if config.conv_kernel_size:
      heads = jnp.concatenate([heads, span(params['conv'], x, q)], 2)
    return project(params['output'], heads.reshape(*x.shape[:2], -1))

  def span(params: Any, x: jax.Array, q: jax.Array) -> jax.Array:
    taps, options = config.conv_kernel_size, {'dimension_numbers': ('NWC', 'WIO', 'NWC')}
    kernel = params['depthwise']['kernel'].astype(x.dtype)[:, None]
    near = jax.lax.conv_general_dilated(x, kernel, (1,), 'SAME', feature_group_count=x.shape[-1], **options)
    merged = project(params['pointwise'], near) * q.reshape(*x.shape[:2], -1)
    weights = split(project(params['taps'], merged), config.num_heads).astype(jnp.float32)
    v = jnp.pad(project(params['value'], x), ((0, 0), (taps // 2, taps // 2), (0, 0)))
    unfolded = jnp.stack([v[:, j : j + x.shape[1]] for j in range(taps)], -1)
    unfolded = unfolded.reshape(*x.shape[:2], config.num_heads, -1, taps)
    return jnp.einsum('bthkw,bthw->bthk', unfolded, jax.nn.softmax(weights).astype(x.dtype))

  return apply


BLOCKS = {
  'self-attention, ours': Block(SELF, module),
  'self-attention, plain': Block(SELF, plain),
  'mixed, ours': Block(MIXED, module),
  'mixed, paper': Block(MIXED, plain),
}


def workload(block: Block, rows: int, length: int, dtype: str, rate: float) -> tuple[Callable[..., Any], tuple]:
  """(forward and backward, shapes of its arguments: parameters, x, mask, gradient, seed)."""
  config = dataclasses.replace(block.config, dtype=dtype, attention_dropout=rate)
  apply = block.apply(config)

  def run(params: Any, x: jax.Array, mask: jax.Array, g: jax.Array, seed: jax.Array) -> Any:
    key = jax.random.key(seed) if rate else None
    out, pull = jax.vjp(lambda params, x: apply(params, x, mask, key), params, x)
    return out, pull(g)

  x = jax.ShapeDtypeStruct((rows, length, config.hidden_size), dtype)
  mask = jax.ShapeDtypeStruct((rows, length), 'int32')
  init = jax.eval_shape(MixedAttention(config).init, jax.random.key(0), x, mask, None, 0)
  return run, (init['params'], x, mask, x, jax.ShapeDtypeStruct((), 'int32'))


def scheduled_seconds(program: str) -> float:
  """The cycles of every operation of a compiled TPU program, in seconds."""
  entry = program[program.index('ENTRY') :]
  return sum(int(n) for n in re.findall(r'"estimated_cycles":"(\d+)"', entry)) / CLOCK


def tpu_table(lengths: list[int], tokens: int, rates: list[float]) -> None:
  from jax.experimental import topologies

  device = topologies.get_topology_desc(platform='tpu', topology_name='v3:2x2').devices[0]
  place = jax.sharding.SingleDeviceSharding(device)
  print('TPU v3, one core, bfloat16: estimates of the compiler, not measurements\n')
  print(
    '| rows x length | dropout | block | roofline us | ratio | cycles us | ratio | GFLOP | MB moved | MB temporary |'
  )
  print('|---|---:|---|---:|---:|---:|---:|---:|---:|---:|')
  for length in lengths:
    for rate in rates:
      base: tuple[float, float] | None = None
      for name, block in BLOCKS.items():
        run, shapes = workload(block, tokens // length, length, 'bfloat16', rate)
        placed = jax.tree.map(lambda s: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=place), shapes)
        compiled = jax.jit(run).lower(*placed).compile()
        cost, memory = compiled.cost_analysis(), compiled.memory_analysis()
        found = (cost['optimal_seconds'], scheduled_seconds(compiled.as_text()))
        base = base or found
        print(
          f'| {tokens // length} x {length} | {rate:g} | {name} | {found[0] * 1e6:.0f} | {found[0] / base[0]:.2f} '
          f'| {found[1] * 1e6:.0f} | {found[1] / base[1]:.2f} | {cost["flops"] / 1e9:.1f} '
          f'| {cost["bytes accessed"] / 1e6:.0f} | {memory.temp_size_in_bytes / 1e6:.0f} |',
          flush=True,
        )
  print()


def cpu_table(lengths: list[int], tokens: int, rates: list[float], rounds: int) -> None:
  rng = np.random.default_rng(0)
  print('CPU, float32, measured: quickest of interleaved calls\n')
  print('| rows x length | dropout | block | ms | ratio | MB temporary |')
  print('|---|---:|---|---:|---:|---:|')
  for length in lengths:
    for rate in rates:
      calls, memory = [], []
      for block in BLOCKS.values():
        run, shapes = workload(block, tokens // length, length, 'float32', rate)
        args = jax.tree.map(lambda s: jnp.asarray(rng.normal(size=s.shape) * 0.05, s.dtype), shapes)
        args = (*args[:2], jnp.ones_like(args[2]), *args[3:])
        compiled = jax.jit(run).lower(*args).compile()
        memory.append(compiled.memory_analysis().temp_size_in_bytes / 1e6)
        calls.append(lambda compiled=compiled, args=args: jax.block_until_ready(compiled(*args)))
      seconds = best_of(calls, rounds)
      for name, best, temporary in zip(BLOCKS, seconds, memory, strict=True):
        print(
          f'| {tokens // length} x {length} | {rate:g} | {name} | {best * 1e3:.1f} | {best / seconds[0]:.2f} '
          f'| {temporary:.0f} |',
          flush=True,
        )
  print()


def best_of(calls: list[Callable[[], Any]], rounds: int) -> list[float]:
  """The quickest seconds of each call; the calls take turns."""
  best = [float('inf')] * len(calls)
  for turn in range(rounds + 2):
    for i, call in enumerate(calls):
      start = time.perf_counter()
      call()
      best[i] = min(best[i], time.perf_counter() - start) if turn > 1 else best[i]
  return best


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument('--only', default='tpu,cpu')
  parser.add_argument('--lengths', default='128,512')
  parser.add_argument('--tokens', type=int, default=4096, help='per core of the TPU')
  parser.add_argument('--cpu_tokens', type=int, default=1024)
  parser.add_argument('--rounds', type=int, default=20)
  parser.add_argument('--dropout', default='0,0.1', help='rates on the attention probabilities, of ours only')
  args = parser.parse_args()
  keep_memory()
  lengths, rates = [int(n) for n in args.lengths.split(',')], [float(r) for r in args.dropout.split(',')]
  if 'cpu' in args.only:
    cpu_table(lengths, args.cpu_tokens, rates, args.rounds)
  if 'tpu' in args.only:
    if importlib.util.find_spec('libtpu'):
      tpu_table(lengths, args.tokens, rates)
    else:
      print("no TPU estimates: install the compiler with pip install 'compactlm-jax[plan]' (libtpu)")


if __name__ == '__main__':
  main()
