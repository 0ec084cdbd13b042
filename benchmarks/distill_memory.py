"""Peak temporary memory and time of MiniLM's relation loss with its gradient, chunked against all heads at once.

Prints one line per version and relation. The default is MiniLMv2 at its published size: 48 relation heads of a 768-wide
teacher and a 384-wide student, rows of 512. Memory is what the compiler reserves beside arguments and results.

Command: python benchmarks/distill_memory.py [--batch=8 --length=512 --heads=48 --repeats=3]
"""

import argparse
import dataclasses
import math
import time

import jax
import jax.numpy as jnp

from compactlm_jax.config import DistillConfig, EncoderConfig
from compactlm_jax.nn.encoder import encoder_shapes
from compactlm_jax.ops.relations import heads_per_chunk, relation_kl
from compactlm_jax.tasks.distill import make_distill_task
from compactlm_jax.types import Batch


def naive_kl(teacher_x, teacher_y, student_x, student_y, mask_BT, weight_BT):
  """The same value by softmax over all heads at once, for automatic differentiation."""

  def log_relation(x, y):
    logits_BHTS = jnp.einsum('bthk,bshk->bhts', x, y) / math.sqrt(x.shape[-1])
    return jax.nn.log_softmax(jnp.where(mask_BT[:, None, None, :] > 0, logits_BHTS, -1e30), axis=-1)

  teacher, student = log_relation(teacher_x, teacher_y), log_relation(student_x, student_y)
  return jnp.einsum('bhts,bt->b', jnp.exp(teacher) * (teacher - student), weight_BT)


def measure(fn, arrays, repeats):
  """(bytes, seconds, gradients) of the compiled gradient with respect to both student operands."""

  def value(*a):
    return fn(*a).sum()

  compiled = jax.jit(jax.value_and_grad(value, (2, 3))).lower(*arrays).compile()
  out, seconds = jax.block_until_ready(compiled(*arrays)), []
  for _ in range(repeats):
    start = time.perf_counter()
    jax.block_until_ready(compiled(*arrays))
    seconds.append(time.perf_counter() - start)
  return compiled.memory_analysis().temp_size_in_bytes, min(seconds), out


def step_memory(batch, length, heads, remat):
  """Bytes of temporaries of a MiniLMv2 step, BERT-base to 6 x 384: loss and gradient, compiled and not run."""
  teacher = EncoderConfig(scan_unroll=1, max_positions=length)
  student = dataclasses.replace(teacher, hidden_size=384, num_layers=6, head_size=32, intermediate_size=1536)
  student = dataclasses.replace(student, embedding_size=384, remat=remat)
  config = DistillConfig(relations=('qq', 'kk', 'vv'), relation_heads=heads)
  task = make_distill_task(student, teacher, encoder_shapes(teacher), config)
  ids = jax.ShapeDtypeStruct((batch, length), jnp.int32)
  key = jax.eval_shape(lambda: jax.random.key(0))
  gradient = jax.jit(jax.value_and_grad(task.loss, has_aux=True))
  step = jax.ShapeDtypeStruct((), jnp.int32)
  compiled = gradient.lower(encoder_shapes(student), task.frozen, Batch(ids, ids, ids), key, step).compile()
  return compiled.memory_analysis().temp_size_in_bytes


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  for name, value in (('batch', 8), ('length', 512), ('heads', 48), ('teacher', 768), ('student', 384), ('repeats', 3)):
    parser.add_argument(f'--{name}', type=int, default=value)
  args = parser.parse_args()
  keys = jax.random.split(jax.random.key(0), 4)
  sizes = [args.teacher // args.heads] * 2 + [args.student // args.heads] * 2
  arrays = [jax.random.normal(k, (args.batch, args.length, args.heads, s)) for k, s in zip(keys, sizes)]
  lengths = jnp.linspace(args.length // 2, args.length, args.batch).astype(jnp.int32)
  mask = (jnp.arange(args.length)[None] < lengths[:, None]).astype(jnp.int32)
  arrays += [mask, mask.astype(jnp.float32)]
  operands = sum(a.nbytes for a in arrays)
  chunk = heads_per_chunk(args.batch, args.length, args.heads)
  print(f'batch {args.batch}, length {args.length}, {args.heads} heads; operands {operands / 2**20:.0f} MiB')
  memory, seconds, want = measure(naive_kl, arrays, args.repeats)
  print(f'all heads at once, autodiff: {memory / 2**20:7.0f} MiB temporary, {seconds:.3f} s')
  ours, ours_seconds, got = measure(relation_kl, arrays, args.repeats)
  print(f'{chunk} head(s) at a time:        {ours / 2**20:7.0f} MiB temporary, {ours_seconds:.3f} s')
  error = max(
    float(jnp.abs(a - b).max() / jnp.abs(b).max()) for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want))
  )
  print(f'memory 1/{memory / ours:.1f}, time 1/{seconds / ours_seconds:.1f}, largest relative difference {error:.1e}')
  for remat in (False, True):
    whole = step_memory(args.batch, args.length, args.heads, remat)
    print(f'whole step, 12 x 768 teacher, 6 x 384 student, remat={remat}: {whole / 2**20:.0f} MiB temporary')


if __name__ == '__main__':
  main()
