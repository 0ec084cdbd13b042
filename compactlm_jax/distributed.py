"""Several processes that run one job: how they find each other, agree, and leave together.

Every process runs the same program. What they say to each other here goes through the key-value store of JAX's
coordination service (process 0 holds it): nothing is compiled, and nobody waits for a process that failed.

- `Group.gather` brings a text of each process to all; `check_same` refuses processes that differ.
- `Group.stop_now` answers alike on all processes, at the same call, after one of them was asked to stop.
- `Group.end` says how this process ended and waits for the others; a process whose main thread waits for one that
  failed is ended by a thread of its own, with the same exit code.
- JAX ends processes by SIGABRT once another one is silent for longer than the heartbeat; `cli.worker` translates it.
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import json
import logging
import os
import re
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from compactlm_jax.errors import ConfigError, PeerError, first_line

log = logging.getLogger(__name__)

_PREFIX = 'compactlm'
_EVENTS = f'{_PREFIX}/events'
_STOP = f'{_EVENTS}/stop'
_LOOK_SECONDS = 0.3
_GRACE_SECONDS = 3.0  # for the main thread to end by itself, with a message of its own
_END_SECONDS = 15.0  # for the others to notice that this process failed


@dataclasses.dataclass(frozen=True)
class Launch:
  """How this process joins the others.

  Attributes:
    coordinator: HOST:PORT of process 0; '' lets JAX find out (TPU pods, Slurm, Open MPI).
    num_processes: of the job; None lets JAX find out.
    process_id: of this one, from 0; None lets JAX find out.
    join_timeout: seconds to wait for the others at the start.
    heartbeat_timeout: seconds of silence after which a process counts as dead.
  """

  coordinator: str = ''
  num_processes: int | None = None
  process_id: int | None = None
  join_timeout: int = 300
  heartbeat_timeout: int = 60


class Group:
  """The processes of this job, seen from one of them.

  All processes must make the same calls of `gather` and `stop_now`, in the same order.

  Args:
    client: of JAX's coordination service.
    index: of this process.
    count: of all.
    leave: ends this process with an exit code when another one failed; None only stops where all agree to stop.
  """

  def __init__(self, client: Any, index: int, count: int, leave: Callable[[int], None] | None = None) -> None:
    self.index, self.count, self._client, self._leave = index, count, client, leave
    self._gathered: collections.Counter[str] = collections.Counter()
    self._asked, self._published = False, False
    self._calls, self._stop_at = 0, 0
    self._lock, self._ending, self._over = threading.Lock(), threading.Lock(), threading.Event()
    self._cleanups: list[Callable[[], None]] = []
    threading.Thread(target=self._watch, name='compactlm-group', daemon=True).start()

  def gather(self, name: str, text: str) -> list[str]:
    """The texts of all processes, in their order. Waits for all of them: data may take long to load."""
    self._gathered[name] += 1
    place = f'{_PREFIX}/gather/{name}/{self._gathered[name]}'
    self._client.key_value_set(f'{place}/{self.index}', text)
    return [self._get(f'{place}/{i}', i) for i in range(self.count)]

  def ask_stop(self) -> None:
    """Asks all processes to stop at a step that they agree on. Safe in a signal handler."""
    self._asked = True

  def stop_now(self) -> bool:
    """True on all processes alike, at the first call that all of them reach after one was asked to stop."""
    with self._lock:
      self._calls += 1
      return 0 < self._stop_at <= self._calls

  def end(self, code: int, why: str = '') -> int:
    """Tells the others how this process ended, and waits until all have; returns the exit code of the job.

    Args:
      code: exit code of this process.
      why: what the others print if they were waiting for it.
    """
    with self._ending:  # whoever comes second waits for the end of the process
      if self._over.is_set():
        return code
      self._over.set()
      with contextlib.suppress(Exception):
        if code:
          event = json.dumps({'code': code, 'why': why})
          self._client.key_value_set(f'{_EVENTS}/failed/{self.index}', event)
      try:
        # One that is done waits for the others as long as they live.
        self._client.wait_at_barrier(f'{_PREFIX}/end', int((_END_SECONDS if code else 86400) * 1000))
        together = True
      except Exception:
        together, code = False, code or PeerError.exit_code
      code = self._code_of_all(code)
      tell(code)
      if together:
        import jax

        with contextlib.suppress(Exception):
          jax.distributed.shutdown()
      return code

  @contextlib.contextmanager
  def cleanup(self, action: Callable[[], None]) -> Iterator[None]:
    """Within, `action` also runs if this process is ended because another one failed."""
    self._cleanups.append(action)
    try:
      yield
    finally:
      self._cleanups.remove(action)

  def _get(self, key: str, index: int) -> str:
    since, said = time.monotonic(), 0.0
    while True:
      try:
        return str(self._client.blocking_key_value_get(key, 10_000))
      except Exception as e:
        if 'DEADLINE_EXCEEDED' not in str(e):
          raise PeerError(f'process {index} cannot be heard any more ({first_line(e)}); restart') from e
      if (waited := time.monotonic() - since) > said + 60:
        said = waited
        log.warning('waiting for process %d for %.0f s (%s)', index, waited, key)

  def _failures(self) -> dict[int, dict[str, Any]]:
    events = dict(self._client.key_value_dir_get(f'{_EVENTS}/failed'))
    return {int(key.rpartition('/')[2]): json.loads(value) for key, value in sorted(events.items())}

  def _code_of_all(self, code: int) -> int:
    """One exit code for all: of the first process that has more to say than 'restart'."""
    with contextlib.suppress(Exception):
      codes = [found['code'] for _, found in sorted(self._failures().items())]
      return next((c for c in codes if c != PeerError.exit_code), codes[0] if codes else code)
    return code

  def _watch(self) -> None:
    while not self._over.wait(_LOOK_SECONDS):
      # Without process 0 nothing can be read, and JAX ends this process.
      with contextlib.suppress(Exception):
        if self._asked and not self._published:
          self._published = True
          self._client.key_value_set(_STOP, str(self.index), True)
        events = [key for key, _ in self._client.key_value_dir_get(_EVENTS)]
        if not self._stop_at and _STOP in events:
          self._agree_to_stop()
        if self._leave and any('/failed/' in key for key in events) and not self._over.wait(_GRACE_SECONDS):
          self._follow()

  def _agree_to_stop(self) -> None:
    with self._lock:  # the main thread does not get further than the call that is told here
      self._stop_at = max(int(calls) for calls in self.gather('stop', str(self._calls))) + 1

  def _follow(self) -> None:
    """Ends this process after another one, whose failure its main thread does not see."""
    index, found = next((i, f) for i, f in self._failures().items() if i != self.index)
    print(f'compactlm: process {index} ended with {found["code"]}: {found["why"]}', file=sys.stderr, flush=True)
    for action in self._cleanups:
      with contextlib.suppress(Exception):
        action()
    assert self._leave is not None
    self._leave(self.end(found['code'], f'followed process {index}'))


_group: Group | None = None


def join(launch: Launch) -> Group:
  """Joins the other processes; before anything else is asked of JAX.

  Raises:
    ConfigError: JAX does not know its place in a cluster, or the job has other processes than it says.
    PeerError: the others did not come in time.
  """
  global _group
  import jax

  # Its handler of SIGTERM would be in the way of ours.
  jax.config.update('jax_enable_preemption_service', False)
  given = launch.num_processes is not None
  try:
    with _aside():
      jax.distributed.initialize(
        launch.coordinator or None,
        launch.num_processes,
        launch.process_id,
        cluster_detection_method='deactivate' if given else None,
        initialization_timeout=launch.join_timeout,
        heartbeat_timeout_seconds=launch.heartbeat_timeout,
        shutdown_timeout_seconds=30,
      )
  except (ValueError, TypeError) as e:
    raise ConfigError(
      f'--coordinator: JAX does not find its place here ({first_line(e)}); give --coordinator=HOST:PORT, '
      '--num_processes and --process_id'
    ) from e
  except RuntimeError as e:
    raise PeerError(not_met(launch, first_line(e))) from e
  _group = _make_group(_leave_now)
  log.info('process %d of %d', _group.index, _group.count)
  return _group


def not_met(launch: Launch, why: str) -> str:
  """What to say when the processes of a job did not come together."""
  where = f'--coordinator={launch.coordinator}' if launch.coordinator else 'the coordinator'
  return (
    f'{launch.num_processes or "the"} processes did not meet at {where} within --join_timeout={launch.join_timeout} s '
    f'({why}); start all of them, where they reach that address, with the same --coordinator and --num_processes and '
    'different --process_id'
  )


def group() -> Group | None:
  """The processes of this job; None for one process. Also if the caller has initialised jax.distributed itself."""
  global _group
  if _group is None:
    import jax

    if jax.distributed.is_initialized():
      _group = _make_group(None)
  return _group if _group and _group.count > 1 else None


def check_same(topic: str, fields: Mapping[str, Any]) -> None:
  """Raises ConfigError on every process unless all of them have the same fields, by name and value (JSON-able).

  Args:
    topic: what is compared, for the order of calls and for messages.
    fields: name -> value.
  """
  if (all_processes := group()) is None:
    return
  mine = json.dumps(dict(fields), sort_keys=True, default=str)
  found = [json.loads(text) for text in all_processes.gather(topic, mine)]
  names = sorted({name for each in found for name in each})
  differing = [name for name in names if len({json.dumps(each.get(name)) for each in found}) > 1]
  if not differing:
    return
  lines = []
  for name in differing[:8]:
    holders: dict[str, list[int]] = {}
    for index, each in enumerate(found):
      holders.setdefault(json.dumps(each.get(name)), []).append(index)
    lines.append(f'{name}: ' + ', '.join(f'{value} on {_processes(who)}' for value, who in holders.items()))
  more = f'; and {len(differing) - 8} more' if len(differing) > 8 else ''
  raise ConfigError(f'the processes differ in their {topic}: {"; ".join(lines)}{more}. Start the same on all of them')


def lost_peer(error: BaseException) -> str:
  """One line if an error says that another process is gone; '' otherwise."""
  if _group is None or _group.count == 1:
    return ''
  # What XLA says while a step is dispatched is a ValueError that begins with the status, otherwise a RuntimeError.
  if not isinstance(error, RuntimeError) and not (isinstance(error, ValueError) and re.match('[A-Z_]+: ', str(error))):
    return ''
  text = f'{type(error).__name__} {error}'
  lost = re.search(r'gloo|coordination|heartbeat|UNAVAILABLE|connection (was )?(reset|closed|refused)|peer', text, re.I)
  return first_line(error) if lost else ''


TOLD = 'COMPACTLM_TOLD'
"""Environment variable: the descriptor by which this process tells the one that started it its exit code."""


def tell(code: int) -> None:
  """Tells the process that started this one how it will end, in case that it is ended otherwise on its way out."""
  if TOLD in os.environ:
    with contextlib.suppress(OSError, ValueError):
      os.write(int(os.environ[TOLD]), bytes([code]))


JOINING = 'COMPACTLM_JOINING'
"""Environment variable: the descriptor of a file for what is said on stderr while this process joins the others.

If they do not come, JAX ends it by SIGABRT with a C++ stack; the process that started it then says why.
"""


@contextlib.contextmanager
def _aside() -> Iterator[None]:
  """Within, stderr goes to the file of JOINING; at the end it gets what is there, and the file is empty."""
  if JOINING not in os.environ:
    yield
    return
  file, stderr = int(os.environ[JOINING]), os.dup(2)
  sys.stderr.flush()
  os.dup2(file, 2)
  try:
    yield
  finally:
    sys.stderr.flush()
    os.dup2(stderr, 2)
    os.close(stderr)
    with contextlib.suppress(OSError):  # nobody reads it any more
      os.write(2, os.pread(file, os.fstat(file).st_size, 0))
    os.ftruncate(file, 0)


def _leave_now(code: int) -> None:
  sys.stdout.flush()
  sys.stderr.flush()
  os._exit(code)


def _make_group(leave: Callable[[int], None] | None) -> Group:
  import jax
  from jax._src import distributed  # the only way to the key-value store

  client = distributed.global_state.client
  if client is None:
    raise ConfigError(f'JAX {jax.__version__} has no client of a coordination service; install a supported version')
  return Group(client, distributed.global_state.process_id, distributed.global_state.num_processes, leave)


def _processes(indices: list[int]) -> str:
  return f'process{"es" if len(indices) > 1 else ""} {", ".join(map(str, indices))}'
