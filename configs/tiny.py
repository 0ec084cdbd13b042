"""Tiny runs of every task, for trying the machinery: each takes under a minute on two CPU cores, data included.

Source: none; a generated corpus with Markov structure, so the losses fall but mean nothing outside this file.
Command: compactlm train --config=configs/tiny.py:distill --workdir=/tmp/tiny
With your own rows: --config.data.path=DIR (written by `compactlm prepare`) and --config.teacher=FOLDER.
"""

from compactlm_jax.config import (
  DataConfig,
  DistillConfig,
  EncoderConfig,
  FinetuneConfig,
  OptimizerConfig,
  RunConfig,
  to_config_dict,
)
from compactlm_jax.errors import ConfigError

ENCODER = EncoderConfig(
  vocab_size=1000, hidden_size=64, num_layers=2, num_heads=4, max_positions=64, embedding_size=64, scan_unroll=1
)
COMMON = {'steps': 60, 'batch_size': 16, 'checkpoint_every': 20, 'encoder': ENCODER}
VARIANTS = {
  'distill': RunConfig(
    task='distill',
    data=DataConfig(seq_len=64),
    optimizer=OptimizerConfig(learning_rate=1e-3, warmup_steps=10),
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
}


def get_config(variant: str = 'distill'):
  """The configuration of a tiny run."""
  if variant not in VARIANTS:
    raise ConfigError(f'configs/tiny.py has no variant {variant!r}; use one of {", ".join(VARIANTS)}')
  return to_config_dict(VARIANTS[variant])
