"""Fine-tuning on your own labelled files.

Claim: trains the whole encoder and a linear head on the first token, as BERT and ELECTRA do for classification.
Hardware: any; a 6-layer, 384-wide encoder takes about a minute for 2,000 short sentences on two CPU cores.
Command: compactlm train --config=configs/finetune.py:table --workdir=RUN --config.model=FOLDER \
  --config.data.train=train.tsv --config.data.dev=dev.tsv --config.data.text_columns=text \
  --config.data.label_column=label
"""

from compactlm_jax.config import DataConfig, OptimizerConfig, RunConfig, to_config_dict
from compactlm_jax.errors import ConfigError


def get_config(variant: str = 'table'):
  """The configuration for labelled tables (.tsv or .jsonl)."""
  if variant != 'table':
    raise ConfigError(f"configs/finetune.py has no variant {variant!r}; use 'table'")
  return to_config_dict(
    RunConfig(
      task='finetune',
      epochs=3.0,
      batch_size=32,
      data=DataConfig(seq_len=128),
      optimizer=OptimizerConfig(learning_rate=5e-5, warmup_fraction=0.1),
    )
  )
