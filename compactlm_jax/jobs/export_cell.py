"""`compactlm export` of one sub-network of an adaptive network, named or chosen by a budget, as a model of its own."""

from __future__ import annotations

import dataclasses
import logging
import math
from collections.abc import Sequence
from typing import Any

from etils import epath

from compactlm_jax.compress.subnet import subnet_config
from compactlm_jax.config import Cell
from compactlm_jax.errors import ConfigError
from compactlm_jax.interop.bundle import Bundle, from_pretrained
from compactlm_jax.jobs import export_tables
from compactlm_jax.jobs.adapt_best import ALL, BEST, CELLS, read_best
from compactlm_jax.jobs.budget import Choice, as_text, choose, parse_budgets
from compactlm_jax.jobs.export import BATCH_SIZES, SECONDS, Export, check_options, export_model, run_export
from compactlm_jax.jobs.grid import (
  Network,
  Timed,
  asked_cell,
  cell_bundle,
  load_network,
  scored_rows,
  seq_len_of,
  sized,
  timed_rows,
)
from compactlm_jax.jobs.latency import JAX, ONNXRUNTIME, measure
from compactlm_jax.jobs.models import is_run
from compactlm_jax.report.grid import GridRow, as_entries, first_metric

log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class CellExport:
  """A sub-network that was written.

  Attributes:
    export: what was written, and what was measured of it.
    cell: which one.
    whole: size of the full network.
    own: size of the sub-network.
    network: what it was cut from.
    seq_len: tokens of the row whose FLOPs are counted.
    choice: by a budget; None if it was named.
    note: what the latencies of `choice` are of.
  """

  export: Export
  cell: Cell
  whole: GridRow
  own: GridRow
  network: Network
  seq_len: int
  choice: Choice | None = None
  note: str = ''

  def text(self) -> str:
    """What `compactlm export` prints."""
    full = self.network.bundle.config
    small = subnet_config(full, self.cell)
    named = {'num_layers': 'layers', 'num_heads': 'heads', 'intermediate_size': 'neurons', 'hidden_size': 'channels'}
    sizes = [f'{getattr(small, field)} of {getattr(full, field)} {what}' for field, what in named.items()]
    share = 100 * (self.own.params or 0) / (self.whole.params or 1)
    counts = [
      f'{(own or 0) / unit:.4g} of {(whole or 0) / unit:.4g} {what}'
      for own, whole, unit, what in (
        (self.own.params, self.whole.params, 1e6, f'million parameters ({share:.1f} %)'),
        (self.own.flops, self.whole.flops, 1e9, f'GFLOPs for a row of {self.seq_len} tokens'),
      )
    ]
    parts = [] if self.choice is None else [as_text(self.choice, self.note)]
    parts.append(f'Sub-network {self.cell.name} of {self.network.path}: {", ".join([*sizes, *counts])}.')
    return '\n\n'.join([*parts, export_tables.as_text(self.export)])

  def report(self) -> dict[str, Any]:
    """What --report adds to the numbers of an export: the sub-network, the full network, and what else was close."""
    others = () if self.choice is None else (*self.choice.others, *self.choice.missed)
    chosen = None if self.choice is None else {
      'budget': [budget.text for budget in self.choice.budgets],
      'metric': self.choice.metric,
      'chosen': as_entries([self.choice.row])[0],
      'others': as_entries(others),
      'latency': self.note,
    }  # fmt: skip
    return {
      'cell': {**as_entries([self.own])[0], 'name': self.cell.name},
      'full': as_entries([self.whole])[0],
      'seq_len': self.seq_len,
      'choice': chosen,
    }


@dataclasses.dataclass(frozen=True)
class Wanted:
  """Which sub-network is exported.

  Attributes:
    width: share of heads and neurons; None for all.
    depth: share of layers; None for all.
    hidden: width of the residual stream; 0 for all of it.
    budget: 'latency<5ms', 'params<20e6', 'flops<3e9', or several with commas: the sub-network with the best score
      within, of a finished run. Latencies are measured here, through the engine of the format. '' exports what
      `width`, `depth` and `hidden` say.
    best: what scored best during training in place of the last checkpoint: the sub-network as it was at its own best,
      or, if none is named, the network with the best sum.
    batch: rows of text of a measured latency.
    seq_len: their tokens; 0 takes those of the training rows.
  """

  width: float | None = None
  depth: float | None = None
  hidden: int = 0
  budget: str = ''
  best: bool = False
  batch: int = 1
  seq_len: int = 0

  @property
  def named(self) -> bool:
    """Whether it names a sub-network itself."""
    return self.width is not None or self.depth is not None or bool(self.hidden)

  @property
  def anything(self) -> bool:
    """Whether it says anything; else the whole network is exported."""
    return self.named or bool(self.budget) or self.best


def run_export_cell(
  checkpoint: str,
  output: str,
  wanted: Wanted,
  *,
  format: str = 'hf',
  layout: str = 'auto',
  values: str = 'float32',
  latency: bool = False,
) -> CellExport | Export:
  """Writes one sub-network of a network, whole or not at all.

  Args:
    checkpoint: run directory, or the folder of a full network (which says nothing of what was trained).
    output: folder to write.
    wanted: which one.
    format: see `run_export`.
    layout: see `run_export`.
    values: see `run_export`.
    latency: measure the sub-network beside the full network.

  Returns:
    What was written; an `Export` of the whole network for `wanted.best` alone.

  Raises:
    ConfigError: see `asked_cell`, `choose` and `run_export`; nothing was kept for `wanted.best`; options that do not
      go together.
    DataError, NumericsError, StorageError: see `run_export`.
  """
  check_options(format, layout, values)
  options: dict[str, Any] = {'format': format, 'layout': layout, 'values': values}
  kept = _checked(checkpoint, wanted)
  if wanted.best and not (wanted.named or wanted.budget):
    return run_export(kept, output, latency=latency, **options)
  network = load_network(kept or checkpoint)
  network = dataclasses.replace(network, seq_len=seq_len_of(checkpoint))
  length, choice, note = network.length(wanted.seq_len), None, ''
  if wanted.budget:
    timing = Timed(wanted.batch, length, ONNXRUNTIME if format == 'onnx' else JAX)
    choice, note = _chosen(checkpoint, network, wanted, timing)
  cell = choice.row.cell if choice else asked_cell(network, wanted.width, wanted.depth, wanted.hidden)
  bundle = (_at_its_best(kept, cell) if wanted.best else None) or cell_bundle(network.bundle, cell)
  done = export_model(bundle, output, name=f'{network.path} {cell.name}', **options)
  if latency:
    log.info('measuring latency here; --nolatency leaves it out')
    models = {'full network': network.bundle, 'exported': done.bundle}
    done = dataclasses.replace(done, latency=measure(models, BATCH_SIZES, length, seconds=SECONDS))
  whole, own = sized([GridRow(network.grid[0]), GridRow(cell)], network, length)
  return CellExport(done, cell, whole, own, network, length, choice, note)


def _checked(checkpoint: str, wanted: Wanted) -> str:
  """The folder of what scored best, if that is wanted; else ''."""
  if wanted.named and wanted.budget:
    raise ConfigError('--budget: chooses width and depth itself; leave out --width, --depth and --hidden')
  if wanted.budget:
    parse_budgets(wanted.budget)  # before anything is loaded
  if not wanted.best:
    return ''
  kept = str(epath.Path(checkpoint) / BEST)
  if not is_run(kept):
    raise ConfigError(
      f'--best: {checkpoint} has no folder {BEST}; train with config.adapt.keep_best, or leave --best out for the last '
      'checkpoint'
    )
  return kept


def _chosen(checkpoint: str, network: Network, wanted: Wanted, timing: Timed) -> tuple[Choice, str]:
  """(what fits the budget, what its latencies are of)."""
  budgets, note = parse_budgets(wanted.budget), ''
  rows, metric = _scored(checkpoint, network, wanted.best)
  rows = sized(rows, network, timing.seq_len)
  if any(budget.quantity == 'latency_ms' for budget in budgets):
    rows, note = timed_rows(rows, network, timing), timing.note(timing.seq_len)
  return choose(rows, budgets, metric), note


def _scored(checkpoint: str, network: Network, best: bool) -> tuple[Sequence[GridRow], str]:
  """(sub-networks with their scores, the metric to choose by) of a run; with `best`, each one's best."""
  rows = scored_rows(checkpoint)
  pretrained = network.adapt is not None and network.adapt.base != 'finetune'
  metric = 'loss' if pretrained else first_metric(rows)  # as what is kept for `best` was compared
  if metric is None:
    raise ConfigError(f'{checkpoint}: its sub-networks have no scores; it had no held-out rows')
  known = {cell.name for cell in network.grid}
  rows = tuple(row for row in rows if row.cell.name in known)
  if best:
    record = {name: entry['value'] for name, entry in read_best(checkpoint).items() if name != ALL}
    rows = tuple(dataclasses.replace(row, metrics={metric: record.get(row.cell.name, math.nan)}) for row in rows)
  return rows, metric


def _at_its_best(kept: str, cell: Cell) -> Bundle | None:
  """The sub-network as it was when it scored best; None if that was not kept."""
  folder = epath.Path(kept) / CELLS / cell.name
  if folder.exists():
    return from_pretrained(folder)
  log.warning('%s is not there: %s is cut out of the network with the best sum', folder, cell.name)
  return None
