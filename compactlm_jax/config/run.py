"""What a run is: data, optimiser, mesh and the options of each task."""

from __future__ import annotations

import dataclasses
import re

from compactlm_jax.config.adapt import AdaptConfig
from compactlm_jax.config.check import one_of, require
from compactlm_jax.config.encoder import EncoderConfig
from compactlm_jax.config.finetune import FinetuneConfig, SpanConfig
from compactlm_jax.config.pretrain import ElectraConfig, MaskConfig
from compactlm_jax.config.prune import PruneConfig

TASKS = ('electra', 'mlm', 'lm', 'distill', 'finetune', 'prune', 'adapt')
LABELLED = ('finetune', 'prune', 'adapt')
"""Tasks on the labelled rows that `finetune` describes ('adapt' if that is its base, see `RunConfig.labelled`)."""


@dataclasses.dataclass(frozen=True)
class DataConfig:
  """What a run reads.

  Attributes:
    path: a dataset written by `compactlm prepare`, or where a benchmark lies (folder in its official layout, tfds:NAME,
      hf:NAME[:CONFIG]); '' trains on a small generated corpus.
    eval_path: held-out rows, likewise; '' holds out the last `eval_rows` rows of `path`.
    eval_rows: rows held out of `path` when `eval_path` is ''.
    seq_len: row length (tokens) of generated corpora and tables; prepared data brings its own.
    train: labelled table (.tsv, .jsonl, optionally .gz) for fine-tuning.
    dev: labelled table for evaluation.
    train_rows: train on so many rows of a table or benchmark, the same ones for every seed; 0 takes all.
    text_columns: one column, or two for pairs.
    label_column: column of class names or integers.
    score_column: column of numbers to predict instead of classes.
    buckets: row lengths, ascending; a batch of tables is cut to the shortest that holds its longest row, and each
      length is compiled once. () pads every row to `seq_len`, as the originals do on TPUs.
    group_by_length: let rows of similar length share batches; with `buckets` less is padded. Still a pure function of
      (seed, step), and every row comes once per epoch.
    bad_record_budget: fraction of damaged records that may be replaced by a neighbour; 0 stops at the first.
    tokenizer: tokenizer folder that the data must match; '' takes the one in `path` or in the model.
  """

  path: str = ''
  eval_path: str = ''
  eval_rows: int = 256
  seq_len: int = 128
  train: str = ''
  dev: str = ''
  train_rows: int = 0
  text_columns: tuple[str, ...] = ('text',)
  label_column: str = 'label'
  score_column: str = ''
  buckets: tuple[int, ...] = ()
  group_by_length: bool = False
  bad_record_budget: float = 0.0
  tokenizer: str = ''

  def __post_init__(self) -> None:
    require(self.seq_len >= 4, 'data.seq_len', f'{self.seq_len} must be at least 4')
    require(self.train_rows >= 0, 'data.train_rows', f'{self.train_rows} must not be negative; 0 takes all')
    require(self.eval_rows >= 0, 'data.eval_rows', f'{self.eval_rows} must not be negative')
    require(len(self.text_columns) in (1, 2), 'data.text_columns', f'{self.text_columns} must name one or two columns')
    sizes = self.buckets
    ascending = all(4 <= a < b for a, b in zip(sizes, (*sizes[1:], 1 << 30)))
    require(ascending, 'data.buckets', f'{sizes} must be ascending lengths of at least 4 tokens')
    require(0 <= self.bad_record_budget <= 1e-2, 'data.bad_record_budget', 'must be a fraction between 0 and 0.01')


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
  """AdamW with the options of the originals (ELECTRA, MiniLM, movement pruning).

  Attributes:
    learning_rate: peak of the schedule.
    warmup_steps: linear warm-up; if 0, `warmup_fraction` of all steps.
    warmup_fraction: see `warmup_steps`.
    decay: 'linear' to zero at the last step, or 'constant'.
    decay_from: 'start' multiplies warm-up by a decay that begins at step 0 (ELECTRA); 'warmup' decays after it.
    beta1, beta2, epsilon: Adam's constants.
    bias_correction: False as in BERT, ELECTRA and ConvBERT.
    weight_decay: decoupled; not on names that match `no_decay`.
    no_decay: regex over parameter names.
    layer_decay: learning rates fall by this factor per layer from the head down; 1 for none.
    layer_decay_rule: 'published' leaves the top layer at layer_decay^2 (ELECTRA and ConvBERT; embeddings at
      layer_decay^(L + 2)), 'corrected' at layer_decay.
    clip_norm: global gradient norm; 0 for none.
    accumulate: micro-batches per step.
    max_bad_steps: consecutive non-finite updates after which the run stops with exit code 70.
  """

  learning_rate: float = 5e-4
  warmup_steps: int = 0
  warmup_fraction: float = 0.0
  decay: str = 'linear'
  decay_from: str = 'warmup'
  beta1: float = 0.9
  beta2: float = 0.999
  epsilon: float = 1e-6
  bias_correction: bool = True
  weight_decay: float = 0.01
  no_decay: str = r'(.*/)?(bias|scale|output_bias)'
  layer_decay: float = 1.0
  layer_decay_rule: str = 'published'
  clip_norm: float = 1.0
  accumulate: int = 1
  max_bad_steps: int = 3

  def __post_init__(self) -> None:
    f = 'optimizer.'
    # Within these bounds finite gradients give finite updates: the step need not look at updates again.
    require(0 <= self.learning_rate <= 10, f + 'learning_rate', f'{self.learning_rate} must be in [0, 10]')
    for name in ('beta1', 'beta2'):
      require(0 <= getattr(self, name) <= 0.99999, f + name, f'{getattr(self, name)} must be in [0, 0.99999]')
    require(1e-12 <= self.epsilon < float('inf'), f + 'epsilon', f'{self.epsilon} must be at least 1e-12')
    require(0 <= self.weight_decay <= 1, f + 'weight_decay', f'{self.weight_decay} must be in [0, 1]')
    require(0 <= self.clip_norm < float('inf'), f + 'clip_norm', f'{self.clip_norm} must be finite; 0 does not clip')
    require(self.warmup_steps >= 0, f + 'warmup_steps', f'{self.warmup_steps} must not be negative')
    try:
      re.compile(self.no_decay)
    except re.error as e:
      require(False, f + 'no_decay', f'{self.no_decay!r} is not a regular expression ({e})')
    require(self.decay in ('linear', 'constant'), f + 'decay', f"{self.decay!r}; use 'linear' or 'constant'")
    require(self.decay_from in ('start', 'warmup'), f + 'decay_from', f"{self.decay_from!r}; use 'start' or 'warmup'")
    require(0 < self.layer_decay <= 1, f + 'layer_decay', f'{self.layer_decay} must be in (0, 1]')
    one_of(f + 'layer_decay_rule', self.layer_decay_rule, ('published', 'corrected'))
    require(self.accumulate >= 1, f + 'accumulate', 'must be at least 1')
    require(self.max_bad_steps >= 1, f + 'max_bad_steps', 'must be at least 1')
    require(0 <= self.warmup_fraction < 1, f + 'warmup_fraction', 'must be in [0, 1)')

  def warmup(self, total_steps: int) -> int:
    """Warm-up steps of a run of so many optimiser steps."""
    return self.warmup_steps or int(self.warmup_fraction * total_steps)


@dataclasses.dataclass(frozen=True)
class MeshConfig:
  """Devices along each mesh axis; -1 (once) takes what is left.

  Attributes:
    data: batch rows, parameters replicated.
    fsdp: batch rows, parameters sharded.
    model: hidden dimensions of the parameters.
  """

  data: int = -1
  fsdp: int = 1
  model: int = 1

  def __post_init__(self) -> None:
    sizes = (self.data, self.fsdp, self.model)
    require(
      all(s >= 1 or s == -1 for s in sizes) and sizes.count(-1) <= 1,
      'mesh',
      f'{sizes} must be positive, with at most one -1',
    )


@dataclasses.dataclass(frozen=True)
class DistillConfig:
  """MiniLM v1 and v2 (Wang et al. 2020, 2021) and the ablations of the paper.

  Attributes:
    relations: any of 'qk' (self-attention), 'vv', 'qq', 'kk'. v1: qk,vv. v2: qq,kk,vv.
    relation_heads: 0 compares attention heads one to one (v1; needs equal head counts); A > 0 concatenates the heads
      and splits them again into A relation heads (v2).
    teacher_layer: 1-based layer whose relations are taught; 0 means the last.
    layers: 'last' teaches the student's last layer; 'uniform' teaches every layer i from teacher layer i * L / M.
    value_loss: 'relation', or 'mse' between the value vectors themselves (ablation; needs equal widths).
    normalize: 'tokens' divides by heads * valid rows of the batch; 'examples' by heads * valid rows of each example,
      then averages examples; 'padded' by heads * padded length * examples and counts pad rows (a public port's way).
    student_init: 'random' as published, or 'teacher_layers'.
    init_layers: 1-based teacher layers to start from; empty spreads them evenly.
    teacher_dtype: dtype of the teacher's matrix products; '' takes the student's.
  """

  relations: tuple[str, ...] = ('qk', 'vv')
  relation_heads: int = 0
  teacher_layer: int = 0
  layers: str = 'last'
  value_loss: str = 'relation'
  normalize: str = 'tokens'
  student_init: str = 'random'
  init_layers: tuple[int, ...] = ()
  teacher_dtype: str = ''

  def __post_init__(self) -> None:
    f = 'distill.'
    require(
      len(self.relations) > 0 and set(self.relations) <= {'qk', 'vv', 'qq', 'kk'},
      f + 'relations',
      f'{self.relations} must be some of qk, vv, qq, kk',
    )
    require(len(set(self.relations)) == len(self.relations), f + 'relations', f'{self.relations} repeats a relation')
    require(self.relation_heads >= 0, f + 'relation_heads', 'must not be negative')
    require(self.teacher_layer >= 0, f + 'teacher_layer', 'is 1-based; 0 means the last layer')
    for name, allowed in (
      ('layers', ('last', 'uniform')),
      ('value_loss', ('relation', 'mse')),
      ('normalize', ('tokens', 'examples', 'padded')),
      ('student_init', ('random', 'teacher_layers')),
      ('teacher_dtype', ('', 'float32', 'bfloat16')),
    ):
      one_of(f + name, getattr(self, name), allowed)


@dataclasses.dataclass(frozen=True)
class RunConfig:
  """One job of `compactlm train`.

  Attributes:
    task: 'electra', 'mlm', 'lm', 'distill', 'finetune', 'prune' (fine-tuning that prunes) or 'adapt' (adaptive width
      and depth).
    seed: the only source of randomness, together with the step.
    steps: optimiser steps; 0 means `epochs` passes over the training rows.
    epochs: see `steps`.
    batch_size: rows per step over all devices and hosts.
    checkpoint_every: steps between saves; the last step is always saved.
    keep: complete checkpoints kept.
    log_every: steps between lines in metrics.jsonl.
    eval_every: steps between evaluations; 0 evaluates at the end only.
    model: folder or run whose weights start the trained model; '' starts from `encoder` at random.
    teacher: folder or run of the frozen teacher; for labelled tasks one that was fine-tuned for the same task.
    encoder: sizes of the trained model where `model` is ''.
  """

  task: str
  seed: int = 0
  steps: int = 0
  epochs: float = 0.0
  batch_size: int = 32
  checkpoint_every: int = 1000
  keep: int = 3
  log_every: int = 10
  eval_every: int = 0
  model: str = ''
  teacher: str = ''
  encoder: EncoderConfig = EncoderConfig()
  data: DataConfig = DataConfig()
  optimizer: OptimizerConfig = OptimizerConfig()
  mesh: MeshConfig = MeshConfig()
  distill: DistillConfig = DistillConfig()
  finetune: FinetuneConfig = FinetuneConfig()
  span: SpanConfig = SpanConfig()
  prune: PruneConfig = PruneConfig()
  adapt: AdaptConfig = AdaptConfig()
  mask: MaskConfig = MaskConfig()
  electra: ElectraConfig = ElectraConfig()

  def __post_init__(self) -> None:
    one_of('task', self.task, TASKS)
    require(
      self.steps >= 0 and self.epochs >= 0 and (self.steps > 0 or self.epochs > 0),
      'steps',
      'set steps or epochs to a positive number',
    )
    require(self.steps < 2**31, 'steps', f'{self.steps} must be less than 2^31')  # counted in int32
    require(self.epochs <= 1e6, 'epochs', f'{self.epochs} must be at most a million')
    for name in ('batch_size', 'checkpoint_every', 'log_every', 'keep'):
      require(getattr(self, name) >= 1, name, f'{getattr(self, name)} must be at least 1')
    require(self.eval_every >= 0, 'eval_every', f'{self.eval_every} must not be negative; 0 evaluates at the end only')
    require(0 <= self.seed < 2**31, 'seed', f'{self.seed} must be in [0, 2^31)')
    require(
      self.batch_size % self.optimizer.accumulate == 0,
      'optimizer.accumulate',
      f'batch_size {self.batch_size} is not divisible by accumulate {self.optimizer.accumulate}',
    )

  @property
  def labelled(self) -> bool:
    """Whether the run reads the labelled rows that `finetune` describes."""
    return self.task in LABELLED and (self.task != 'adapt' or self.adapt.base == 'finetune')
