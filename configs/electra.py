"""ELECTRA: replaced-token detection with a small generator (Clark et al. 2020).

Claim: with these settings the authors report, on the development sets of GLUE (CoLA / SST-2 / MRPC / STS-B / QQP /
MNLI / QNLI / RTE; google-research/electra README), test average and hours. Not yet reproduced here.
  small           trained on open data: 56.8 / 88.3 / 87.4 / 86.8 / 88.3 / 78.9 / 87.9 / 68.5; 12 h on a TPU v3-8
                  (ConvBERT's authors), about 4 days on one V100
  small-plusplus  the released "small": 57.0 / 91.2 / 88.0 / 87.5 / 89.0 / 81.3 / 88.4 / 66.7, test average 77.4
  base            67.7 / 95.1 / 89.5 / 91.2 / 91.5 / 88.8 / 93.2 / 82.7, test average 82.7; 192 h on a TPU v3-8
                  (ConvBERT's authors), about 4 days on 16 TPU v3
  large           69.1 / 96.9 / 90.8 / 92.6 / 92.4 / 90.9 / 95.0 / 88.0, test average 85.2
14, 14, 110 and 335 million parameters. Reproductions spread by 0.57 points of the GLUE average over pre-training seeds.
Hardware: a TPU v3-8 or larger; `compactlm plan` tells memory and hours for other machines.
Data: rows of 128 tokens (small) or 512 with `compactlm prepare --mode=pairs`.
Original: `optimizer` has no bias correction and decays from step 0. Positions are drawn without replacement; the
original draws with replacement (--config.mask.with_replacement=True) and averages the ids of double draws.
Command: compactlm train --config=configs/electra.py:small --config.data.path=DIR --workdir=RUN
Continue: --config.model=DISCRIMINATOR_FOLDER --config.electra.generator=GENERATOR_FOLDER
"""

from compactlm_jax.config import (
  DataConfig,
  ElectraConfig,
  EncoderConfig,
  MaskConfig,
  OptimizerConfig,
  RunConfig,
  to_config_dict,
)
from compactlm_jax.errors import ConfigError


def encoder(layers: int, width: int, heads: int, embedding: int) -> EncoderConfig:
  """A published discriminator."""
  return EncoderConfig(
    architecture='electra',
    hidden_size=width,
    num_layers=layers,
    num_heads=heads,
    embedding_size=embedding,
    glorot_projections=True,
    dtype='bfloat16',
  )


def run(
  model: EncoderConfig, generator: float, seq_len: int, learning_rate: float, batch_size: int, steps: int, mask: float
) -> RunConfig:
  """What all sizes share: lambda 50, warm-up of 10,000 steps, decay to zero, clipping at 1, weight decay 0.01."""
  return RunConfig(
    task='electra',
    steps=steps,
    batch_size=batch_size,
    encoder=model,
    data=DataConfig(seq_len=seq_len),
    electra=ElectraConfig(generator_size=generator),
    mask=MaskConfig(probability=mask),
    optimizer=OptimizerConfig(
      learning_rate=learning_rate, warmup_steps=10_000, decay_from='start', bias_correction=False
    ),
    checkpoint_every=5000,
    log_every=100,
  )


SMALL, BASE = encoder(12, 256, 4, 128), encoder(12, 768, 12, 768)
LARGE = encoder(24, 1024, 16, 1024)
VARIANTS = {
  'small': run(SMALL, 1 / 4, 128, 5e-4, 128, 1_000_000, 0.15),
  'small-plusplus': run(SMALL, 1.0, 512, 5e-4, 128, 4_000_000, 0.15),
  'base': run(BASE, 1 / 3, 512, 2e-4, 256, 766_000, 0.15),
  'large': run(LARGE, 1 / 4, 512, 2e-4, 2048, 400_000, 0.25),
}


def get_config(variant: str = 'small'):
  """The configuration of one published size.

  Raises:
    ConfigError: an unknown variant.
  """
  if variant not in VARIANTS:
    raise ConfigError(f'configs/electra.py has no variant {variant!r}; use one of {", ".join(VARIANTS)}')
  return to_config_dict(VARIANTS[variant])
