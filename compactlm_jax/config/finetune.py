"""How an encoder is fine-tuned: benchmark, head, distillation from a fine-tuned teacher, spans."""

from __future__ import annotations

import dataclasses
import difflib

from compactlm_jax.config.check import require

GLUE = ('cola', 'sst2', 'mrpc', 'stsb', 'qqp', 'mnli', 'qnli', 'rte', 'wnli')
SQUAD = ('squad1', 'squad2')


@dataclasses.dataclass(frozen=True)
class FinetuneConfig:
  """A head on the encoder, for classes, scores or spans.

  Attributes:
    benchmark: '' trains on the user's tables (`data.train`, `data.dev`); a GLUE task (cola, sst2, mrpc, stsb, qqp,
      mnli, qnli, rte, wnli) or SQuAD (squad1, squad2) is read from `data.path`.
    num_classes: 0 counts the labels of the training table.
    dropout: rate before the head.
    pooled: read BERT's pooler instead of the raw first token.
    swap_pairs: also train on the pairs in the other order (ELECTRA's `double_unordered`, for MRPC and STS-B).
    score_scale: scores are divided by it for training, outputs multiplied by it (5 for ELECTRA's STS-B).
    keep_layers: layers (from 1) that the finished model keeps, ascending, after training with all of them (LayerDrop);
      () keeps all.
    ce_weight: weight of the task's own loss where `teacher` is set.
    distil_weight: weight of the distillation loss, where `teacher` is set: T^2 KL of softened classes or span ends,
      squared difference of scores.
    temperature: T of the softened distributions.
  """

  benchmark: str = ''
  num_classes: int = 0
  dropout: float = 0.1
  pooled: bool = False
  swap_pairs: bool = False
  score_scale: float = 1.0
  keep_layers: tuple[int, ...] = ()
  ce_weight: float = 0.5
  distil_weight: float = 0.5
  temperature: float = 2.0

  def __post_init__(self) -> None:
    f, known = 'finetune.', (*GLUE, *SQUAD)
    if self.benchmark not in ('', *known):
      close = difflib.get_close_matches(self.benchmark.lower().replace('-', ''), known, 1)
      hint = f'; did you mean {close[0]}?' if close else f'; use one of {", ".join(known)}, or none for your own tables'
      require(False, f + 'benchmark', f'{self.benchmark!r} is unknown{hint}')
    require(self.num_classes >= 0, f + 'num_classes', f'{self.num_classes} must not be negative')
    require(0 <= self.dropout < 1, f + 'dropout', f'{self.dropout} must be in [0, 1)')
    require(0 < self.score_scale < float('inf'), f + 'score_scale', f'{self.score_scale} must be positive and finite')
    layers = self.keep_layers
    ascending = all(1 <= a < b for a, b in zip(layers, (*layers[1:], 1 << 30)))
    require(ascending, f + 'keep_layers', f'{layers} must be ascending numbers of layers, from 1 on')
    for name in ('ce_weight', 'distil_weight'):
      require(0 <= getattr(self, name) < float('inf'), f + name, f'{getattr(self, name)} must not be negative')
    require(self.ce_weight + self.distil_weight > 0, f + 'ce_weight', 'and distil_weight must not both be 0')
    require(0 < self.temperature < float('inf'), f + 'temperature', f'{self.temperature} must be positive and finite')


@dataclasses.dataclass(frozen=True)
class SpanConfig:
  """Extractive question answering (SQuAD).

  Attributes:
    head: 'independent' start and end logits (BERT), or 'joint' (ELECTRA: ends depend on the start; answerability).
    doc_stride: tokens between the starts of neighbouring windows of a long context.
    max_query_length: questions are cut to so many tokens.
    n_best: candidates kept for each start, end and question.
    max_answer_length: tokens of the longest answer considered.
    null_threshold: SQuAD v2.0: no answer where the null score exceeds the best span's by more than this.
    beam: starts that the joint head tries.
    answerable_weight: weight of the joint head's answerability loss.
  """

  head: str = 'independent'
  doc_stride: int = 128
  max_query_length: int = 64
  n_best: int = 20
  max_answer_length: int = 30
  null_threshold: float = 0.0
  beam: int = 20
  answerable_weight: float = 0.5

  def __post_init__(self) -> None:
    f = 'span.'
    require(self.head in ('independent', 'joint'), f + 'head', f"{self.head!r}; use 'independent' or 'joint'")
    for name in ('doc_stride', 'max_query_length', 'n_best', 'max_answer_length', 'beam'):
      require(getattr(self, name) >= 1, f + name, f'{getattr(self, name)} must be at least 1')
    require(abs(self.null_threshold) < float('inf'), f + 'null_threshold', f'{self.null_threshold} must be finite')
    require(0 <= self.answerable_weight < float('inf'), f + 'answerable_weight', 'must not be negative')
