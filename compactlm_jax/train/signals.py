"""Stopping on request: SIGTERM (maintenance, preemption) and Ctrl-C."""

from __future__ import annotations

import signal
import threading
from types import FrameType, TracebackType

from compactlm_jax.distributed import group


class StopRequest:
  """While open, SIGTERM and the first SIGINT are remembered instead of ending the process.

  The loop asks `requested()` after every step and saves before it leaves. A second SIGTERM changes nothing, a
  second SIGINT aborts at once. With several processes all agree on the same step.

  One may be open inside another (a run inside a series of runs): each knows what the other was asked.
  """

  def __init__(self) -> None:
    self._signals: frozenset[int] = frozenset()
    self._group = group()
    self._previous: dict[int, object] = {}

  def __enter__(self) -> StopRequest:
    if threading.current_thread() is threading.main_thread():
      for number in (signal.SIGTERM, signal.SIGINT):
        self._previous[number] = signal.signal(number, self._remember)
      self._signals = self._signals.union(*(outer._signals for outer in self._outer()))
    return self

  def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
    for number, handler in self._previous.items():
      signal.signal(number, handler)  # type: ignore[arg-type]
    for outer in self._outer():
      outer._signals |= self._signals
    self._previous.clear()

  def _outer(self) -> list[StopRequest]:
    owners = [getattr(handler, '__self__', None) for handler in self._previous.values()]
    return [owner for owner in owners if isinstance(owner, StopRequest)]

  def _remember(self, number: int, frame: FrameType | None) -> None:
    if number == signal.SIGINT and number in self._signals:
      raise KeyboardInterrupt
    self._signals |= {number}
    if self._group is not None:
      self._group.ask_stop()

  def requested(self) -> bool:
    """True once a stop was asked for; with several processes, on any of them, and at the same call on all."""
    return bool(self._signals) if self._group is None else self._group.stop_now()
