"""The rules of a directory of checkpoints, without Orbax: which steps count, how they go, and what proves one intact.

DIRECTORY/STEP/state             the arrays, by Orbax
DIRECTORY/STEP/manifest/...json  shape, dtype and SHA-256 of every leaf, the caller's metadata, and its own SHA-256
DIRECTORY/STEP/DELETING          a deletion has begun; the step no longer counts
DIRECTORY/STEP.bad               a step that proved damaged; never deleted by us
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import logging
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import numpy as np
from etils import epath

from compactlm_jax.errors import ConfigError, StorageError
from compactlm_jax.parse import json_digest, parse_json
from compactlm_jax.storage import children, copy_folder

log = logging.getLogger(__name__)

MANIFEST = 'manifest/manifest.json'
_DELETING = 'DELETING'
_COMMITTED = 'commit_success.txt'
_TEMPORARY = '.orbax-checkpoint-tmp'
_STEP = re.compile('0|[1-9][0-9]*', re.ASCII)


class DamagedError(Exception):
  """Why one checkpoint cannot be used. checkpoint.py catches it and tries an older one."""


@dataclasses.dataclass(frozen=True)
class StepDirectory:
  """A directory of checkpoints.

  Attributes:
    path: the directory; it need not exist.
    commit_file: a step counts only with its commit file (written last) instead of by its name (renamed last).
  """

  path: epath.Path
  commit_file: bool

  def steps(self) -> list[int]:
    """Committed steps, ascending."""
    return sorted(int(p.name) for p in children(self.path) if _STEP.fullmatch(p.name) and self._counts(p))

  def bad(self) -> list[str]:
    """Names of the checkpoints that were set aside."""
    return sorted(p.name for p in children(self.path) if '.bad' in p.name)

  def uncommitted(self) -> list[int]:
    """Steps that lack nothing but their commit file: of a copy that made none, or of a save stopped at its very end."""
    found = [p for p in children(self.path) if _STEP.fullmatch(p.name) and not self._counts(p)]
    return sorted(int(p.name) for p in found if (p / MANIFEST).exists() and not (p / _DELETING).exists())

  def commit(self, step: int) -> None:
    """Gives a step its commit file, without which Orbax does not read it from a bucket."""
    (self.path / str(step) / _COMMITTED).write_text('')

  def clean(self) -> None:
    """Removes what stopped saves and deletions left. Only for the holder of the lock, with no save under way."""
    for child in children(self.path):
      is_step = bool(_STEP.fullmatch(child.name))
      if is_step and (child / _DELETING).exists():
        self.delete(int(child.name))
      elif _TEMPORARY in child.name or (is_step and not self._counts(child)):
        log.info('removing %s, which a stopped save left', child)
        child.rmtree()

  def delete(self, step: int, event: Callable[[str, int], None] = lambda name, step: None) -> None:
    """Deletes a step; killed half way, it is recognised by a mark, which goes last."""
    path = self.path / str(step)
    (path / _DELETING).write_text('')
    event('deleting', step)
    for child in children(path):
      if child.is_dir():
        child.rmtree()
      elif child.name != _DELETING:
        child.unlink()
    event('deleted', step)
    path.rmtree()

  def set_aside(self, step: int) -> None:
    """Renames a damaged step to STEP.bad, STEP.bad2, ..."""
    target, n = self.path / f'{step}.bad', 1
    while target.exists():
      n += 1
      target = self.path / f'{step}.bad{n}'
    log.error('keeping the damaged checkpoint %s as %s', step, target)
    (self.path / str(step)).rename(target)

  def _counts(self, child: epath.Path) -> bool:
    return not (child / _DELETING).exists() and (not self.commit_file or (child / _COMMITTED).exists())


@contextlib.contextmanager
def reporting_damage(path: epath.Path) -> Iterator[None]:
  """Logs a DamagedError with its path and goes on."""
  try:
    yield
  except DamagedError as e:
    log.error('checkpoint %s is damaged: %s', path, e)


def hush_late_reads() -> None:
  """Silences, from now on, the reads that Orbax abandons when one of them fails.

  Orbax closes its event loop under them; each then complains of that on stderr, by a traceback without a name, from a
  thread that nobody waits for. The failure itself is raised and reported.
  """
  before = sys.unraisablehook
  if getattr(before, 'hushes_late_reads', False):
    return

  def hook(unraisable: sys.UnraisableHookArgs) -> None:
    if not (isinstance(unraisable.exc_value, RuntimeError) and 'Event loop is closed' in str(unraisable.exc_value)):
      before(unraisable)

  hook.hushes_late_reads = True  # type: ignore[attr-defined]
  sys.unraisablehook = hook


def public_metadata(manifest: Mapping[str, Any]) -> dict[str, Any]:
  """What callers see of a manifest: their own metadata, with 'step'."""
  return {**manifest['metadata'], 'step': manifest['step']}


def none_intact(directory: epath.Path, steps: Iterable[int]) -> StorageError:
  """The error that ends a run which has checkpoints but no intact one."""
  return StorageError(
    f'{directory}: none of the checkpoints {sorted(steps)} is intact (reasons in the log); nothing was changed. Bring '
    'one back from a backup, or start afresh in another directory'
  )


def build_manifest(step: int, metadata: Mapping[str, Any], host: Mapping[str, np.ndarray]) -> dict[str, Any]:
  """The manifest of a checkpoint.

  Args:
    step: number of steps done.
    metadata: JSON-able, the caller's.
    host: name -> whole leaf.
  """
  leaves = {name: {'shape': list(x.shape), 'dtype': x.dtype.name, 'sha256': sha256(x)} for name, x in host.items()}
  body = json.loads(json.dumps({'format': 1, 'step': step, 'metadata': dict(metadata), 'leaves': leaves}))
  return {**body, 'sha256': json_digest(body)}


def read_manifest(path: epath.Path, step: int) -> dict[str, Any]:
  """The manifest of the checkpoint at `path`.

  Raises:
    DamagedError: absent, changed, or of another step.
    StorageError: it may not be read.
  """
  try:
    manifest = parse_json((path / MANIFEST).read_bytes())
    body = {k: v for k, v in manifest.items() if k != 'sha256'}
    if manifest['sha256'] != json_digest(body):
      raise DamagedError(f'{MANIFEST}: digest differs')
    if body['step'] != step or body['format'] != 1:
      raise DamagedError(f'{MANIFEST}: is of step {body["step"]}, format {body["format"]}')
    return manifest
  except PermissionError as e:
    raise StorageError(f'{path}: cannot be read ({e}); fix its permissions') from e
  except (OSError, ValueError, KeyError, TypeError, AttributeError) as e:
    raise DamagedError(f'{MANIFEST}: {type(e).__name__}: {e}') from e


def copy_step(source: epath.Path, target: epath.Path) -> None:
  """Copies a committed checkpoint, under another number if `target` is named so: its manifest then says that one.

  Raises:
    DamagedError: the manifest is not intact; arrays are proven when the copy is read.
  """
  manifest = read_manifest(source, int(source.name))
  copy_folder(source, target)
  body = {**{k: v for k, v in manifest.items() if k != 'sha256'}, 'step': int(target.name)}
  (target / MANIFEST).write_text(json.dumps({**body, 'sha256': json_digest(body)}))


def check_same_leaves(path: epath.Path, saved: Mapping[str, Any], wanted: Mapping[str, Any]) -> None:
  """Raises ConfigError, naming the leaves, unless names, shapes and dtypes agree.

  Args:
    path: of the checkpoint, for the message.
    saved: 'leaves' of a manifest.
    wanted: name -> array or ShapeDtypeStruct of the run.
  """
  lines = []
  for name in sorted(set(saved) | set(wanted)):
    old = f'{saved[name]["dtype"]}{saved[name]["shape"]}' if name in saved else 'absent'
    new = f'{np.dtype(wanted[name].dtype).name}{list(wanted[name].shape)}' if name in wanted else 'absent'
    if old != new:
      lines.append(f'{name}: checkpoint {old}, run {new}')
  if lines:
    more = f'; and {len(lines) - 8} more' if len(lines) > 8 else ''
    raise ConfigError(
      f'{path} does not fit this run: {"; ".join(lines[:8])}{more}. Use the config that wrote it, or another --workdir'
    )


def sha256(x: np.ndarray) -> str:
  """Digest of the bytes of an array."""
  return hashlib.sha256(np.ascontiguousarray(x).reshape(-1).view(np.uint8).data).hexdigest()
