"""FLOPs of a training step, counted from its configuration: what MFU divides by.

A product of `nn.flops` counts three times if it is trained (forward, and two in the backward pass), once if it is
frozen. Recomputation and the optimiser count nothing. For a plain encoder at short length this is the usual 6 * weights
* tokens (PaLM, Chowdhery et al. 2022, appendix B), plus attention and heads.
"""

from __future__ import annotations

import dataclasses

from compactlm_jax.compress.subnet import subnet_config
from compactlm_jax.config import SQUAD, Cell, EncoderConfig, OptimizerConfig, RunConfig, cells
from compactlm_jax.nn.flops import encoder_flops, layer_flops, mlm_head_flops, span_head_flops
from compactlm_jax.tasks.distill import layer_pairs

TRAINED = 3
"""Forward pass, gradient of the inputs, gradient of the weights."""


def model_flops(config: RunConfig, teacher: EncoderConfig | None = None) -> float:
  """FLOPs of one training step of the whole batch.

  Args:
    config: the run as `plan.abstract.resolve` has it: the trained encoder, the number of classes.
    teacher: of distillation, or of fine-tuning.
  """
  if config.task == 'adapt':
    return config.batch_size * (
      _adaptive_flops(config, teacher) if config.labelled else _elastic_flops(config, teacher)
    )
  rows, length, encoder = config.batch_size, config.data.seq_len, config.encoder
  own = length * encoder_flops(encoder, length)
  if config.task == 'electra':
    small, width = config.electra.generator_encoder(encoder), encoder.hidden_size
    generator = length * encoder_flops(small, length) + config.mask.slots(length) * mlm_head_flops(small)
    return TRAINED * rows * (own + length * 2 * width * (width + 1) + generator)
  if config.task == 'mlm':
    return TRAINED * rows * (own + config.mask.slots(length) * mlm_head_flops(encoder))
  if config.task == 'lm':
    return TRAINED * rows * (own + (length - 1) * mlm_head_flops(encoder))
  if config.labelled:
    trained = own + _head_flops(encoder, config, config.finetune.pooled)
    if teacher is None:
      return TRAINED * rows * trained
    frozen = length * encoder_flops(teacher, length) + _head_flops(teacher, config, teacher.pooler)
    return rows * (TRAINED * trained + frozen)
  assert config.task == 'distill' and teacher is not None
  taught, learning = layer_pairs(encoder, teacher, config.distill)
  return rows * (
    TRAINED * _relations_flops(encoder, config, learning) + _relations_flops(teacher, config, tuple(taught))
  )


def _adaptive_flops(config: RunConfig, teacher: EncoderConfig | None) -> float:
  """FLOPs of a row in a stage of an adaptive network: its cells, of a sandwich those of a step on average."""
  adapt, encoder, length = config.adapt, config.encoder, config.data.seq_len
  stage = adapt.stages[-1]
  grid = cells(adapt, encoder, full_depth=stage == 'width')

  def forward(encoder: EncoderConfig, pooled: bool) -> float:
    return length * encoder_flops(encoder, length) + _head_flops(encoder, config, pooled)

  sizes = [subnet_config(encoder, cell) for cell in grid]
  costs = [TRAINED * forward(size, config.finetune.pooled) for size in sizes]
  if adapt.term == 'relations' and teacher is not None:
    # The relations themselves; the teacher's are made anew for each cell.
    costs = [c + TRAINED * _pairs_flops(s, config) + _pairs_flops(teacher, config) for c, s in zip(costs, sizes)]
  trained = _of_a_step(costs, config)
  if teacher is None:
    return trained
  same = stage == 'depth' and adapt.depth_teacher == 'same_width'
  taught = {subnet_config(teacher, Cell(cell.width, 1.0, cell.hidden)) for cell in grid} if same else {teacher}
  return trained + sum(forward(own, own.pooler) for own in taught)


def _elastic_flops(config: RunConfig, teacher: EncoderConfig | None) -> float:
  """FLOPs of a row of elastic pre-training: its cells, and once what they share (a generator, a teacher)."""
  alone = dataclasses.replace(config, task=objective_of(config), batch_size=1, optimizer=OptimizerConfig())
  shared = 0.0
  if alone.task == 'electra':
    small = config.electra.generator_encoder(config.encoder)
    length, slots = config.data.seq_len, config.mask.slots(config.data.seq_len)
    shared = TRAINED * (length * encoder_flops(small, length) + slots * mlm_head_flops(small))
  elif teacher is not None:
    taught, _ = layer_pairs(config.encoder, teacher, config.distill)
    shared = _relations_flops(teacher, config, tuple(taught))
  own = [
    dataclasses.replace(alone, encoder=subnet_config(config.encoder, cell))
    for cell in cells(config.adapt, config.encoder)
  ]
  if alone.task == 'electra':
    length = config.data.seq_len
    costs = [
      TRAINED * length * (encoder_flops(e, length) + 2 * e.hidden_size * (e.hidden_size + 1))
      for e in (run.encoder for run in own)
    ]
  else:
    costs = [model_flops(run, teacher) - shared for run in own]
  return _of_a_step(costs, config) + shared


def _of_a_step(costs: list[float], config: RunConfig) -> float:
  """The sum over the cells that a step trains, on average."""
  others, adapt = costs[1:-1], config.adapt
  if adapt.sampling == 'sandwich' and adapt.random_cells < len(others):
    return costs[0] + costs[-1] + adapt.random_cells * sum(others) / len(others)
  return sum(costs)


def objective_of(config: RunConfig) -> str:
  """The task whose loss a step minimises: of an adaptive network that of each of its sub-networks."""
  return config.adapt.base if config.task == 'adapt' else config.task


def _head_flops(encoder: EncoderConfig, config: RunConfig, pooled: bool) -> float:
  """Forward FLOPs of a row's classifier, regression or span head."""
  finetune = config.finetune
  if finetune.benchmark in SQUAD:
    joint, answerable = config.span.head == 'joint', finetune.benchmark == 'squad2'
    return span_head_flops(encoder.hidden_size, config.data.seq_len, joint=joint, answerable=joint and answerable)
  pooler = encoder.hidden_size if pooled else 0
  return 2.0 * encoder.hidden_size * (pooler + max(1, finetune.num_classes))


def _relations_flops(encoder: EncoderConfig, config: RunConfig, layers: tuple[int, ...]) -> float:
  """Forward FLOPs of a row up to the compared projections of the last of `layers`, and of the relations of all."""
  length, inner = config.data.seq_len, encoder.num_heads * encoder.head_size
  below = length * encoder_flops(dataclasses.replace(encoder, num_layers=max(layers)), length)
  below -= length * layer_flops(encoder, length)
  projections = len(set(''.join(config.distill.relations)))
  return below + length * projections * 2 * encoder.hidden_size * inner + len(layers) * _pairs_flops(encoder, config)


def _pairs_flops(encoder: EncoderConfig, config: RunConfig) -> float:
  """Forward FLOPs of a row's relations of one layer."""
  pairs = [pair for pair in config.distill.relations if not (pair == 'vv' and config.distill.value_loss == 'mse')]
  return len(pairs) * 2.0 * config.data.seq_len**2 * encoder.num_heads * encoder.head_size
