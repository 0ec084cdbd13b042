"""What an encoder is."""

from __future__ import annotations

import dataclasses
from typing import Any

from compactlm_jax.config.check import require

MAX_SIZE = 1 << 24
"""Largest width, vocabulary or number of positions."""

_MOST = {'num_layers': 1 << 10, 'conv_kernel_size': 1 << 10, 'type_vocab_size': 1 << 16, 'num_heads': 1 << 12}
_SIZES = (
  'vocab_size',
  'hidden_size',
  'num_layers',
  'num_heads',
  'head_size',
  'intermediate_size',
  'embedding_size',
  'max_positions',
  'type_vocab_size',
  'conv_kernel_size',
  'num_groups',
  'scan_unroll',
)

TABLE_FIELDS = ('vocab_size', 'embedding_size', 'max_positions', 'type_vocab_size')
"""Fields of an EncoderConfig that decide the shapes of its embeddings."""

LAYER_FIELDS = (
  'hidden_size',
  'num_heads',
  'head_size',
  'intermediate_size',
  'conv_kernel_size',
  'conv_kind',
  'self_attention',
  'num_groups',
  'heads_per_layer',
  'neurons_per_layer',
)
"""Those that decide the shapes and the parts of its layers; how many there are, `num_layers` says."""


@dataclasses.dataclass(frozen=True)
class EncoderConfig:
  """One encoder: BERT, ELECTRA, ConvBERT, their students and their sub-networks.

  Attributes:
    architecture: 'bert', 'electra' or 'convbert': the Hugging Face layout that it is read from and written to.
    vocab_size: rows of the word table.
    hidden_size: width of the residual stream (D).
    num_layers: number of layers (N).
    num_heads: self-attention heads (H); with a convolution branch, also its number of heads.
    head_size: size of one head (K); 0 means hidden_size / num_heads.
    intermediate_size: feed-forward neurons (F); 0 means 4 * hidden_size.
    embedding_size: width of the embedding tables (E); 0 means hidden_size. If it differs, a projection follows.
    max_positions: rows of the position table.
    type_vocab_size: rows of the token-type table.
    conv_kernel_size: taps (odd) of the span-based dynamic convolution beside self-attention; 0 for none.
    conv_sees_padding: True lets the convolution read padded positions as the original ConvBERT and its Hugging Face
      port do (parity); False zeroes them, so that outputs do not depend on how far a batch is padded (clean).
    conv_kind: 'span' makes each kernel from the query and the span around it (ConvBERT); 'dynamic' from the query alone
      (plain dynamic convolution, the ablation).
    self_attention: False leaves the convolution branch alone (the ablation `conv_only`); needs `conv_kernel_size`.
    causal: position t reads positions <= t only, in both branches (a left-to-right language model).
    num_groups: groups of the feed-forward matrices (1: ordinary Dense).
    pooler: BERT's tanh pooler on the first token.
    layer_norm_epsilon: added to the variance.
    hidden_dropout: rate on embeddings and on each sub-layer's output.
    attention_dropout: rate on attention probabilities.
    layer_drop: probability that training skips a layer (LayerDrop, Fan et al. 2019); evaluation runs all.
    initializer_range: standard deviation of the truncated normal initialiser.
    glorot_projections: start the embedding projection and the last layer of the replaced-token head by Glorot's uniform
      rule, as ELECTRA's and ConvBERT's code does (TensorFlow's default, kept there alone); False starts them like all
      other layers, as transformers does.
    pad_token_id: id of [PAD]; positions that hold it are not special by themselves, the mask decides.
    dtype: 'float32' or 'bfloat16' for matrix products. Parameters, softmax, LayerNorm and losses stay float32.
    remat: recompute each layer's activations in the backward pass. On a CPU this frees memory with `scan_unroll` 1
      alone: XLA computes unrolled layers there in an order that keeps all activations.
    scan_unroll: layers per iteration of the scan; 0 unrolls all of them.
    heads_per_layer: heads of each layer if they differ (a pruned encoder), 0 to `num_heads`, which then is the size
      that the layers once had; () for `num_heads` in every layer. A layer without heads adds the bias of its
      attention output and has no other parameter of attention.
    neurons_per_layer: feed-forward neurons of each layer if they differ, 0 to `intermediate_size`, in multiples of
      `num_groups`; () for `intermediate_size` in every layer. A layer without neurons adds the output bias alone.
  """

  architecture: str = 'bert'
  vocab_size: int = 30522
  hidden_size: int = 768
  num_layers: int = 12
  num_heads: int = 12
  head_size: int = 0
  intermediate_size: int = 0
  embedding_size: int = 0
  max_positions: int = 512
  type_vocab_size: int = 2
  conv_kernel_size: int = 0
  conv_sees_padding: bool = False
  conv_kind: str = 'span'
  self_attention: bool = True
  causal: bool = False
  num_groups: int = 1
  pooler: bool = False
  layer_norm_epsilon: float = 1e-12
  hidden_dropout: float = 0.1
  attention_dropout: float = 0.1
  layer_drop: float = 0.0
  initializer_range: float = 0.02
  glorot_projections: bool = False
  pad_token_id: int = 0
  dtype: str = 'float32'
  remat: bool = False
  scan_unroll: int = 0
  heads_per_layer: tuple[int, ...] = ()
  neurons_per_layer: tuple[int, ...] = ()

  def __post_init__(self) -> None:
    f = 'encoder.'
    require(
      self.architecture in ('bert', 'electra', 'convbert'),
      f + 'architecture',
      f"{self.architecture!r} is unknown; use 'bert', 'electra' or 'convbert'",
    )
    for name in (
      'vocab_size',
      'hidden_size',
      'num_layers',
      'num_heads',
      'max_positions',
      'type_vocab_size',
      'num_groups',
    ):
      headless = name == 'num_heads' and self.head_size and self.heads_per_layer  # of a run, see `runs`
      require(getattr(self, name) >= (0 if headless else 1), f + name, f'{getattr(self, name)} must be at least 1')
    self._check_sizes(f)
    if not self.head_size:
      require(
        self.hidden_size % self.num_heads == 0,
        f + 'num_heads',
        f'hidden_size {self.hidden_size} is not divisible by num_heads {self.num_heads}; set head_size',
      )
      object.__setattr__(self, 'head_size', self.hidden_size // self.num_heads)
    if not self.intermediate_size and not self.neurons_per_layer:
      object.__setattr__(self, 'intermediate_size', 4 * self.hidden_size)
    if not self.embedding_size:
      object.__setattr__(self, 'embedding_size', self.hidden_size)
    for name in ('hidden_size', 'intermediate_size'):
      require(
        getattr(self, name) % self.num_groups == 0,
        f + 'num_groups',
        f'{name} {getattr(self, name)} is not divisible by num_groups {self.num_groups}',
      )
    require(
      self.conv_kernel_size == 0 or self.conv_kernel_size % 2 == 1,
      f + 'conv_kernel_size',
      f'{self.conv_kernel_size} must be odd, or 0 for no convolution',
    )
    require(self.conv_kind in ('span', 'dynamic'), f + 'conv_kind', f"{self.conv_kind!r}; use 'span' or 'dynamic'")
    require(
      self.self_attention or self.conv_kernel_size > 0,
      f + 'self_attention',
      'False leaves nothing that mixes positions; set encoder.conv_kernel_size',
    )
    require(self.dtype in ('float32', 'bfloat16'), f + 'dtype', f"{self.dtype!r}; use 'float32' or 'bfloat16'")
    for name in ('hidden_dropout', 'attention_dropout', 'layer_drop'):
      require(0 <= getattr(self, name) < 1, f + name, f'{getattr(self, name)} must be in [0, 1)')
    self._check_per_layer('heads_per_layer', 'num_heads')
    self._check_per_layer('neurons_per_layer', 'intermediate_size')

  def _check_sizes(self, f: str) -> None:
    """Bounds that no encoder comes near: shapes are computed from what a file claims, before its weights are read."""
    for name in _SIZES:
      most = _MOST.get(name, MAX_SIZE)
      require(0 <= getattr(self, name) <= most, f + name, f'{getattr(self, name)} is not between 0 and {most}')
    width = self.num_heads * max(self.head_size, self.conv_kernel_size)
    require(width <= MAX_SIZE, f + 'head_size', f'{self.num_heads} heads of this size have a width above {MAX_SIZE}')
    require(
      0 <= self.pad_token_id < self.vocab_size, f + 'pad_token_id', f'{self.pad_token_id} is not in the vocabulary'
    )
    for name in ('layer_norm_epsilon', 'initializer_range'):
      require(0 <= getattr(self, name) <= 1, f + name, f'{getattr(self, name)} must be in [0, 1]')

  def _check_per_layer(self, name: str, stock: str) -> None:
    sizes, most, groups = getattr(self, name), getattr(self, stock), self.num_groups
    require(
      len(sizes) in (0, self.num_layers),
      'encoder.' + name,
      f'{sizes} has {len(sizes)} entries; name one for each of the {self.num_layers} layers, or leave it empty',
    )
    for i, size in enumerate(sizes):
      require(
        0 <= size <= most,
        'encoder.' + name,
        f'{size} in layer {i + 1} is not between 0 and {most}, the encoder.{stock} of an unpruned layer',
      )
      require(
        name == 'heads_per_layer' or size % groups == 0,
        'encoder.' + name,
        f'{size} in layer {i + 1} does not divide over num_groups {groups}',
      )

  @property
  def branches(self) -> int:
    """Number of branches whose heads stand side by side before the output projection: 1, or 2 of ConvBERT."""
    return self.self_attention + bool(self.conv_kernel_size)

  @property
  def ragged(self) -> bool:
    """Whether layers have sizes of their own; the parameter tree then has one stack for each of `runs`."""
    return bool(self.heads_per_layer or self.neurons_per_layer)

  @classmethod
  def mixed(cls, *, heads: int, head_ratio: int, **fields: Any) -> EncoderConfig:
    """A ConvBERT from its published numbers: `heads` configured heads, reduced by `head_ratio` in each branch.

    The head size is hidden_size / heads in every case; with fewer heads than `head_ratio` one head per branch is left
    (ConvBERT, `modeling.py: attention_layer`).
    """
    require(
      heads < head_ratio or heads % head_ratio == 0,
      'encoder.num_heads',
      f'{heads} configured heads do not divide by the head ratio {head_ratio}',
    )
    per_branch = max(1, heads // head_ratio)
    return cls(
      architecture='convbert',
      num_heads=per_branch,
      head_size=fields['hidden_size'] // heads,
      **{'conv_kernel_size': 9, **fields},
    )

  def with_run_options(self, asked: EncoderConfig) -> EncoderConfig:
    """The sizes of this (loaded) encoder with dropout, dtype, remat and the like of the run that was asked for."""
    names = ('hidden_dropout', 'attention_dropout', 'layer_drop', 'glorot_projections', 'dtype', 'remat', 'scan_unroll')
    sees = self.conv_sees_padding or (asked.conv_sees_padding and self.architecture == 'convbert')
    return dataclasses.replace(self, conv_sees_padding=sees, **{name: getattr(asked, name) for name in names})


Run = tuple[int, int, EncoderConfig]
"""(start, stop, configuration) of the layers [start, stop), counted from 0."""


def runs(config: EncoderConfig) -> tuple[Run, ...]:
  """Consecutive layers of equal sizes; each run is one stack of parameters and one scan.

  Run i of a ragged encoder is 'encoder/layers_i' of the tree; an encoder that is not ragged is one run and its stack
  is 'encoder/layers' (`stack_names`). In a run's configuration `num_layers`, `num_heads` and `intermediate_size` are
  the run's own, and the last two may be 0 (then `heads_per_layer` or `neurons_per_layer` holds zeros, which allow
  it); otherwise both lists are empty.

  Args:
    config: an encoder.
  """
  if not config.ragged:
    return ((0, config.num_layers, config),)
  heads = config.heads_per_layer or (config.num_heads,) * config.num_layers
  neurons = config.neurons_per_layer or (config.intermediate_size,) * config.num_layers
  sizes = list(zip(heads, neurons))
  starts = [i for i in range(len(sizes)) if i == 0 or sizes[i] != sizes[i - 1]]
  return tuple(
    (start, stop, _run(config, stop - start, *sizes[start])) for start, stop in zip(starts, [*starts[1:], len(sizes)])
  )


def _run(config: EncoderConfig, layers: int, heads: int, neurons: int) -> EncoderConfig:
  return dataclasses.replace(
    config,
    num_layers=layers,
    num_heads=heads,
    intermediate_size=neurons,
    heads_per_layer=() if heads else (0,) * layers,
    neurons_per_layer=() if neurons else (0,) * layers,
  )


def stack_names(config: EncoderConfig) -> tuple[str, ...]:
  """The key under 'encoder' of each run's stack of parameters: 'layers', or 'layers_0', 'layers_1', ... if ragged."""
  return tuple(f'layers_{i}' for i in range(len(runs(config)))) if config.ragged else ('layers',)
