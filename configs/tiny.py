"""Tiny runs of every task, for trying the machinery: each takes under a minute on two CPU cores, data included.

Source: none; a generated corpus with Markov structure, so the losses fall but mean nothing outside this file.
Command: compactlm train --config=configs/tiny.py:distill --workdir=/tmp/tiny
With your own rows: --config.data.path=DIR (written by `compactlm prepare`) and --config.teacher=FOLDER.
"""

import dataclasses

from compactlm_jax.config import (
  AdaptConfig,
  DataConfig,
  DistillConfig,
  ElectraConfig,
  EncoderConfig,
  FinetuneConfig,
  MaskConfig,
  OptimizerConfig,
  PruneConfig,
  RunConfig,
  to_config_dict,
)
from compactlm_jax.errors import ConfigError

ENCODER = EncoderConfig(
  vocab_size=1000, hidden_size=64, num_layers=2, num_heads=4, max_positions=64, embedding_size=64, scan_unroll=1
)
COMMON = {'steps': 60, 'batch_size': 16, 'checkpoint_every': 20, 'encoder': ENCODER}
MIXED = EncoderConfig.mixed(
  heads=4, head_ratio=2, vocab_size=1000, hidden_size=64, num_layers=2, max_positions=64, embedding_size=32,
  num_groups=2, scan_unroll=1,
)  # fmt: skip
# ELECTRA's optimiser: no bias correction, and a decay that begins at step 0.
PRETRAIN = OptimizerConfig(learning_rate=2e-3, warmup_fraction=1 / 6, bias_correction=False, decay_from='start')
VARIANTS = {
  'mlm': RunConfig(
    task='mlm',
    data=DataConfig(seq_len=64),
    optimizer=PRETRAIN,
    mask=MaskConfig(mask_rate=0.8, random_rate=0.1),
    **COMMON,
  ),
  'electra': RunConfig(
    task='electra',
    data=DataConfig(seq_len=64),
    optimizer=PRETRAIN,
    electra=ElectraConfig(generator_size=0.5),
    **{**COMMON, 'encoder': dataclasses.replace(ENCODER, architecture='electra', embedding_size=32)},
  ),
  'convbert': RunConfig(
    task='electra',
    data=DataConfig(seq_len=64),
    optimizer=PRETRAIN,
    electra=ElectraConfig(generator_size=0.5),
    **{**COMMON, 'encoder': MIXED},
  ),
  'lm': RunConfig(
    task='lm',
    data=DataConfig(seq_len=64),
    optimizer=OptimizerConfig(learning_rate=2e-3, warmup_fraction=1 / 6),
    **{**COMMON, 'encoder': dataclasses.replace(MIXED, causal=True)},
  ),
  'distill': RunConfig(
    task='distill',
    data=DataConfig(seq_len=64),
    optimizer=OptimizerConfig(learning_rate=1e-3, warmup_fraction=1 / 6),
    distill=DistillConfig(relations=('qk', 'vv')),
    **COMMON,
  ),
  'finetune': RunConfig(
    task='finetune',
    data=DataConfig(seq_len=64),
    optimizer=OptimizerConfig(learning_rate=5e-4, warmup_fraction=0.1),
    finetune=FinetuneConfig(dropout=0.1),
    **COMMON,
  ),
  'prune': RunConfig(
    task='prune',
    data=DataConfig(seq_len=64),
    optimizer=OptimizerConfig(learning_rate=5e-4, warmup_fraction=0.1, weight_decay=0.0),
    finetune=FinetuneConfig(dropout=0.1),
    prune=PruneConfig(density=0.15),
    **COMMON,
  ),
  # Two stages of 30 steps. Without a teacher (--config.teacher=RUN, of tiny:finetune) the first trains on labels.
  'adapt': RunConfig(
    task='adapt',
    data=DataConfig(seq_len=64),
    optimizer=OptimizerConfig(learning_rate=2e-3, weight_decay=0.0),
    finetune=FinetuneConfig(dropout=0.1),
    adapt=AdaptConfig(widths=(0.5, 1.0), depths=(0.5, 1.0), stages=('width', 'depth'), width_loss='labels'),
    **{**COMMON, 'steps': 30, 'checkpoint_every': 10},
  ),
}


def get_config(variant: str = 'distill'):
  """The configuration of a tiny run."""
  if variant not in VARIANTS:
    raise ConfigError(f'configs/tiny.py has no variant {variant!r}; use one of {", ".join(VARIANTS)}')
  return to_config_dict(VARIANTS[variant])
