"""May this run start? The lock of a run directory, its config.json, and what may change when a run is resumed."""

from __future__ import annotations

import contextlib
import datetime
import json
import logging
import os
import pathlib
import re
import secrets
import shlex
import socket
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
from etils import epath

from compactlm_jax.config import RunConfig, from_config_dict, to_json
from compactlm_jax.distributed import group
from compactlm_jax.errors import CompactLMError, ConfigError, LockedError, StorageError
from compactlm_jax.parse import json_digest, parse_json
from compactlm_jax.stepdir import StepDirectory
from compactlm_jax.storage import is_remote, own_error, write_whole
from compactlm_jax.train.agree import agree_on_run, flat, on_first_process, share_directory, versions

log = logging.getLogger(__name__)

FREE_FIELDS = ('log_every', 'keep', 'checkpoint_every', 'eval_every')
"""Fields of a RunConfig that a resumed run may change at will. (`steps` is not one: the schedule depends on it.)"""

ROUNDING_FIELDS = ('mesh.data', 'mesh.fsdp', 'mesh.model', 'encoder.remat', 'encoder.scan_unroll')
"""Fields that may change too, but then sums are taken in another order and the curve is no longer identical in bits."""

_FLAGS = ('jax_platforms', 'jax_enable_x64', 'jax_default_matmul_precision', 'jax_threefry_partitionable',
          'jax_default_prng_impl', 'jax_debug_nans', 'jax_disable_jit', 'jax_num_cpu_devices')  # fmt: skip
_ENVIRONMENT = ('XLA_FLAGS', 'LIBTPU_INIT_ARGS')
_SETTLE_SECONDS = 2.0


@contextlib.contextmanager
def open_run(
  workdir: epath.PathLike,
  config: RunConfig,
  identity: Mapping[str, str],
  *,
  allow_change: tuple[str, ...] = (),
  steal_lock: bool = False,
  total_steps: int = 0,
) -> Iterator[epath.Path]:
  """Holds a run directory: makes it, locks it, checks that a resume continues the same run, writes config.json.

  Args:
    workdir: the run directory.
    config: the resolved configuration.
    identity: fingerprints of tokenizer, data and teacher.
    allow_change: fields ('optimizer.learning_rate'), sections ('optimizer') or fingerprints ('identity.teacher') that
      may differ from the run that is resumed; each difference is recorded under 'changes' in config.json.
    steal_lock: take over a lock whose holder cannot be proved dead because it is on another host.
    total_steps: optimiser steps of the run; when all of them are done, nothing may differ. 0 is not known.

  Yields:
    The directory.

  Raises:
    LockedError: another run holds the directory.
    ConfigError: there are checkpoints, and a field that alters the curve differs; names field, old and new value. Or
      config.json is of something else, such as a model folder.
    StorageError: the directory cannot be written.
  """
  path = epath.Path(workdir)
  lock = _Lock(path)

  def enter() -> None:
    try:
      path.mkdir(parents=True, exist_ok=True)
      lock.take(steal_lock)
      _write_record(path, _next_record(path, config, identity, allow_change, total_steps))
    except CompactLMError:
      raise
    except Exception as e:  # clients of buckets have errors of their own
      if is_remote(path) and (own := own_error(e)):
        raise own from e
      if isinstance(e, OSError):
        raise StorageError(f'{path}: cannot be written ({e}); free space or fix permissions') from e
      raise

  try:
    agree_on_run(identity)
    on_first_process(enter)
    share_directory(path, lock.token)
    processes = group()
    with processes.cleanup(lock.release) if processes else contextlib.nullcontext():
      yield path
  finally:
    lock.release()


def read_run(workdir: epath.PathLike) -> tuple[RunConfig, dict[str, Any]]:
  """The configuration of a run directory and the whole of its config.json.

  Raises:
    ConfigError: there is none, or it is damaged or was edited.
  """
  path = epath.Path(workdir) / 'config.json'
  try:
    record = parse_json(path.read_bytes())
    intact = record['config_hash'] == _hash(record['config'])
  except FileNotFoundError as e:
    raise ConfigError(f'{path} is absent; name a directory written by `compactlm train`') from e
  except (OSError, ValueError, KeyError, TypeError) as e:
    raise ConfigError(f'{path} is damaged ({type(e).__name__}: {e}); bring it back from a backup') from e
  if not intact:
    raise ConfigError(f'{path} was edited or damaged: its config does not match its hash. Bring the original back')
  changes = record.get('changes', [])
  sound = isinstance(record.get('identity'), dict) and isinstance(record.get('code', {}), dict)
  if not (sound and isinstance(changes, list) and all(isinstance(change, dict) for change in changes)):
    raise ConfigError(f'{path} is damaged (identity, code or changes); bring it back from a backup')
  return from_config_dict(RunConfig, record['config']), record


class _Lock:
  """WORKDIR/lock: who holds the directory. A holder that is dead on this host does not count."""

  def __init__(self, workdir: epath.Path) -> None:
    self._workdir, self._path, self.token = workdir, workdir / 'lock', ''
    self._open = contextlib.ExitStack()

  def take(self, steal: bool) -> None:
    # Held as long as the run: containers with the host's name do not see one another's processes.
    if not self._open.enter_context(_kernel_lock(self._workdir)):
      self._check_holder(steal=False, alive=True)
      raise LockedError(f'{self._workdir}: another run is just starting here; use another --workdir')
    if self._path.exists():
      self._check_holder(steal)
    token = secrets.token_hex(8)
    mine = {
      'host': socket.gethostname(),
      'pid': os.getpid(),
      'process_start': _process_start(os.getpid()),
      'started': _now(),
      'token': token,
    }
    write_whole(self._path, json.dumps(mine) + '\n')
    self.token = token
    if is_remote(self._path):
      # A bucket has no locks: of two runs that start at once, the one that wrote last holds it, and both must see that.
      time.sleep(_SETTLE_SECONDS)
      if json.loads(self._path.read_text())['token'] != token:
        self.token = ''
        raise LockedError(f'{self._workdir}: another run is just starting here; use another --workdir')

  def release(self) -> None:
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
      if self.token and json.loads(self._path.read_text())['token'] == self.token:
        self._path.unlink()
    self._open.close()

  def _check_holder(self, steal: bool, alive: bool = False) -> None:
    """Raises LockedError if the holder is alive, as is known or looked up here, or may be."""
    try:
      holder = parse_json(self._path.read_bytes())
      host, pid, start = holder['host'], int(holder['pid']), holder['process_start']
      if not 0 < pid < 1 << 31:
        raise ValueError(f'no process has the number {pid}')
      who = f'process {pid} on host {host}, since {holder["started"]}'
    except FileNotFoundError:
      return
    except (ValueError, KeyError, TypeError):
      host, pid, start, who = '', 0, None, 'an unknown process (the lock file is damaged)'
    if alive or host == socket.gethostname():
      found = _process_start(pid)
      if not alive and (found is None or (start is not None and found != start)):
        log.info('taking over the lock of %s, which is gone', who)
        return
      raise LockedError(f'{self._workdir} is held by {who}; wait for it, stop it, or use another --workdir')
    if not steal:
      raise LockedError(
        f'{self._workdir} is held by {who}. If it is certainly dead, pass --steal_lock; else use another --workdir'
      )
    log.warning('stealing the lock of %s', who)


@contextlib.contextmanager
def _kernel_lock(workdir: epath.Path) -> Iterator[bool]:
  """Whether this process alone holds the kernel's lock on a directory; it ends with the process, however this ends.

  True where there are no such locks.
  """
  try:
    import fcntl

    descriptor = os.open(os.fspath(workdir), os.O_RDONLY)
  except (ImportError, OSError):  # no such call, or an object store
    yield True
    return
  try:
    deadline = time.monotonic() + 1
    while True:
      try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        break
      except BlockingIOError:
        if time.monotonic() > deadline:
          yield False
          return
        time.sleep(0.02)
      except OSError:  # a file system without flock
        break
    yield True
  finally:
    os.close(descriptor)


def _process_start(pid: int) -> str | None:
  """When a process of this host started, as an opaque string; None if it is gone; '' where that is not known.

  Tells a process from another that got the same pid later. A zombie counts as gone.
  """
  proc = pathlib.Path('/proc')
  if (proc / 'self' / 'stat').exists():
    try:
      fields = (proc / str(pid) / 'stat').read_text().rpartition(')')[2].split()
      boot = (proc / 'sys/kernel/random/boot_id').read_text().strip()
    except (OSError, IndexError):
      return None
    return None if fields[0] in 'ZX' else f'{boot}:{fields[19]}'
  try:
    os.kill(pid, 0)
  except ProcessLookupError:
    return None
  except PermissionError:
    pass
  return ''


def _next_record(
  path: epath.Path,
  config: RunConfig,
  identity: Mapping[str, str],
  allow_change: tuple[str, ...],
  total_steps: int,
) -> dict[str, Any]:
  """What config.json shall hold, after comparing with what it holds."""
  record = {
    'config': to_json(config),
    'config_hash': _hash(to_json(config)),
    'identity': dict(identity),
    'command': _command(sys.argv),
    **_versions(),
    'changes': [],
  }
  new = _fields(record)
  _check_names(allow_change, new)
  checkpoints = StepDirectory(path / 'checkpoints', commit_file=is_remote(path))
  if not (checkpoints.steps() or checkpoints.bad()):
    _check_own(path)
    return record  # nothing to resume
  old_config, old = read_run(path)
  record['command'] = old.get('command') or record['command']  # of the start, not of the last resume
  before = _fields({**old, 'config': to_json(old_config)})
  differing = [f for f in sorted(set(new) | set(before)) if new.get(f) != before.get(f) and f not in FREE_FIELDS]
  refused = [
    f for f in differing if f not in ROUNDING_FIELDS and not any(f == a or f.startswith(a + '.') for a in allow_change)
  ]
  if refused:
    lines = '; '.join(f'{_label(f)}: was {before.get(f)!r}, now {new.get(f)!r}' for f in refused[:8])
    raise ConfigError(
      f'{path} holds a run with another configuration: {lines}. Use the old value, another --workdir, or '
      f'--allow_change={",".join(refused[:8])} to go on from its checkpoint all the same'
    )
  changes = [{'field': f, 'old': before.get(f), 'new': new.get(f)} for f in differing]
  late = [f for f in differing if f not in ROUNDING_FIELDS]
  if late and 0 < total_steps <= max(checkpoints.steps(), default=0):
    raise ConfigError(
      f'{_label(late[0])}: {path} has done {max(checkpoints.steps())} of {total_steps} steps, so that nothing is left '
      'to be trained with another value; use the old one, more config.steps, or another --workdir'
    )
  for part in ('code', 'libraries', 'jax'):
    if old.get(part) != record[part]:
      changes.append({'field': part, 'old': old.get(part), 'new': record[part]})
  for change in changes:
    log.warning('resuming with %s changed: was %s, now %s', change['field'], change['old'], change['new'])
  if changes:
    log.warning('the curve will not be identical in bits to an uninterrupted run')
  record['changes'] = [*old.get('changes', []), *({'time': _now(), **change} for change in changes)]
  return record


def _check_own(path: epath.Path) -> None:
  """Raises ConfigError for a directory whose config.json no run wrote: it would be lost."""
  try:
    found = parse_json((path / 'config.json').read_bytes())
  except (FileNotFoundError, ValueError):
    return
  if isinstance(found, dict) and 'config_hash' not in found:
    raise ConfigError(
      f'--workdir: {path}/config.json is not the record of a run (a model folder?); use another --workdir'
    )


def _check_names(allow_change: tuple[str, ...], known: Mapping[str, Any]) -> None:
  for name in allow_change:
    if not name.startswith('identity.') and not any(f == name or f.startswith(name + '.') for f in known):
      raise ConfigError(f'--allow_change={name}: there is no such field or section')


def _label(field: str) -> str:
  return field if field.startswith('identity.') else f'config.{field}'


def _fields(record: Mapping[str, Any]) -> dict[str, Any]:
  """'optimizer.learning_rate' -> value, 'identity.teacher' -> fingerprint."""
  return dict([*flat(record['config']), *flat({'identity': record['identity']})])


def _command(argv: Sequence[str]) -> str:
  """The line that a shell takes to start this process again; the home directory is written as "$HOME"."""
  program = pathlib.Path(argv[0]) if argv and argv[0] else pathlib.Path('python')
  if program.name == '__main__.py':
    start = ['python', '-m', program.parent.name]
  else:
    start = ['python', argv[0]] if program.suffix == '.py' else [program.name]
  parts = []
  for argument in [*start, *argv[1:]]:
    quoted = shlex.quote(argument)
    variable = '$HOME' if quoted == argument else """'"$HOME"'"""
    parts.append(re.sub(_home(), variable, quoted))
  return ' '.join(parts)


def _home() -> str:
  """A pattern of the home directory, as a path or the beginning of one."""
  home = os.path.expanduser('~')
  return rf'(?<![\w./-]){re.escape(home)}(?![\w.-])' if len(home) > 1 else '(?!)'  # '~' or '/': there is none


def _versions() -> dict[str, Any]:
  """Code, libraries and flags. Nothing about the user: the home directory is written as '~'."""
  flags = {name: getattr(jax.config, name, None) for name in _FLAGS}
  flags |= {name: re.sub(_home(), '~', os.environ[name]) for name in _ENVIRONMENT if name in os.environ}
  return {
    **versions(),
    'jax': {
      'backend': jax.default_backend(),
      'device_kind': jax.devices()[0].device_kind,
      'devices': jax.device_count(),
      'processes': jax.process_count(),
      **flags,
    },
  }


def _hash(config: Mapping[str, Any]) -> str:
  return json_digest(config)[:16]


def _now() -> str:
  return datetime.datetime.now(datetime.UTC).isoformat(timespec='seconds')


def _write_record(path: epath.Path, record: Mapping[str, Any]) -> None:
  write_whole(path / 'config.json', json.dumps(record, indent=2) + '\n')
