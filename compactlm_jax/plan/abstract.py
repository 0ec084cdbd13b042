"""The training step of a configuration as shapes: no data, no weights, nothing is computed."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from etils import epath
from jax.sharding import Mesh

from compactlm_jax.checkpoint import load_params
from compactlm_jax.config import SQUAD, EncoderConfig, RunConfig, from_config_dict
from compactlm_jax.data.glue_tasks import glue_task
from compactlm_jax.data.manifest import read_manifest
from compactlm_jax.errors import ConfigError
from compactlm_jax.interop.folder import open_folder
from compactlm_jax.interop.hf_config import from_hf
from compactlm_jax.interop.hub import local_folder
from compactlm_jax.nn.encoder import encoder_shapes
from compactlm_jax.nn.heads import Classifier
from compactlm_jax.nn.span import SpanHead
from compactlm_jax.parallel import batch_sharding, check_batch_size, param_shardings, state_shardings
from compactlm_jax.plan.flops import objective_of
from compactlm_jax.tasks.adapt import make_adapt_task
from compactlm_jax.tasks.distill import check_distill, make_distill_task
from compactlm_jax.tasks.elastic_pretrain import (
  make_elastic_distill_task,
  make_elastic_electra_task,
  make_elastic_mlm_task,
)
from compactlm_jax.tasks.electra import make_electra_task
from compactlm_jax.tasks.finetune import make_finetune_task
from compactlm_jax.tasks.lm import make_lm_task
from compactlm_jax.tasks.mlm import make_mlm_task
from compactlm_jax.tasks.prune import make_prune_task
from compactlm_jax.tasks.span import make_span_task
from compactlm_jax.train.optimizer import learning_rate_schedule, make_optimizer
from compactlm_jax.train.step import compile_step, make_train_step
from compactlm_jax.types import Batch, Params, SpecialTokens, Task, TrainState

_SPECIAL = SpecialTokens(pad=0, cls=1, sep=2, mask=3)  # any ids give the same program


@dataclasses.dataclass(frozen=True)
class Plan:
  """A configuration with everything resolved that decides the program.

  Attributes:
    config: its `encoder` is that of the trained model, all layers unrolled: costs of a loop count its body once. Its
      `finetune.num_classes` is the head's, 0 for scores.
    teacher: of distillation, or of fine-tuning.
    notes: what was assumed because nothing names it.
  """

  config: RunConfig
  teacher: EncoderConfig | None = None
  notes: tuple[str, ...] = ()

  def with_batch(self, batch_size: int) -> Plan:
    """The same with another batch size."""
    return dataclasses.replace(self, config=dataclasses.replace(self.config, batch_size=batch_size))


def resolve(config: RunConfig) -> Plan:
  """Reads the configurations (not the weights) of the models that `config` names, and assumes what it leaves open.

  Raises:
    ConfigError, DataError: a model that cannot be read, or that does not fit.
  """
  notes = []
  encoder = config.encoder
  elastic = config.task == 'adapt' and config.labelled
  if source := config.model or (config.teacher if elastic else ''):
    found = encoder_of(source)
    causal = encoder.causal if config.task == 'lm' else found.causal
    encoder = dataclasses.replace(found.with_run_options(encoder), causal=causal)
  encoder = dataclasses.replace(encoder, scan_unroll=0)
  if config.labelled:
    # Rows of tables and benchmarks are padded to `data.seq_len`; only prepared data brings a length of its own.
    config, encoder, assumed = _labelled(config, encoder)
    notes += assumed
  elif config.data.path:
    config = dataclasses.replace(config, data=dataclasses.replace(config.data, seq_len=_row_length(config)))
  if config.data.seq_len > encoder.max_positions:
    raise ConfigError(
      f'config.data.seq_len: {config.data.seq_len} is more than encoder.max_positions {encoder.max_positions}'
    )
  config = dataclasses.replace(config, encoder=encoder)
  teacher = None
  if objective_of(config) == 'distill':
    teacher, assumed = _teacher(config)
    notes += assumed
  if config.labelled and config.teacher:
    teacher = dataclasses.replace(encoder_of(config.teacher), scan_unroll=0)
  if elastic:
    config, teacher, assumed = _adaptive(config, teacher)
    notes += assumed
  if not config.steps:
    notes.append('no hours: set --config.steps, epochs of data that is not read have no length')
  return Plan(config, teacher, tuple(notes))


def _labelled(config: RunConfig, encoder: EncoderConfig) -> tuple[RunConfig, EncoderConfig, list[str]]:
  """The run with its number of classes, its encoder with the pooler that the head reads, and what was assumed."""
  notes, finetune = [], config.finetune
  if finetune.pooled and not config.model:
    encoder = dataclasses.replace(encoder, pooler=True)
  if config.data.buckets:
    notes.append(f'every batch is {config.data.seq_len} tokens long (config.data.buckets makes many of them shorter)')
  if finetune.benchmark in SQUAD or config.data.score_column:
    classes = 0
  elif finetune.benchmark:
    classes = len(glue_task(finetune.benchmark).classes)
  else:
    classes = finetune.num_classes or 2
    if not finetune.num_classes:
      notes.append('two classes (config.finetune.num_classes is 0)')
  config = dataclasses.replace(config, finetune=dataclasses.replace(finetune, num_classes=classes))
  return config, encoder, notes


def _adaptive(config: RunConfig, teacher: EncoderConfig | None) -> tuple[RunConfig, EncoderConfig | None, list[str]]:
  """The run with the stage that costs most alone, who teaches it, and what was assumed."""
  adapt, notes = config.adapt, []
  stage = 'depth' if 'depth' in adapt.stages else adapt.stages[-1]
  if len(adapt.stages) > 1:
    notes.append(f'the stage {stage}, which costs most; config.adapt.stages has {", ".join(adapt.stages)}')
  taught = stage == 'depth' or (stage == 'width' and adapt.width_loss == 'distil')
  if stage == 'depth' or (taught and teacher is None):
    teacher = config.encoder
  # The head of the model that becomes adaptive reads the pooler if there is one.
  finetune = dataclasses.replace(config.finetune, pooled=config.encoder.pooler)
  config = dataclasses.replace(config, adapt=dataclasses.replace(adapt, stages=(stage,)), finetune=finetune)
  return config, teacher if taught else None, notes


def encoder_of(path: str) -> EncoderConfig:
  """The encoder of a model folder (only config.json is read) or of a run."""
  if (epath.Path(path) / 'checkpoints').exists():
    _, metadata = load_params(path)
    return from_config_dict(EncoderConfig, metadata['model']['encoder'], 'encoder.')
  return from_hf(open_folder(local_folder(path)).read_json('config.json'))


def _row_length(config: RunConfig) -> int:
  """Tokens of a row of the prepared data; only its manifest is read."""
  return read_manifest(config.data.path).seq_len


def _teacher(config: RunConfig) -> tuple[EncoderConfig, list[str]]:
  """The named teacher, or the first of the usual ones that fits."""
  student = config.encoder
  if config.teacher:
    return dataclasses.replace(encoder_of(config.teacher), scan_unroll=0), []
  shared: dict[str, Any] = {'vocab_size': student.vocab_size, 'max_positions': student.max_positions}
  large: dict[str, Any] = {'hidden_size': 1024, 'num_layers': 24, 'num_heads': 16}
  deeper = dataclasses.replace(student, num_layers=2 * student.num_layers, scan_unroll=0)
  candidates = {
    'of BERT-base size': EncoderConfig(**shared),
    'of BERT-large size': EncoderConfig(**shared, **large),
    "twice as deep as the student (BERT's sizes do not fit it)": deeper,
  }
  for name, teacher in candidates.items():
    try:
      check_distill(student, teacher, config.distill)
    except ConfigError:
      continue
    return teacher, [f'a teacher {name}: config.teacher names none']
  check_distill(student, deeper, config.distill)
  raise AssertionError('check_distill accepts what it refused')


def make_task(plan: Plan, teacher_params: Params | None) -> Task:
  """The task of a plan; runs under `jax.eval_shape`.

  Raises:
    ConfigError: an option that does not fit.
  """
  config = plan.config
  if config.task == 'distill':
    assert plan.teacher is not None and teacher_params is not None
    return make_distill_task(config.encoder, plan.teacher, teacher_params, config.distill)
  if config.task == 'prune':
    steps = _steps(config)
    return make_prune_task(
      _labelled_task(plan, teacher_params),
      config.encoder,
      config.prune,
      total_steps=steps,
      warmup=config.optimizer.warmup(steps),
      learning_rate=learning_rate_schedule(config.optimizer, steps),
    )
  if config.task == 'adapt':
    return _adapt_task(plan, teacher_params) if config.labelled else _elastic_task(plan, teacher_params)
  if config.task == 'finetune':
    return _labelled_task(plan, teacher_params)
  if config.task == 'electra':
    return make_electra_task(config.encoder, config.electra, config.mask, _SPECIAL)
  if config.task == 'mlm':
    return make_mlm_task(config.encoder, config.mask, _SPECIAL)
  assert config.task == 'lm'
  return make_lm_task(config.encoder)


def _adapt_task(plan: Plan, teacher_params: Params | None) -> Task:
  """The task of a stage that makes a network adaptive."""
  config = plan.config
  classes = tuple(map(str, range(config.finetune.num_classes)))
  return make_adapt_task(
    config.encoder,
    classes,
    config.finetune,
    config.adapt,
    config.adapt.stages[-1],
    start=make_finetune_task(config.encoder, classes, config.finetune).init(jax.random.key(0)),
    teacher=None if plan.teacher is None or teacher_params is None else (teacher_params, plan.teacher),
    distill=config.distill,
  )


def _elastic_task(plan: Plan, teacher_params: Params | None) -> Task:
  """The task of elastic pre-training."""
  config = plan.config
  if config.adapt.base == 'mlm':
    return make_elastic_mlm_task(config.encoder, config.mask, _SPECIAL, config.adapt)
  if config.adapt.base == 'electra':
    return make_elastic_electra_task(config.encoder, config.electra, config.mask, _SPECIAL, config.adapt)
  assert plan.teacher is not None and teacher_params is not None
  return make_elastic_distill_task(config.encoder, plan.teacher, teacher_params, config.distill, config.adapt)


def _labelled_task(plan: Plan, teacher_params: Params | None) -> Task:
  """The task of fine-tuning."""
  config = plan.config
  teacher = None if plan.teacher is None or teacher_params is None else (teacher_params, plan.teacher)
  if config.finetune.benchmark in SQUAD:
    version = int(config.finetune.benchmark[-1])
    return make_span_task(config.encoder, config.span, config.finetune, version=version, teacher=teacher)
  classes = tuple(map(str, range(config.finetune.num_classes)))
  return make_finetune_task(config.encoder, classes, config.finetune, teacher=teacher)


def _steps(config: RunConfig) -> int:
  """Steps of the run; so many that every schedule fits, where they depend on data that is not read."""
  pause = config.prune.initial_warmup + config.prune.final_warmup
  return config.steps or 1000 + int((1 + pause) * config.optimizer.warmup_steps)


def abstract_step(plan: Plan, mesh: Mesh) -> tuple[Callable[..., Any], tuple[Any, Any, Batch]]:
  """The training step as the loop compiles it, and the arguments to lower it with: shapes with placements.

  Args:
    plan: from `resolve`.
    mesh: of the devices to compile for.

  Returns:
    (jitted step, (state, frozen, batch)).

  Raises:
    ConfigError: sizes that do not divide over the mesh.
  """
  config = plan.config
  check_batch_size(mesh, config.batch_size, config.optimizer.accumulate)
  made: list[Any] = []

  def start(teacher: Params | None, key: jax.Array) -> tuple[TrainState, Any]:
    task = make_task(plan, teacher)
    tx = make_optimizer(config.optimizer, _steps(config), task.trainable, task.groups)
    made.append((dataclasses.replace(task, frozen=None), tx))
    params = task.init(key)
    return TrainState(jnp.zeros([], jnp.int32), params, tx.init(params)), task.frozen

  teacher = None if plan.teacher is None else _teacher_shapes(plan.teacher, config)
  state, frozen = jax.eval_shape(start, teacher, jax.random.key(config.seed))
  state = _placed(state, state_shardings(mesh, state))
  frozen = None if frozen is None else _placed(frozen, param_shardings(mesh, frozen))
  task, tx = made[-1]
  step = make_train_step(task, tx, config.seed, config.optimizer.accumulate, mesh)
  return compile_step(step, mesh, state, frozen), (state, frozen, _batch(config, mesh))


def _teacher_shapes(teacher: EncoderConfig, config: RunConfig) -> Params:
  """Parameters of a teacher as shapes, with the head of the same task where it has to know the task."""
  shapes = encoder_shapes(teacher)
  if not config.labelled:
    return shapes
  if config.finetune.benchmark in SQUAD:
    fresh = jax.eval_shape(lambda: SpanHead(teacher).init(jax.random.key(0), jnp.zeros((1, 1, teacher.hidden_size))))
    return {**shapes, 'span': dict(fresh['params'])}
  head = Classifier(max(1, config.finetune.num_classes), teacher)
  fresh = jax.eval_shape(lambda: head.init(jax.random.key(0), jnp.zeros((1, teacher.hidden_size))))
  return {**shapes, 'classifier': dict(fresh['params'])}


def _placed(shapes: Any, shardings: Any) -> Any:
  return jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), shapes, shardings)


def _batch(config: RunConfig, mesh: Mesh) -> Batch:
  def array(*shape: int, dtype: Any = jnp.int32) -> Any:
    return jax.ShapeDtypeStruct(shape, dtype, sharding=batch_sharding(mesh))

  size, finetune = config.batch_size, config.finetune
  rows = array(size, config.data.seq_len)
  if not config.labelled:
    return Batch(rows, rows, rows)
  if finetune.benchmark in SQUAD:
    return Batch(rows, rows, rows, labels=array(size, 3))
  labels = array(size) if finetune.num_classes else array(size, dtype=jnp.float32)
  return Batch(rows, rows, rows, labels=labels)
