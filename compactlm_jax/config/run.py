"""Configuration: ConfigDicts at the command line, frozen and validated dataclasses inside.

`to_config_dict` turns a dataclass into the ConfigDict that a file in `configs/` returns, `from_config_dict` turns it
back and validates it once. Nothing below `cli.py` and this file sees a ConfigDict. Lists are comma-separated strings
at the command line and tuples inside.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import typing
from typing import Any, TypeVar

import ml_collections

from compactlm_jax.errors import ConfigError

_C = TypeVar('_C')


def _require(ok: bool, field: str, message: str) -> None:
  if not ok:
    raise ConfigError(f'config.{field}: {message}')


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
    num_groups: groups of the feed-forward matrices (1: ordinary Dense).
    pooler: BERT's tanh pooler on the first token.
    layer_norm_epsilon: added to the variance.
    hidden_dropout: rate on embeddings and on each sub-layer's output.
    attention_dropout: rate on attention probabilities.
    initializer_range: standard deviation of the truncated normal initialiser.
    pad_token_id: id of [PAD]; positions that hold it are not special by themselves, the mask decides.
    dtype: 'float32' or 'bfloat16' for matrix products. Parameters, softmax, LayerNorm and losses stay float32.
    remat: recompute each layer's activations in the backward pass.
    scan_unroll: layers per iteration of the scan; 0 unrolls all of them.
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
  num_groups: int = 1
  pooler: bool = False
  layer_norm_epsilon: float = 1e-12
  hidden_dropout: float = 0.1
  attention_dropout: float = 0.1
  initializer_range: float = 0.02
  pad_token_id: int = 0
  dtype: str = 'float32'
  remat: bool = False
  scan_unroll: int = 0

  def __post_init__(self) -> None:
    f = 'encoder.'
    _require(
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
      _require(getattr(self, name) >= 1, f + name, f'{getattr(self, name)} must be at least 1')
    if not self.head_size:
      _require(
        self.hidden_size % self.num_heads == 0,
        f + 'num_heads',
        f'hidden_size {self.hidden_size} is not divisible by num_heads {self.num_heads}; set head_size',
      )
      object.__setattr__(self, 'head_size', self.hidden_size // self.num_heads)
    if not self.intermediate_size:
      object.__setattr__(self, 'intermediate_size', 4 * self.hidden_size)
    if not self.embedding_size:
      object.__setattr__(self, 'embedding_size', self.hidden_size)
    for name in ('hidden_size', 'intermediate_size'):
      _require(
        getattr(self, name) % self.num_groups == 0,
        f + 'num_groups',
        f'{name} {getattr(self, name)} is not divisible by num_groups {self.num_groups}',
      )
    _require(
      self.conv_kernel_size == 0 or self.conv_kernel_size % 2 == 1,
      f + 'conv_kernel_size',
      f'{self.conv_kernel_size} must be odd, or 0 for no convolution',
    )
    _require(self.dtype in ('float32', 'bfloat16'), f + 'dtype', f"{self.dtype!r}; use 'float32' or 'bfloat16'")
    for name in ('hidden_dropout', 'attention_dropout'):
      _require(0 <= getattr(self, name) < 1, f + name, f'{getattr(self, name)} must be in [0, 1)')

  @classmethod
  def mixed(cls, *, heads: int, head_ratio: int, **fields: Any) -> EncoderConfig:
    """A ConvBERT from its published numbers: `heads` configured heads, reduced by `head_ratio` in each branch.

    The head size is hidden_size / heads in every case; with fewer heads than `head_ratio` one head per branch is left
    (ConvBERT, `modeling.py: attention_layer`).
    """
    per_branch = max(1, heads // head_ratio)
    return cls(
      architecture='convbert',
      num_heads=per_branch,
      head_size=fields['hidden_size'] // heads,
      **{'conv_kernel_size': 9, **fields},
    )


@dataclasses.dataclass(frozen=True)
class DataConfig:
  """What a run reads.

  Attributes:
    path: a dataset written by `compactlm prepare`; '' trains on a small generated corpus.
    eval_path: held-out rows, likewise; '' holds out the last `eval_rows` rows of `path`.
    eval_rows: rows held out of `path` when `eval_path` is ''.
    seq_len: row length (tokens) of generated corpora and tables; prepared data brings its own.
    train: labelled table (.tsv, .jsonl, optionally .gz) for fine-tuning.
    dev: labelled table for evaluation.
    text_columns: one column, or two for pairs.
    label_column: column of class names or integers.
    bad_record_budget: fraction of damaged records that may be replaced by a neighbour; 0 stops at the first.
    tokenizer: tokenizer folder that the data must match; '' takes the one in `path` or in the model.
  """

  path: str = ''
  eval_path: str = ''
  eval_rows: int = 256
  seq_len: int = 128
  train: str = ''
  dev: str = ''
  text_columns: tuple[str, ...] = ('text',)
  label_column: str = 'label'
  bad_record_budget: float = 0.0
  tokenizer: str = ''

  def __post_init__(self) -> None:
    _require(self.seq_len >= 4, 'data.seq_len', f'{self.seq_len} must be at least 4')
    _require(len(self.text_columns) in (1, 2), 'data.text_columns', f'{self.text_columns} must name one or two columns')
    _require(0 <= self.bad_record_budget <= 1e-2, 'data.bad_record_budget', 'must be a fraction between 0 and 0.01')


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
  """AdamW with the options of the originals (papers: ELECTRA 1.5, MiniLM 3.1, movement pruning 4.5).

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
  clip_norm: float = 1.0
  accumulate: int = 1
  max_bad_steps: int = 3

  def __post_init__(self) -> None:
    f = 'optimizer.'
    _require(self.learning_rate >= 0, f + 'learning_rate', 'must not be negative')
    _require(self.decay in ('linear', 'constant'), f + 'decay', f"{self.decay!r}; use 'linear' or 'constant'")
    _require(self.decay_from in ('start', 'warmup'), f + 'decay_from', f"{self.decay_from!r}; use 'start' or 'warmup'")
    _require(self.accumulate >= 1, f + 'accumulate', 'must be at least 1')
    _require(self.max_bad_steps >= 1, f + 'max_bad_steps', 'must be at least 1')
    _require(0 <= self.warmup_fraction < 1, f + 'warmup_fraction', 'must be in [0, 1)')


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
    _require(
      all(s >= 1 or s == -1 for s in sizes) and sizes.count(-1) <= 1,
      'mesh',
      f'{sizes} must be positive, with at most one -1',
    )


@dataclasses.dataclass(frozen=True)
class DistillConfig:
  """MiniLM v1 and v2 (papers: 3.1, 3.2) and the ablations of the paper.

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
    _require(
      len(self.relations) > 0 and set(self.relations) <= {'qk', 'vv', 'qq', 'kk'},
      f + 'relations',
      f'{self.relations} must be some of qk, vv, qq, kk',
    )
    _require(len(set(self.relations)) == len(self.relations), f + 'relations', f'{self.relations} repeats a relation')
    _require(self.relation_heads >= 0, f + 'relation_heads', 'must not be negative')
    _require(self.teacher_layer >= 0, f + 'teacher_layer', 'is 1-based; 0 means the last layer')
    for name, allowed in (
      ('layers', ('last', 'uniform')),
      ('value_loss', ('relation', 'mse')),
      ('normalize', ('tokens', 'examples', 'padded')),
      ('student_init', ('random', 'teacher_layers')),
      ('teacher_dtype', ('', 'float32', 'bfloat16')),
    ):
      _require(getattr(self, name) in allowed, f + name, f'{getattr(self, name)!r}; use one of {allowed}')


@dataclasses.dataclass(frozen=True)
class FinetuneConfig:
  """A classification head on the first token.

  Attributes:
    num_classes: 0 counts the labels of the training table.
    dropout: rate before the head.
    pooled: read BERT's pooler instead of the raw first token.
  """

  num_classes: int = 0
  dropout: float = 0.1
  pooled: bool = False


@dataclasses.dataclass(frozen=True)
class RunConfig:
  """One job of `compactlm train`.

  Attributes:
    task: 'distill' or 'finetune'.
    seed: the only source of randomness, together with the step.
    steps: optimiser steps; 0 means `epochs` passes over the training rows.
    epochs: see `steps`.
    batch_size: rows per step over all devices and hosts.
    checkpoint_every: steps between saves; the last step is always saved.
    keep: complete checkpoints kept.
    log_every: steps between lines in metrics.jsonl.
    eval_every: steps between evaluations; 0 evaluates at the end only.
    model: folder or run whose weights start the trained model; '' starts from `encoder` at random.
    teacher: folder or run of the frozen teacher.
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

  def __post_init__(self) -> None:
    _require(self.task in ('distill', 'finetune'), 'task', f"{self.task!r} is unknown; use 'distill' or 'finetune'")
    _require(
      self.steps >= 0 and self.epochs >= 0 and (self.steps > 0 or self.epochs > 0),
      'steps',
      'set steps or epochs to a positive number',
    )
    for name in ('batch_size', 'checkpoint_every', 'log_every', 'keep'):
      _require(getattr(self, name) >= 1, name, f'{getattr(self, name)} must be at least 1')
    _require(
      self.batch_size % self.optimizer.accumulate == 0,
      'optimizer.accumulate',
      f'batch_size {self.batch_size} is not divisible by accumulate {self.optimizer.accumulate}',
    )


def to_config_dict(config: Any) -> ml_collections.ConfigDict:
  """The ConfigDict of a dataclass: nested, with tuples as comma-separated strings."""
  out = ml_collections.ConfigDict()
  for field in dataclasses.fields(config):
    value = getattr(config, field.name)
    if dataclasses.is_dataclass(value):
      value = to_config_dict(value)
    elif isinstance(value, tuple):
      value = ','.join(str(v) for v in value)
    out[field.name] = value
  return out.lock()


def _coerce(kind: Any, value: Any, path: str) -> Any:
  origin = typing.get_origin(kind)
  if dataclasses.is_dataclass(kind):
    return from_config_dict(typing.cast(type, kind), value, path + '.')
  if origin is tuple:
    (item, *_) = typing.get_args(kind)
    parts = [p.strip() for p in value.split(',') if p.strip()] if isinstance(value, str) else list(value)
    try:
      return tuple(item(p) for p in parts)
    except ValueError as e:
      raise ConfigError(f'config.{path}: {value!r} is not a comma-separated list of {item.__name__}') from e
  if kind is float and isinstance(value, int) and not isinstance(value, bool):
    return float(value)
  if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
    raise ConfigError(f'config.{path}: {value!r} must be of type {kind.__name__}')
  return value


def from_config_dict(cls: type[_C], config: Any, prefix: str = '') -> _C:
  """The frozen dataclass `cls` of a ConfigDict, a dict or JSON.

  Raises:
    ConfigError: an unknown field, a wrong type or an invalid value, named by its full path.
  """
  if not isinstance(config, (dict, ml_collections.ConfigDict)):
    raise ConfigError(f'config.{prefix.rstrip(".")}: expected a section, got {config!r}')
  kinds = typing.get_type_hints(cls)
  unknown = sorted(set(config.keys()) - set(kinds))
  if unknown:
    raise ConfigError(f'config.{prefix}{unknown[0]}: unknown field; known fields are {", ".join(sorted(kinds))}')
  return cls(**{name: _coerce(kinds[name], config[name], prefix + name) for name in config.keys()})


def to_json(config: Any) -> dict[str, Any]:
  """A dataclass as plain JSON values."""
  return to_config_dict(config).to_dict()


def config_hash(config: Any) -> str:
  """SHA-256 over the canonical JSON of a dataclass, 16 hex digits."""
  return hashlib.sha256(json.dumps(to_json(config), sort_keys=True).encode()).hexdigest()[:16]
