"""The same fine-tuning in PyTorch `transformers`: scores within the spread, and time per run.

Usage: python benchmarks/finetune_torch.py --model=FOLDER --data=GLUE --workdir=RUNS [--task=sst2] [--seeds=3]
Trains with the configuration of benchmarks/glue.py, 3 epochs of a fixed part of the rows (--rows=4000), and in PyTorch
with the same rows, tokenizer, encoder, head on the first token, dropout, AdamW (fused), clipping, schedule and steps;
batches are shuffled and padded to their longest row, as transformers does. Seconds are those of a whole run with
its final evaluation, compilation included, one after the other on an idle machine.
Needs PyTorch: pip install torch==2.13.0
"""

from __future__ import annotations

import argparse
import dataclasses
import math
import statistics
import time
from typing import Any

import glue
import jax
import numpy as np
import torch
import transformers

from compactlm_jax.config import RunConfig
from compactlm_jax.cpu import keep_memory
from compactlm_jax.data.source import RowSource
from compactlm_jax.jobs import run_train
from compactlm_jax.jobs.finetune import finetune_job

MAIN = glue.MAIN
EPOCHS = 3.0


class Model(torch.nn.Module):
  """The encoder with a head on the first token."""

  def __init__(self, folder: str, width: int, dropout: float) -> None:
    super().__init__()
    self.encoder = transformers.AutoModel.from_pretrained(folder, add_pooling_layer=False)
    self.dropout = torch.nn.Dropout(dropout)
    self.head = torch.nn.Linear(self.encoder.config.hidden_size, width)
    torch.nn.init.normal_(self.head.weight, std=0.02)
    torch.nn.init.zeros_(self.head.bias)

  def forward(self, **inputs: Any) -> Any:
    return self.head(self.dropout(self.encoder(**inputs).last_hidden_state[:, 0]))


def inputs(rows: dict[str, np.ndarray]) -> dict[str, Any]:
  """A batch, padded to its longest row."""
  longest = int(rows['length'].max())
  mask = np.arange(longest)[None] < rows['length'][:, None]
  return {
    'input_ids': torch.from_numpy(rows['input_ids'][:, :longest]).long(),
    'token_type_ids': torch.from_numpy(rows['token_type_ids'][:, :longest]).long(),
    'attention_mask': torch.from_numpy(mask).long(),
  }


def train_torch(config: RunConfig, train: RowSource, evaluation: Any, seed: int) -> tuple[dict[str, float], float]:
  """(metrics, seconds) of a run."""
  started = time.monotonic()
  torch.manual_seed(seed)
  classes, o = len(train.classes), config.optimizer
  model = Model(config.model, max(1, classes), config.finetune.dropout)
  decayed = [p for n, p in model.named_parameters() if not n.endswith('bias') and 'LayerNorm' not in n]
  rest = [p for n, p in model.named_parameters() if n.endswith('bias') or 'LayerNorm' in n]
  groups = [{'params': decayed, 'weight_decay': o.weight_decay}, {'params': rest, 'weight_decay': 0.0}]
  adam = torch.optim.AdamW(groups, lr=o.learning_rate, betas=(o.beta1, o.beta2), eps=o.epsilon, fused=True)
  steps = math.ceil(config.epochs * len(train) / config.batch_size)
  schedule = transformers.get_linear_schedule_with_warmup(adam, int(o.warmup_fraction * steps), steps)
  order = np.concatenate(
    [np.random.default_rng([seed, e]).permutation(len(train)) for e in range(math.ceil(config.epochs) + 1)]
  )
  model.train()
  for step in range(steps):
    rows = train.fetch(order[step * config.batch_size : (step + 1) * config.batch_size])
    outputs = model(**inputs(rows))
    if classes:
      loss = torch.nn.functional.cross_entropy(outputs, torch.from_numpy(rows['label']).long())
    else:
      target = torch.from_numpy(rows['label']) / config.finetune.score_scale
      loss = torch.nn.functional.mse_loss(outputs[:, 0], target)
    adam.zero_grad()
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), o.clip_norm)
    adam.step()
    schedule.step()
  model.eval()
  rows, found = evaluation.rows, []
  with torch.no_grad():
    for first in range(0, len(rows), config.batch_size):
      part = rows.fetch(np.arange(first, min(first + config.batch_size, len(rows))))
      found.append(model(**inputs(part)).numpy())
  scale = 1.0 if classes else config.finetune.score_scale
  labels = rows.fetch(np.arange(len(rows)))['label']
  metrics = evaluation.score({'outputs': scale * np.concatenate(found), 'labels': labels})
  return dict(metrics), time.monotonic() - started


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  for name in ('model', 'data', 'workdir'):
    parser.add_argument(f'--{name}', required=True)
  parser.add_argument('--task', default='sst2')
  parser.add_argument('--rows', type=int, default=4000, help='training rows, a fixed part; 0 takes all')
  parser.add_argument('--seeds', type=int, default=3)
  args = parser.parse_args()
  keep_memory()
  config = dataclasses.replace(glue.config(args.task, args.model, args.data, args.rows), epochs=EPOCHS)
  _, data = finetune_job(config)
  rows = {'PyTorch': [], 'compactlm_jax': []}
  for seed in range(args.seeds):
    metrics, seconds = train_torch(config, data.train, data.evals[0], seed)
    rows['PyTorch'].append((metrics[MAIN[args.task]], seconds))
    ours = run_train(dataclasses.replace(config, seed=seed), f'{args.workdir}/{args.task}-timed/seed-{seed}')
    rows['compactlm_jax'].append((ours['metrics'][MAIN[args.task]], ours['seconds']))
    jax.clear_caches()
    print(f'seed {seed}: {rows}', flush=True)
  print(f'| {args.task} | {MAIN[args.task]} | standard deviation | seconds per run |\n|---|---:|---:|---:|')
  for name, found in rows.items():
    scores = [score for score, _ in found]
    spread = statistics.stdev(scores) if len(scores) > 1 else float('nan')
    seconds = statistics.mean(s for _, s in found)
    print(f'| {name} | {statistics.mean(scores):.4f} | {spread:.4f} | {seconds:.0f} |')
  ratio = statistics.mean(s for _, s in rows['PyTorch']) / statistics.mean(s for _, s in rows['compactlm_jax'])
  print(f'ours is faster by {ratio:.2f}')


if __name__ == '__main__':
  main()
