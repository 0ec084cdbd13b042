"""Elastic pre-training: sub-networks of one encoder learn from unlabelled text together (DynaBERT, Hou et al. 2020).

Each objective is the one that a single network has. A step draws hidden tokens and dropout for each cell anew, but
replaced tokens are drawn once: the generator is one, and the cells are discriminators of what it wrote.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from compactlm_jax.compress.subnet import subnet, subnet_config
from compactlm_jax.config import (
  AdaptConfig,
  Cell,
  DistillConfig,
  ElectraConfig,
  EncoderConfig,
  MaskConfig,
  cells,
  to_json,
)
from compactlm_jax.losses.reduce import masked_mean, masked_sum
from compactlm_jax.nn.encoder import encode
from compactlm_jax.tasks.distill import check_distill, compare, layer_pairs, make_distill_task
from compactlm_jax.tasks.elastic import CellLoss, over_cells, rows_of, with_rows
from compactlm_jax.tasks.electra import (
  Corrupted,
  corrupt,
  discriminator_measures,
  generator_measures,
  judge,
  make_electra_task,
)
from compactlm_jax.tasks.mlm import evaluation_key, make_mlm_task
from compactlm_jax.types import QKV, Batch, LossFn, Metrics, Params, SpecialTokens, Task

Sums = dict[str, tuple[jax.Array, jax.Array]]


def make_elastic_mlm_task(
  encoder: EncoderConfig, mask: MaskConfig, special: SpecialTokens, adapt: AdaptConfig, start: Params | None = None
) -> Task:
  """A masked language model whose every sub-network is one (`make_mlm_task`).

  Evaluation gives the metrics of the full network, and those of each cell as 'loss@NAME' and so on.

  Args:
    encoder: the full network.
    mask: which tokens are hidden.
    special: ids of the special tokens.
    adapt: sub-networks; `combine` 'mean' keeps the scale of one network's loss.
    start: see `make_mlm_task`.

  Raises:
    ConfigError: see `make_mlm_task`, and cells that cannot be cut.
  """
  base = make_mlm_task(encoder, mask, special, start)
  own = {cell: make_mlm_task(subnet_config(encoder, cell), mask, special) for cell in cells(adapt, encoder)}

  def cell_loss(cell: Cell) -> CellLoss:
    def loss(
      read: Params, shared: Any, frozen: Any, batch: Batch, key: jax.Array, step: jax.Array
    ) -> tuple[jax.Array, Metrics]:
      return own[cell].loss(subnet(read, encoder, cell), frozen, batch, key, step)

    return loss

  def evaluate(params: Params, frozen: Any, batch: Batch) -> Sums:
    found: Sums = {}
    for cell, task in own.items():
      sums = task.evaluate(subnet(params, encoder, cell), frozen, batch)
      found |= {f'{name}@{cell.name}': pair for name, pair in sums.items() if isinstance(pair, tuple)}
    full = f'@{next(iter(own)).name}'
    return {**{name.removesuffix(full): pair for name, pair in found.items() if name.endswith(full)}, **found}

  loss = over_cells({cell: cell_loss(cell) for cell in own}, adapt)
  return _elastic(base, adapt, own, loss, evaluate=evaluate)


def make_elastic_electra_task(
  encoder: EncoderConfig,
  config: ElectraConfig,
  mask: MaskConfig,
  special: SpecialTokens,
  adapt: AdaptConfig,
  start: Params | None = None,
) -> Task:
  """Replaced-token detection whose discriminator is adaptive (`make_electra_task`).

  The generator, which belongs to the full network, runs and learns once per step; all cells read what it wrote.
  Evaluation gives the metrics of the full network, and 'rtd_loss@NAME', 'rtd_accuracy@NAME' and 'loss@NAME' of cells.

  Args:
    encoder: the full discriminator.
    config: generator, weights, sharing.
    mask: which tokens are hidden.
    special: ids of the special tokens.
    adapt: sub-networks; `combine` 'mean' keeps the balance of both losses.
    start: see `make_electra_task`.

  Raises:
    ConfigError: see `make_electra_task`, and cells that cannot be cut.
  """
  base = make_electra_task(encoder, config, mask, special, start)
  own = {cell: subnet_config(encoder, cell) for cell in cells(adapt, encoder)}
  towers = _Discriminators(encoder, config, mask, special, own, base)
  loss = over_cells({cell: towers.cell_loss(cell) for cell in own}, adapt, read=towers.read, share=towers.share)
  return _elastic(base, adapt, own, loss, evaluate=towers.evaluate, summarize=towers.summarize)


def make_elastic_distill_task(
  student: EncoderConfig,
  teacher: EncoderConfig,
  teacher_params: Params,
  config: DistillConfig,
  adapt: AdaptConfig,
  *,
  start: Params | None = None,
  student_tokenizer: str = '',
  teacher_tokenizer: str = '',
) -> Task:
  """A student whose every sub-network learns the teacher's relations (`make_distill_task`).

  The teacher runs once per step. Its heads are compared with those of every cell, so that `relation_heads` must divide
  all widths. Evaluation gives the metrics of the full network, and 'loss@NAME' of each cell.

  Args:
    student: the full network.
    teacher: configuration of the teacher.
    teacher_params: its parameters, a tree with 'encoder'.
    config: relations, layers, normalisation, student initialisation.
    adapt: sub-networks; `combine` 'mean' keeps the scale of one network's loss.
    start: see `make_distill_task`, as are the rest.
    student_tokenizer: fingerprint of the tokenizer of the data.
    teacher_tokenizer: fingerprint of the teacher's.

  Raises:
    ConfigError: see `make_distill_task`, for any of the cells, and cells that cannot be cut.
  """
  tokenizers = {'student_tokenizer': student_tokenizer, 'teacher_tokenizer': teacher_tokenizer}
  base = make_distill_task(student, teacher, teacher_params, config, start=start, **tokenizers)
  own = {cell: subnet_config(student, cell) for cell in cells(adapt, student)}
  for small in own.values():
    check_distill(small, teacher, config)
  students = _Students(student, teacher, config, own, base)
  loss = over_cells(
    {cell: students.cell_loss(cell) for cell in own},
    adapt,
    read=lambda params, batch, shared: with_rows(params, student, batch.input_ids),
    share=lambda params, frozen, batch, key, step: (jnp.float32(0.0), {}, students.taught(frozen, batch)),
  )
  return _elastic(base, adapt, own, loss, evaluate=students.evaluate)


@dataclasses.dataclass(frozen=True)
class _Discriminators:
  """A generator and the sub-networks of its discriminator."""

  encoder: EncoderConfig
  config: ElectraConfig
  mask: MaskConfig
  special: SpecialTokens
  own: Mapping[Cell, EncoderConfig]
  base: Task

  def corrupt(self, params: Params, batch: Batch, keys: tuple[jax.Array, jax.Array, jax.Array | None]) -> Corrupted:
    return corrupt(params, self.encoder, self.config, self.mask, self.special, batch, keys)

  def share(
    self, params: Params, frozen: Any, batch: Batch, key: jax.Array, step: jax.Array
  ) -> tuple[jax.Array, Metrics, Corrupted]:
    """See `elastic.Share`: the generator, its loss and what it wrote."""
    mask_key, sample_key, dropout_key = jax.random.split(key, 3)
    rows = self.corrupt(params, batch, (mask_key, sample_key, dropout_key))
    metrics = {name: masked_mean(*pair) for name, pair in generator_measures(rows).items()}
    return self.config.generator_weight * metrics['mlm_loss'], metrics, rows

  def read(self, params: Params, batch: Batch, rows: Corrupted) -> Params:
    """See `elastic.Read`."""
    return with_rows({name: params[name] for name in ('encoder', 'rtd_head')}, self.encoder, rows.fake_BT)

  def cell_loss(self, cell: Cell) -> CellLoss:
    """See `elastic.CellLoss`."""

    def loss(
      read: Params, rows: Corrupted, frozen: Any, batch: Batch, key: jax.Array, step: jax.Array
    ) -> tuple[jax.Array, Metrics]:
      sub = subnet(read, self.encoder, cell)
      out = judge(sub, self.own[cell], rows.fake_BT, batch, key, rows_of(sub, rows.fake_BT))
      metrics = {name: masked_mean(*pair) for name, pair in discriminator_measures(out).items()}
      return self.config.discriminator_weight * metrics['rtd_loss'], {**metrics, 'weight': out.tokens_BT.sum()}

    return loss

  def evaluate(self, params: Params, frozen: Any, batch: Batch) -> Sums:
    """See `types.EvaluateFn`."""
    found: Any = dict(self.base.evaluate(params, frozen, batch))
    mask_key, sample_key, *_ = jax.random.split(evaluation_key(batch), 4)  # what `base` draws
    rows = self.corrupt(params, batch, (mask_key, sample_key, None))
    towers = {name: params[name] for name in ('encoder', 'rtd_head')}
    for cell, small in self.own.items():
      measures = discriminator_measures(judge(subnet(towers, self.encoder, cell), small, rows.fake_BT, batch, None))
      found |= {f'{name}@{cell.name}': masked_sum(*measures[name]) for name in ('rtd_loss', 'rtd_accuracy')}
    return found

  def summarize(self, means: Mapping[str, float]) -> dict[str, float]:
    """See `types.Task`: the whole loss, of each cell with that of the one generator."""
    out = dict(self.base.summarize(means))
    for cell in self.own:
      own = self.base.summarize({**means, 'rtd_loss': means[f'rtd_loss@{cell.name}']})
      out[f'loss@{cell.name}'] = own['loss']
    return out


@dataclasses.dataclass(frozen=True)
class _Students:
  """The sub-networks of a student, and the one teacher of their relations."""

  student: EncoderConfig
  teacher: EncoderConfig
  config: DistillConfig
  own: Mapping[Cell, EncoderConfig]
  base: Task

  def pairs(self, cell: Cell) -> tuple[tuple[int, ...], tuple[int, ...]]:
    return layer_pairs(self.own[cell], self.teacher, self.config)

  def taught(self, frozen: Any, batch: Batch) -> dict[int, QKV]:
    """Queries, keys and values of every layer of the teacher that some cell learns from, by the layer's number."""
    layers = tuple(sorted({layer for cell in self.own for layer in self.pairs(cell)[0]}))
    dtype = self.config.teacher_dtype or self.student.dtype
    teacher = dataclasses.replace(self.teacher, num_layers=layers[-1], pooler=False, dtype=dtype, remat=False)
    rows = (batch.input_ids, batch.attention_mask, batch.token_type_ids)
    out = encode(jax.lax.stop_gradient(frozen), teacher, *rows, qkv_layers=layers, skip_above=True)
    return dict(zip(layers, out.qkv, strict=True))

  def parts(
    self, cell: Cell, sub: Params, taught: Mapping[int, QKV], batch: Batch, config: DistillConfig, **options: Any
  ) -> tuple[dict[str, jax.Array], jax.Array]:
    """See `distill.compare`."""
    rows = (batch.input_ids, batch.attention_mask, batch.token_type_ids)
    teaching, learning = self.pairs(cell)
    out = encode(sub, self.own[cell], *rows, qkv_layers=learning, skip_above=True, **options)
    return compare([taught[layer] for layer in teaching], out.qkv, batch, config)

  def cell_loss(self, cell: Cell) -> CellLoss:
    """See `elastic.CellLoss`."""

    def loss(
      read: Params, shared: Mapping[int, QKV], frozen: Any, batch: Batch, key: jax.Array, step: jax.Array
    ) -> tuple[jax.Array, Metrics]:
      sub = subnet(read, self.student, cell)
      options = {'dropout_key': key, 'word_BTE': rows_of(sub, batch.input_ids)}
      parts, weights_B = self.parts(cell, sub, shared, batch, self.config, **options)
      metrics = {name: masked_mean(part_B, weights_B) for name, part_B in parts.items()}
      return jnp.stack(list(metrics.values())).sum(), {**metrics, 'weight': weights_B.sum()}

    return loss

  def evaluate(self, params: Params, frozen: Any, batch: Batch) -> Sums:
    """See `types.EvaluateFn`."""
    found: Any = dict(self.base.evaluate(params, frozen, batch))
    taught, comparable = self.taught(frozen, batch), dataclasses.replace(self.config, normalize='tokens')
    for cell in self.own:
      parts, weights_B = self.parts(cell, subnet(params, self.student, cell), taught, batch, comparable)
      found[f'loss@{cell.name}'] = masked_sum(jnp.stack(list(parts.values())).sum(0), weights_B)
    return found


def _elastic(base: Task, adapt: AdaptConfig, own: Mapping[Cell, Any], loss: LossFn, **fields: Any) -> Task:
  """`base` over cells."""
  model = {**base.model, 'adapt': to_json(adapt), 'stage': 'pretrain', 'cells': [cell.name for cell in own]}
  return dataclasses.replace(base, name='adapt', loss=loss, model=model, **fields)
