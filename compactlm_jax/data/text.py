"""Where text comes from: files, TFDS datasets and Hugging Face datasets, as one stream of lines.

A stream yields stripped lines; the empty string ends a document. In text files a blank line and the end of a file end
a document; in datasets the end of a record does too.
"""

from __future__ import annotations

import contextlib
import dataclasses
import gzip
import hashlib
import io
import itertools
import logging
import sys
import time
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import tqdm
from etils import epath

from compactlm_jax.errors import ConfigError, DataError

MAX_LINE_BYTES = 64 << 20
"""Of text for `prepare`: far above a book in one line; a longer one is refused."""
MAX_ROW_BYTES = 1 << 20
"""Of a row of a table: a text of which a model reads 512 tokens, and a tokenizer takes 200 times as much memory."""

_BLOCK = 1 << 20
_PART_CHARS = 1 << 18
_WILDCARDS = frozenset('*?[')
_LOG_SECONDS = 30

log = logging.getLogger(__name__)

OnBytes = Callable[[int], None]
"""Called with the number of bytes (of `TextSource.size`) read since the last call."""


@dataclasses.dataclass(frozen=True)
class TextSource:
  """One file or dataset split.

  Attributes:
    name: file or dataset name, without its folder.
    size: bytes as stored (compressed, if it is).
    sha256: digest of what is stored, hex.
    lines: starts a fresh pass over the lines; '' ends a document.
    path: of the file; '' for a dataset.
  """

  name: str
  size: int
  sha256: str
  lines: Callable[[OnBytes], Iterator[str]]
  path: str = ''


def open_text(
  spec: str, *, split: str = 'train', text_key: str = 'text', digests: bool = True
) -> tuple[TextSource, ...]:
  """Resolves an input specification.

  Args:
    spec: comma-separated globs of text files (.gz is decompressed), `tfds:NAME`, a TFDS directory (with or without
      `tfds:`), or `hf:NAME` / `hf:NAME:CONFIG`.
    split: split of a TFDS or Hugging Face dataset.
    text_key: its text field.
    digests: False leaves the digests of files empty, for which they would be read.

  Returns:
    The sources, files sorted by path within each glob.

  Raises:
    DataError: no file matches.
    ConfigError: a dataset cannot be opened.
  """
  if spec.startswith('hf:'):
    return (_open_hf(spec.removeprefix('hf:'), split, text_key),)
  if spec.startswith('tfds:') or _is_tfds_dir(spec):
    return (_open_tfds(spec.removeprefix('tfds:'), split, text_key),)
  paths: dict[str, epath.Path] = {}
  for pattern in (p.strip() for p in spec.split(',')):
    matches = _glob(pattern) if pattern else []
    if not matches:
      raise DataError(f'input {pattern!r}: no file matches; check the path, and quote globs on the command line')
    paths.update((str(p), p) for p in matches)
  return tuple(open_file(p, digest=digests) for p in paths.values())


def open_file(path: epath.PathLike, *, digest: bool = True) -> TextSource:
  """One text file.

  Args:
    path: of the file.
    digest: False leaves its digest empty.
  """
  file = epath.Path(path)
  sha256 = file_sha256(file) if digest else ''
  return TextSource(file.name, int(file.stat().length), sha256, lambda on_bytes: _file_lines(file, on_bytes), str(file))


def progress(sources: Sequence[TextSource], what: str) -> contextlib.AbstractContextManager[OnBytes]:
  """Shows a pass over the sources; what it gives, `TextSource.lines` takes. See `progress_of`."""
  return progress_of(sum(s.size for s in sources), what)


@contextlib.contextmanager
def progress_of(total: int, what: str) -> Iterator[OnBytes]:
  """Shows how many bytes are done: a bar on a terminal, a line every half minute in a log.

  Args:
    total: bytes.
    what: name of the work.

  Yields:
    What is told of bytes that are done.
  """
  on_terminal = sys.stderr.isatty()
  done, last = 0, time.monotonic()

  def on_bytes(count: int) -> None:
    nonlocal done, last
    done += count
    bar.update(count)
    if not on_terminal and (now := time.monotonic()) - last > _LOG_SECONDS:
      last = now
      log.info('%s: %.1f of %.1f MB read', what, done / 1e6, total / 1e6)

  with tqdm.tqdm(total=total, unit='B', unit_scale=True, desc=what, disable=not on_terminal) as bar:
    yield on_bytes


def file_sha256(path: epath.Path, on_bytes: OnBytes = lambda _: None) -> str:
  """SHA-256 of a file's content, hex."""
  digest = hashlib.sha256()
  with path.open('rb') as f:
    while block := f.read(_BLOCK):
      digest.update(block)
      on_bytes(len(block))
  return digest.hexdigest()


def _is_tfds_dir(spec: str) -> bool:
  return (
    bool(spec) and ',' not in spec and not _WILDCARDS & set(spec) and (epath.Path(spec) / 'dataset_info.json').exists()
  )


def _glob(pattern: str) -> list[epath.Path]:
  parts = epath.Path(pattern).parts
  wild = next((i for i, part in enumerate(parts) if _WILDCARDS & set(part)), None)
  if wild is None:
    path = epath.Path(pattern)
    if path.is_dir():
      raise DataError(f'input {pattern!r} is a folder; name files, for example {str(path / "*.txt")!r}')
    return [path] if path.exists() else []
  base = epath.Path(*parts[:wild]) if wild else epath.Path('.')
  return sorted((p for p in base.glob('/'.join(parts[wild:])) if p.is_file()), key=str)


def _file_lines(path: epath.Path, on_bytes: OnBytes) -> Iterator[str]:
  with path.open('rb') as raw:
    try:
      yield from _decode(path, raw, on_bytes)
    except (EOFError, gzip.BadGzipFile, zlib.error) as e:
      raise DataError(f'{path}: damaged gzip file ({e}); fetch or compress it again') from e
  yield ''


def limited_lines(stream: Any, name: str, most: int = 0) -> Iterator[bytes]:
  """The lines of a binary stream, which may be a small file that decompresses to anything.

  Args:
    stream: has `readline`.
    name: of the file, for messages.
    most: bytes of a line; 0 takes MAX_LINE_BYTES.

  Raises:
    DataError: a line is longer than that; file and line are named.
  """
  most = most or MAX_LINE_BYTES
  if not isinstance(stream, io.BufferedIOBase):  # of a bucket: its readline takes no limit
    stream = io.BufferedReader(stream, _BLOCK)
  for number in itertools.count(1):
    if not (line := stream.readline(most + 1)):
      return
    if len(line) > most:
      raise DataError(
        f'{name}:{number}: a line of more than {most} bytes; break it into lines, one for each row, or cut its text'
      )
    yield line


def in_parts(texts: Iterable[str]) -> Iterator[list[str]]:
  """Lists of texts to encode at once, as an encoding takes 200 bytes for each character: short lists, or one text."""
  part: list[str] = []
  chars = 0
  for each in texts:
    if part and chars + len(each) > _PART_CHARS:
      yield part
      part, chars = [], 0
    part.append(each)
    chars += len(each)
  if part:
    yield part


def _decode(path: epath.Path, raw: Any, on_bytes: OnBytes) -> Iterator[str]:
  packed = path.suffix == '.gz'
  stream = gzip.GzipFile(fileobj=raw) if packed else raw
  offset = seen = 0
  for line in limited_lines(io.BufferedReader(stream, _BLOCK) if packed else stream, str(path)):
    try:
      text = line.decode('utf-8-sig' if offset == 0 else 'utf-8')
    except UnicodeDecodeError as e:
      where = 'byte offset of the decompressed text' if packed else 'byte offset'
      raise DataError(
        f'{path}: not UTF-8 at {where} {offset + e.start} ({e.reason}); convert it, for example with iconv -t UTF-8'
      ) from e
    offset += len(line)
    if (position := raw.tell()) != seen:
      on_bytes(position - seen)
      seen = position
    yield text.strip()


def record_lines(texts: Iterable[Any], name: str, on_bytes: OnBytes) -> Iterator[str]:
  """The lines of records; each record is at least one document.

  Raises:
    DataError: a record is not text.
  """
  for index, text in enumerate(texts):
    if isinstance(text, bytes):
      on_bytes(len(text))
      try:
        text = text.decode('utf-8')
      except UnicodeDecodeError as e:
        raise DataError(f'{name}: record {index} is not UTF-8 at byte offset {e.start}') from e
    elif isinstance(text, str):
      on_bytes(len(text.encode('utf-8', 'surrogatepass')))
    else:
      raise DataError(f'{name}: record {index} holds {type(text).__name__} instead of text; is it damaged?')
    for line in text.split('\n'):
      yield line.strip()
    yield ''


def _require_key(keys: Sequence[str], text_key: str, name: str) -> None:
  if text_key not in keys:
    raise ConfigError(f'{name} has no field {text_key!r}; set text_key to one of {", ".join(sorted(keys))}')


def tfds_records(name: str, split: str) -> tuple[Any, Any]:
  """(builder, records) of one split of a TFDS dataset: its name, or its version directory. Needs no TensorFlow.

  Raises:
    ConfigError: it cannot be opened.
  """
  import tensorflow_datasets as tfds

  try:
    builder = (
      tfds.builder_from_directory(name) if _is_tfds_dir(name) else tfds.builder(name, file_format='array_record')
    )
    return builder, builder.as_data_source(split)
  except Exception as e:  # TFDS raises many kinds, among them bare AssertionError.
    reason = (str(e).strip() or type(e).__name__).splitlines()[0]
    raise ConfigError(
      f'input tfds:{name}, split {split!r}: cannot be opened ({reason}); '
      "build it first with file_format='array_record', or give its version directory"
    ) from e


def _open_tfds(name: str, split: str, text_key: str) -> TextSource:
  builder, data = tfds_records(name, split)
  _require_key(list(builder.info.features), text_key, f'tfds:{name}')
  files = [epath.Path(f) for f in sorted({str(i.filename) for i in builder.info.splits[split].file_instructions})]
  digest = hashlib.sha256(''.join(file_sha256(f) for f in files).encode()).hexdigest()
  title = f'tfds:{builder.info.full_name}/{split}'
  return TextSource(
    title,
    sum(int(f.stat().length) for f in files),
    digest,
    lambda on_bytes: record_lines((data[i][text_key] for i in range(len(data))), title, on_bytes),
  )


def hf_records(name: str, split: str) -> Any:
  """One split of a Hugging Face dataset, NAME or NAME:CONFIG.

  Raises:
    ConfigError: it cannot be loaded, or the package `datasets` is missing.
  """
  try:
    import datasets
  except ImportError as e:
    raise ConfigError(f"input hf:{name} needs the package 'datasets'; install it with: pip install datasets") from e

  path, _, config = name.partition(':')
  try:
    return datasets.load_dataset(path, config or None, split=split)
  except Exception as e:  # network, names and formats fail in many ways there
    raise ConfigError(f'input hf:{name}, split {split!r}: cannot be loaded ({e})') from e


def _open_hf(name: str, split: str, text_key: str) -> TextSource:
  data = hf_records(name, split)
  _require_key(list(data.column_names), text_key, f'hf:{name}')
  digest, size = hashlib.sha256(), 0
  for row in data:
    text = str(row[text_key]).encode('utf-8', 'surrogatepass')
    digest.update(len(text).to_bytes(8, 'little') + text)
    size += len(text)
  title = f'hf:{name}/{split}'
  return TextSource(
    title, size, digest.hexdigest(), lambda on_bytes: record_lines((row[text_key] for row in data), title, on_bytes)
  )
