"""Pruned runs in a report: which of them lie on one line, what remains of their encoders, and the base lines beside."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from etils import epath

from compactlm_jax.config import PruneConfig
from compactlm_jax.config.prune import PENALISED, STRUCTURES
from compactlm_jax.report.runs import Group
from compactlm_jax.report.summary import Summary, lower_is_better, summarize

NAMES = {
  'hard_movement': 'hard movement',
  'soft_movement': 'soft movement',
  'magnitude': 'magnitude',
  'post_hoc_magnitude': 'magnitude, post hoc',
  'l0': 'L0',
  'rpp': 'RPP',
  'random': 'random',
}
"""Methods as they are called in tables and pictures, in the order of their colours."""

_ROUNDING = 1e-3
"""Of densities in results.json it is far below, other encoders are far above it."""

_SHOWN = 3
"""Settings that a label names at most."""


@dataclasses.dataclass(frozen=True)
class Line:
  """Pruned groups that differ in how much they prune alone.

  Attributes:
    label: method, structure, 'distilled' with a teacher, and settings where other lines would be called the same.
    groups: the fewest remaining weights first.
  """

  label: str
  groups: tuple[Group, ...]

  @property
  def config(self) -> PruneConfig:
    """What its runs share, but for `asked`."""
    return self.groups[0].runs[0].config.prune

  @property
  def teacher(self) -> str:
    """Name of the teacher's folder; '' without one."""
    return teacher_of(self.groups[0])


@dataclasses.dataclass(frozen=True)
class Row:
  """One metric of one pruned group.

  Attributes:
    method: see `NAMES`.
    structure: of what is pruned; 'none' is single weights.
    teacher: name of its folder; '' without one.
    asked: what was set: 'density 0.1', 'lambda 400' or 'threshold 0.3'.
    group: name of the group.
    remaining: mean fraction of the encoder's weights that are not zero.
    nonzero: mean number of them; None where it is not known.
    metric: its name.
    scores: over seeds.
    of_dense: mean as a fraction of the mean of the dense runs of the same starting model; None without exactly one
      group of them, or for losses.
  """

  method: str
  structure: str
  teacher: str
  asked: str
  group: str
  remaining: float
  nonzero: float | None
  metric: str
  scores: Summary
  of_dense: float | None


def is_pruned(group: Group) -> bool:
  """Whether a group pruned, and says what remains."""
  return group.runs[0].config.task == 'prune' and _says_what_remains(group)


@dataclasses.dataclass(frozen=True)
class Point:
  """A fine-tuned group that is smaller than the encoder that others prune, or was trained to be (LayerDrop).

  Attributes:
    kind: 'LayerDrop', 'fewer layers' or 'smaller model'.
    group: its runs.
    remaining: its weights as a fraction of those of the encoder that others prune.
  """

  kind: str
  group: Group
  remaining: float


def dense_groups(groups: Sequence[Group]) -> list[Group]:
  """The fine-tuned models of which nothing was left out, of the starting models of the pruned ones.

  Args:
    groups: of one subject.
  """
  pruned = [group for group in groups if is_pruned(group)]
  dense = (group for group in groups if group.runs[0].config.task == 'finetune' and not _fewer_layers(group))
  return [group for group in dense if any(_same_start(group, other) for other in pruned)]


def points_beside(groups: Sequence[Group]) -> list[Point]:
  """Base lines that are no lines: LayerDrop, and dense models with fewer weights than the encoder that others prune.

  Those of other starting models than the pruned ones are left out unless all of these have as many weights in all:
  otherwise there is no one number that theirs could be a fraction of. So are runs that do not say how many they have.

  Args:
    groups: of one subject.
  """
  pruned = [group for group in groups if is_pruned(group)]
  whole = common_weights(groups)
  found = []
  for group in (group for group in groups if group.runs[0].config.task == 'finetune'):
    nonzero, fewer = nonzero_of(group), _fewer_layers(group)
    if fewer and any(_same_start(group, other) for other in pruned) and _says_what_remains(group):
      found.append(Point(fewer, group, remaining_of(group)))
    elif whole and nonzero is not None and nonzero < (1 - _ROUNDING) * whole:
      found.append(Point(fewer or 'smaller model', group, nonzero / whole))
  return found


def common_weights(groups: Sequence[Group]) -> float | None:
  """How many weights can be masked in the encoder of every pruned group; None if not known, or not the same."""
  counts = []
  for group in filter(is_pruned, groups):
    nonzero, remaining = nonzero_of(group), remaining_of(group)
    counts += [nonzero / remaining] if nonzero and remaining else []
  same = counts and max(counts) - min(counts) <= _ROUNDING * max(counts)
  return float(np.mean(counts)) if same else None


def _fewer_layers(group: Group) -> str:
  """'LayerDrop' or 'fewer layers' of runs that leave layers out, in training or at its end; else ''."""
  config = group.runs[0].config
  return 'LayerDrop' if config.encoder.layer_drop else 'fewer layers' if config.finetune.keep_layers else ''


def _says_what_remains(group: Group) -> bool:
  return all(run.remaining is not None for run in group.runs)


def _same_start(one: Group, other: Group) -> bool:
  """Whether both began with the same weights, as far as was recorded; without a model, with the same encoder."""
  a, b = one.runs[0].config, other.runs[0].config
  encoders = [dataclasses.replace(config.encoder, layer_drop=0.0) for config in (a, b)]
  if a.model.rstrip('/') != b.model.rstrip('/') or (not a.model and encoders[0] != encoders[1]):
    return False
  digests = {group.fields['identity.start'] for group in (one, other) if group.fields.get('identity.start')}
  return len(digests) < 2


def remaining_of(group: Group) -> float:
  """Mean over seeds of the fraction of the encoder's weights that are not zero."""
  return float(np.mean([run.remaining for run in group.runs if run.remaining is not None]))


def nonzero_of(group: Group) -> float | None:
  """Mean over seeds of how many weights of the encoder are not zero; None where a run does not say."""
  known = [run.nonzero for run in group.runs if run.nonzero is not None]
  return float(np.mean(known)) if len(known) == len(group.runs) else None


def teacher_of(group: Group) -> str:
  """Name of the teacher's folder; '' without one."""
  return epath.Path(group.runs[0].config.teacher).name


def lines_of(groups: Sequence[Group]) -> tuple[Line, ...]:
  """Pruned groups as lines of a figure.

  Groups share a line if all their settings agree but the one that decides how much remains: the weight of the penalty
  for soft movement, L0 and RPP without a controller (the threshold where there is no penalty), the density otherwise.

  Args:
    groups: of one subject; what was not pruned is left out.
  """
  shared: dict[str, list[Group]] = {}
  for group in filter(is_pruned, groups):
    prune = group.runs[0].config.prune
    ignored = ('config.prune.density', f'config.prune.{_decides(prune)[0]}')
    shared.setdefault(json.dumps({k: v for k, v in group.fields.items() if k not in ignored}), []).append(group)
  found = [(json.loads(fields), tuple(sorted(own, key=remaining_of))) for fields, own in shared.items()]
  found.sort(key=lambda item: _place(item[1][0]))
  plain = [_plain_label(own[0]) for _, own in found]
  lines = []
  for (fields, own), label in zip(found, plain):
    namesakes = [other for (other, _), its in zip(found, plain) if its == label]
    lines.append(Line(label + _differences(fields, namesakes), own))
  return tuple(lines)


def rows_of(groups: Sequence[Group]) -> list[Row]:
  """A row for each metric of each pruned group, line by line."""
  rows = []
  for line in lines_of(groups):
    for group in line.groups:
      dense = [other for other in dense_groups(groups) if _same_start(group, other)]
      name, value = _decides(group.runs[0].config.prune)
      said = {'regularization': 'lambda'}.get(name, name)
      for metric in group.metrics:
        scores = summarize(group.values(metric), metric)
        rows.append(
          Row(
            method=NAMES[line.config.method],
            structure=line.config.structure,
            teacher=line.teacher,
            asked=f'{said} {value:g}',
            group=group.name,
            remaining=remaining_of(group),
            nonzero=nonzero_of(group),
            metric=metric,
            scores=scores,
            of_dense=_of_dense(scores.mean, metric, dense),
          )
        )
  return rows


def _decides(prune: PruneConfig) -> tuple[str, float]:
  """(field, value) that sets how much remains."""
  if prune.method not in PENALISED or prune.control == 'density':
    return 'density', prune.density
  if prune.method == 'soft_movement' and not prune.regularization:
    return 'threshold', prune.threshold
  return 'regularization', prune.regularization


def _place(group: Group) -> tuple[int, int, bool]:
  """Where a line stands among others: by method, structure, teacher."""
  config = group.runs[0].config
  return list(NAMES).index(config.prune.method), STRUCTURES.index(config.prune.structure), bool(config.teacher)


def _plain_label(group: Group) -> str:
  prune = group.runs[0].config.prune
  structure = '' if prune.structure == 'none' else f', {prune.structure}'
  return NAMES[prune.method] + structure + (', distilled' if group.runs[0].config.teacher else '')


def _differences(fields: Mapping[str, Any], namesakes: Sequence[Mapping[str, Any]]) -> str:
  """' (field=value, ...)' of the settings in which lines that would be called the same differ."""
  names = [name for name in fields if any(other.get(name) != fields[name] for other in namesakes)]
  names.sort(key=lambda name: not name.startswith('config.prune.'))
  said = [f'{name.rpartition(".")[2]}={_short(fields[name])}' for name in names[:_SHOWN]]
  return f' ({", ".join(said)}{", ..." if names[_SHOWN:] else ""})' if said else ''


def _short(value: Any) -> str:
  text = f'{value:g}' if isinstance(value, float) else str(value)
  return text if len(text) <= 20 else f'…{text[-19:]}'


def _of_dense(mean: float, metric: str, dense: Sequence[Group]) -> float | None:
  if len(dense) != 1 or lower_is_better(metric) or not dense[0].values(metric):
    return None
  whole = float(np.mean(dense[0].values(metric)))
  return mean / whole if whole else None
