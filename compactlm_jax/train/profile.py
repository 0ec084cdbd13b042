"""A trace of some steps, for xprof and TensorBoard."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable
from types import TracebackType
from typing import Any

import jax
from etils import epath

from compactlm_jax.errors import ConfigError, first_line

log = logging.getLogger(__name__)


class Profile:
  """While open, traces steps START to STOP - 1 (0-based) into FOLDER/plugins/profile/TIME/HOST.xplane.pb.

  Each process traces itself. A run that is resumed behind STOP traces nothing, one that is resumed between them what is
  left. A trace that cannot be written is a warning: the run goes on without it.

  Args:
    steps: 'START:STOP', or '' for no trace.
    folder: where the trace is written.
    total: steps of the run.

  Raises:
    ConfigError: `steps` is not two ascending numbers within the run.
  """

  def __init__(self, steps: str, folder: epath.PathLike, total: int) -> None:
    self._start, self._stop = parse_steps(steps, total)
    self._folder = epath.Path(folder)
    self._tracing = False

  def __enter__(self) -> Profile:
    return self

  def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
    self._end()

  def run(self, step: int, fn: Callable[..., Any], *args: Any) -> Any:
    """fn(*args), which is step `step`; the last one traced is waited for."""
    if not self._start <= step < self._stop:
      return fn(*args)
    if not self._tracing:
      self._begin()
    with jax.profiler.StepTraceAnnotation('train', step_num=step):
      out = fn(*args)
      if step + 1 == self._stop:
        jax.block_until_ready(out)
    if step + 1 == self._stop:
      self._end()
    return out

  def _begin(self) -> None:
    options = jax.profiler.ProfileOptions()
    options.python_tracer_level = 0  # each Python call of each thread would hide the steps
    try:
      self._folder.mkdir(parents=True, exist_ok=True)
      jax.profiler.start_trace(self._folder, profiler_options=options)
      self._tracing = True
    except Exception as e:  # of the disk, of a bucket, of the profiler
      self._warn(e)

  def _end(self) -> None:
    if self._tracing:
      self._tracing = False
      try:
        jax.profiler.stop_trace()
        log.info('traced up to step %d: xprof --logdir=%s', self._stop, self._folder)
      except Exception as e:
        self._warn(e)

  def _warn(self, error: Exception) -> None:
    log.warning('--profile: no trace is written to %s (%s); training goes on', self._folder, first_line(error))
    self._stop = self._start


def parse_steps(text: str, total: int) -> tuple[int, int]:
  """(START, STOP) of 'START:STOP'; (0, 0) of ''.

  Raises:
    ConfigError: see `Profile`.
  """
  if not text:
    return 0, 0
  found = re.fullmatch(r'(\d+):(\d+)', text)
  start, stop = (int(found[1]), int(found[2])) if found else (0, 0)
  if not start < stop <= total:
    raise ConfigError(
      f'--profile={text}: use START:STOP with START < STOP <= {total}, the steps of the run; for example 10:15'
    )
  return start, stop
