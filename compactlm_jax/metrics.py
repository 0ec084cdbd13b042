"""What a run reports: metrics.jsonl always, a progress bar on a terminal, plain lines in a log, TensorBoard if asked.

One JSON object per line, flushed at once. A step stands once per kind of line (training or evaluation): a resumed run
drops the lines after the step that it resumes from, and a last line that a kill tore; the device-hours that they told
are in the file device_hours until a new line tells them. Values that JSON has no number
for are the strings 'NaN', 'Infinity' and '-Infinity', so that every JSON parser reads the file and float() reads the
values.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import json
import logging
import math
import queue
import shutil
import sys
import threading
import time
from collections.abc import Iterable, Mapping
from types import TracebackType
from typing import Any, Protocol

import jax
from etils import epath
from tqdm.auto import tqdm

from compactlm_jax.errors import ConfigError, StorageError, first_line
from compactlm_jax.parse import parse_row
from compactlm_jax.storage import GrowingFile, write_whole

log = logging.getLogger(__name__)

_HOURS = 'device_hours'
_BOARD_LINES = 1000
_BOARD_SECONDS = 10.0


class _Summary(Protocol):
  def add_scalar(self, tag: str, value: float, step: int) -> None: ...
  def close(self) -> None: ...


class _Board:
  """TensorBoard's writer in a thread of its own, because on a full disk tensorboardX blocks for ever."""

  def __init__(self, summary: _Summary) -> None:
    self._lines: queue.Queue[tuple[int, Mapping[str, float]] | None] = queue.Queue(_BOARD_LINES)
    self._thread = threading.Thread(target=self._run, args=(summary,), name='compactlm-tensorboard', daemon=True)
    self._thread.start()
    self._whole = True

  def write(self, step: int, values: Mapping[str, float]) -> None:
    self._put((step, dict(values)))

  def close(self) -> None:
    self._put(None)
    self._thread.join(_BOARD_SECONDS)
    if self._thread.is_alive():
      log.warning('TensorBoard: its files cannot be finished and lack lines; metrics.jsonl has them all')

  def _put(self, line: tuple[int, Mapping[str, float]] | None) -> None:
    try:
      self._lines.put_nowait(line)
    except queue.Full:
      if self._whole:
        log.warning('TensorBoard: its files cannot be written for now and will lack lines; metrics.jsonl has them all')
      self._whole = False

  def _run(self, summary: _Summary) -> None:
    try:
      while (line := self._lines.get()) is not None:
        for name, value in line[1].items():
          summary.add_scalar(name, float(value), line[0])
      summary.close()
    except Exception as e:  # of its files
      log.warning('TensorBoard: its files end here (%s); metrics.jsonl has all lines', first_line(e))


class MetricsWriter:
  """Writes metrics of one run. Only process 0 writes or shows anything.

  Args:
    workdir: the run directory.
    total_steps: of the run; for the bar and the time left.
    start_step: steps done already; later lines in an existing file are dropped.
    bar: show a progress bar; by default if standard error is a terminal or belongs to a notebook.
    tensorboard: also write WORKDIR/tensorboard by tensorboardX; by default if that is installed (extra 'tensorboard').

  Raises:
    StorageError: metrics.jsonl cannot be written.
    ConfigError: TensorBoard is asked for but not installed.
  """

  def __init__(
    self,
    workdir: epath.PathLike,
    total_steps: int,
    *,
    start_step: int = 0,
    bar: bool | None = None,
    tensorboard: bool | None = None,
  ) -> None:
    self._active = jax.process_index() == 0
    self._path = epath.Path(workdir) / 'metrics.jsonl'
    self._total, self._start = total_steps, start_step
    self._tokens, self._since, self._opened = 0, time.monotonic(), time.monotonic()
    self._rate, self._hours_before = 0.0, 0.0
    self._hours_kept = self._hours_told = False
    self._first: tuple[int, float] | None = None
    self._bar: Any = None
    self._board: _Board | None = None
    if not self._active:
      return
    self._path.parent.mkdir(parents=True, exist_ok=True)
    if tensorboard if tensorboard is not None else importlib.util.find_spec('tensorboardX') is not None:
      self._board = _open_board(self._path.parent / 'tensorboard')
    try:
      self._hours_before = max(_device_hours(read_metrics(workdir)), _kept_hours(self._path.parent / _HOURS))
      _keep_until(self._path, start_step, self._hours_before)
      self._hours_kept = (self._path.parent / _HOURS).exists()
      self._file = GrowingFile(self._path)
    except OSError as e:
      raise StorageError(f'{self._path}: cannot be written ({e}); free space or fix permissions') from e
    notebook = type(sys.stderr).__module__ == 'ipykernel.iostream'
    if sys.stderr.isatty() or notebook if bar is None else bar:
      # A terminal that does not tell its size says 0 x 0, and tqdm would show nothing there. In a notebook the bar is
      # a widget where ipywidgets is installed, and its width would be in pixels.
      columns = None if notebook else shutil.get_terminal_size((100, 20)).columns
      self._bar = tqdm(total=total_steps, initial=start_step, unit='step', ncols=columns, nrows=20, file=sys.stderr)

  def __enter__(self) -> MetricsWriter:
    return self

  def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
    with contextlib.suppress(*([Exception] if error else [])):  # an earlier error is the one to report
      self.close()

  def step(
    self,
    step: int,
    values: Mapping[str, float],
    *,
    tokens: int = 0,
    logged: bool = True,
    finished: float | None = None,
  ) -> None:
    """Reports one training step, steps in ascending order.

    A logged line also holds 'tokens_per_second' from the end of the last logged step to the end of this one,
    'seconds_left' of the whole run at its pace so far, and 'device_hours': devices of all hosts times hours, from
    opening the metrics to the end of this step, added up over the processes that wrote metrics.jsonl (of one that was
    killed, up to its last line; what it lost is counted too).

    Args:
      step: number of steps done.
      values: host numbers: 'loss', its parts, 'learning_rate', ...
      tokens: real tokens of the step over all hosts; summed up for 'tokens_per_second' since the last logged step.
      logged: whether the step gets a line; the bar moves anyway.
      finished: time.monotonic() at the end of the step, for a line that is written later; None is now.
    """
    if not self._active:
      return
    self._tokens += tokens
    if self._bar is not None:
      self._bar.update(step - self._bar.n)
    now = time.monotonic() if finished is None else finished
    self._first = self._first or (step, now)
    if not logged:
      return
    self._rate = self._tokens / max(now - self._since, 1e-9)
    self._tokens, self._since = 0, now
    rate = {'tokens_per_second': round(self._rate, 1)} if self._rate else {}
    left, hours = self._seconds_left(step, now), self._hours_before + jax.device_count() * (now - self._opened) / 3600
    self.write(step, {**values, **rate, 'seconds_left': round(left, 1), 'device_hours': round(hours, 6)})
    self._hours_told = True
    self._show(step, values, left, hours)

  def write(self, step: int, values: Mapping[str, float]) -> None:
    """Writes one line of host numbers, {'step': step, **values}; on a full disk it waits for `sync`."""
    if not self._active:
      return
    self._file.write(json.dumps({'step': step, **{k: _number(v) for k, v in values.items()}}, allow_nan=False) + '\n')
    if self._board is not None:
      self._board.write(step, values)

  def sync(self) -> None:
    """Before a checkpoint: all lines so far are in the file, in a bucket too.

    Raises:
      OSError: they are not, for now; they are kept. Clients of buckets raise errors of their own.
    """
    if self._active:
      self._file.sync()
      self._forget_hours()

  def close(self) -> None:
    """Closes the file, the bar and TensorBoard.

    Raises:
      StorageError: lines that were kept still cannot be written.
    """
    if not self._active:
      return
    self._active = False
    if self._bar is not None:
      self._bar.close()
    if self._board is not None:
      self._board.close()
    try:
      self._file.close()
      self._forget_hours()
    except OSError as e:
      why = e.strerror or e
      raise StorageError(f'{self._path}: cannot be written ({why}); free space, then run the same command again') from e

  def _forget_hours(self) -> None:
    """Removes the file of device-hours, once a line tells them; left behind, it does no harm."""
    if self._hours_kept and self._hours_told:
      self._hours_kept = False
      with contextlib.suppress(Exception):  # clients of buckets have errors of their own
        (self._path.parent / _HOURS).unlink(missing_ok=True)

  def _seconds_left(self, step: int, now: float) -> float:
    """At the pace since the first step was reported, which leaves compiling out; before that, since opening."""
    first, since = self._first or (step, now)
    pace = (now - since) / (step - first) if step > first else (now - self._opened) / max(step - self._start, 1)
    return pace * max(self._total - step, 0)

  def _show(self, step: int, values: Mapping[str, float], left: float, hours: float) -> None:
    names = [k for k in values if 'loss' in k or k.startswith('relation') or k == 'density']
    parts = {name: f'{float(values[name]):.4g}' for name in names}
    if self._rate:
      parts['tokens/s'] = f'{self._rate:,.0f}'
    if self._bar is not None:
      self._bar.set_postfix(parts)  # tqdm itself shows step, total and time left
      return
    text = ', '.join(f'{k} {v}' for k, v in parts.items())
    finish = time.strftime('%Y-%m-%d %H:%M:%S', time.localtime(time.time() + left))
    log.info(
      'step %d/%d, %s, %s left (until %s), %.3g device-hours used',
      step,
      self._total,
      text,
      tqdm.format_interval(left),
      finish,
      hours,
    )


def read_metrics(workdir: epath.PathLike) -> list[dict[str, Any]]:
  """The lines of WORKDIR/metrics.jsonl, with non-finite values as floats again; a torn last line is left out."""
  path = epath.Path(workdir) / 'metrics.jsonl'
  lines = _whole_lines(path.read_bytes()) if path.exists() else []
  return [{k: float(v) if v in _NAMES.values() else v for k, v in parse_row(line).items()} for line in lines]


_NAMES = {math.inf: 'Infinity', -math.inf: '-Infinity', None: 'NaN'}


def _number(value: Any) -> int | float | str:
  if isinstance(value, int):
    return value
  value = float(value)
  return value if math.isfinite(value) else _NAMES[None if math.isnan(value) else value]


def _whole_lines(content: bytes) -> list[bytes]:
  """Complete lines; what follows the last newline, or is no JSON object with a step, was torn."""

  def whole(line: bytes) -> bool:
    try:
      return isinstance(parse_row(line)['step'], int)
    except (ValueError, KeyError, TypeError):
      return False

  return [line for line in content.split(b'\n')[:-1] if whole(line)]


def _device_hours(lines: Iterable[Mapping[str, Any]]) -> float:
  """What the runs so far used, by the line that says most."""
  said = [line.get('device_hours') for line in lines]
  return float(max((hours for hours in said if isinstance(hours, (int, float)) and math.isfinite(hours)), default=0))


def _kept_hours(path: epath.Path) -> float:
  """What `_keep_until` left there; 0 if that is nothing, or damaged."""
  try:
    hours = float(path.read_text()) if path.exists() else 0.0
  except ValueError:
    return 0.0
  return hours if math.isfinite(hours) else 0.0


def _keep_until(path: epath.Path, step: int, hours: float) -> None:
  """Drops lines after `step` and torn ones, but not their device-hours; the file changes as a whole or not at all."""
  if not path.exists():
    return
  old = path.read_bytes()
  kept = [line for line in _whole_lines(old) if parse_row(line)['step'] <= step]
  new = b''.join(line + b'\n' for line in kept)
  if new != old:
    if hours > _device_hours(map(parse_row, kept)):
      write_whole(path.parent / _HOURS, f'{hours}\n')
    write_whole(path, new)


def _open_board(folder: epath.Path) -> _Board:
  try:
    board = importlib.import_module('tensorboardX')
  except ImportError as e:
    raise ConfigError("TensorBoard output needs the extra: pip install 'compactlm-jax[tensorboard]'") from e
  return _Board(board.SummaryWriter(str(folder)))
