"""Augmentation of a labelled table, file to file: shards that are written whole, joined at the end."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import logging
import pathlib
import shutil
import sys
import time
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import tqdm
from etils import epath

from compactlm_jax.data.augment import (
  COPIES,
  DEFAULT_COPIES,
  PAIRS,
  STOP_WORDS,
  augmented_rows,
  find_words,
  make_copies,
)
from compactlm_jax.data.table import numbered_lines
from compactlm_jax.data.vectors import WordVectors, read_vectors
from compactlm_jax.errors import ConfigError, DataError, PreemptedError, StorageError
from compactlm_jax.jobs.augment_rows import Rows, Writer, open_rows
from compactlm_jax.jobs.candidates import Finder, load_masked_model
from compactlm_jax.jobs.models import params_digest
from compactlm_jax.jobs.output import output_table
from compactlm_jax.parse import parse_json
from compactlm_jax.storage import is_remote, whole_file
from compactlm_jax.train.signals import StopRequest

SHARD_ROWS = 256
"""Rows of the input that are computed, and kept, together."""

_LOG_SECONDS = 30

log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Counts:
  """What augmentation did.

  Attributes:
    rows: of the input.
    written: rows of the output, the originals included.
    guessed_words: words that the masked language model was asked about.
    neighbour_words: words that the vectors were asked about.
    guesses, neighbours: candidates that they gave.
    without: words without candidates, which are never replaced.
    replaced: words of the output that are others than in the original.
    repeated: copies that were dropped because they exist already.
  """

  rows: int = 0
  written: int = 0
  guessed_words: int = 0
  neighbour_words: int = 0
  guesses: int = 0
  neighbours: int = 0
  without: int = 0
  replaced: int = 0
  repeated: int = 0

  def __add__(self, other: Counts) -> Counts:
    return Counts(*(a + b for a, b in zip(dataclasses.astuple(self), dataclasses.astuple(other), strict=True)))


@dataclasses.dataclass(frozen=True)
class Options:
  """How a table is augmented.

  Attributes:
    text_columns: one, or two for pairs; () takes those of `task`, or 'text'.
    task: GLUE task, whose official file, number of copies and columns are taken; '' for none.
    copies: copies of each text; 0 takes the published number of `task`, or 30.
    candidates: of each word; the original's M.
    probability: of replacing a word.
    pairs: see `data.augment.augmented_rows`.
    context: see `jobs.candidates.Finder`.
    vectors: file of word vectors in GloVe's format; '' takes the model's token embeddings.
    stop_words: file with a word on each line, which are never replaced; '' takes English ones.
    seed: of what is replaced.
    batch_size: gaps that are guessed together. It may change when an augmentation is continued.
    seq_len: most tokens that the model reads; 0 takes all it can.
  """

  text_columns: tuple[str, ...] = ()
  task: str = ''
  copies: int = 0
  candidates: int = 15
  probability: float = 0.4
  pairs: str = 'clean'
  context: str = 'published'
  vectors: str = ''
  stop_words: str = ''
  seed: int = 0
  batch_size: int = 128
  seq_len: int = 0

  def __post_init__(self) -> None:
    if not 0 < self.probability <= 1:
      raise ConfigError(f'--probability: {self.probability} must be above 0 and at most 1')
    if self.pairs not in PAIRS:
      raise ConfigError(f'--pairs: {self.pairs!r}; use one of {", ".join(PAIRS)}')
    if self.copies < 0 or self.seed < 0:
      raise ConfigError(f'--copies, --seed: {self.copies} and {self.seed} must not be negative')

  @property
  def wanted_copies(self) -> int:
    """Copies of each text."""
    return self.copies or COPIES.get(self.task, DEFAULT_COPIES)


def run_augment(source: str, model: str, output: str, options: Options, overwrite: bool = False) -> Counts:
  """Writes a table with each row and its augmented copies, the original first.

  What is drawn for a row depends on the seed and its number alone. Finished shards lie in a folder beside the output
  until it is complete, so the same call continues after a kill and gives the same bytes; a complete output of the same
  call is kept. OUTPUT.json holds settings and counts.

  Args:
    source: .tsv with a header or .jsonl, perhaps with .gz; with `options.task` what `read_glue` takes, or its file.
    model: folder or run of a masked language model or a generator.
    output: .tsv or .jsonl to write.
    options: how.
    overwrite: replace an output, or the beginning of one, that was made in another way.

  Returns:
    What was done.

  Raises:
    ConfigError: a missing column, a model that guesses no words, or an output that was made in another way.
    DataError: a damaged file, no rows, vectors that cannot be read, or no word of the table has a candidate.
    PreemptedError: a signal asked to stop; finished shards are kept.
    StorageError: the output cannot be written.
  """
  target = _on_disk(output, source)
  rows = open_rows(source, options.task, options.text_columns)
  bundle = load_masked_model(model)
  vectors = read_vectors(options.vectors) if options.vectors else None
  stop_words = _stop_words(options.stop_words)
  settings = _settings(options, rows, params_digest(bundle.params), vectors, stop_words)
  if (done := _finished(target, settings)) is not None:
    log.info('%s already holds this augmentation; it is kept', target)
    return done
  finder = Finder.of(
    bundle,
    vectors,
    count=options.candidates,
    context=options.context,
    batch_size=options.batch_size,
    seq_len=options.seq_len,
  )
  try:
    parts = _parts_folder(target, settings, overwrite)
    counts = _augment_shards(rows, finder, options, stop_words, Writer(target.suffix, rows.columns), parts)
    if counts.guesses + counts.neighbours == 0:
      shutil.rmtree(parts)
      raise DataError(
        f'{rows.name}: no word has a candidate ({counts.guessed_words + counts.neighbour_words:,} words were looked '
        f'up); are {", ".join(rows.text_columns)} the text columns, in the language of the model and the vectors?'
      )
    _join(target, parts, Writer(target.suffix, rows.columns).header(), settings, counts)
  except OSError as e:
    raise StorageError(f'{target}: cannot be written ({e.strerror or e}); the same command continues') from e
  return counts


def as_text(output: str, counts: Counts) -> str:
  """The counts in words."""
  words = counts.guessed_words + counts.neighbour_words
  return '\n'.join(
    [
      f'{output}: {counts.rows:,} rows in, {counts.written:,} rows out ({counts.written / max(1, counts.rows):.1f} for '
      f'each), {counts.repeated:,} copies dropped because they were there already',
      f'words looked up: {words:,}, of them {counts.without:,} without candidates; replaced in the copies: '
      f'{counts.replaced:,}',
      f'candidates of the masked language model: {counts.guesses:,} for {counts.guessed_words:,} words; neighbours of '
      f'vectors: {counts.neighbours:,} for {counts.neighbour_words:,} words',
    ]
  )


def augment_shard(
  chunk: Sequence[dict[str, Any]],
  first: int,
  rows: Rows,
  finder: Finder,
  options: Options,
  stop_words: frozenset[str] = STOP_WORDS,
) -> tuple[list[dict[str, Any]], Counts]:
  """The rows that some rows become, and what was done.

  Args:
    chunk: rows of the table.
    first: number of the first one.
    rows: the table.
    finder: finds candidates; those of the whole chunk together.
    options: how.
    stop_words: words that stay.
  """
  texts = find_words([row[name] for row in chunk for name in rows.text_columns], finder.reader.tokenizer, stop_words)
  known = {text.text: text for text in texts}
  candidates = dict(zip(known, finder.find(list(known.values())), strict=True))
  out, total = [], Counts()
  width, wanted = len(rows.text_columns), options.wanted_copies
  for number, row in enumerate(chunk):
    own = texts[number * width : (number + 1) * width]
    copies = []
    for column, text in enumerate(own):
      rng = np.random.default_rng([options.seed, first + number, column])
      made = make_copies(text, candidates[text.text], wanted, options.probability, rng)
      copies.append(made.texts)
      kinds = [(word.pieces == 1, len(found)) for word, found in zip(text.words, candidates[text.text], strict=True)]
      total += Counts(
        guessed_words=sum(single for single, _ in kinds),
        neighbour_words=sum(not single for single, _ in kinds),
        guesses=sum(found for single, found in kinds if single),
        neighbours=sum(found for single, found in kinds if not single),
        without=sum(not found for _, found in kinds),
        replaced=made.replaced,
        repeated=wanted - len(made.texts),
      )
    made_rows = augmented_rows([text.text for text in own], copies, options.pairs)
    out += [{**row, **dict(zip(rows.text_columns, values, strict=True))} for values in made_rows]
    total += Counts(rows=1, written=len(made_rows))
  return out, total


def _augment_shards(
  rows: Rows, finder: Finder, options: Options, stop_words: frozenset[str], writer: Writer, parts: pathlib.Path
) -> Counts:
  """Computes the shards that are not there yet."""
  total, last = Counts(), time.monotonic()
  bar = tqdm.tqdm(total=rows.count, unit=' rows', disable=not sys.stderr.isatty(), file=sys.stderr)
  with StopRequest() as stop, bar:
    for shard, chunk in enumerate(_chunks(rows)):
      file = parts / f'{shard:06d}'
      counts = _read_counts(file) if file.exists() else None
      if counts is None:
        if stop.requested():
          raise PreemptedError(f'asked to stop after {total.rows:,} of {rows.count:,} rows; the same command continues')
        made, counts = augment_shard(chunk, shard * SHARD_ROWS, rows, finder, options, stop_words)
        body = ''.join(map(writer.line, made))
        head = {'counts': dataclasses.asdict(counts), 'sha256': _digest(body.encode())}
        _write_whole(file, json.dumps(head) + '\n' + body)
      total += counts
      bar.update(len(chunk))
      if bar.disable and time.monotonic() - last > _LOG_SECONDS:
        last = time.monotonic()
        log.info('augment: %d of %d rows, %d written', total.rows, rows.count, total.written)
  return total


def _chunks(rows: Rows) -> Iterator[list[dict[str, Any]]]:
  chunk: list[dict[str, Any]] = []
  for row in rows.read():
    chunk.append(row)
    if len(chunk) == SHARD_ROWS:
      yield chunk
      chunk = []
  if chunk:
    yield chunk


def _settings(
  options: Options, rows: Rows, model: str, vectors: WordVectors | None, stop_words: frozenset[str]
) -> dict[str, Any]:
  """What decides the output; files count by what they hold."""
  known = {name: value for name, value in dataclasses.asdict(options).items() if name != 'batch_size'}
  digest = hashlib.sha256('\n'.join(vectors.words).encode() + vectors.vectors_VE.tobytes()) if vectors else None
  return {
    **known,
    'text_columns': list(rows.text_columns),
    'copies': options.wanted_copies,
    'vectors': digest.hexdigest() if digest else '',
    'stop_words': hashlib.sha256('\n'.join(sorted(stop_words)).encode()).hexdigest(),
    'input': rows.sha256,
    'model': model,
    'shard_rows': SHARD_ROWS,
  }


def _on_disk(output: str, source: str) -> pathlib.Path:
  """The path of the output, beside which parts are gathered, by renames."""
  target = output_table(output, source)
  if is_remote(target):
    raise ConfigError(f'--output: {output} is in a bucket; write to a disk, and copy the file there when it is whole')
  return pathlib.Path(target)


def _finished(target: pathlib.Path, settings: dict[str, Any]) -> Counts | None:
  report, parts = _report_file(target), _parts(target)
  if not target.exists() or not report.exists() or (parts / 'settings.json').exists():
    return None
  found = _read_json(report)
  counts = _counts(found.get('counts'))
  if found.get('settings') != settings or counts is None:
    return None
  if parts.exists():
    shutil.rmtree(parts)  # a call that was killed while it removed them
  return counts


def _parts_folder(target: pathlib.Path, settings: dict[str, Any], overwrite: bool) -> pathlib.Path:
  """The folder of the shards, with those of an earlier call of the same settings."""
  parts = _parts(target)
  begun = _read_json(parts / 'settings.json') if (parts / 'settings.json').exists() else None
  if begun == settings:
    log.info('%s: continues, %d shards are there', target, sum(1 for _ in parts.iterdir()) - 1)
    return parts
  if begun is not None and not overwrite:
    changed = ', '.join(sorted(name for name in settings if settings[name] != begun.get(name)))
    raise ConfigError(
      f'{parts} holds the beginning of an augmentation with other settings ({changed}); add --overwrite'
    )
  if begun is None and target.exists() and not overwrite:
    raise ConfigError(f'--output: {target} exists and was made in another way; choose another one or add --overwrite')
  if parts.exists():
    shutil.rmtree(parts)
  parts.mkdir()
  _write_whole(parts / 'settings.json', json.dumps(settings))
  return parts


def _join(target: pathlib.Path, parts: pathlib.Path, header: str, settings: dict[str, Any], counts: Counts) -> None:
  with whole_file(target) as draft, draft.open('wb') as out:
    out.write(header.encode())
    for file in sorted(file for file in parts.iterdir() if file.name.isdecimal()):
      with file.open('rb') as part:
        part.readline()
        shutil.copyfileobj(part, out)
  report = {'settings': settings, 'counts': dataclasses.asdict(counts)}
  _write_whole(_report_file(target), json.dumps(report, indent=2) + '\n')
  shutil.rmtree(parts)


def _write_whole(file: pathlib.Path, content: str) -> None:
  with whole_file(file, shared=True) as draft:
    draft.write_bytes(content.encode())


def _read_counts(file: pathlib.Path) -> Counts | None:
  """What was done for a shard; None if it is not as it was written, so that it has to be made again."""
  head, _, body = file.read_bytes().partition(b'\n')
  with contextlib.suppress(ValueError, TypeError, KeyError):
    found = parse_json(head)
    if found['sha256'] == _digest(body):
      return _counts(found['counts'])
  log.warning('%s is damaged and made again', file)
  return None


def _counts(found: object) -> Counts | None:
  names = [field.name for field in dataclasses.fields(Counts)]
  if not isinstance(found, dict) or sorted(found) != sorted(names):
    return None
  return Counts(**found) if all(type(count) is int for count in found.values()) else None


def _digest(content: bytes) -> str:
  return hashlib.sha256(content).hexdigest()


def _read_json(file: pathlib.Path) -> dict[str, Any]:
  try:
    found = parse_json(file.read_bytes())
  except ValueError:
    return {}
  return found if isinstance(found, dict) else {}


def _parts(target: pathlib.Path) -> pathlib.Path:
  return target.with_name(f'.{target.name}.parts')


def _report_file(target: pathlib.Path) -> pathlib.Path:
  return target.with_name(f'{target.name}.json')


def _stop_words(path: str) -> frozenset[str]:
  if not path:
    return STOP_WORDS
  return frozenset(line.strip().lower() for _, line in numbered_lines(epath.Path(path)) if line.strip())
