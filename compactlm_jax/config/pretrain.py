"""Options of pre-training: masked language models and replaced-token detection."""

from __future__ import annotations

import dataclasses

from compactlm_jax.config.check import require
from compactlm_jax.config.encoder import EncoderConfig


@dataclasses.dataclass(frozen=True)
class MaskConfig:
  """Which tokens are to be predicted, and what the model sees in their place (ELECTRA, BERT).

  Attributes:
    probability: slots per row: round(probability * real tokens, special ones counted), at least one.
    max_predictions: most slots per row; 0 means int((probability + 0.005) * T): 19 at T = 128, 79 at T = 512.
    with_replacement: draw positions with replacement, as the originals do: a position may fill two slots, and the
      original then averages the two ids (parity). False draws without (clean).
    mask_rate: share of the slots that read [MASK].
    random_rate: share of the slots that read a uniformly random token; the rest is left as it is. ELECTRA has 0.85 and
      0, BERT 0.8 and 0.1.
  """

  probability: float = 0.15
  max_predictions: int = 0
  with_replacement: bool = False
  mask_rate: float = 0.85
  random_rate: float = 0.0

  def __post_init__(self) -> None:
    f = 'mask.'
    require(0 < self.probability < 1, f + 'probability', f'{self.probability} must be between 0 and 1, for example .15')
    require(self.max_predictions >= 0, f + 'max_predictions', f'{self.max_predictions} must not be negative')
    for name in ('mask_rate', 'random_rate'):
      require(0 <= getattr(self, name) <= 1, f + name, f'{getattr(self, name)} must be in [0, 1]')
    require(self.mask_rate + self.random_rate <= 1, f + 'random_rate', 'and mask.mask_rate add up to more than 1')

  def slots(self, seq_len: int) -> int:
    """Slots of a row of `seq_len` tokens (P)."""
    return max(1, self.max_predictions or int((self.probability + 0.005) * seq_len))


SHARED_EMBEDDINGS = ('word', 'position', 'token_type', 'norm')
"""Parts of the embeddings that both towers use with sharing 'embeddings'; a projection belongs to its tower."""


@dataclasses.dataclass(frozen=True)
class ElectraConfig:
  """Replaced-token detection (Clark et al. 2020): a generator and a discriminator trained together.

  Attributes:
    generator_size: width of the generator as a fraction of the discriminator's; heads and feed-forward shrink with it.
    generator_layers: its depth as a fraction of the discriminator's.
    generator_heads: attention heads of the generator before any head ratio; 0 scales them by `generator_size`.
    sharing: 'embeddings' shares word, position and token-type tables and their LayerNorm (each tower keeps its own
      projection); 'none' nothing; 'all' the whole encoder (generator_size and generator_layers must be 1).
    generator_weight: of the masked-language-model loss.
    discriminator_weight: of the replaced-token loss (lambda).
    temperature: of sampling from the generator.
    disallow_correct: never sample the original token.
    generator: folder or run whose generator continues; '' starts it at random.
  """

  generator_size: float = 0.25
  generator_layers: float = 1.0
  generator_heads: int = 0
  sharing: str = 'embeddings'
  generator_weight: float = 1.0
  discriminator_weight: float = 50.0
  temperature: float = 1.0
  disallow_correct: bool = False
  generator: str = ''

  def __post_init__(self) -> None:
    f = 'electra.'
    for name in ('generator_size', 'generator_layers'):
      require(0 < getattr(self, name) <= 1, f + name, f'{getattr(self, name)} must be in (0, 1]')
    require(self.generator_heads >= 0, f + 'generator_heads', f'{self.generator_heads} must not be negative')
    require(
      self.sharing in ('embeddings', 'none', 'all'),
      f + 'sharing',
      f"{self.sharing!r}; use 'embeddings', 'none' or 'all'",
    )
    require(
      self.sharing != 'all' or self.generator_size == self.generator_layers == 1,
      f + 'sharing',
      "'all' needs generator_size and generator_layers of 1",
    )
    require(
      self.sharing != 'all' or self.generator_heads == 0,
      f + 'generator_heads',
      f"{self.generator_heads}: with sharing='all' the generator has the heads of the discriminator; set it to 0",
    )
    for name in ('generator_weight', 'discriminator_weight'):
      require(0 <= getattr(self, name) < float('inf'), f + name, f'{getattr(self, name)} must be finite, not negative')
    require(0 < self.temperature < float('inf'), f + 'temperature', f'{self.temperature} must be positive')

  def generator_encoder(self, encoder: EncoderConfig) -> EncoderConfig:
    """The generator of a discriminator: the same architecture, scaled (convolution, groups and kernel are kept).

    Configured heads are hidden_size / head_size; a branch of mixed attention has that number divided by the head
    ratio, and one where this is below one (ConvBERT, `configure_pretraining.py`).

    Raises:
      ConfigError: a multiplier that gives a fraction of a layer, a neuron or a head.
    """
    width = _whole(encoder.hidden_size, self.generator_size, 'generator_size', 'hidden_size')
    configured = encoder.hidden_size // encoder.head_size
    ratio = max(1, configured // encoder.num_heads)
    heads = self.generator_heads or max(1, round(configured * self.generator_size))
    require(
      width % heads == 0,
      'electra.generator_size',
      f'gives a width of {width}, not divisible by {heads} heads; set electra.generator_heads',
    )
    return dataclasses.replace(
      encoder,
      hidden_size=width,
      num_layers=_whole(encoder.num_layers, self.generator_layers, 'generator_layers', 'num_layers'),
      num_heads=max(1, heads // ratio),
      head_size=width // heads,
      intermediate_size=_whole(encoder.intermediate_size, self.generator_size, 'generator_size', 'intermediate_size'),
      pooler=False,
    )


def _whole(size: int, factor: float, field: str, what: str) -> int:
  """size * factor, which must be whole but for the digits that a third lacks."""
  value = round(size * factor)
  require(
    value >= 1 and abs(size * factor - value) < 0.05,
    f'electra.{field}',
    f'{factor} of {what} {size} is {size * factor:.2f}, not a whole number; try {max(1, value) / size:.4f}',
  )
  return value
