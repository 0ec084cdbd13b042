"""A line in the log when a step takes much longer than the others: a host hangs, or data do not come."""

from __future__ import annotations

import collections
import itertools
import logging
import statistics
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from types import TracebackType
from typing import TypeVar

log = logging.getLogger(__name__)

_T = TypeVar('_T')
_TIMES = 10
_AT_LEAST = 10.0  # seconds; short steps vary by more than tenfold without meaning anything
_KNOWN = 10  # steps before the median means something; the first ones compile


class Watchdog:
  """While open, a thread of its own looks at the step that is under way.

  Args:
    now: seconds of a clock.
    look: seconds between two looks; 0 starts no thread.
  """

  def __init__(self, now: Callable[[], float] = time.monotonic, look: float = 1.0) -> None:
    self._now, self._look = now, look
    self._seconds: collections.deque[float] = collections.deque(maxlen=100)
    self._current: tuple[int, float] | None = None
    self._said = -1
    self._over = threading.Event()

  def __enter__(self) -> Watchdog:
    if self._look:
      threading.Thread(target=self._run, name='compactlm-watchdog', daemon=True).start()
    return self

  def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
    self._over.set()

  def over(self, first: int, batches: Iterable[_T]) -> Iterator[_T]:
    """The batches from step `first` on (0-based); a step is under way from the wait for its batch until `done`."""
    source, none = iter(batches), object()
    for step in itertools.count(first):
      self._current = (step, self._now())
      if (batch := next(source, none)) is none:
        break
      yield batch  # type: ignore[misc]
    self._current = None

  def done(self) -> None:
    """The step is over; what follows until the next one is none: evaluations, saves."""
    if self._current is not None:
      self._seconds.append(self._now() - self._current[1])
    self._current = None

  def check(self) -> None:
    """Logs the step that is under way, once, if it takes more than ten times the median of the last 100."""
    current = self._current
    if current is None or len(self._seconds) < _KNOWN or self._said == current[0]:
      return
    median, taken = statistics.median(list(self._seconds)), self._now() - current[1]
    if taken > max(_TIMES * median, _AT_LEAST):
      self._said = current[0]
      log.warning(
        'step %d takes %.0f s so far, the median is %.3g s: another host, the device, the data or compiling (rows of a '
        'new length) keep it waiting',
        current[0] + 1,
        taken,
        median,
      )

  def _run(self) -> None:
    while not self._over.wait(self._look):
      self.check()
