"""DynaBERT: fine-tuned sub-networks of one encoder, by distillation and then on labels (Hou et al. 2020).

Three stages, each a task. 'width': every width at full depth learns from the fine-tuned model. 'depth': every cell
learns from the network that the stage before made. 'final': every cell learns from labels. One update follows the
gradients of all cells of a step.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from compactlm_jax.compress.subnet import kept_layers, subnet, subnet_config
from compactlm_jax.config import AdaptConfig, Cell, DistillConfig, EncoderConfig, FinetuneConfig, cells, to_json
from compactlm_jax.config.adapt import STAGES
from compactlm_jax.errors import ConfigError
from compactlm_jax.losses.adapt import hidden_mse, soft_cross_entropy
from compactlm_jax.losses.reduce import masked_mean, masked_sum
from compactlm_jax.nn.encoder import encode
from compactlm_jax.tasks.distill import check_distill, compare, layer_pairs
from compactlm_jax.tasks.elastic import CellLoss, over_cells, rows_of, with_rows
from compactlm_jax.tasks.finetune import SentenceModel, check_head
from compactlm_jax.types import QKV, Batch, EncoderOutput, Metrics, Params, Task, struct


def make_adapt_task(
  encoder: EncoderConfig,
  classes: tuple[str, ...],
  finetune: FinetuneConfig,
  adapt: AdaptConfig,
  stage: str,
  *,
  start: Params,
  teacher: tuple[Params, EncoderConfig] | None,
  distill: DistillConfig,
  term_weight: float | None = None,
) -> Task:
  """A task that trains the sub-networks of a fine-tuned encoder, in one of DynaBERT's stages.

  Metrics are means over the cells of a step (`tasks.elastic.over_cells`): 'distil_loss' (outputs) and 'hidden_loss' or
  'relation_loss' where a teacher teaches, 'task_loss' where labels do, 'accuracy' where there are classes and labels.

  Outputs of evaluation are those of `make_finetune_task`, of the full network; 'outputs@NAME' [B, C] are those of each
  cell of the stage (`Cell.name`).

  Args:
    encoder: the full network.
    classes: class names; () for a regression.
    finetune: head, dropout, scale of scores.
    adapt: sub-networks and losses.
    stage: 'width', 'depth' or 'final'.
    start: fine-tuned 'encoder' and 'classifier' (whose scores are in units of the labels), rewired if they are to be.
    teacher: (parameters with 'encoder' and 'classifier', configuration) where the stage is taught; not used elsewhere.
    distill: of the term 'relations'.
    term_weight: of the hidden states or relations; None takes that of `adapt` for the stage.

  Raises:
    ConfigError: cells that cannot be cut, a model or teacher without a fitting head, or a teacher whose hidden states
      or relations cannot be compared.
  """
  if stage not in STAGES:
    raise ConfigError(f'config.adapt.stages: {stage!r}; use one of {", ".join(STAGES)}')
  model = SentenceModel(encoder, classes, finetune)
  _check_start(start, model)
  weight = adapt.hidden_weight if stage == 'width' else adapt.depth_hidden_weight
  taught = stage == 'depth' or (stage == 'width' and adapt.width_loss == 'distil')
  frozen, teaches = _teacher(teacher, model, stage) if taught else (None, None)
  run = _Stage(model, adapt, stage, distill, weight if term_weight is None else term_weight, teaches)
  run.check()
  return Task(
    name='adapt',
    init=lambda key: _fitted(start, model),
    loss=over_cells(
      {cell: run.cell_loss(cell) for cell in run.cells},
      adapt,
      read=lambda params, batch, shared: with_rows(params, encoder, batch.input_ids),
      share=run.share if taught else None,
    ),
    evaluate=run.evaluate,
    frozen=frozen,
    model=run.description,
  )


def terms(task: Task, params: Params, batches: Iterable[Batch]) -> tuple[float, float]:
  """Means over batches and cells of (the loss of outputs, that of hidden states or relations), without their weights.

  With `adapt.balance` 'auto', a weight divided by the second over the first makes both terms of one scale.

  Args:
    task: of `make_adapt_task`, in a stage with a teacher.
    params: its parameters.
    batches: rows to measure on, in batches of equal size.

  Raises:
    ConfigError: a task without a teacher, or without one of the terms.
  """
  names = ('distil_loss', 'relation_loss' if task.model['adapt']['term'] == 'relations' else 'hidden_loss')

  @jax.jit
  def measure(params: Params, frozen: Any, batch: Batch, index: jax.Array) -> Metrics:
    metrics = task.loss(params, frozen, batch, jax.random.fold_in(jax.random.key(0), index), index)[1]
    return {name: metrics[name] for name in names if name in metrics}

  found = [measure(params, task.frozen, batch, jnp.int32(i)) for i, batch in enumerate(batches if task.frozen else ())]
  if not found or set(found[0]) != set(names):
    raise ConfigError(
      "config.adapt.balance: 'auto' compares the losses of outputs and of hidden states or relations, and this stage "
      "does not have both; use 'given'"
    )
  outputs, other = (float(np.mean([float(metrics[name]) for metrics in found])) for name in names)
  return outputs, other


@struct
class _Taught:
  """What a teacher said about a batch.

  Attributes:
    outputs_BC: of its head, in units of the labels.
    hidden_NBTD: all of its hidden states, if they are compared.
    qkv: of the layers that teach, by their number.
  """

  outputs_BC: jax.Array
  hidden_NBTD: jax.Array | None
  qkv: dict[int, QKV]


@dataclasses.dataclass(frozen=True)
class _Stage:
  """One stage: its cells, their losses, and what they share. `teacher` is None where labels teach."""

  model: SentenceModel
  adapt: AdaptConfig
  stage: str
  distill: DistillConfig
  term_weight: float
  teacher: EncoderConfig | None

  @property
  def cells(self) -> tuple[Cell, ...]:
    return cells(self.adapt, self.model.encoder, full_depth=self.stage == 'width')

  @property
  def description(self) -> dict[str, Any]:
    """See `types.Task.model`."""
    return {
      'encoder': to_json(self.model.encoder),
      'classes': list(self.model.classes),
      'finetune': dataclasses.asdict(self.model.config),
      'adapt': to_json(self.adapt),
      'stage': self.stage,
      'cells': [cell.name for cell in self.cells],
    }

  @property
  def teachers(self) -> tuple[Cell, ...]:
    """The sub-networks of the teacher whose forward pass all cells of a step share.

    Of a sandwich these are the teachers of the cells that every step has.
    """
    certain = self.cells if self.adapt.sampling == 'all' else (self.cells[0], self.cells[-1])
    return tuple(dict.fromkeys(self.teacher_of(cell) for cell in certain))

  def teacher_of(self, cell: Cell) -> Cell:
    """The sub-network of the teacher that a cell learns from: the teacher, or its full depth at the cell's width."""
    same = self.stage == 'depth' and self.adapt.depth_teacher == 'same_width'
    return Cell(cell.width, 1.0, cell.hidden) if same else Cell()

  def check(self) -> None:
    """Raises ConfigError for cells that cannot be cut or that their teacher cannot teach."""
    for cell in self.cells:
      own = subnet_config(self.model.encoder, cell)
      if self.teacher is None:
        continue
      theirs = subnet_config(self.teacher, self.teacher_of(cell)) if self.teacher_of(cell) != Cell() else self.teacher
      if self.adapt.term == 'relations':
        check_distill(own, theirs, self.distill)
        continue
      if theirs.num_layers != self.model.encoder.num_layers:
        raise ConfigError(
          f'config.teacher: it has {theirs.num_layers} layers and the network {self.model.encoder.num_layers}; hidden '
          "states are compared layer by layer: take a teacher as deep, or set adapt.term to 'relations'"
        )
      if theirs.hidden_size != own.hidden_size:
        raise ConfigError(
          f'config.teacher: its hidden states have {theirs.hidden_size} channels and those of the sub-network '
          f"{cell.name} {own.hidden_size}; take a teacher of the same size, or set adapt.term to 'relations'"
        )

  def share(
    self, params: Params, frozen: Any, batch: Batch, key: jax.Array, step: jax.Array
  ) -> tuple[jax.Array, Metrics, dict[str, _Taught]]:
    """See `elastic.Share`: the teachers' forward passes, by the names of their cells."""
    return jnp.float32(0.0), {}, {cell.name: self.teach(frozen, cell, batch) for cell in self.teachers}

  def teach(self, frozen: Params, cell: Cell, batch: Batch) -> _Taught:
    """A sub-network of the teacher on a batch: without dropout, in its dtype."""
    assert self.teacher is not None
    frozen, whole = jax.lax.stop_gradient(frozen), self.teacher
    if cell != Cell():
      frozen, whole = subnet(frozen, whole, cell), subnet_config(whole, cell)
    whole = dataclasses.replace(whole, dtype=self.distill.teacher_dtype or self.model.encoder.dtype, remat=False)
    relations = self.adapt.term == 'relations'
    pairs = [self.pairs(subnet_config(self.model.encoder, each)) for each in self.cells] if relations else []
    layers = tuple(sorted({layer for taught, _ in pairs for layer in taught}))
    rows = (batch.input_ids, batch.attention_mask, batch.token_type_ids)
    out = encode(frozen, whole, *rows, all_hidden=not relations, qkv_layers=layers)
    # A finished model's head reads the pooler if there is one.
    own = SentenceModel(whole, self.model.classes, dataclasses.replace(self.model.config, pooled=whole.pooler))
    return _Taught(own.read(frozen, out, None), out.hidden_NBTD, dict(zip(layers, out.qkv)))

  def pairs(self, own: EncoderConfig) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """(layers of the teacher, layers of the sub-network) whose relations are compared."""
    return layer_pairs(own, self.teacher, self.distill) if self.teacher is not None else ((), ())

  def network(self, cell: Cell) -> SentenceModel:
    """The sub-network with its head."""
    return dataclasses.replace(self.model, encoder=subnet_config(self.model.encoder, cell))

  def evaluate(self, params: Params, frozen: Any, batch: Batch) -> dict[str, Any]:
    """See `types.EvaluateFn`."""
    model, rows = self.model, {}
    for cell in self.cells:
      outputs_BC = self.network(cell).outputs(subnet(params, model.encoder, cell), batch, None)
      rows[f'outputs@{cell.name}'] = model.scale * outputs_BC
    rows['outputs'] = rows[f'outputs@{self.cells[0].name}']
    if batch.labels is None:
      return rows
    losses_B = model.losses(rows['outputs'] / model.scale, batch)
    return {'loss': masked_sum(losses_B, batch.weights), **rows, 'labels': batch.labels}

  def cell_loss(self, cell: Cell) -> CellLoss:
    """See `elastic.CellLoss`."""
    own = self.network(cell)
    hidden = self.teacher is not None and self.adapt.term == 'hidden'
    learning = self.pairs(own.encoder)[1] if self.teacher is not None and not hidden else ()

    def loss(
      read: Params, shared: Mapping[str, _Taught], frozen: Any, batch: Batch, key: jax.Array, step: jax.Array
    ) -> tuple[jax.Array, Metrics]:
      sub = subnet(read, self.model.encoder, cell)
      word_BTE = rows_of(sub, batch.input_ids)
      rows = (batch.input_ids, batch.attention_mask, batch.token_type_ids)
      keys = jax.random.split(key)
      options: dict[str, Any] = {'all_hidden': hidden, 'qkv_layers': learning, 'word_BTE': word_BTE}
      out = encode(sub, own.encoder, *rows, dropout_key=keys[0], **options)
      outputs_BC = own.read(sub, out, keys[1])
      weights_B = jnp.ones(outputs_BC.shape[:1]) if batch.weights is None else batch.weights
      metrics = {'weight': weights_B.sum()}
      if own.classes and batch.labels is not None:
        hits_B = jnp.equal(outputs_BC.argmax(-1), jnp.asarray(batch.labels)).astype(jnp.float32)
        metrics['accuracy'] = masked_mean(hits_B, weights_B)
      if self.teacher is None:
        value = masked_mean(own.losses(outputs_BC, batch), weights_B)
        return value, {**metrics, 'task_loss': value}
      teacher = self.teacher_of(cell)
      taught = shared[teacher.name] if teacher.name in shared else self.teach(frozen, teacher, batch)
      value, found = self.distillation(cell, own, taught, outputs_BC, out, batch, weights_B)
      return value, {**metrics, **found}

    return loss

  def distillation(
    self,
    cell: Cell,
    own: SentenceModel,
    taught: _Taught,
    outputs_BC: jax.Array,
    out: EncoderOutput,
    batch: Batch,
    weights_B: jax.Array,
  ) -> tuple[jax.Array, Metrics]:
    """(weighted sum of the terms, each of them without its weight)."""
    metrics = {}
    if own.classes:
      metrics['distil_loss'] = masked_mean(soft_cross_entropy(taught.outputs_BC, outputs_BC), weights_B)
    elif self.adapt.score_logits == 'mse':
      metrics['distil_loss'] = masked_mean(own.distillation(outputs_BC, taught.outputs_BC), weights_B)
    value = self.adapt.logit_weight * metrics['distil_loss'] if metrics else jnp.float32(0.0)
    if out.hidden_NBTD is not None and taught.hidden_NBTD is not None:
      depth = self.model.encoder.num_layers
      states = np.array([*kept_layers(depth, cell.depth), depth])  # inputs of the kept layers, and the last output
      target_NBTD = taught.hidden_NBTD if cell.depth == 1 else taught.hidden_NBTD[states]
      mask_BT = batch.attention_mask if self.adapt.hidden_tokens == 'real' else None
      term = masked_mean(hidden_mse(target_NBTD, out.hidden_NBTD, mask_BT), weights_B)
      metrics['hidden_loss'] = term
    else:
      layers = [taught.qkv[layer] for layer in self.pairs(own.encoder)[0]]
      parts, counts_B = compare(layers, out.qkv, batch, self.distill)
      term = jnp.stack([masked_mean(part_B, counts_B) for part_B in parts.values()]).sum()
      metrics['relation_loss'] = term
    return value + self.term_weight * term, metrics


def _teacher(
  teacher: tuple[Params, EncoderConfig] | None, model: SentenceModel, stage: str
) -> tuple[Params, EncoderConfig]:
  """(frozen weights, configuration) of a teacher with a fitting head."""
  if teacher is None:
    raise ConfigError(f'config.teacher: the stage {stage!r} learns from a fine-tuned model; name one')
  check_head(teacher[0], model.width, 'config.teacher')
  return {name: teacher[0][name] for name in ('encoder', 'classifier')}, teacher[1]


def _check_start(start: Params, model: SentenceModel) -> None:
  """Raises ConfigError unless `start` is what the sentence model can go on from."""
  if model.config.keep_layers:
    raise ConfigError('config.finetune.keep_layers: depth is chosen from the sub-networks; leave it empty')
  if model.encoder.pooler and not model.config.pooled:
    raise ConfigError('config.finetune.pooled: the classifier of the fine-tuned model reads the pooler; set it to True')
  check_head(start, model.width, 'config.model')


def _fitted(start: Params, model: SentenceModel) -> Params:
  """The parameters that training starts from: scores in its units."""
  head = jax.tree.map(lambda leaf: jnp.asarray(leaf) / model.scale, start['classifier'])
  return {'encoder': jax.tree.map(jnp.asarray, start['encoder']), 'classifier': head}
