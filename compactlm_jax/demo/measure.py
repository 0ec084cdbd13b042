"""What the demo measures of a model: parameters, relation KL, latency, file size."""

from __future__ import annotations

import statistics
import time

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath

from compactlm_jax.config import DistillConfig, MeshConfig
from compactlm_jax.data.batches import eval_batches
from compactlm_jax.data.source import open_dataset
from compactlm_jax.data.table import Table, tokenize_table
from compactlm_jax.data.tokenizer import load_tokenizer
from compactlm_jax.interop.bundle import Bundle
from compactlm_jax.nn.encoder import encode
from compactlm_jax.parallel import make_mesh
from compactlm_jax.tasks.distill import make_distill_task
from compactlm_jax.train.evaluate import Evaluation, make_evaluate


def parameters(model: Bundle) -> int:
  """Number of parameters of the encoder."""
  return sum(leaf.size for leaf in jax.tree.leaves(model.params['encoder']))


def file_bytes(folder: epath.Path) -> int:
  """Size of model.safetensors."""
  return (folder / 'model.safetensors').stat().length


def relation_kl(model: Bundle, teacher: Bundle, rows: str) -> float:
  """Mean KL of attention and value relations of the last layer against the teacher's, per head and token (nats)."""
  task = make_distill_task(model.config, teacher.config, teacher.params, DistillConfig())
  evaluate = make_evaluate(task, make_mesh(MeshConfig()))
  params = {'encoder': model.params['encoder']}
  return evaluate(params, task.frozen, Evaluation(lambda: eval_batches(open_dataset(rows), 32)))['loss']


def latency(model: Bundle, folder: epath.Path, sentences: list[str]) -> float:
  """Median milliseconds to encode one sentence, batch of one, padded to a multiple of 16 tokens, compiled before.

  Args:
    model: the model.
    folder: where its tokenizer is.
    sentences: what is encoded.
  """
  table = Table((tuple(sentences),), np.zeros(len(sentences), np.int32), ('x',), 'sentences')
  rows = tokenize_table(table, load_tokenizer(folder), 128)
  run = jax.jit(encode, static_argnums=1)
  seconds = []
  for i in range(len(rows)):
    length = int(rows[i]['length'])
    padded = -(-length // 16) * 16
    ids = jnp.asarray(rows[i]['input_ids'][None, :padded])
    mask = jnp.asarray((np.arange(padded) < length).astype(np.int32)[None])
    jax.block_until_ready(run(model.params, model.config, ids, mask).last_BTD)
    for _ in range(5):
      start = time.perf_counter()
      jax.block_until_ready(run(model.params, model.config, ids, mask).last_BTD)
      seconds.append(time.perf_counter() - start)
  return 1000 * statistics.median(seconds)
