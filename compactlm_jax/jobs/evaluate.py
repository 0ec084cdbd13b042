"""Evaluation of a model that is there already: metrics, and files of predictions."""

from __future__ import annotations

import dataclasses
import json
import logging
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath

from compactlm_jax.config import RunConfig
from compactlm_jax.data.glue import read_glue, submission
from compactlm_jax.data.glue_tasks import glue_task
from compactlm_jax.data.table import tokenize_table
from compactlm_jax.errors import ConfigError, DataError, StorageError
from compactlm_jax.interop.bundle import Bundle
from compactlm_jax.interop.pretrained import GENERATOR
from compactlm_jax.jobs.commands import build_job, evaluation
from compactlm_jax.jobs.data import EvalSet
from compactlm_jax.jobs.grid import Timed, load_network, with_grid
from compactlm_jax.jobs.models import is_run, load_run_params, tokenizer_of
from compactlm_jax.parallel import make_mesh, param_shardings
from compactlm_jax.storage import write_whole
from compactlm_jax.train.evaluate import Evaluation, make_gather, metrics_of
from compactlm_jax.train.loop import Job
from compactlm_jax.tree import named_leaves, nested
from compactlm_jax.types import Params

_NEEDED: dict[str, tuple[str, ...]] = {
  'mlm': ('mlm_head',),
  'lm': ('mlm_head',),
  'electra': ('rtd_head',),
  'finetune': (),
  'distill': (),
}
"""Heads that a model folder must bring for the evaluation of a task."""

log = logging.getLogger(__name__)


def run_evaluate(
  config: RunConfig, checkpoint: str, split: str = 'dev', output: str = '', *, timing: Timed | None = None
) -> dict[str, Any]:
  """Evaluates a run or a model folder as a run of this configuration would at its end.

  Of an adaptive network every sub-network is evaluated, whatever stage made it. Any fine-tuned model is taken for one:
  the grid of one that was not trained so shows what its sub-networks are worth as they are cut. Those that a run of
  task adapt never trained are told.

  Args:
    config: of the run, or one that describes the same task and data. For fine-tuning, `model` and `teacher` are not
      read: the model is the checkpoint.
    checkpoint: run directory (its newest intact checkpoint) or model folder.
    split: 'dev' are the held-out rows of the configuration; 'test' are the unlabelled test sets of a GLUE task, for
      submission (MNLI: both, and the diagnostic set).
    output: folder for results.json and for predictions: GLUE's submission files; predictions.json,
      nbest_predictions.json and null_odds.json of SQuAD; grid.csv and grid.png of an adaptive network. '' writes
      nothing; the test split needs it.
    timing: of an adaptive network, measure the latency of each sub-network on this device; None does not.

  Returns:
    What results.json holds: 'metrics', 'task', 'split', 'checkpoint', and 'step' of a run; of an adaptive network also
    'grid' (see `grid_rows`) and, if it was timed, 'latency'.

  Raises:
    ConfigError: the checkpoint does not fit the task (the message names what differs), or there is nothing to evaluate.
    DataError, StorageError: files that cannot be used or written.
  """
  if split == 'test' and not output:
    raise ConfigError('--output: name a folder; test sets have no labels, their evaluation is a file to submit')
  # A model that training finishes otherwise than its parameters stand is loaded in its finished form.
  finished = config.task == 'prune' or _is_grid(config) or bool(config.finetune.keep_layers)
  network = None if is_run(checkpoint) and not finished else load_network(checkpoint)
  bundle = network.bundle if network else None
  if finished:
    config = dataclasses.replace(config, finetune=dataclasses.replace(config.finetune, keep_layers=()))
    config = dataclasses.replace(config, task='finetune' if config.task == 'prune' else config.task)
  asked = _asked(config, checkpoint, bundle)
  job = build_job(asked)
  if network is None:
    params, step = _run_params(job, checkpoint)
  else:
    params, step = _folder_params(job, network.bundle, checkpoint), network.step
  _check_tree(job, params, checkpoint)
  evals = _test_evaluations(asked, checkpoint) if split == 'test' else job.evals
  if not evals:
    raise ConfigError('config.data: names no held-out rows; set data.dev, or data.path for a benchmark')
  metrics, files = _evaluate(job, params, evals)
  results: dict[str, Any] = {'metrics': metrics, 'task': job.task.name, 'split': split, 'checkpoint': str(checkpoint)}
  if step is not None:
    results['step'] = step
  contents: dict[str, str | bytes] = {**files}
  if job.keeper is not None and split == 'dev':
    network = network or load_network(checkpoint)
    entries, own = with_grid(job.keeper.results(params, metrics), network, timing)
    results |= entries
    contents |= own
  if output and jax.process_index() == 0:
    _write({**contents, 'results.json': json.dumps(results, indent=2) + '\n'}, epath.Path(output))
  return results


def _is_grid(config: RunConfig) -> bool:
  """Whether labelled rows are given to each sub-network of an adaptive network."""
  return config.task == 'adapt' and config.labelled


def _asked(config: RunConfig, checkpoint: str, bundle: Bundle | None) -> RunConfig:
  """The configuration whose job has the parameters of the checkpoint."""
  if config.task == 'finetune' or _is_grid(config):
    if bundle is not None and not {'classifier', 'span'} & set(bundle.params):
      raise ConfigError(f'{checkpoint}: its head was never trained; fine-tune it first (compactlm train)')
    if _is_grid(config):  # the stage that asks for no teacher, and has all sub-networks
      adapt = dataclasses.replace(config.adapt, stages=('final',), augmented='')
      return dataclasses.replace(config, model=checkpoint, teacher='', adapt=adapt)
    generated = not (config.data.train or config.finetune.benchmark)
    return config if generated else dataclasses.replace(config, model=checkpoint, teacher='')
  if bundle is None:
    return config
  objective = config.adapt.base if config.task == 'adapt' else config.task
  missing = [head for head in _NEEDED[objective] if head not in bundle.params]
  if missing:
    raise ConfigError(f'{checkpoint}: has no {missing[0]}, which the objective {objective} evaluates; train it first')
  if objective != 'electra':
    return dataclasses.replace(config, model=checkpoint)
  if not (epath.Path(checkpoint) / GENERATOR).exists():
    raise ConfigError(f'{checkpoint}: has no folder {GENERATOR}, whose tokens it judges; export the run whole')
  electra = dataclasses.replace(config.electra, generator=checkpoint)
  return dataclasses.replace(config, model=checkpoint, electra=electra)


def _run_params(job: Job, checkpoint: str) -> tuple[Params, int | None]:
  """(parameters as they were trained, step) of the newest intact checkpoint."""
  leaves, metadata = load_run_params(checkpoint)
  if metadata['task'] != job.task.name:
    raise ConfigError(f'config.task: {checkpoint} is a run of {metadata["task"]}, not of {job.task.name}')
  _check_same_model(metadata['model'], job.task.model, checkpoint)
  names = set(named_leaves(jax.eval_shape(job.task.init, jax.random.key(0))))
  kept = {
    name: leaf
    for name, leaf in named_leaves(leaves).items()
    if name in names or not name.startswith('encoder/pooler/')  # a pooler that the head does not read
  }
  return nested(kept), int(metadata['step'])


def _folder_params(job: Job, bundle: Bundle, checkpoint: str) -> Params:
  """Parameters of a model folder, in the form in which the task trains them."""
  config = job.config
  if config.task != 'finetune':
    return dict(job.task.init(jax.random.key(config.seed)))
  if 'span' in bundle.params:
    return {name: bundle.params[name] for name in ('encoder', 'span')}
  if bundle.config.pooler != config.finetune.pooled:
    raise ConfigError(
      f'config.finetune.pooled: the classifier of {checkpoint} reads the '
      f'{"pooler" if bundle.config.pooler else "first token"}; set it to {bundle.config.pooler}'
    )
  classes = tuple(job.task.model.get('classes', ()))
  if bundle.labels and bundle.labels != classes:
    raise ConfigError(
      f'{checkpoint}: its classes are {", ".join(bundle.labels)}, those of the task '
      f'{", ".join(classes) or "none (scores)"}; evaluate it on the task that it was fine-tuned for'
    )
  scale = 1.0 if classes else config.finetune.score_scale
  head = jax.tree.map(lambda leaf: leaf / scale, bundle.params['classifier'])
  return {'encoder': bundle.params['encoder'], 'classifier': head}


def _check_same_model(trained: Mapping[str, Any], asked: Mapping[str, Any], checkpoint: str) -> None:
  """Raises ConfigError where the same weights would mean something else."""
  fields = ('classes', 'finetune.pooled', 'finetune.score_scale', 'span.head')
  modes = ('layer_norm_epsilon', 'conv_sees_padding', 'causal')
  for field in (*fields, *(f'encoder.{mode}' for mode in modes)):
    there, here = _value(trained, field), _value(asked, field)
    if there is not None and here is not None and there != here:
      raise ConfigError(f'config: {checkpoint} was trained with {field} {there!r}, this configuration has {here!r}')


def _value(model: Mapping[str, Any], field: str) -> Any:
  value: Any = model
  for part in field.split('.'):
    value = value.get(part) if isinstance(value, Mapping) else None
  return list(value) if isinstance(value, tuple) else value


def _check_tree(job: Job, params: Params, checkpoint: str) -> None:
  """Raises ConfigError for the first parameter that differs from what the task trains."""
  expected = named_leaves(jax.eval_shape(job.task.init, jax.random.key(0)))
  found = named_leaves(params)
  for name in sorted(set(expected) | set(found)):
    if name not in found:
      raise ConfigError(f'{checkpoint}: parameter {name} is missing, which the task of this configuration has')
    if name not in expected:
      raise ConfigError(f'{checkpoint}: parameter {name} has no place in the task of this configuration')
    if np.shape(found[name]) != expected[name].shape:
      raise ConfigError(
        f'{checkpoint}: parameter {name} is {np.shape(found[name])}, the task of this configuration has '
        f'{expected[name].shape}; evaluate it with the configuration that it was trained with'
      )


def _test_evaluations(config: RunConfig, checkpoint: str) -> tuple[Evaluation, ...]:
  """The test sets of a GLUE task, with their submission files."""
  benchmark = config.finetune.benchmark
  if not config.labelled or not benchmark or benchmark.startswith('squad'):
    raise ConfigError(
      f'--split: test sets are those of the GLUE tasks, config.finetune.benchmark is {benchmark!r}; use --split=dev, '
      'or compactlm predict for unlabelled texts'
    )
  tokenizer, sets = tokenizer_of(checkpoint), []
  for split in glue_task(benchmark).test_splits:
    try:
      table = read_glue(benchmark, config.data.path, split.name)
    except DataError as e:
      if split.name != 'ax':
        raise
      log.warning('%s is left out: %s', split.submission, e)  # it is distributed apart from the tasks
      continue
    rows = tokenize_table(dataclasses.replace(table, labels=None), tokenizer, config.data.seq_len)
    sets.append(EvalSet(rows, files=_submission(benchmark, split.name)))
  return tuple(evaluation(held, config) for held in sets)


def _submission(benchmark: str, split: str) -> Any:
  return lambda rows: dict([submission(benchmark, split, rows['outputs'])])


def _evaluate(job: Job, params: Params, evals: tuple[Evaluation, ...]) -> tuple[dict[str, float], dict[str, str]]:
  """(metrics, files) of all evaluations."""
  mesh = make_mesh(job.config.mesh)
  placed = jax.device_put(jax.tree.map(jnp.asarray, params), param_shardings(mesh, params))
  frozen = job.task.frozen
  if frozen is not None:
    frozen = jax.device_put(frozen, param_shardings(mesh, frozen))
  gather = make_gather(job.task, mesh)
  metrics: dict[str, float] = {}
  files: dict[str, str] = {}
  for held in evals:
    means, rows = gather(placed, frozen, held.batches())
    metrics |= metrics_of(job.task, held, means, rows)
    files |= held.files(rows)
  return metrics, files


def _write(files: Mapping[str, str | bytes], folder: epath.Path) -> None:
  """Each file appears whole; results.json last."""
  try:
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
      write_whole(folder / name, content)
  except OSError as e:
    raise StorageError(f'{folder}: cannot be written ({e.strerror or e}); free space or fix permissions') from e
