"""Speed of ConvBERT on this machine: against PyTorch transformers, and against our own BERT.

1. Training step (forward, backward, AdamW) of ConvBERT-small and -base against transformers, the same work in one run,
   as benchmarks/speed.py does it: float32, T = 128, dropout 0.1, the two sides take turns, the quickest call counts.
2. Forward pass of ConvBERT-base against our BERT-base at T = 128. The authors measured 12.94 ms against 17.66 ms for
   one block of each on a CPU: a ratio of 0.73 (whole models share their feed-forward layers, so that theirs is closer
   to 1). The ratio of FLOPs (matrix products, counted from the shapes) stands beside it.

Usage: python benchmarks/convbert_speed.py [--rounds=8] [--batch=4] [--sizes=small,base] [--json=FILE]
"""

from __future__ import annotations

import argparse
import json
import os

import jax
import jax.numpy as jnp
import numpy as np
import torch
import transformers
from speed import LENGTH, Cell, best_of, flops, jax_runs, torch_runs

from compactlm_jax.config import EncoderConfig
from compactlm_jax.cpu import keep_memory
from compactlm_jax.nn.attention import MixedAttention
from compactlm_jax.nn.encoder import encode, init_encoder

AUTHORS = 0.73


def cell(size: str, batch: int) -> Cell:
  """ConvBERT of one size on both sides."""
  widths = {
    'small': {'hidden_size': 256, 'embedding_size': 128, 'num_attention_heads': 4, 'intermediate_size': 1024},
    'base': {'hidden_size': 768, 'embedding_size': 768, 'num_attention_heads': 12, 'intermediate_size': 3072},
  }[size]
  ours = EncoderConfig.mixed(
    heads=widths['num_attention_heads'],
    head_ratio=2,
    hidden_size=widths['hidden_size'],
    embedding_size=widths['embedding_size'],
    conv_sees_padding=True,
  )
  theirs = transformers.ConvBertConfig(head_ratio=2, pad_token_id=0, **widths)
  return Cell(ours, theirs, transformers.ConvBertModel, batch, ('eager',))


def train_table(sizes: list[str], batch: int, rounds: int) -> list[dict[str, float | str]]:
  print('| model | batch | PyTorch ms | ours ms | ours is faster by |\n|---|---:|---:|---:|---:|')
  rng, rows = np.random.default_rng(0), []
  for size in sizes:
    one = cell(size, batch * 4 if size == 'small' else batch)
    ids = rng.integers(0, one.config.vocab_size, (one.batch, LENGTH))
    weights = rng.normal(size=(one.batch, LENGTH, one.config.hidden_size)).astype('f4')
    ours, theirs = jax_runs(one, ids, weights, 0.1)['train'], torch_runs(one, ids, weights, 0.1)['train']
    mine, *others = best_of([ours, *theirs], rounds)
    rows.append({'model': f'convbert-{size}', 'work': 'train', 'ratio': min(others) / mine})
    ratio = min(others) / mine
    print(f'| convbert-{size} | {one.batch} | {min(others) * 1e3:.0f} | {mine * 1e3:.0f} | {ratio:.2f}x |', flush=True)
  return rows


def forward_table(batch: int, rounds: int) -> list[dict[str, float | str]]:
  """Whole models and single blocks (projections, branches, output projection)."""
  convbert, bert = cell('base', batch).config, EncoderConfig()
  rng = np.random.default_rng(0)
  ids = jnp.asarray(rng.integers(0, bert.vocab_size, (batch, LENGTH)))
  x = jnp.asarray(rng.normal(size=(batch, LENGTH, bert.hidden_size)).astype('f4'))

  def model(config: EncoderConfig):
    params, run = init_encoder(config, jax.random.key(0)), jax.jit(lambda p: encode(p, config, ids).last_BTD)
    return lambda: run(params).block_until_ready() is None

  def block(config: EncoderConfig):
    module, mask = MixedAttention(config), jnp.ones_like(ids)
    params = module.init(jax.random.key(0), x, mask, None, 0)
    run = jax.jit(lambda p: module.apply(p, x, mask, None, 0)[0])
    return lambda: run(params).block_until_ready() is None

  pair = [cell('base', batch), Cell(bert, transformers.BertConfig(), transformers.BertModel, batch)]
  rows = []
  print('\n| forward, T = 128 | BERT-base ms | ConvBERT-base ms | ratio | of FLOPs | authors, a block |')
  print('|---|---:|---:|---:|---:|---:|')
  for name, make in (('model', model), ('block', block)):
    mine, other = best_of([make(convbert), make(bert)], rounds)
    share = f'{flops(pair[0]) / flops(pair[1]):.2f}' if name == 'model' else ''
    rows.append({'model': 'convbert-base / bert-base', 'work': f'forward, {name}', 'ratio': mine / other})
    print(f'| {name} | {other * 1e3:.1f} | {mine * 1e3:.1f} | {mine / other:.2f} | {share} | {AUTHORS} |', flush=True)
  return rows


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument('--rounds', type=int, default=8)
  parser.add_argument('--batch', type=int, default=4, help='rows of base; small has four times as many')
  parser.add_argument('--sizes', default='small,base')
  parser.add_argument('--json', default='')
  args = parser.parse_args()
  keep_memory()
  torch.set_num_threads(os.cpu_count() or 1)
  rows = train_table(args.sizes.split(','), args.batch, args.rounds) + forward_table(args.batch, args.rounds)
  if args.json:
    with open(args.json, 'w') as file:
      json.dump(rows, file, indent=2)


if __name__ == '__main__':
  main()
