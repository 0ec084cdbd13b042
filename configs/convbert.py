"""ConvBERT: mixed attention, grouped feed-forward, replaced-token detection (Jiang et al. 2020), and its ablations.

Claim: with these settings the authors report (not yet reproduced here)
  small         13.1 M parameters ("14M"); GLUE dev, median of 9: MNLI 81.4, QNLI 88.3, QQP 90.3, RTE 67.4, SST-2 90.2,
                MRPC 86.7, CoLA 59.4, STS-B 87.8, average 81.4 (+-0.5); 12 h on a TPU v3-8
  medium-small  17.5 M ("17M"); 18 h
  base          106 M; GLUE test CoLA 67.8, SST-2 95.7, MRPC 88.3, STS-B 89.7, QQP 90.0, MNLI 88.3, QNLI 93.2, RTE 77.9,
                average 86.4; SQuAD dev (a reproduction) v1.1 84.8 / 91.3, v2 80.9 / 83.9; 72 h
and as ablations
  medium-small-4-groups     "14M": average 81.0
  medium-small-larger       hidden size 432, "17M": average 81.1
  medium-small-no-grouped   ungrouped feed-forward
  small-no-bottleneck       every head in both branches (head ratio 1)
  small-conv-only           no self-attention: 64
  small-dynamic             plain dynamic convolution beside self-attention, as Lite Transformer
  small-kernel-N            N taps instead of 9 (3, 5, 7, 13)
The groups of medium-small-4-groups and -larger are inferred: four give 14.1 and 16.7 M parameters, the two of the
released medium-small would give 17.6 and 21.2 M. The original lets the convolution read padding; here it does not,
unless --config.encoder.conv_sees_padding=True, or the model that training continues does (an imported folder).
Hardware: a TPU v3-8; `compactlm plan` tells memory and hours for other machines.
Data: rows of 128 tokens from `compactlm prepare --seq_len=128 --mode=pairs`; the original's pair builder had a bug that
left the second segment empty (--pair_rule=convbert).
Command: compactlm train --config=configs/convbert.py:small --config.data.path=DIR --workdir=RUN
Continue: --config.model=DISCRIMINATOR_FOLDER --config.electra.generator=GENERATOR_FOLDER
"""

import dataclasses
from typing import Any

from compactlm_jax.config import (
  DataConfig,
  ElectraConfig,
  EncoderConfig,
  OptimizerConfig,
  RunConfig,
  to_config_dict,
)
from compactlm_jax.errors import ConfigError


def run(encoder: EncoderConfig, generator: float, learning_rate: float, batch_size: int) -> RunConfig:
  """What all sizes share: 1M steps of rows of 128, lambda 50, warm-up of 10,000 steps, decay to zero."""
  return RunConfig(
    task='electra',
    steps=1_000_000,
    batch_size=batch_size,
    encoder=encoder,
    data=DataConfig(seq_len=128),
    electra=ElectraConfig(generator_size=generator),
    optimizer=OptimizerConfig(
      learning_rate=learning_rate, warmup_steps=10_000, decay_from='start', bias_correction=False
    ),
    checkpoint_every=10_000,
    log_every=100,
  )


def mixed(width: int, heads: int, embedding: int, *, head_ratio: int = 2, **changes: Any) -> EncoderConfig:
  """A published encoder of 12 layers."""
  fields = {'hidden_size': width, 'num_layers': 12, 'embedding_size': embedding, 'dtype': 'bfloat16', **changes}
  return EncoderConfig.mixed(heads=heads, head_ratio=head_ratio, glorot_projections=True, **fields)


SMALL = mixed(256, 4, 128)
VARIANTS = {
  'small': run(SMALL, 1 / 4, 3e-4, 128),
  'medium-small': run(mixed(384, 8, 128, num_groups=2), 1 / 4, 5e-4, 128),
  'base': run(mixed(768, 12, 768), 1 / 3, 2e-4, 256),
  'medium-small-4-groups': run(mixed(384, 8, 128, num_groups=4), 1 / 4, 5e-4, 128),
  'medium-small-larger': run(mixed(432, 8, 128, num_groups=4), 1 / 4, 5e-4, 128),
  'medium-small-no-grouped': run(mixed(384, 8, 128), 1 / 4, 5e-4, 128),
  'small-no-bottleneck': run(mixed(256, 4, 128, head_ratio=1), 1 / 4, 3e-4, 128),
  'small-conv-only': run(mixed(256, 4, 128, head_ratio=1, self_attention=False), 1 / 4, 3e-4, 128),
  'small-dynamic': run(dataclasses.replace(SMALL, conv_kind='dynamic'), 1 / 4, 3e-4, 128),
  **{f'small-kernel-{n}': run(dataclasses.replace(SMALL, conv_kernel_size=n), 1 / 4, 3e-4, 128) for n in (3, 5, 7, 13)},
}


def get_config(variant: str = 'medium-small'):
  """The configuration of one published size or ablation.

  Raises:
    ConfigError: an unknown variant.
  """
  if variant not in VARIANTS:
    raise ConfigError(f'configs/convbert.py has no variant {variant!r}; use one of {", ".join(VARIANTS)}')
  return to_config_dict(VARIANTS[variant])
