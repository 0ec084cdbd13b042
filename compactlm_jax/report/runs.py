"""Which runs belong together: finished ones that differ in their seed alone."""

from __future__ import annotations

import dataclasses
import json
import logging
import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from etils import epath

from compactlm_jax.config import LABELLED, RunConfig, to_json
from compactlm_jax.errors import ConfigError
from compactlm_jax.parse import parse_row
from compactlm_jax.report.grid import Grid, GridRow, over_runs, read_rows
from compactlm_jax.report.subjects import subject_titles

log = logging.getLogger(__name__)

ReadRun = Callable[[str], tuple[RunConfig, dict[str, Any]]]


@dataclasses.dataclass(frozen=True)
class Run:
  """A finished run.

  Attributes:
    folder: its directory.
    config: its configuration.
    identity: fingerprints of its data (and, as 'eval', of the held-out rows), tokenizer, teacher and the weights that
      it starts from.
    scores: metrics of results.json.
    steps: optimiser steps.
    seconds: of the process that finished it.
    command: the command line that started it; '' where an older version did not record it.
    config_hash: of its config.json.
    code: version of the package, and digest of its sources.
    remaining: fraction of the encoder's weights that are not zero, layers that were left out counted as zeros; None
      where it is not known.
    nonzero: how many they are; None where it is not known.
    by_matrix: kind of matrix -> that fraction in each layer, of a run that pruned; {} otherwise.
    grid: sub-networks of an adaptive run; () otherwise.
  """

  folder: str
  config: RunConfig
  identity: Mapping[str, str]
  scores: Mapping[str, float]
  steps: int
  seconds: float
  command: str
  config_hash: str
  code: str
  remaining: float | None = None
  nonzero: int | None = None
  by_matrix: Mapping[str, tuple[float, ...]] = dataclasses.field(default_factory=dict)
  grid: tuple[GridRow, ...] = ()

  @property
  def measured_on(self) -> tuple[str, str]:
    """(benchmark, or task; path of the user's own files, or ''): what it was trained and measured on.

    A run that prunes is measured as one that fine-tunes the dense model, and stands beside it.
    """
    data, labelled = self.config.data, self.config.labelled
    named = self.config.finetune.benchmark if labelled else ''
    file = data.dev or data.train or data.eval_path or data.path
    return named or ('finetune' if labelled else self.config.task), '' if named or not file else str(epath.Path(file))


@dataclasses.dataclass(frozen=True)
class Group:
  """Runs that differ in their seed alone, by seed.

  Attributes:
    name: of their folder.
    runs: one or more.
    fields: what they share: configuration and fingerprints by name.
  """

  name: str
  runs: tuple[Run, ...]
  fields: Mapping[str, Any] = dataclasses.field(default_factory=dict)

  @property
  def benchmark(self) -> str:
    """Name of the GLUE task or SQuAD version; '' without one."""
    config = self.runs[0].config
    return config.finetune.benchmark if config.labelled else ''

  @property
  def metrics(self) -> tuple[str, ...]:
    """Names of all metrics, those of the first run first."""
    return tuple(dict.fromkeys(name for run in self.runs for name in run.scores))

  @property
  def grid(self) -> Grid | None:
    """Sub-networks over the seeds, of adaptive runs."""
    having = [run.grid for run in self.runs if run.grid]
    return over_runs(having) if having else None

  def values(self, metric: str) -> list[float]:
    """One for each run that has it, by seed."""
    return [run.scores[metric] for run in self.runs if metric in run.scores]


@dataclasses.dataclass(frozen=True)
class Report:
  """What is reported.

  Attributes:
    groups: in the order in which they were named.
    left_out: (directory, why) of runs that count for nothing.
    notes: what a reader should know about the rest.
  """

  groups: tuple[Group, ...]
  left_out: tuple[tuple[str, str], ...] = ()
  notes: tuple[str, ...] = ()

  def subjects(self) -> dict[str, list[Group]]:
    """Groups by what they were measured on, in a few words: groups with different subjects share no table.

    Held-out rows are the same if their fingerprints are; where none was recorded, if their path is.
    """
    found: dict[tuple[str, str], list[Group]] = {}
    for group in self.groups:
      what, file = group.runs[0].measured_on
      found.setdefault((what, group.runs[0].identity.get('eval') or file), []).append(group)
    titles = subject_titles(
      [(*own[0].runs[0].measured_on, own[0].runs[0].identity.get('eval', '')) for own in found.values()]
    )
    return dict(zip(titles, found.values()))


def collect(folders: Sequence[str], read_run: ReadRun, free: tuple[str, ...] = ()) -> Report:
  """Reads and groups runs.

  Args:
    folders: run directories, or parents that hold seed-*; one that is named twice counts once.
    read_run: reads and checks config.json (`train.rundir.read_run`).
    free: fields of the configuration that may differ within a group, as they do not alter the curve.

  Returns:
    Groups of runs that differ in their seed alone. Unfinished runs are left out, named, and logged.

  Raises:
    ConfigError: no such directory; an edited or damaged file; no finished run; seeds of one parent that differ in
      more than the seed; runs of different tasks (other than 'prune' beside 'finetune'); the same seed twice.
  """
  runs: list[tuple[Run, str]] = []
  left_out: list[tuple[str, str]] = []
  for folder, parent in _run_folders(folders):
    found = _read(folder, read_run)
    if isinstance(found, Run):
      runs.append((found, parent))
    else:
      left_out.append((str(folder), found))
      log.warning('%s is left out: %s', folder, found)
  if not runs:
    raise ConfigError('no finished run: ' + '; '.join(f'{folder}: {why}' for folder, why in left_out))
  _check_one_task([run for run, _ in runs])
  groups = _group(runs, free)
  return Report(groups, tuple(left_out), tuple(note for group in groups for note in _notes(group)))


def _run_folders(folders: Sequence[str]) -> list[tuple[epath.Path, str]]:
  """(run directory, the parent that was named instead of it or '')."""
  found: dict[epath.Path, tuple[epath.Path, str]] = {}
  for name in folders:
    path = epath.Path(name)
    if not path.is_dir():
      raise ConfigError(f'{name}: there is no such directory; name runs of `compactlm train`, or parents of seed-*')
    if (path / 'config.json').exists():
      found.setdefault(path.resolve(), (path, ''))
      continue
    seeds = [p for p in path.iterdir() if re.fullmatch(r'seed-\d+', p.name) and p.is_dir()]
    if not seeds:
      raise ConfigError(f'{name} holds neither config.json nor seed-*: it is no directory of `compactlm train`')
    for folder in sorted(seeds):
      found.setdefault(folder.resolve(), (folder, name))
  return list(found.values())


def _read(folder: epath.Path, read_run: ReadRun) -> Run | str:
  """The run, or why it does not count."""
  if not (folder / 'config.json').exists():
    return 'it has not started'
  config, record = read_run(str(folder))
  path = folder / 'results.json'
  try:
    results = parse_row(path.read_bytes())
    scores = {str(name): float(value) for name, value in results['metrics'].items()}
    steps, seconds = int(results['steps']), float(results['seconds'])
    remaining, nonzero = (results.get(name) for name in ('density', 'nonzero'))
    remaining = None if remaining is None else float(remaining)
    nonzero = None if nonzero is None else int(nonzero)
    by_matrix = {str(name): tuple(map(float, own)) for name, own in results.get('by_matrix', {}).items()}
    if len({len(own) for own in by_matrix.values()}) > 1:
      raise ValueError('by_matrix has different numbers of layers')
    grid = read_rows(results.get('grid', ()), str(path))
  except FileNotFoundError:
    return 'it is unfinished; start its command again' if not (folder / 'failure.json').exists() else 'it failed'
  except (OSError, ValueError, KeyError, TypeError, AttributeError, OverflowError) as e:
    raise ConfigError(
      f'{path} is damaged ({type(e).__name__}: {e}); delete it and start the run again: it only evaluates'
    ) from e
  if config.steps not in (0, steps):
    return f'it was evaluated after {steps} steps and is to have {config.steps}; start its command again'
  if not scores:
    return 'it measured nothing: there are no held-out rows'
  code = record.get('code', {})
  return Run(
    folder=str(folder),
    config=config,
    identity=record.get('identity', {}),
    scores=scores,
    steps=steps,
    seconds=seconds,
    command=record.get('command', ''),
    config_hash=record['config_hash'],
    code=f'{code.get("version", "unknown")} ({code.get("sources", "unknown")})',
    remaining=remaining,
    nonzero=nonzero,
    by_matrix=by_matrix,
    grid=grid,
  )


def _check_one_task(runs: Sequence[Run]) -> None:
  first = runs[0]
  for run in runs[1:]:
    together = {run.config.task, first.config.task} <= set(LABELLED)
    if run.config.task != first.config.task and not together:
      raise ConfigError(
        f'{first.folder} is a run of task {first.config.task}, {run.folder} of {run.config.task}: their scores cannot '
        'stand in one report. Report them apart'
      )


def _fields(run: Run, free: tuple[str, ...]) -> dict[str, Any]:
  """Everything that runs of a group share: field -> value, and fingerprints."""

  def flat(tree: Mapping[str, Any], prefix: str) -> dict[str, Any]:
    out: dict[str, Any] = {}
    for name, value in tree.items():
      out |= flat(value, f'{prefix}{name}.') if isinstance(value, Mapping) else {prefix + name: value}
    return out

  identity = {k: v for k, v in run.identity.items() if v and k not in _seeded(run.config)}
  fields = flat(to_json(run.config), 'config.')
  return {k: v for k, v in fields.items() if k.removeprefix('config.') not in ('seed', *free)} | flat(
    identity, 'identity.'
  )


def _seeded(config: RunConfig) -> set[str]:
  """Fingerprints of weights that the run made from its seed: of no folder, or of an earlier stage."""
  if config.task == 'adapt' and config.adapt.base == 'finetune' and len(config.adapt.stages) > 1:
    return {'teacher', 'start'}
  named = {'teacher': config.teacher, 'start': config.model or config.teacher or config.electra.generator}
  return {name for name, folder in named.items() if not folder}


def _group(runs: Sequence[tuple[Run, str]], free: tuple[str, ...]) -> tuple[Group, ...]:
  members: dict[str, list[tuple[Run, str]]] = {}
  first_of: dict[str, Run] = {}
  for run, parent in runs:
    fields = _fields(run, free)
    other = first_of.setdefault(parent, run) if parent else run
    before = _fields(other, free)
    differing = [name for name in sorted({*fields, *before}) if fields.get(name) != before.get(name)]
    if differing:
      name = differing[0]
      raise ConfigError(
        f'{other.folder} and {run.folder} differ in more than the seed: {name} is {before.get(name)!r} and '
        f'{fields.get(name)!r}. Name the runs that belong together one by one'
      )
    members.setdefault(json.dumps(fields, sort_keys=True), []).append((run, parent))
  return tuple(
    Group(name, _by_seed([run for run, _ in found]), json.loads(fields))
    for name, (fields, found) in zip(_names(members), members.items())
  )


def _by_seed(runs: Sequence[Run]) -> tuple[Run, ...]:
  ordered = tuple(sorted(runs, key=lambda run: run.config.seed))
  for a, b in zip(ordered, ordered[1:]):
    if a.config.seed == b.config.seed:
      raise ConfigError(
        f'{a.folder} and {b.folder} are the same run, seed {a.config.seed}: it would count twice. Name one of them'
      )
  return ordered


def _names(members: Mapping[str, list[tuple[Run, str]]]) -> list[str]:
  """Parent's name for runs that share one, a single run's own; longer paths where names would be equal."""
  paths = []
  for found in members.values():
    folders = [epath.Path(run.folder).resolve() for run, _ in found]
    alone = len(folders) == 1 and not re.fullmatch(r'seed-\d+', folders[0].name)
    paths.append(folders[0] if alone else folders[0].parent)
  for length in range(1, 1 + max(len(path.parts) for path in paths)):
    names = ['/'.join(path.parts[-length:]) for path in paths]
    if len(set(names)) == len(names):
      return names
  return [f'{path.name}#{i}' for i, path in enumerate(paths, 1)]


def _notes(group: Group) -> list[str]:
  notes = []
  if len({run.code for run in group.runs}) > 1:
    notes.append(f'{group.name}: its runs were made by different versions of the code')
  for metric in group.metrics:
    without = [str(run.config.seed) for run in group.runs if metric not in run.scores]
    if without:
      notes.append(f'{group.name}: no {metric} from seed {", ".join(without)}')
    broken = [str(run.config.seed) for run in group.runs if not math.isfinite(run.scores.get(metric, 0.0))]
    if broken:
      notes.append(f'{group.name}: {metric} of seed {", ".join(broken)} is not finite')
  return notes
