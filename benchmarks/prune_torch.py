"""Hard movement as published, in PyTorch: does a short run collapse there too?

Usage: python benchmarks/prune_torch.py --model=FOLDER --table=TSV --workdir=RUNS [--density=.7] [--steps=250]
A version of its own of emmental's masked BERT (top-v of each matrix, straight-through scores that begin at 0, cubic
schedule, embeddings frozen, one clip of all gradients, AdamW without decay) on `transformers`, with the rows, rates,
dropout and schedule of `benchmarks/prune.py` (1,000 steps of 32), stopped after --steps of them. Prints the mean loss
and accuracy on training rows, for every 25 steps, to be held against metrics.jsonl of a run of prune.py.
Needs PyTorch: pip install torch==2.13.0
"""

from __future__ import annotations

import argparse
import pathlib
import random
import statistics
from typing import Any

import prune
import torch
import transformers

STEPS, WARMUP, COOL_DOWN, BATCH, ROWS, EVERY = 1000, 100, 200, 32, 4000, 25


class TopV(torch.autograd.Function):
  """Mask of the highest scores of one matrix; the gradient passes as it is."""

  @staticmethod
  def forward(ctx: Any, scores: torch.Tensor, density: float) -> torch.Tensor:
    kept = int(density * scores.numel())
    if kept == scores.numel():
      return torch.ones_like(scores)
    return (scores > torch.kthvalue(scores.flatten(), scores.numel() - kept)[0]).float()

  @staticmethod
  def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None]:
    return gradient, None


class Masked(torch.nn.Linear):
  """A linear layer with scores; `density` is set for all of them at once."""

  density = 1.0

  def forward(self, x: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.linear(x, self.weight * TopV.apply(self.scores, Masked.density), self.bias)


def masked_model(folder: str) -> torch.nn.Module:
  """The encoder with a classifier, scores in all its layers, embeddings frozen."""
  model = transformers.AutoModelForSequenceClassification.from_pretrained(folder, num_labels=2)
  for module in model.base_model.encoder.modules():
    if type(module) is torch.nn.Linear:
      module.__class__ = Masked
      module.scores = torch.nn.Parameter(torch.zeros_like(module.weight))
  model.base_model.embeddings.requires_grad_(False)
  return model.train()


def optimizer_of(model: torch.nn.Module) -> tuple[torch.optim.Optimizer, torch.optim.lr_scheduler.LRScheduler]:
  """AdamW with a rate for the weights and one for the scores, and their schedule."""
  trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
  groups = [
    {'params': [p for name, p in trained.items() if name.endswith('scores')], 'lr': 1e-2},
    {'params': [p for name, p in trained.items() if not name.endswith('scores')], 'lr': 1e-4},
  ]
  optimizer = torch.optim.AdamW(groups, eps=1e-8, weight_decay=0.0)
  rate = lambda step: min((step + 1) / WARMUP, max(0.0, (STEPS - step) / (STEPS - WARMUP)))  # noqa: E731
  return optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, rate)


def density_at(step: int, final: float) -> float:
  """The published cubic schedule from 1 to the final density."""
  if step <= WARMUP:
    return 1.0
  left = 1 - (step - WARMUP) / (STEPS - COOL_DOWN - WARMUP)
  return final + (1 - final) * max(0.0, left) ** 3


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  for name in ('model', 'table', 'workdir'):
    parser.add_argument(f'--{name}', required=True)
  parser.add_argument('--density', type=float, default=0.7)
  parser.add_argument('--steps', type=int, default=250)
  args = parser.parse_args()
  transformers.logging.set_verbosity_error()
  torch.manual_seed(0)
  train, _ = prune.split(pathlib.Path(args.table), pathlib.Path(args.workdir) / 'data')
  header, *rows = [line.split('\t') for line in pathlib.Path(train).read_text().splitlines()[: ROWS + 1]]
  label, text = header.index('label'), header.index('text')
  classes, tokenizer = sorted({row[label] for row in rows}), transformers.AutoTokenizer.from_pretrained(args.model)
  model = masked_model(args.model)
  optimizer, schedule = optimizer_of(model)
  order: list[int] = []
  seen: list[tuple[float, float]] = []
  print('| step | density | loss | accuracy |\n|---:|---:|---:|---:|')
  for step in range(args.steps):
    order = order if len(order) >= BATCH else random.Random(step).sample(range(len(rows)), len(rows))
    batch, order = [rows[i] for i in order[:BATCH]], order[BATCH:]
    Masked.density = density_at(step, args.density)
    texts = tokenizer([row[text] for row in batch], padding=True, truncation=True, max_length=64, return_tensors='pt')
    labels = torch.tensor([classes.index(row[label]) for row in batch])
    out = model(**texts, labels=labels)
    optimizer.zero_grad()
    out.loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    schedule.step()
    seen.append((out.loss.item(), (out.logits.argmax(-1) == labels).float().mean().item()))
    if (step + 1) % EVERY == 0:
      loss, accuracy = (statistics.mean(values) for values in zip(*seen[-EVERY:]))
      print(f'| {step + 1} | {Masked.density:.3f} | {loss:.3f} | {accuracy:.3f} |', flush=True)


if __name__ == '__main__':
  main()
