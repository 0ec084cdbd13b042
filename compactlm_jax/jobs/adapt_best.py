"""What a run of an adaptive network keeps: the best network over all cells, each cell at its best, and the grid.

WORKDIR/best              the network with the highest sum over cells of the first metric: loads as a run does
WORKDIR/best/cells/CELL   each cell as it was when it scored best, as a model folder of its own
WORKDIR/best.json         {'all' or CELL: {'value', 'step'}}: the sum, or the cell's own metric

A stage takes over what the stage before it kept, and keeps what is better than that. Such an entry of best.json has
'stage', the name of the stage whose step it is. The network with the best sum, which is the one that the stage starts
from, is taken over if both stages have the same cells, as step 0 of its checkpoints.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import logging
import math
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import numpy as np
from etils import epath

from compactlm_jax.checkpoint import Checkpoints
from compactlm_jax.config import Cell, EncoderConfig
from compactlm_jax.errors import StorageError, first_line
from compactlm_jax.interop.bundle import save_pretrained
from compactlm_jax.interop.tokenizer_files import TokenizerFiles
from compactlm_jax.jobs.grid_rows import cell_bundle, grid_rows, metrics_of_cells
from compactlm_jax.jobs.models import towers_of
from compactlm_jax.parallel import replicated
from compactlm_jax.parse import parse_row
from compactlm_jax.stepdir import DamagedError, StepDirectory, copy_step
from compactlm_jax.storage import copy_folder, is_remote, write_whole
from compactlm_jax.train.agree import on_first_process
from compactlm_jax.types import Params, TrainState

log = logging.getLogger(__name__)

ALL = 'all'
"""The network with the best sum over all cells, in best.json."""

BEST, CELLS, RECORD = 'best', 'cells', 'best.json'


@dataclasses.dataclass
class BestCells:
  """See `train.loop.Keeper`.

  What is kept depends on the evaluations alone, not on interruptions: of equal values the earliest stays, and an
  evaluation that is made again changes nothing. Every file appears whole or not at all.

  Attributes:
    cells: the full network first.
    encoder: of the full network.
    model: `types.Task.model`.
    metric: name of the metric to compare by.
    higher: whether more of it is better.
    tokenizer: its files.
    seq_len: tokens of a row whose FLOPs the grid counts.
    keep: False keeps nothing; the grid is made all the same.
    before: run directory of the stage before; '' for none.
  """

  cells: tuple[Cell, ...]
  encoder: EncoderConfig
  model: Mapping[str, Any]
  metric: str
  higher: bool
  tokenizer: TokenizerFiles | None
  seq_len: int
  keep: bool = True
  before: str = ''
  _workdir: epath.Path | None = dataclasses.field(default=None, init=False)
  _record: dict[str, dict[str, Any]] = dataclasses.field(default_factory=dict, init=False)

  def start(self, workdir: epath.Path, step: int) -> None:
    """Reads what an interrupted run kept; a fresh one starts with what the stage before kept, or with nothing."""
    self._workdir, self._record = workdir, {}
    if not self.keep:
      return
    if step:
      if not (workdir / RECORD).exists():
        raise StorageError(
          f'{workdir / RECORD} is gone, so that nobody knows how good the networks in {BEST} are; bring it back, or '
          f'write {{}} to it to keep what comes from now on'
        )
      self._record = read_best(workdir)
      return
    if self.before:
      self._record = self._inherited(read_best(self.before), epath.Path(self.before).name)
    on_first_process(lambda: self._take_over(workdir))

  def offer(self, state: TrainState, scores: Mapping[str, float], metadata: Mapping[str, Any]) -> None:
    """Keeps what is better than before."""
    metrics = metrics_of_cells(scores, self.cells)
    values = {cell: metrics.get(cell, {}).get(self.metric, math.nan) for cell in self.cells}
    if not self.keep or not scores or self._workdir is None:
      return
    step, best = int(state.step), self._workdir / BEST
    if self._is_better(ALL, sum(values.values())):
      self._save(best, step, state, metadata)
      self._note(ALL, sum(values.values()), step)
    better = [cell for cell in self.cells if self._is_better(cell.name, values[cell])]
    if not better:
      return
    params = _whole(state.params)
    if jax.process_index() == 0:
      bundle = towers_of(params, self.model, self.tokenizer)[0]
    for cell in better:
      if jax.process_index() == 0:
        with _quiet():
          save_pretrained(cell_bundle(bundle, cell), best / CELLS / cell.name)
      self._note(cell.name, values[cell], step)

  def results(self, params: Params, scores: Mapping[str, float]) -> Mapping[str, Any]:
    """'metrics' of the full network, 'grid' of all cells, 'seq_len' of its FLOPs, and 'best' as in best.json."""
    metrics = metrics_of_cells(scores, self.cells)
    shapes = jax.eval_shape(lambda tree: towers_of(tree, self.model, None)[0].params, params)
    pooler = 'pooler' in shapes['encoder']
    encoder = dataclasses.replace(self.encoder, pooler=pooler)
    rows = grid_rows(scores, self.cells, encoder, shapes, self.seq_len)
    kept = {'best': self._record} if self._record else {}
    return {'metrics': metrics.get(self.cells[0], {}), 'grid': rows, 'seq_len': self.seq_len, **kept}

  def _inherited(self, record: Mapping[str, dict[str, Any]], stage: str) -> dict[str, dict[str, Any]]:
    """The entries of the stage before that this one has too."""
    names = {cell.name for cell in self.cells}
    shared = names | {ALL} if set(record) == names | {ALL} else names
    return {name: {**entry, 'stage': entry.get('stage', stage)} for name, entry in record.items() if name in shared}

  def _take_over(self, workdir: epath.Path) -> None:
    """The files of what is inherited, after removing what a killed start left; best.json, which names them, is last."""
    best, source = workdir / BEST, epath.Path(self.before) / BEST
    (workdir / RECORD).unlink(missing_ok=True)
    if best.exists():
      best.rmtree()
    try:
      for name in self._record:
        if name != ALL:
          copy_folder(source / CELLS / name, best / CELLS / name)
      if ALL in self._record:
        steps = source / 'checkpoints'
        newest = StepDirectory(steps, is_remote(steps)).steps()[-1:]
        copy_step(steps / str(newest[0] if newest else 0), best / 'checkpoints' / '0')
        if self.tokenizer is not None:
          copy_folder(source / 'tokenizer', best / 'tokenizer')
      self._write_record(workdir)
    except (OSError, DamagedError) as e:
      raise StorageError(
        f'{source}: what the stage before kept could not be copied ({first_line(e)}); free space, bring it back, or '
        f'write {{}} to {RECORD} there to do without'
      ) from e

  def _is_better(self, name: str, value: float) -> bool:
    before = self._record.get(name, {}).get('value')
    if not math.isfinite(value) or before is None:
      return math.isfinite(value)
    return value > before if self.higher else value < before

  def _note(self, name: str, value: float, step: int) -> None:
    self._record[name] = {'value': value, 'step': step}
    if jax.process_index() == 0 and self._workdir is not None:
      self._write_record(self._workdir)

  def _write_record(self, workdir: epath.Path) -> None:
    write_whole(workdir / RECORD, json.dumps(self._record, indent=2) + '\n')

  def _save(self, folder: epath.Path, step: int, state: TrainState, metadata: Mapping[str, Any]) -> None:
    if jax.process_index() == 0 and self.tokenizer is not None:
      (folder / 'tokenizer').mkdir(parents=True, exist_ok=True)
      self.tokenizer.write(folder / 'tokenizer')
    with Checkpoints(folder / 'checkpoints', keep=1) as checkpoints:
      if step not in checkpoints.all_steps():  # of an evaluation that is made again
        checkpoints.save(step, state, metadata, wait=True)


def read_best(workdir: epath.PathLike) -> dict[str, dict[str, Any]]:
  """What best.json of a run holds; {} if there is none.

  Raises:
    StorageError: it is damaged.
  """
  path = epath.Path(workdir) / RECORD
  try:
    found = parse_row(path.read_bytes()) if path.exists() else {}
    if not isinstance(found, dict) or not all(map(_is_entry, found.values())):
      raise ValueError('it is no record of networks')
    return found
  except (OSError, ValueError) as e:
    raise StorageError(f'{path}: cannot be read ({e}); bring it back, or write {{}} to it to keep anew') from e


def _is_entry(entry: object) -> bool:
  if not isinstance(entry, dict) or type(entry.get('step')) is not int or not isinstance(entry.get('stage', ''), str):
    return False
  value = entry.get('value')
  return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _whole(params: Params) -> Params:
  """Whole parameters on the host, where slicing compiles nothing."""
  if jax.process_count() > 1:
    placed = jax.jit(lambda tree: tree, out_shardings=replicated(jax.tree.leaves(params)[0].sharding.mesh))(params)
    params = jax.tree.map(lambda leaf: leaf.addressable_data(0), placed)
  return jax.tree.map(np.asarray, params)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
  """Without the warnings of an export, which would come for every cell of every evaluation."""
  logger = logging.getLogger('compactlm_jax.interop')
  level = logger.level
  logger.setLevel(logging.ERROR)
  try:
    yield
  finally:
    logger.setLevel(level)
