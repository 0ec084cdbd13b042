"""Offline preparation: text in, a TFDS dataset of fixed-length rows of token ids out."""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import errno
import importlib.metadata
import logging
import os
import random
import shutil
import socket
from collections.abc import Generator, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, NamedTuple

import numpy as np
from etils import epath

from compactlm_jax.data import packing, shards, text
from compactlm_jax.data.manifest import FILE, Manifest, Shard, read_manifest, verify_files
from compactlm_jax.data.tokenizer import Tokenizer, load_tokenizer, one_thread_each
from compactlm_jax.errors import ConfigError, DataError, StorageError

MODES = ('packed', 'pairs', 'sentences')
PAIR_RULES = ('electra', 'convbert')

log = logging.getLogger(__name__)

_CHUNK_CHARS = 1 << 17
_CHECK_ROWS = 2048
_SHARD_TOKENS = 1 << 25
_SPARE_BYTES = 64 << 20


@dataclasses.dataclass
class _Counts:
  documents: int = 0
  lines: int = 0
  rows: int = 0
  tokens: int = 0
  words: int = 0
  unknown_tokens: int = 0


def prepare(
  input: str,
  tokenizer: str | Tokenizer,
  output: Any,
  seq_len: int,
  mode: str = 'packed',
  *,
  workers: int = 0,
  seed: int = 0,
  pair_rule: str = 'electra',
  holdout_rows: int = 0,
  split: str = 'train',
  text_key: str = 'text',
  shard_rows: int = 0,
  overwrite: bool = False,
) -> Manifest:
  """Tokenises text into rows and writes them as a TFDS dataset of ArrayRecord shards.

  `tfds.builder_from_directory(output).as_data_source()` reads the result: `input_ids` uint16 [T] (int32 for more than
  65,536 tokens), `token_type_ids` uint8 [T], `length` int32 (real tokens). The same input and settings give the same
  bytes for any number of workers. The folder appears when it is complete; one that holds the same settings is reused.

  Args:
    input: comma-separated globs of UTF-8 text files (.gz is read), in which a blank line ends a document and each
      line is a sentence or paragraph; or `tfds:NAME`, a TFDS directory, `hf:NAME[:CONFIG]`.
    tokenizer: tokenizer folder, or a loaded tokenizer.
    output: folder to write.
    seq_len: row length T in tokens, special tokens included.
    mode: 'packed' fills each row with whole documents one after the other (`packing.pack_documents`), 'pairs' builds
      ELECTRA's two-segment examples (`packing.sentence_pairs`), 'sentences' puts one line in each row, cut at T.
    workers: threads that tokenise; 0 takes all cores.
    seed: of the pairs and of the held-out rows.
    pair_rule: 'electra', or 'convbert' for the condition before its fix (ConvBERT), in mode 'pairs'.
    holdout_rows: rows, drawn uniformly, that become a 'validation' split.
    split: split of a dataset input.
    text_key: text field of a dataset input.
    shard_rows: rows of one file; 0 takes about 32 million tokens.
    overwrite: replace a dataset with other settings.

  Returns:
    The manifest, also written to output/manifest.json.

  Raises:
    ConfigError: a setting is invalid, or `output` holds something else.
    DataError: no text, no file matches, not UTF-8.
    StorageError: the disk is full or not writable.
  """
  options: dict[str, Any] = {'mode': mode, 'seq_len': seq_len, 'seed': seed, 'pair_rule': pair_rule}
  options |= {'holdout_rows': holdout_rows, 'shard_rows': shard_rows}
  _check(options, workers)
  tokenizer = tokenizer if isinstance(tokenizer, Tokenizer) else load_tokenizer(tokenizer)
  sources = text.open_text(input, split=split, text_key=text_key)
  settings = {
    **options,
    'pair_rule': pair_rule if mode == 'pairs' else '',
    'shard_rows': shard_rows or max(1, _SHARD_TOKENS // seq_len),
    'text_key': text_key if sources[0].name.startswith(('tfds:', 'hf:')) else '',
    'tokenizer': tokenizer.fingerprint(),
    'sources': [{'name': s.name, 'size': s.size, 'sha256': s.sha256} for s in sources],
  }
  return _write_once(epath.Path(output), sources, tokenizer, settings, workers or os.cpu_count() or 1, overwrite)


def _check(options: dict[str, Any], workers: int) -> None:
  if options['seq_len'] < 8:
    raise ConfigError(f'seq_len {options["seq_len"]} must be at least 8')
  if options['mode'] not in MODES:
    raise ConfigError(f'mode {options["mode"]!r} is unknown; use one of {", ".join(MODES)}')
  if options['pair_rule'] not in PAIR_RULES:
    raise ConfigError(f'pair_rule {options["pair_rule"]!r} is unknown; use one of {", ".join(PAIR_RULES)}')
  for name, value in {'workers': workers, **{k: options[k] for k in ('seed', 'holdout_rows', 'shard_rows')}}.items():
    if value < 0:
      raise ConfigError(f'{name} {value} must not be negative')


def _write_once(
  target: epath.Path,
  sources: Sequence[text.TextSource],
  tokenizer: Tokenizer,
  settings: dict[str, Any],
  workers: int,
  overwrite: bool,
) -> Manifest:
  if (existing := _existing(target, settings, overwrite)) is not None:
    log.info('%s already holds this dataset; it is reused', target)
    return existing
  # At least this much is written: ids take about two bytes each, a token about four characters of (packed) text.
  _require_space(target.parent, sum(s.size for s in sources) // 2 + _SPARE_BYTES)
  with _atomic_folder(target, overwrite) as scratch:
    manifest = _write(scratch, sources, tokenizer, settings, workers)
  log.info('%s: %d rows of %d tokens', target, manifest.counts['rows'], manifest.seq_len)
  return manifest


def _existing(target: epath.Path, settings: dict[str, Any], overwrite: bool) -> Manifest | None:
  """The manifest of a dataset that can be reused; None if `target` may be written."""
  if not target.exists() or (target.is_dir() and not any(target.iterdir())):
    return None
  if not (target / FILE).exists():
    raise ConfigError(f'{target} exists and is not a prepared dataset; choose another output')
  try:
    manifest = read_manifest(target)
    if manifest.settings == settings:
      verify_files(target, manifest)
      return manifest
  except DataError:
    if not overwrite:
      raise
    return None
  if overwrite:
    return None
  changed = sorted(k for k in settings if settings[k] != manifest.settings.get(k))
  raise ConfigError(
    f'{target} holds a dataset with other settings ({", ".join(changed)}); choose another output or set overwrite'
  )


def _require_space(folder: epath.Path, needed: int) -> None:
  path = epath.Path(folder)
  while not path.exists() and path != path.parent:
    path = path.parent
  if '://' in str(path):
    return
  free = shutil.disk_usage(os.fspath(path)).free
  if free < needed:
    raise StorageError(
      f'{folder}: {free >> 20} MiB free, at least {needed >> 20} MiB needed; free some space or choose another output'
    )


@contextlib.contextmanager
def _atomic_folder(target: epath.Path, overwrite: bool) -> Iterator[epath.Path]:
  """A folder beside `target` that takes its name at the end, or is removed."""
  host = socket.gethostname()
  scratch = target.parent / f'.{target.name}.tmp-{host}-{os.getpid()}'
  try:
    target.parent.mkdir(parents=True, exist_ok=True)
    for stale in target.parent.glob(f'.{target.name}.tmp-{host}-*'):
      if not _alive(stale.name.rsplit('-', 1)[-1]) or stale == scratch:
        stale.rmtree()
    scratch.mkdir()
    yield scratch
    if target.exists():
      old = target.parent / f'{scratch.name}.old'
      target.rename(old)
      scratch.rename(target)
      old.rmtree()
    else:
      scratch.rename(target)
  except (OSError, RuntimeError) as e:
    # ArrayRecord reports a full disk as RuntimeError.
    if isinstance(e, OSError) or os.strerror(errno.ENOSPC) in str(e):
      raise StorageError(f'{target}: cannot be written ({e}); free some space or choose another output') from e
    raise
  finally:
    if scratch.exists():
      scratch.rmtree()


def _alive(pid: str) -> bool:
  try:
    os.kill(int(pid), 0)
  except (ValueError, ProcessLookupError):
    return False
  except PermissionError:
    pass
  return True


def _write(
  scratch: epath.Path, sources: Sequence[text.TextSource], tokenizer: Tokenizer, settings: dict[str, Any], workers: int
) -> Manifest:
  counts = _Counts()
  contents: dict[str, dict[str, int]] = {}
  with contextlib.closing(_tokenized(sources, tokenizer, workers, counts)) as lines:
    rows = _counted(_rows(lines, tokenizer, settings), tokenizer, counts)
    examples = _totalled(_split(rows, settings, counts), tokenizer.pad_id, settings['seq_len'], contents)
    shards.write_dataset(
      scratch,
      _while_there_is_space(scratch, examples, settings['seq_len']),
      settings['seq_len'],
      settings['shard_rows'],
      tokenizer.vocab_size,
    )
  tokenizer.save(scratch / 'tokenizer')
  packages = ('tokenizers', 'tensorflow-datasets', 'array_record')
  manifest = Manifest(
    settings=settings,
    vocab_size=tokenizer.vocab_size,
    counts={
      **dataclasses.asdict(counts),
      'real_token_fraction': round(counts.tokens / (counts.rows * settings['seq_len']), 6),
    },
    splits=_digests(scratch),
    versions={name: importlib.metadata.version(name) for name in packages},
    contents=contents,
  )
  (scratch / FILE).write_text(manifest.dumps())
  return read_manifest(scratch)


def _tokenized(
  sources: Sequence[text.TextSource], tokenizer: Tokenizer, workers: int, counts: _Counts
) -> Generator[list[int] | None, None, None]:
  """Token ids of each line in order, the first of each word marked; None after each document."""

  def encode(chunk: list[str]) -> list[list[int] | None]:
    encodings = iter(tokenizer.backend.encode_batch([line for line in chunk if line], add_special_tokens=False))
    return [_marked(line, next(encodings)) if line else None for line in chunk]

  # The encoder runs outside the interpreter lock, so threads are enough, and nothing is forked or pickled.
  pool = ThreadPoolExecutor(workers)
  waiting: collections.deque[Future[list[list[int] | None]]] = collections.deque()
  try:
    with one_thread_each(), text.progress(sources, 'prepare') as on_bytes:
      for chunk in _chunks(sources, on_bytes, counts):
        waiting.append(pool.submit(encode, chunk))
        if len(waiting) > 2 * workers:
          yield from waiting.popleft().result()
      while waiting:
        yield from waiting.popleft().result()
  finally:
    pool.shutdown(wait=True, cancel_futures=True)


def _marked(line: str, encoding: Any) -> list[int]:
  return packing.mark_words(line, encoding.ids, [end for _, end in encoding.offsets])


def _chunks(sources: Sequence[text.TextSource], on_bytes: text.OnBytes, counts: _Counts) -> Iterator[list[str]]:
  chunk: list[str] = []
  chars, previous = 0, ''
  for source in sources:
    for line in source.lines(on_bytes):
      counts.lines += bool(line)
      counts.documents += bool(previous and not line)
      previous = line
      chunk.append(line)
      chars += len(line)
      if chars >= _CHUNK_CHARS:
        yield chunk
        chunk, chars = [], 0
  if chunk:
    yield chunk


def _rows(lines: Iterable[list[int] | None], tokenizer: Tokenizer, settings: dict[str, Any]) -> Iterator[packing.Row]:
  seq_len, cls_id, sep_id = settings['seq_len'], tokenizer.cls_id, tokenizer.sep_id
  if settings['mode'] == 'packed':
    return packing.pack_documents(lines, seq_len, cls_id, sep_id)
  if settings['mode'] == 'sentences':
    return packing.one_per_line(lines, seq_len, cls_id, sep_id)
  seed, rule = settings['seed'], settings['pair_rule']
  return packing.sentence_pairs(lines, seq_len, cls_id, sep_id, seed=seed, rule=rule)


class _Counted(NamedTuple):
  ids: np.ndarray
  second: int
  words: int


def _counted(rows: Iterable[packing.Row], tokenizer: Tokenizer, counts: _Counts) -> Iterator[_Counted]:
  """Takes the marks of words off again."""
  for row in rows:
    marked = np.asarray(row.ids, np.int32)
    ids, words = marked & ~packing.WORD_START, int((marked >= packing.WORD_START).sum())
    counts.rows += 1
    counts.tokens += len(ids)
    counts.words += words
    counts.unknown_tokens += int((ids == tokenizer.unk_id).sum())
    yield _Counted(ids, row.second, words)


def _split(rows: Iterable[_Counted], settings: dict[str, Any], counts: _Counts) -> Iterator[tuple[str, _Counted]]:
  """(split, row) pairs; held-out rows are a uniform sample (reservoir), known when all rows were seen."""
  rng = random.Random(settings['seed'])
  held: list[tuple[int, _Counted]] = []
  for number, row in enumerate(rows):
    if len(held) < settings['holdout_rows']:
      held.append((number, row))
      continue
    if held and (slot := rng.randrange(number + 1)) < len(held):
      (_, row), held[slot] = held[slot], (number, row)
    yield 'train', row
  names = ', '.join(s['name'] for s in settings['sources'])
  if not counts.rows:
    raise DataError(f'input {names}: no rows, the text is empty')
  if counts.rows <= len(held):
    raise DataError(
      f'input {names}: {counts.rows} rows only, holdout_rows {settings["holdout_rows"]} leaves none to train on'
    )
  for _, row in sorted(held, key=lambda item: item[0]):
    yield 'validation', row


def _totalled(
  rows: Iterable[tuple[str, _Counted]], pad_id: int, seq_len: int, contents: dict[str, dict[str, int]]
) -> Iterator[tuple[str, dict[str, Any]]]:
  """(split, example) pairs; `contents` gets what each split holds."""
  for split, row in rows:
    content = contents.setdefault(split, {'rows': 0, 'tokens': 0, 'words': 0})
    for name, number in (('rows', 1), ('tokens', len(row.ids)), ('words', row.words)):
      content[name] += number
    yield split, _example(row, seq_len, pad_id)


def _example(row: _Counted, seq_len: int, pad_id: int) -> dict[str, Any]:
  input_ids = np.full(seq_len, pad_id, np.int32)
  input_ids[: len(row.ids)] = row.ids
  token_type_ids = np.zeros(seq_len, np.uint8)
  token_type_ids[row.second : len(row.ids)] = 1
  return {'input_ids': input_ids, 'token_type_ids': token_type_ids, 'length': np.int32(len(row.ids))}


def _while_there_is_space(
  folder: epath.Path, examples: Iterable[tuple[str, dict[str, Any]]], seq_len: int
) -> Iterator[tuple[str, dict[str, Any]]]:
  """Passes examples on and looks at the free disk now and then."""
  for number, item in enumerate(examples):
    if number % _CHECK_ROWS == 0:
      _require_space(folder, _CHECK_ROWS * seq_len * 8 + _SPARE_BYTES)
    yield item


def _digests(folder: epath.Path) -> dict[str, tuple[Shard, ...]]:
  import tensorflow_datasets as tfds

  splits = {}
  for name, info in tfds.builder_from_directory(os.fspath(folder)).info.splits.items():
    found = []
    for file, rows in zip(info.filepaths, info.shard_lengths, strict=True):
      path = epath.Path(file)
      found.append(Shard(path.name, int(rows), int(path.stat().length), text.file_sha256(path)))
    splits[name] = tuple(found)
  return splits
