"""Pruning while fine-tuning: movement pruning and what it is compared with.

Variants: `table` for your own files; squad-METHOD, mnli-METHOD, qqp-METHOD with METHOD one of hard, soft, magnitude,
l0, hybrid; minibert-TASK and layerdrop-TASK, the dense base lines.
Claim: with a BERT-base teacher that was fine-tuned for the same task, the authors report at 10 % / 3 % of the encoder's
weights (huggingface/transformers movement-pruning README; dense: 80.4/88.1, 84.5/84.9, 91.4/88.4). Published figures;
none has been measured here.
  SQuAD v1.1 EM/F1     magnitude 70.2/80.1, 45.5/59.6; L0 72.4/81.9, 64.3/75.8; hard 75.6/84.3, 67.5/78.0;
                       soft 76.6/84.9, 72.7/82.3
  MNLI m/mm            magnitude 78.3/79.3, 69.4/70.6; L0 78.7/79.7, 76.0/76.2; hard 80.1/80.4, 76.5/77.4;
                       soft 81.2/81.8, 79.5/80.1
  QQP accuracy/F1      magnitude 79.8/65.0, 72.4/57.8; L0 88.1/82.8, 87.0/81.9; hard 89.7/86.2, 86.1/81.5;
                       soft 90.2/86.8, 89.1/85.5
Recipes: 3e-5, linear warm-up and decay, no weight decay, clipping at 1, embeddings frozen; scores at 1e-2 (L0 1e-1).
  squad   384 tokens, batches of 16, 10 epochs, warm-up 5,400 (the README's commands: 15 % for hard and magnitude,
          lambda 400 for soft, 125 for L0)
  mnli    128 tokens, batches of 32, 6 epochs, warm-up 12,000, schedule multiples 1 and 1; soft: lambda 290
  qqp     128 tokens, batches of 32, 10 epochs, warm-up 11,000, multiples 2 and 3; soft: lambda 190
          (both by third parties that started from the authors' code; alibaba/AliceMind ContrastivePruning: 190 gave
          90 %, 550 97 % on QQP, 290 and 680 on MNLI, 600 and 2000 on SQuAD). L0's lambda outside SQuAD is our choice
  hybrid  nn_pruning: 32 x 32 blocks in the attention, its output included (attention_output_with_dense=0), neurons in
          the feed-forward, sigmoid threshold, lambda 10, 20 epochs on SQuAD and 12 on GLUE, schedule multiples 1 and
          10, on GLUE 1 and 4 (examples/command_line.py). A masked neuron loses its bias, as with its bias_mask; a bias
          of the attention stays here when all blocks of its column are masked
  minibert, layerdrop  the same updates on a small dense model (--config.model=SMALL) and with every layer left out with
          probability .2, of which --config.finetune.keep_layers are kept
A density instead of a lambda: --config.prune.control=density --config.prune.density=.1 (soft, L0, RPP). With neither,
these three prune nothing and are refused. L0 as published needs, beside method=l0, prune.scores_scale=2.197 and
prune.scores_learning_rate=.1.
Hardware: any; bfloat16 (--config.encoder.dtype=bfloat16) on a TPU. The original: one V100 of 16 GB.
Command: compactlm train --config=configs/prune.py:squad-soft --config.model=BERT --config.teacher=SQUAD_RUN \
  --config.data.path=SQUAD --workdir=RUN
Command: compactlm train --config=configs/prune.py:table --config.model=FOLDER --config.data.train=train.tsv \
  --config.data.dev=dev.tsv --config.data.text_columns=text --config.data.label_column=label --workdir=RUN \
  --config.prune.method=soft_movement --config.prune.control=density --config.prune.density=.1
"""

import dataclasses

from compactlm_jax.config import DataConfig, FinetuneConfig, OptimizerConfig, PruneConfig, RunConfig, to_config_dict
from compactlm_jax.errors import ConfigError

TASKS = {
  'squad': ('squad1', 10.0, 16, 384, 5400, PruneConfig(initial_warmup=1, final_warmup=2, first_step=1)),
  'mnli': ('mnli', 6.0, 32, 128, 12000, PruneConfig(initial_warmup=1, final_warmup=1)),
  'qqp': ('qqp', 10.0, 32, 128, 11000, PruneConfig(initial_warmup=2, final_warmup=3)),
}
"""Benchmark, epochs, rows of a batch, tokens, warm-up steps, schedule."""

LAMBDA = {'squad': 400.0, 'mnli': 290.0, 'qqp': 190.0}
"""Of soft movement, for about 10 % of the weights."""


def methods(task: str) -> dict[str, dict]:
  """Fields of each method on a task."""
  density = 0.15 if task == 'squad' else 0.1
  return {
    'hard': {'method': 'hard_movement', 'density': density},
    'soft': {'method': 'soft_movement', 'threshold': 0.1, 'regularization': LAMBDA[task]},
    'magnitude': {'method': 'magnitude', 'density': density},
    'l0': {
      'method': 'l0',
      'scores_scale': 2.197,
      'scores_learning_rate': 1e-1,
      'regularization': 125.0,
      'initial_warmup': 1,
      'final_warmup': 1,
    },
    'hybrid': {
      'method': 'soft_movement',
      'structure': 'block+neurons',
      'threshold': 0.1,
      'regularization': 10.0,
      'initial_warmup': 1,
      'final_warmup': 10 if task == 'squad' else 4,
    },
  }


def run(task: str) -> RunConfig:
  """What all methods share on a task."""
  benchmark, epochs, batch_size, seq_len, warmup, prune = TASKS[task]
  return RunConfig(
    task='prune',
    epochs=epochs,
    batch_size=batch_size,
    data=DataConfig(seq_len=seq_len),
    finetune=FinetuneConfig(benchmark=benchmark, pooled=task != 'squad', ce_weight=0.1, distil_weight=0.9),
    prune=prune,
    optimizer=OptimizerConfig(learning_rate=3e-5, warmup_steps=warmup, weight_decay=0.0, epsilon=1e-8),
    log_every=50,
  )


def table() -> RunConfig:
  """Your own labelled files."""
  return RunConfig(
    task='prune',
    epochs=6.0,
    batch_size=32,
    data=DataConfig(seq_len=128),
    prune=PruneConfig(),
    optimizer=OptimizerConfig(learning_rate=3e-5, warmup_fraction=0.1, weight_decay=0.0, epsilon=1e-8),
  )


def variants() -> dict[str, RunConfig]:
  """Every variant by its name."""
  found = {'table': table()}
  for task in TASKS:
    for name, fields in methods(task).items():
      base = run(task)
      epochs = {'squad': 20.0}.get(task, 12.0) if name == 'hybrid' else base.epochs
      found[f'{task}-{name}'] = dataclasses.replace(
        base, epochs=epochs, prune=dataclasses.replace(base.prune, **fields)
      )
    dense = dataclasses.replace(run(task), task='finetune', prune=PruneConfig())
    found[f'minibert-{task}'] = dense
    found[f'layerdrop-{task}'] = dataclasses.replace(dense, encoder=dataclasses.replace(dense.encoder, layer_drop=0.2))
  return found


def get_config(variant: str = 'table'):
  """The configuration of a variant; `--config.model`, `--config.data` and perhaps `--config.teacher` are the user's.

  Raises:
    ConfigError: an unknown variant.
  """
  known = variants()
  if variant not in known:
    raise ConfigError(f'configs/prune.py has no variant {variant!r}; use one of {", ".join(known)}')
  return to_config_dict(known[variant])
