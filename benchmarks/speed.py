"""Speed of our encoder against PyTorch transformers, the same work in one run on this machine.

Forward and training step (forward, backward, AdamW), float32, T = 128, dropout 0.1 in training as both libraries
default to, for BERT L6-H384 (batch 16), BERT-base (batch 4) and ConvBERT-small (batch 16). PyTorch runs eagerly with
the faster of its two attention implementations and fused AdamW. Both sides do the work in turn, several times; the
quickest of each counts, so that other processes disturb neither. The last column is the share of the speed that a
plain matrix product of 1024 x 1024 reaches in the same library on this machine.

Usage: python benchmarks/speed.py [--cells=bert-l6-h384,bert-base,convbert-small] [--rounds=8] [--dropout=0.1]
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import json
import os
import time
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import optax
import torch
import transformers

from compactlm_jax.config import EncoderConfig, OptimizerConfig
from compactlm_jax.cpu import keep_memory
from compactlm_jax.nn.encoder import encode, init_encoder
from compactlm_jax.train.optimizer import make_optimizer

LENGTH = 128


@dataclasses.dataclass(frozen=True)
class Cell:
  """One model at one batch size, on both sides."""

  config: EncoderConfig
  torch_config: transformers.PretrainedConfig
  torch_class: type
  batch: int
  attention: tuple[str, ...] = ('sdpa', 'eager')


def cells() -> dict[str, Cell]:
  """The measured models."""
  bert, convbert = transformers.BertConfig, transformers.ConvBertConfig
  l6 = {'hidden_size': 384, 'num_hidden_layers': 6, 'num_attention_heads': 12, 'intermediate_size': 1536}
  small = EncoderConfig.mixed(heads=4, head_ratio=2, hidden_size=256, embedding_size=128, conv_sees_padding=True)
  return {
    'bert-l6-h384': Cell(EncoderConfig(hidden_size=384, num_layers=6), bert(**l6), transformers.BertModel, 16),
    'bert-base': Cell(EncoderConfig(), bert(), transformers.BertModel, 4),
    'convbert-small': Cell(
      small,
      convbert(
        hidden_size=256, num_attention_heads=4, embedding_size=128, intermediate_size=1024, head_ratio=2, pad_token_id=0
      ),
      transformers.ConvBertModel,
      16,
      ('eager',),
    ),
  }


def flops(cell: Cell) -> float:
  """Multiplications and additions of the matrix products of one forward pass (counted from the shapes)."""
  cfg = cell.config
  inner = cfg.num_heads * cfg.head_size
  per_token = 3 * cfg.hidden_size * inner + 2 * LENGTH * inner + 2 * cfg.hidden_size * cfg.intermediate_size
  if cfg.conv_kernel_size:
    per_token += 2 * cfg.hidden_size * inner + inner * cfg.num_heads * cfg.conv_kernel_size
    per_token += cfg.conv_kernel_size * (cfg.hidden_size + inner) + inner * cfg.hidden_size
  per_token += inner * cfg.hidden_size
  project = cfg.embedding_size * cfg.hidden_size if cfg.embedding_size != cfg.hidden_size else 0
  return 2.0 * cell.batch * LENGTH * (cfg.num_layers * per_token + project)


def jax_runs(cell: Cell, ids: np.ndarray, weights: np.ndarray, dropout: float) -> dict[str, Callable[[], None]]:
  """Our side: name -> one call."""
  cfg = dataclasses.replace(cell.config, hidden_dropout=dropout, attention_dropout=dropout)
  params, ids_, weights_ = init_encoder(cfg, jax.random.key(0)), jnp.asarray(ids), jnp.asarray(weights)
  tx = make_optimizer(OptimizerConfig(clip_norm=0.0, decay='constant'), 1000, (('.*', True),))

  def loss(params, key):
    return jnp.mean(jnp.square(encode(params, cfg, ids_, dropout_key=key).last_BTD) * weights_)

  @functools.partial(jax.jit, donate_argnums=(0, 1))
  def step(params, opt_state, index):
    value, grads = jax.value_and_grad(loss)(params, jax.random.fold_in(jax.random.key(1), index))
    updates, opt_state = tx.update(grads, opt_state, params)
    return optax.apply_updates(params, updates), opt_state, value

  forward = jax.jit(lambda p: encode(p, cfg, ids_).last_BTD)
  state = [jax.tree.map(jnp.copy, params), tx.init(params), 0]

  def train() -> None:
    state[0], state[1], value = step(state[0], state[1], state[2])
    state[2] += 1
    value.block_until_ready()

  return {'forward': lambda: forward(params).block_until_ready() is None, 'train': train}


def torch_runs(cell: Cell, ids: np.ndarray, weights: np.ndarray, dropout: float) -> dict[str, list[Callable[[], None]]]:
  """PyTorch's side: name -> one call per attention implementation."""
  ids_, weights_ = torch.tensor(ids), torch.tensor(weights)
  out: dict[str, list[Callable[[], None]]] = {'forward': [], 'train': []}
  for attention in cell.attention:
    config = cell.torch_config
    config.hidden_dropout_prob = config.attention_probs_dropout_prob = dropout
    config._attn_implementation = attention
    extra = {'add_pooling_layer': False} if cell.torch_class is transformers.BertModel else {}
    model = cell.torch_class(config, **extra)
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-4, fused=True)
    mask = torch.ones_like(ids_)

    def forward(model=model, mask=mask) -> None:
      model.eval()
      with torch.no_grad():
        model(input_ids=ids_, attention_mask=mask)

    def train(model=model, mask=mask, optimizer=optimizer) -> None:
      model.train()
      (model(input_ids=ids_, attention_mask=mask).last_hidden_state.square() * weights_).mean().backward()
      optimizer.step()
      optimizer.zero_grad(set_to_none=True)

    out['forward'].append(forward)
    out['train'].append(train)
  return out


def best_of(calls: list[Callable[[], None]], rounds: int) -> list[float]:
  """The quickest seconds of each call; the calls take turns."""
  for call in calls:
    call()
    call()
  best = [float('inf')] * len(calls)
  for _ in range(rounds):
    for i, call in enumerate(calls):
      start = time.perf_counter()
      call()
      best[i] = min(best[i], time.perf_counter() - start)
  return best


def peaks(rounds: int) -> tuple[float, float]:
  """FLOP/s of a plain float32 matrix product in (JAX, PyTorch)."""
  a = np.random.default_rng(0).normal(size=(1024, 1024)).astype('f4')
  ja, ta = jnp.asarray(a), torch.tensor(a)
  product = jax.jit(jnp.matmul)
  seconds = best_of([lambda: product(ja, ja).block_until_ready() is None, lambda: torch.mm(ta, ta) is None], rounds * 5)
  return 2 * 1024**3 / seconds[0], 2 * 1024**3 / seconds[1]


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument('--cells', default=','.join(cells()))
  parser.add_argument('--rounds', type=int, default=8)
  parser.add_argument('--dropout', type=float, default=0.1)
  parser.add_argument('--json', default='')
  args = parser.parse_args()
  keep_memory()  # as the command line does; PyTorch, in the same process, gains from it too
  torch.set_num_threads(os.cpu_count() or 1)
  rng = np.random.default_rng(0)
  ours_peak, torch_peak = peaks(args.rounds)
  print(f'plain matrix product: JAX {ours_peak / 1e9:.0f} GFLOP/s, PyTorch {torch_peak / 1e9:.0f} GFLOP/s\n')
  print('| model | work | PyTorch ms | ours ms | ours is faster by | of the matrix-product peak |')
  print('|---|---|---:|---:|---:|---:|')
  rows = []
  for name in args.cells.split(','):
    cell = cells()[name]
    ids = rng.integers(0, cell.config.vocab_size, (cell.batch, LENGTH))
    weights = rng.normal(size=(cell.batch, LENGTH, cell.config.hidden_size)).astype('f4')
    ours, theirs = jax_runs(cell, ids, weights, args.dropout), torch_runs(cell, ids, weights, args.dropout)
    for work, factor in (('forward', 1), ('train', 3)):
      seconds = best_of([ours[work], *theirs[work]], args.rounds)
      mine, other = seconds[0], min(seconds[1:])
      share = factor * flops(cell) / mine / ours_peak
      rows.append({'model': name, 'work': work, 'ratio': other / mine, 'share_of_peak': share})
      print(
        f'| {name} | {work} | {other * 1e3:.1f} | {mine * 1e3:.1f} | {other / mine:.2f}x | {share:.0%} |', flush=True
      )
  if args.json:
    with open(args.json, 'w') as file:
      json.dump(rows, file, indent=2)


if __name__ == '__main__':
  main()
