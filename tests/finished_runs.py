"""Run directories as a finished training leaves them, without training."""

import json

from compactlm_jax.config import RunConfig
from compactlm_jax.train.rundir import open_run

IDENTITY = {'data': 'rows', 'tokenizer': 'words'}


def finished(folder, scores, *, steps=10, seconds=1.5, losses=(), identity=IDENTITY, **fields):
  """A run of `steps` steps with these scores, and training losses at steps 1, 2, ...; returns its directory."""
  config = RunConfig(**{'task': 'finetune', 'steps': steps, **fields})
  with open_run(folder, config, identity):
    pass
  results = {'metrics': scores, 'task': config.task, 'steps': steps, 'seconds': seconds}
  (folder / 'results.json').write_text(json.dumps(results))
  lines = [json.dumps({'step': i, 'loss': loss}) + '\n' for i, loss in enumerate(losses, 1)]
  (folder / 'metrics.jsonl').write_text(''.join(lines))
  return folder


def series(parent, accuracies, seeds=(), **fields):
  """PARENT/seed-0, ... with these accuracies; returns PARENT."""
  for seed, accuracy in zip(seeds or range(len(accuracies)), accuracies):
    folder = parent / f'seed-{seed}'
    folder.mkdir(parents=True)
    finished(folder, {'accuracy': accuracy, 'loss': 1 - accuracy}, seed=seed, **fields)
  return parent
