"""What differs between a disk and a bucket. Paths are etils' epath everywhere, so that most code need not know.

A bucket (gs://) has neither renames nor appending nor empty folders: renaming copies and deletes, opening for 'a'
truncates, listing a folder without files fails. But an object that is written in one go appears whole or not at all.
"""

from __future__ import annotations

import contextlib
import logging
import os
import pathlib
import re
import secrets
import shutil
import tempfile
import time
import urllib.parse
from collections.abc import Iterator
from typing import Any

from etils import epath

from compactlm_jax.errors import CompactLMError, ConfigError, DataError, StorageError, first_line

log = logging.getLogger(__name__)

_REFUSED = re.compile(
  r'Forbidden|PERMISSION_DENIED|UNAUTHENTICATED|does not have storage\.|Anonymous caller|Invalid Credentials'
  r'|default credentials were not found|\b40[13]\b.{0,40}(Unauthorized|Forbidden)'
)
_UNREACHED = re.compile(
  r'Cannot connect to host|Connect call failed|Server disconnected|Connection (refused|reset)|[Tt]imed? ?out|CURL error'
  r'|Name or service not known|Temporary failure in name resolution|[Rr]esolve host'
)
_CLIENTS = ('aiohttp', 'gcsfs', 'google')
_OBJECT = re.compile(r'\bb/([^/\s]+)/o(?:/([^\s?\\]+))?')
_BLOCK = 1 << 22
SPARE_BYTES = 64 << 20
"""What should be free on a disk besides what is known to be written."""
_REWRITE_SECONDS = 30


def is_remote(path: epath.PathLike) -> bool:
  """True for object stores such as gs://."""
  return '://' in str(path)


def absolute(path: epath.PathLike) -> epath.Path:
  """The path from the root, as Orbax wants it; object stores have no other."""
  return epath.Path(path) if is_remote(path) else epath.Path(path).resolve()


def free_bytes(path: epath.PathLike) -> int | None:
  """Bytes free on the disk of an existing path; None where that is not known (object stores)."""
  return None if is_remote(path) else shutil.disk_usage(path).free


def require_space(disk: epath.PathLike, needed: int, what: str, remedy: str) -> None:
  """Checks that so many bytes are free on a disk.

  Args:
    disk: a path on it, which need not exist yet; in a bucket nothing is known.
    needed: bytes.
    what: begins the message: a path, or a sentence.
    remedy: ends it: what may be done instead of freeing space.

  Raises:
    StorageError: fewer are free.
  """
  place = epath.Path(disk)
  while not is_remote(place) and not place.exists() and place != place.parent:
    place = place.parent
  free = free_bytes(place)
  if free is not None and free < needed:
    found = f'{free >> 20} MiB free, at least {needed >> 20} MiB needed'
    raise StorageError(f'{what}: {found}; free some space or {remedy}')


def require_file_place(flag: str, path: str, *, buckets: bool = True, name: str = 'a file') -> None:
  """Before long work: checks that a file can be made at the path that a flag names.

  Args:
    flag: for messages.
    path: of the file; '' names none. A bucket has no folders that would have to be there, and is not asked.
    buckets: whether this file may be in one.
    name: what to name instead, for messages.

  Raises:
    ConfigError: its folder is not there, it is a folder itself, or it is in a bucket and may not be.
  """
  if is_remote(path):
    if not buckets:
      raise ConfigError(f'--{flag}: {path} is in a bucket, where this cannot be written; name a path on a disk')
  elif path and not pathlib.Path(path).absolute().parent.is_dir():
    raise ConfigError(f'--{flag}: the folder of {path} is not there')
  elif path and pathlib.Path(path).is_dir():
    raise ConfigError(f'--{flag}: {path} is a folder; name {name}')


def cache_folder(name: str) -> epath.Path:
  """$XDG_CACHE_HOME/compactlm/NAME, or ~/.cache/compactlm/NAME."""
  return epath.Path(os.environ.get('XDG_CACHE_HOME') or epath.Path('~/.cache').expanduser()) / 'compactlm' / name


def children(folder: epath.PathLike) -> list[epath.Path]:
  """What a folder holds; nothing if it is not there, as a bucket knows no empty folders."""
  try:
    return list(epath.Path(folder).iterdir())
  except FileNotFoundError:
    return []


def write_whole(path: epath.PathLike, content: str | bytes) -> None:
  """Writes a file that appears whole or not at all, in an existing folder."""
  target, data = epath.Path(path), content.encode() if isinstance(content, str) else content
  if is_remote(target):
    target.write_bytes(data)
    return
  with whole_file(target) as draft:
    draft.write_bytes(data)


def require_inside(file: epath.PathLike, folder: epath.PathLike) -> None:
  """For folders that are not trusted: a file of one, if it is there, must be a file and not a link to somewhere else.

  The download cache of Hugging Face may link snapshots/REVISION/FILE to blobs/HASH.

  Raises:
    DataError: the link leads out, or the file is a pipe or the like, which a reader would wait for.
  """
  if is_remote(file):
    return  # object stores have no links
  try:
    real, home = pathlib.Path(file).resolve(), pathlib.Path(folder).resolve()
    there = real.exists()
  except (OSError, RuntimeError) as e:  # links in a circle
    raise DataError(f'{file}: cannot be followed ({first_line(e)}); copy the file itself there') from e
  blobs = home.parent.parent / 'blobs' if home.parent.name == 'snapshots' else home
  if not (real.is_relative_to(home) or real.is_relative_to(blobs)):
    raise DataError(f'{file}: a link that leads out of the folder, to {real}; copy the file itself there')
  if there and not real.is_file():
    raise DataError(f'{file}: is no ordinary file; put one there')


@contextlib.contextmanager
def whole_file(path: epath.PathLike, *, shared: bool = False) -> Iterator[epath.Path]:
  """For long files: gives a local file to write, which becomes `path` when the block ends without an error.

  A disk gets it by renaming, from the same folder. For a bucket it is written to the disk of temporary files first:
  what a bucket's own file is closed with, after an error too, would appear there.

  Args:
    path: of the file, in an existing folder.
    shared: several processes may write it at once, the same content.
  """
  target = epath.Path(path)
  if not is_remote(target):
    draft = target.parent / f'.{target.name}.tmp{f"-{secrets.token_hex(8)}" if shared else ""}'
    try:
      yield draft
      draft.replace(target)
    finally:
      draft.unlink(missing_ok=True)
    return
  with tempfile.TemporaryDirectory() as folder:
    local = epath.Path(folder) / target.name
    yield local
    copy_file(local, target)


class GrowingFile:
  """A text file to add lines to.

  On a disk they are in the file at once. In a bucket, where nothing is appended, the file is written anew at most every
  half minute, and when it is synced or closed. What cannot be written (a full disk) stays in memory and is tried again.

  Args:
    path: of the file, which is gone on with if it exists.
  """

  def __init__(self, path: epath.PathLike) -> None:
    self._path, self._written = epath.Path(path), time.monotonic()
    self._file: Any = None
    self._kept = b''  # of a disk's file what is not in it yet, of a bucket's all
    if not is_remote(path):
      self._file = open(self._path, 'ab', buffering=0)
    elif self._path.exists():
      self._kept = self._path.read_bytes()
    self._new = self._failing = False

  def write(self, text: str) -> None:
    """Adds text; if it cannot be written now, that is logged."""
    self._kept, self._new = self._kept + text.encode(), True
    if self._file is None and time.monotonic() - self._written <= _REWRITE_SECONDS:
      return
    try:
      self.sync()
    except Exception as e:  # clients of buckets have errors of their own
      if not self._failing:
        why = getattr(e, 'strerror', None) or first_line(e)
        log.warning('%s: cannot be written (%s); lines are kept and tried again', self._path, why)
      self._failing = True

  def sync(self) -> None:
    """All that was added is in the file afterwards, or this raises what the disk or the bucket complains of."""
    self._written = time.monotonic()
    if self._file is None and self._new:
      write_whole(self._path, self._kept)
      self._new = False
    while self._file is not None and self._kept:
      try:
        # A disk that is nearly full takes a part: the line is torn until the rest follows.
        self._kept = self._kept[self._file.write(self._kept) :]
      except OSError as e:
        e.filename = str(self._path)
        raise
    self._failing = False

  def close(self) -> None:
    """Syncs and closes."""
    try:
      self.sync()
    finally:
      if self._file is not None:
        self._file.close()


def copy_file(source: epath.PathLike, target: epath.PathLike) -> None:
  """Copies a file, between a disk and a bucket too; memory does not grow with its size."""
  with epath.Path(source).open('rb') as read, epath.Path(target).open('wb') as write:
    shutil.copyfileobj(read, write, _BLOCK)


def copy_folder(source: epath.PathLike, target: epath.PathLike) -> None:
  """Copies a folder and all that it holds, to where nothing is."""
  epath.Path(target).mkdir(parents=True, exist_ok=True)
  for child in epath.Path(source).iterdir():
    (copy_folder if child.is_dir() else copy_file)(child, epath.Path(target) / child.name)


def temporary_folder() -> epath.Path:
  """Where `whole_file` writes what goes to a bucket."""
  return epath.Path(tempfile.gettempdir())


def causes(error: BaseException | None) -> Iterator[BaseException]:
  """An error, what caused it, what caused that."""
  while error is not None:
    yield error
    error = error.__cause__ or error.__context__


def own_error(error: BaseException) -> CompactLMError | None:
  """The library's own error for what a bucket or the client of one complained of; None if that is not the reason.

  Clients have no common base of errors: gcsfs raises OSError and its own, TensorStore ValueError, ArrayRecord
  RuntimeError, and Orbax wraps them.
  """
  for cause in causes(error):
    said = str(cause)
    if isinstance(cause, ImportError) and re.search(r'gcsfs|fsspec|google\.cloud|google-cloud', said):
      return ConfigError("paths on gs:// need the extra gcs: pip install 'compactlm-jax[gcs]'")
    if isinstance(cause, PermissionError) or _REFUSED.search(said):
      return StorageError(
        f'{_named(cause, said)}: no permission, or no credentials. On a disk fix the permissions; for a bucket give '
        'this account the role Storage Object Admin on it, or log in with: gcloud auth application-default login'
      )
    if (type(cause).__module__.partition('.')[0] in _CLIENTS or 'CURL error' in said) and _UNREACHED.search(said):
      return StorageError(
        f'{_named(cause, said)}: the bucket cannot be reached; check the network, the name of the bucket and the '
        'credentials, then run the same command again'
      )
  return None


def _named(error: BaseException, said: str) -> str:
  """The path that an error is about, as the user writes it."""
  if isinstance(error, OSError) and error.filename:
    return os.fsdecode(error.filename)
  if found := _OBJECT.search(said):
    return f'gs://{found[1]}/{urllib.parse.unquote(found[2] or "")}'
  return (said.strip().splitlines() or ['a path'])[0][:200]
