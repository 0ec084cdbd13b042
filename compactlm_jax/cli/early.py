"""SIGTERM when no step is under way: imports, data, weights and other processes take time, and nothing needs saving."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from collections.abc import Iterator
from types import FrameType

from compactlm_jax.errors import PreemptedError


@contextlib.contextmanager
def leaves_early(name: str) -> Iterator[None]:
  """While open, SIGTERM ends the process with 75 at once, unless another handler is in place: that of the loop saves.

  Python calls handlers between two bytecodes only, and not while a runtime starts or waits for others: there a thread
  does it.

  Args:
    name: of the command, for the message.
  """
  main = threading.current_thread() is threading.main_thread()
  if not main or signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL:
    yield
    return
  told, tell = os.pipe()
  os.set_blocking(tell, False)
  first = threading.Lock()

  def leave(number: int, frame: FrameType | None) -> None:
    if first.acquire(blocking=False):
      why = 'asked to stop while no step was under way: nothing is lost, and the same command goes on'
      os.write(2, f'compactlm {name}: {why}\n'.encode())
      os._exit(PreemptedError.exit_code)

  def wait() -> None:
    while numbers := os.read(told, 64):
      if signal.SIGTERM in numbers and signal.getsignal(signal.SIGTERM) is leave:
        leave(signal.SIGTERM, None)
    os.close(told)

  signal.signal(signal.SIGTERM, leave)
  before = signal.set_wakeup_fd(tell, warn_on_full_buffer=False)
  threading.Thread(target=wait, name='compactlm-early', daemon=True).start()
  try:
    yield
  finally:
    signal.set_wakeup_fd(before)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    os.close(tell)
