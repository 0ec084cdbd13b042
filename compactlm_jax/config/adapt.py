"""Width- and depth-adaptive networks (DynaBERT): one set of weights, many sub-networks."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Sequence

from compactlm_jax.config.check import one_of, require
from compactlm_jax.config.encoder import EncoderConfig

STAGES = ('width', 'depth', 'final')
PUBLISHED_HIDDEN_WEIGHT = 0.1
BASES = ('finetune', 'mlm', 'electra', 'distill')


@dataclasses.dataclass(frozen=True)
class Cell:
  """A sub-network of an encoder: a static choice, made of leftmost heads and neurons and of evenly dropped layers.

  Attributes:
    width: share of the heads and feed-forward neurons of each layer.
    depth: share of the layers.
    hidden: width of the residual stream (D); 0 for the encoder's own.
  """

  width: float = 1.0
  depth: float = 1.0
  hidden: int = 0

  @property
  def name(self) -> str:
    """For metrics and folders: '0.25x0.5' (width x depth), with '-h256' behind it where the hidden size is chosen."""
    return f'{self.width:g}x{self.depth:g}' + (f'-h{self.hidden}' if self.hidden else '')


@dataclasses.dataclass(frozen=True)
class AdaptConfig:
  """DynaBERT (Hou et al. 2020): which sub-networks are trained, and how.

  Attributes:
    base: what every sub-network is trained on: 'finetune' (labelled rows, in `stages`, with a fine-tuned teacher), or
      the pre-training objectives 'mlm', 'electra' (its discriminator is adaptive) and 'distill' (MiniLM's relations),
      in one stage.
    widths: shares of heads and neurons, ascending, ending with 1.
    depths: shares of layers, ascending, ending with 1.
    hidden_sizes: widths of the residual stream, ascending, ending with the encoder's; heads and neurons shrink with
      it, so that `widths` must be 1 then. () keeps it whole.
    stages: of the base 'finetune', one after another: 'width' (all widths at full depth, taught by the fine-tuned
      model), 'depth' (all cells, taught by the network of the stage before), 'final' (all cells, on labels).
    width_loss: of the stage 'width': 'distil', or 'labels' as the original trains it without augmented data.
    depth_teacher: of the stage 'depth': 'full' (the network before at full width, as the original's code) or
      'same_width' (at the width of the sub-network, as its paper).
    term: what is distilled beside the outputs: 'hidden' (mean squared error of all hidden states), or 'relations'
      (MiniLM's of the last layer, as `distill` says).
    hidden_tokens: positions of the hidden states that count: 'all', padding too, as published, or 'real'.
    logit_weight: weight of the soft cross-entropy of the outputs (squared error for scores).
    hidden_weight: weight of `term` in the stage 'width'. With `balance` 'auto' the published .1, which makes up for
      unequal scales, stands for 1.
    depth_hidden_weight: weight of `term` in the stage 'depth'.
    balance: 'given' takes these weights; 'auto' divides each weight of `term` by the ratio of both terms, measured on
      `balance_batches` batches before training, so that equal weights mean equal scale.
    balance_batches: see `balance`.
    score_logits: of regressions: 'mse' teaches the scores too, 'none' the hidden states alone as published.
    rewire: sort heads and neurons by importance before the stage 'width'.
    importance_rows: 'dev' as published, or 'train', which leaves the held-out rows unseen.
    importance_batches: batches that importance is measured on, shared among the held-out sets; 0 for all rows.
    importance_sum: 'cleared' adds up each batch's own gradient; 'published' never clears gradients between batches, so
      that batch i adds the gradient of batches 1 to i.
    sampling: 'all' trains every cell at every step as published; 'sandwich' the largest, the smallest and
      `random_cells` others.
    random_cells: see `sampling`.
    combine: gradients of the cells of a step: 'sum' as published, or 'mean'.
    augmented: table for the stages 'width' and 'depth', written by `compactlm augment`; '' uses `data.train`.
    keep_best: keep the best network over all cells, and each cell at its best, of the evaluations during training.
  """

  base: str = 'finetune'
  widths: tuple[float, ...] = (0.25, 0.5, 0.75, 1.0)
  depths: tuple[float, ...] = (0.5, 0.75, 1.0)
  hidden_sizes: tuple[int, ...] = ()
  stages: tuple[str, ...] = STAGES
  width_loss: str = 'distil'
  depth_teacher: str = 'full'
  term: str = 'hidden'
  hidden_tokens: str = 'all'
  logit_weight: float = 1.0
  hidden_weight: float = PUBLISHED_HIDDEN_WEIGHT
  depth_hidden_weight: float = 1.0
  balance: str = 'given'
  balance_batches: int = 8
  score_logits: str = 'mse'
  rewire: bool = True
  importance_rows: str = 'dev'
  importance_batches: int = 0
  importance_sum: str = 'cleared'
  sampling: str = 'all'
  random_cells: int = 2
  combine: str = 'sum'
  augmented: str = ''
  keep_best: bool = True

  def __post_init__(self) -> None:
    f = 'adapt.'
    for name, allowed in (
      ('base', BASES),
      ('width_loss', ('distil', 'labels')),
      ('depth_teacher', ('full', 'same_width')),
      ('term', ('hidden', 'relations')),
      ('hidden_tokens', ('all', 'real')),
      ('balance', ('given', 'auto')),
      ('score_logits', ('mse', 'none')),
      ('importance_rows', ('dev', 'train')),
      ('importance_sum', ('cleared', 'published')),
      ('sampling', ('all', 'sandwich')),
      ('combine', ('sum', 'mean')),
    ):
      one_of(f + name, getattr(self, name), allowed)
    for name in ('widths', 'depths'):
      shares = getattr(self, name)
      require(
        _ascending(shares) and shares[0] > 0 and shares[-1] == 1,
        f + name,
        f'{shares} must be ascending shares in (0, 1] that end with 1, the full network',
      )
    require(
      not self.hidden_sizes or (_ascending(self.hidden_sizes) and self.hidden_sizes[0] > 0 and self.widths == (1.0,)),
      f + 'hidden_sizes',
      f'{self.hidden_sizes} must be ascending sizes, and adapt.widths=1: heads and neurons shrink with the hidden size',
    )
    require(
      self.base != 'finetune' or (len(self.stages) > 0 and _subsequence(self.stages)),
      f + 'stages',
      f'{self.stages} must be some of {", ".join(STAGES)}, in this order',
    )
    for name in ('logit_weight', 'hidden_weight', 'depth_hidden_weight'):
      require(0 <= getattr(self, name) < float('inf'), f + name, f'{getattr(self, name)} must not be negative')
    require(self.balance_batches >= 1, f + 'balance_batches', f'{self.balance_batches} must be at least 1')
    require(self.importance_batches >= 0, f + 'importance_batches', 'must not be negative; 0 takes all rows')
    require(self.random_cells >= 0, f + 'random_cells', f'{self.random_cells} must not be negative')


def cells(config: AdaptConfig, encoder: EncoderConfig, *, full_depth: bool = False) -> tuple[Cell, ...]:
  """The sub-networks of an encoder, the full network first, the smallest last; by depth, then by width.

  Args:
    config: the grid.
    encoder: the full network.
    full_depth: only those with all layers (the stage 'width').
  """
  depths = (1.0,) if full_depth else config.depths[::-1]
  if config.hidden_sizes:
    sizes: Sequence[int] = config.hidden_sizes[::-1]
    return tuple(Cell(h / encoder.hidden_size, d, h) for d, h in itertools.product(depths, sizes))
  return tuple(Cell(w, d) for d, w in itertools.product(depths, config.widths[::-1]))


def _ascending(values: Sequence[float]) -> bool:
  return len(values) > 0 and all(a < b for a, b in zip(values, values[1:]))


def _subsequence(stages: Sequence[str]) -> bool:
  return list(stages) == [stage for stage in STAGES if stage in stages]
