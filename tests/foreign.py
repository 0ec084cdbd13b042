"""What readers of foreign bytes must hold, and how their files are damaged.

A case starts from small valid files, changes one of them, and reads. `Cases.run` says what must hold: a value or one
of our own errors, no file outside the folder, nothing executed, no network, bounded memory, an end. A change is made
by numbers that a function `pick` chooses: hypothesis in tests/faults/test_fuzz.py, which finds the smallest change
that fails; a generator of random numbers in benchmarks/fuzz.py, which is fast enough for a hundred thousand cases.
"""

import contextlib
import dataclasses
import faulthandler
import functools
import gzip
import json
import os
import pathlib
import resource
import signal
import struct
import sys
import sysconfig
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from compactlm_jax.errors import CompactLMError

SECONDS = 60
"""A case that takes longer counts as a hang: the process ends with a traceback."""

MOST_BYTES = 256 << 20
"""A case that makes the process grow by more is an error; the files of a case have a few kilobytes."""

Files = dict[str, bytes]

Pick = Callable[[int], int]
"""n -> a whole number from 0 to n - 1."""


@dataclasses.dataclass(frozen=True)
class Reader:
  """A reader and what it reads.

  Attributes:
    name: for reports.
    files: makes valid files, name -> content; those that end in '.gz' are stored compressed.
    read: reads the folder that they are written to.
  """

  name: str
  files: Callable[[], Files]
  read: Callable[[pathlib.Path], object]


class OtherError(AssertionError):
  """What a reader must never do."""


# --- the property ---------------------------------------------------------------------------------------------------

_HARMLESS = tuple(
  os.path.realpath(p) + os.sep
  for p in {sys.prefix, sys.base_prefix, *sysconfig.get_paths().values(), str(pathlib.Path(__file__).parents[1])}
) + ('/proc/', '/sys/', '/dev/null', '/dev/urandom', '/etc/localtime', '/usr/share/zoneinfo/')
"""What may be opened for reading at any time: code that is imported late, facts about the machine."""

_FORBIDDEN = ('subprocess.Popen', 'os.system', 'os.exec', 'os.posix_spawn', 'os.fork', 'pickle.find_class',
              'socket.connect', 'socket.getaddrinfo', 'socket.bind', 'urllib.Request')  # fmt: skip
_CHANGES = ('os.remove', 'os.rename', 'os.mkdir', 'os.rmdir', 'os.link', 'os.symlink', 'os.chmod', 'os.truncate')


class _Watch:
  """An audit hook, which cannot be removed, so that it is there once and switched."""

  def __init__(self) -> None:
    self.folder, self.seen, self.thread = '', list[str](), 0
    sys.addaudithook(self._event)

  def _event(self, event: str, args: tuple) -> None:
    if not self.folder or threading.get_ident() != self.thread:
      return
    if event in _FORBIDDEN:
      self.seen.append(f'{event} {args!r:.200}')
    elif event == 'open' and isinstance(args[0], (str, bytes)):
      self._path(event, args[0], writes=bool(args[2] & (os.O_WRONLY | os.O_RDWR)))
    elif event in _CHANGES and isinstance(args[0], (str, bytes)):
      self._path(event, args[0], writes=True)

  def _path(self, event: str, path: str | bytes, *, writes: bool) -> None:
    real = os.path.realpath(os.fsdecode(path))
    if not (real + os.sep).startswith(self.folder) and (writes or not real.startswith(_HARMLESS)):
      self.seen.append(f'{event} {real}')


@functools.cache
def _watch() -> _Watch:
  return _Watch()


@contextlib.contextmanager
def watched(folder: pathlib.Path) -> Iterator[None]:
  """Nothing outside of `folder` is opened or changed, nothing is started, nobody is called.

  Raises:
    OtherError: at the end, if it was.
  """
  watch = _watch()
  watch.folder, watch.thread, watch.seen = os.path.realpath(folder) + os.sep, threading.get_ident(), []
  try:
    yield
  finally:
    watch.folder = ''
    if watch.seen:
      raise OtherError(watch.seen[0])


def check(reader: Reader, folder: pathlib.Path) -> str:
  """Reads `folder`, which holds one case.

  Returns:
    'read', or the name of the class of our error.

  Raises:
    OtherError: an exception that is not ours, a file outside the folder, code, a network call, too much memory.
  """
  faulthandler.register(signal.SIGALRM, chain=True)  # tells where it hangs, then the signal ends the process
  before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
  signal.setitimer(signal.ITIMER_REAL, SECONDS)
  try:
    with watched(folder):
      reader.read(folder)
    result = 'read'
  except CompactLMError as e:
    result = type(e).__name__
    if not str(e):
      raise OtherError(f'{reader.name}: {result} without a message') from e
  except (OtherError, KeyboardInterrupt):
    raise
  except BaseException as e:
    raise OtherError(f'{reader.name}: {type(e).__name__}: {e!s:.300}') from e
  finally:
    signal.setitimer(signal.ITIMER_REAL, 0)
  grown = 1024 * (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
  if grown > MOST_BYTES:
    raise OtherError(f'{reader.name}: {grown} bytes more memory')
  return result


def stored(name: str, content: bytes) -> bytes:
  """The bytes of a file on disk."""
  return gzip.compress(content, 1, mtime=0) if name.endswith('.gz') else content


class Cases:
  """The folder of a reader's valid files, in which one file at a time is exchanged.

  Args:
    reader: whose files.
    folder: an existing empty folder.
  """

  def __init__(self, reader: Reader, folder: pathlib.Path) -> None:
    self.reader, self.folder, self.valid = reader, folder, reader.files()
    for name, content in self.valid.items():
      (folder / name).parent.mkdir(parents=True, exist_ok=True)
      (folder / name).write_bytes(stored(name, content))
    reader.read(folder)  # unwatched: imports, and what is made once

  def run(self, change: 'Change') -> str:
    """`check` with one file changed; the valid file is put back."""
    path = self.folder / change.file
    path.unlink() if change.content is None else path.write_bytes(change.content)
    try:
      return check(self.reader, self.folder)
    finally:
      path.write_bytes(stored(change.file, self.valid[change.file]))


# --- the damage -------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Change:
  """One damaged file: its bytes on disk, None for one that is gone."""

  file: str
  content: bytes | None


DEEP = 100_000
ODD_JSON = (
  'null', 'true', 'false', '0', '-1', '1', '2', '3', '1.5', '-0.0', '1e-400', '1e400', '-1e400', 'NaN', 'Infinity',
  '-Infinity', '255', '65536', '2147483647', '2147483648', '-2147483649', '4294967296', '9223372036854775807',
  '9223372036854775808', '18446744073709551616', '9' * 400, '-' + '9' * 400, '9' * 4300, '9' * 5000, '1e308', '""',
  '"x"', '" "', '"0"', '"-1"', '"1e999"', '"nan"', '"' + '9' * 400 + '"', '"../../etc/passwd"', '"/etc/passwd"', '"."',
  '".."', '"\\u0000"', '"a/b"', '"\\ud800"', '"\\udfff\\ud800"', '"\\u202e"', '"\\uff11"', '"e\\u0301"',
  '"' + 'a' * 5000 + '"', '"("', '"(a+)+$"', '"file:///etc/passwd"', '"gs://bucket/x"', '"hf:a/b"', '"owner/name"',
  '[]', '{}', '[[]]', '[null]', '[0]', '[-1]', '[1e400]', '[NaN]', '["a", "a"]', '[1, 2, 3]', '[[[[0]]]]', '{"": 0}',
  '{"a": null}', '{"0": "a"}', '{"a": 1, "a": 2}', '{"content": 0}', '{"content": "x"}', '[' * DEEP, '{"a":' * DEEP,
  '[' * 900 + ']' * 900, '[' * 5000 + ']' * 5000, '',
)  # fmt: skip
"""What a value is exchanged for, as it stands in the file."""

_ODD_NAMES = tuple(text for text in ODD_JSON if text.startswith('"'))

ODD_BYTES = (
  b'', b'\0', b'\xff', b'\n', b'\r', b'\r\n', b'\t', b' ', b'"', b"'", b'\\', b',', b':', b'-', b'1', b'.', b'e', b'%',
  b'\xef\xbb\xbf', b'\xff\xfe', b'\xed\xa0\x80', b'\xf4\x90\x80\x80', b'\xc0\x80', '\u2028'.encode(), '\u0085'.encode(),
  '\u202e'.encode(), '\u0661'.encode(), '\U0001f600'.encode(), b'{', b'}', b'[', b']', b'[' * 3000, b'9' * 4999, b'nan',
  b'inf', b'1e999', b'-1', b'\0' * 100, b'a' * 70000, b'\n' * 1000, b'\t' * 1000, b'\x1f\x8b\x08',
)  # fmt: skip


def _one(pick: Pick, options: Sequence[Any]) -> Any:
  return options[pick(len(options))]


def _bytes_changed(pick: Pick, content: bytes) -> bytes:
  """One to three edits: bits, single bytes, ranges."""
  out = bytearray(content)
  for _ in range(1 + pick(3)):
    kind, at = pick(7), pick(len(out) + 1)
    upto = min(len(out), at + _one(pick, (1, 2, 4, 8, 30, 300)))
    part = bytes(out[at:upto])
    if kind == 0 and part:
      out[at] ^= 1 << pick(8)
    elif kind == 1 and part:
      out[at] = _one(pick, (0, 1, 9, 10, 32, 34, 48, 57, 127, 128, 255))
    elif kind == 2:
      del out[at:upto]
    elif kind == 3:
      out[at:at] = _one(pick, ODD_BYTES)
    elif kind == 4:
      out[at:at] = part * _one(pick, (1, 2, 50))
    elif kind == 5:
      del out[at:]
    elif kind == 6:
      del out[at:upto]
      to = pick(len(out) + 1)
      out[to:to] = part
  return bytes(out)


class _Raw(str):
  """A piece of JSON as it is to stand in the file."""


class _Pairs(list):
  """An object whose names may occur twice."""


def _text(value: Any) -> str:
  if isinstance(value, _Raw):
    return str(value)
  if isinstance(value, _Pairs):
    return '{' + ', '.join(f'{k if isinstance(k, _Raw) else json.dumps(k)}: {_text(v)}' for k, v in value) + '}'
  return '[' + ', '.join(map(_text, value)) + ']' if isinstance(value, list) else json.dumps(value)


def _places(value: Any) -> Iterator[tuple[list, int]]:
  """(container, index) of every member and element below `value`."""
  if isinstance(value, list):
    for i, child in enumerate(value):
      yield value, i
      yield from _places(child[1] if isinstance(value, _Pairs) else child)


def _json_changed(pick: Pick, content: bytes) -> bytes:
  """One to three members or elements exchanged, removed, doubled, renamed, copied; sometimes the whole."""
  root = [json.loads(content, object_pairs_hook=_Pairs)]
  for _ in range(1 + pick(3)):
    places = list(_places(root))
    holder, i = _one(pick, places)
    pairs, kind = isinstance(holder, _Pairs), pick(7)
    value = _Raw(_one(pick, ODD_JSON))
    if kind == 0:  # something that stands elsewhere in the document
      other, j = _one(pick, places)
      value = _Raw(_text(other[j][1] if isinstance(other, _Pairs) else other[j]))
    if kind == 1 and holder is not root:
      del holder[i]
    elif kind == 2 and holder is not root:
      holder.append((holder[i][0], value) if pairs and pick(2) else holder[i])
    elif kind == 3 and pairs:
      holder[i] = (_Raw(_one(pick, _ODD_NAMES)), holder[i][1])
    else:
      holder[i] = (holder[i][0], value) if pairs else value
  return _text(root[0]).encode()


def _lines_changed(pick: Pick, content: bytes) -> bytes:
  """One line of JSON lines changed."""
  lines = content.split(b'\n')
  at = pick(max(1, len(lines) - 1))
  lines[at] = _json_changed(pick, lines[at])
  return b'\n'.join(lines)


def _safetensors_changed(pick: Pick, content: bytes) -> bytes:
  """The header changed, with a length that agrees with it or does not."""
  (size,) = struct.unpack('<Q', content[:8])
  header = _json_changed(pick, content[8 : 8 + size])
  length = len(header) + _one(pick, (0, 0, 0, 0, 0, 0, 0, 1, -1, 1 << 20, 1 << 31, (1 << 63) - 1))
  return struct.pack('<Q', max(0, length)) + header + content[8 + size :]


_BY_FORMAT = {'.json': _json_changed, '.jsonl': _lines_changed, '.safetensors': _safetensors_changed}


def damaged(pick: Pick, files: Mapping[str, bytes]) -> Change:
  """One file of a case, damaged with an eye on its format, or byte by byte; one in fifty is gone or empty.

  Args:
    pick: decides.
    files: valid ones, '.gz' not yet compressed.
  """
  name = _one(pick, sorted(files))
  content, plain, how = files[name], name.removesuffix('.gz'), pick(50)
  if how == 49:
    return Change(name, _one(pick, (None, b'')))
  if name != plain and how >= 35:
    return Change(name, _bytes_changed(pick, stored(name, content)))
  by_format = _BY_FORMAT.get(pathlib.PurePath(plain).suffix)
  changed = by_format(pick, content) if by_format and how < 38 else _bytes_changed(pick, content)
  return Change(name, stored(name, changed))
