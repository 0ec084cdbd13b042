"""Datasets that are made in parts, each from files of its own: here one after the other, or by any number of workers.

A part is a function of its files and the settings: it has packing and random numbers of its own, and its share of the
held-out rows. It leaves one file of rows, its held-out rows (part-N.held) and, last, what there is to say about it
(part-N.json), which marks it as done. Each file appears whole, so that a part may be written twice, by two workers at
once, or again after a kill. When all are done, `finish` adds what makes the files a dataset.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import logging
import random
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from etils import epath

from compactlm_jax.data import shards, text
from compactlm_jax.data.manifest import FILE, Manifest, Shard, write_manifest
from compactlm_jax.data.rows import Counts, make_examples
from compactlm_jax.data.tokenizer import Tokenizer
from compactlm_jax.errors import CompactLMError, ConfigError, DataError, StorageError
from compactlm_jax.filenames import TOKENIZER_FILES
from compactlm_jax.parse import json_digest, parse_json
from compactlm_jax.storage import absolute, children, is_remote, write_whole

log = logging.getLogger(__name__)

_TRIES = 3
_PAUSE_SECONDS = 2.0


LOCAL = 'local'
"""The runner that is no runner: parts are written here, one after the other."""


@dataclasses.dataclass(frozen=True)
class Spread:
  """How a dataset is made.

  Attributes:
    parts: 0 is one stream of rows over all files. N > 0 shares the files out to N parts of similar size, each with a
      file of rows and random numbers of its own; the bytes are other ones for each N, but do not depend on the rest.
    runner: LOCAL, or an Apache Beam runner: 'DirectRunner', 'DataflowRunner', 'FlinkRunner'.
    beam_options: further options of its pipeline, as a command line.
  """

  parts: int = 0
  runner: str = LOCAL
  beam_options: str = ''


ONE_STREAM = Spread()
"""Without parts."""


@dataclasses.dataclass(frozen=True)
class Part:
  """Files that are read one after the other.

  Attributes:
    index: of its file of rows.
    files: paths.
    size: of all of them, bytes as stored.
    holdout_rows: its share.
  """

  index: int
  files: tuple[str, ...]
  size: int
  holdout_rows: int


@dataclasses.dataclass(frozen=True)
class Plan:
  """Everything that the parts depend on; plain values, so that it can be sent to workers.

  Attributes:
    settings: of the manifest; digests of the sources are empty, they are taken when a source is read.
    parts: in order of their index.
    folder: where they are written.
    order: all files, in the order of the sources.
    tokenizer: its files.
  """

  settings: Mapping[str, Any]
  parts: tuple[Part, ...]
  order: tuple[str, ...]
  folder: str = ''
  tokenizer: Mapping[str, bytes] = dataclasses.field(default_factory=dict)

  def into(self, folder: epath.Path, tokenizer: Tokenizer) -> Plan:
    """The plan for a folder."""
    files = {name: epath.Path(tokenizer.folder) / name for name in TOKENIZER_FILES}
    content = {name: file.read_bytes() for name, file in files.items() if file.exists()}
    return dataclasses.replace(self, folder=str(absolute(folder)), tokenizer=content)

  @property
  def key(self) -> str:
    """Names the settings in the marks of parts."""
    return json_digest(self.settings)

  def describes(self, settings: Mapping[str, Any]) -> bool:
    """Whether a manifest with these settings is of this plan; the files are compared too, unless in a bucket."""
    known = settings.get('sources', ())
    if {**settings, 'sources': [{**entry, 'sha256': ''} for entry in known]} != dict(self.settings):
      return False
    files = zip(self.order, known, strict=True)
    return all(is_remote(file) or text.file_sha256(epath.Path(file)) == entry['sha256'] for file, entry in files)


def plan_parts(sources: Sequence[text.TextSource], settings: Mapping[str, Any]) -> Plan:
  """Shares files out: the largest first, each to the part that has least; within a part they keep their order.

  Held-out rows are shared out by size, so that each row has the same chance where files are equally dense.

  Args:
    sources: text files.
    settings: of the manifest, with 'parts'.

  Raises:
    ConfigError: fewer files than parts, or a dataset.
  """
  count = settings['parts']
  if not all(source.path for source in sources):
    raise ConfigError(f'--parts={count}: {sources[0].name} is not text files, which alone can be shared out')
  if len(sources) < count:
    raise ConfigError(
      f'--parts={count}: the input is {len(sources)} file(s); a part has one at least. Take fewer parts, or cut the '
      'files between documents'
    )
  members: list[list[int]] = [[] for _ in range(count)]
  sizes = [0] * count
  for i in sorted(range(len(sources)), key=lambda i: (-sources[i].size, i)):
    # Empty files have no weight: the number of files decides among parts that are equally large.
    lightest = min(range(count), key=lambda p: (sizes[p], len(members[p]), p))
    members[lightest].append(i)
    sizes[lightest] += sources[i].size
  held = _shares(sizes, settings['holdout_rows'])
  paths = [str(absolute(source.path)) for source in sources]
  parts = (Part(p, tuple(paths[i] for i in sorted(members[p])), sizes[p], held[p]) for p in range(count))
  return Plan(settings, tuple(parts), tuple(paths))


def write_here(plan: Plan, tokenizer: Tokenizer, workers: int) -> None:
  """Writes the parts that are not done yet, in order.

  Args:
    plan: with its folder.
    tokenizer: makes the ids.
    workers: threads that tokenise.

  Raises:
    DataError: a part has no rows, or a file is not UTF-8.
    StorageError: the disk is full or not writable.
  """
  with text.progress_of(sum(part.size for part in plan.parts), 'prepare') as on_bytes:
    for part in plan.parts:
      write_part(plan, part, tokenizer, workers, on_bytes)


def write_part(
  plan: Plan, part: Part, tokenizer: Tokenizer, workers: int = 1, on_bytes: text.OnBytes = lambda _: None
) -> None:
  """Writes one part unless it is done; what fails for want of storage is tried again.

  Args:
    plan: with its folder.
    part: one of its parts.
    tokenizer: makes the ids.
    workers: threads that tokenise.
    on_bytes: told of what was read.

  Raises:
    DataError: no rows, or not UTF-8.
    StorageError: see `prepare`.
  """
  for attempt in range(1, _TRIES + 1):
    try:
      _write(plan, part, tokenizer, workers, on_bytes)
      return
    except Exception as e:  # clients of buckets have errors of their own
      if attempt == _TRIES or (isinstance(e, CompactLMError) and not isinstance(e, StorageError)):
        raise
      log.warning('part %d failed (%s: %s) and is written again', part.index, type(e).__name__, e)
      time.sleep(_PAUSE_SECONDS * attempt)


def _write(plan: Plan, part: Part, tokenizer: Tokenizer, workers: int, on_bytes: text.OnBytes) -> None:
  folder, seq_len = epath.Path(plan.folder), plan.settings['seq_len']
  mark = _read_mark(plan, part)
  if mark is not None and all(is_remote(f) for f in part.files):
    on_bytes(part.size)
    return
  sources = [text.open_file(file) for file in part.files]
  digests = [source.sha256 for source in sources]
  if mark is not None and mark['sources'] == digests:
    on_bytes(part.size)
    return
  settings = {**plan.settings, 'holdout_rows': part.holdout_rows, 'seed': _seed(plan.settings['seed'], part.index)}
  counts = Counts()
  found: list[Shard] = []
  contents: dict[str, dict[str, int]] = {}
  held: list[bytes] = []
  layout = shards.rows_layout(seq_len, tokenizer.vocab_size)
  try:
    with shards.shard_file(folder / shards.shard_name('train', part.index), found.append) as add:
      for split, example in make_examples(sources, tokenizer, settings, workers, on_bytes, counts, contents):
        (add if split == 'train' else held.append)(layout.encode(example))
  except DataError as e:
    raise DataError(f'part {part.index} of {len(plan.parts)}: {e}; fewer --parts put more files together') from e
  if held:
    write_whole(folder / _held(part), b''.join(held))
  mark = {
    'key': plan.key,
    'sources': digests,
    'counts': dataclasses.asdict(counts),
    'contents': contents,
    'shard': dataclasses.asdict(found[0]),
    'held': hashlib.sha256(b''.join(held)).hexdigest(),
  }
  write_whole(folder / _mark(part), json.dumps({**mark, 'sha256': json_digest(mark)}))


def finish(plan: Plan, tokenizer: Tokenizer) -> Manifest:
  """Makes a dataset of the parts: the held-out rows of all in one file, dataset_info.json, manifest.json last.

  Args:
    plan: with its folder.
    tokenizer: that made the ids.

  Raises:
    StorageError: a part is missing.
  """
  folder, seq_len = epath.Path(plan.folder), plan.settings['seq_len']
  marks = [_read_mark(plan, part) for part in plan.parts]
  missing = [part.index for part, mark in zip(plan.parts, marks, strict=True) if mark is None]
  if missing:
    raise StorageError(f'{folder}: parts {missing[:8]} are not there; the same command writes them')
  known = [mark for mark in marks if mark is not None]
  splits = {'train': tuple(Shard(**mark['shard']) for mark in known)}
  if plan.settings['holdout_rows']:
    splits['validation'] = (_held_out(plan, shards.rows_layout(seq_len, tokenizer.vocab_size)),)
  shards.write_info(folder, splits, seq_len, tokenizer.vocab_size)
  wanted = {shard.file for found in splits.values() for shard in found}
  for child in children(folder):
    if child.name.startswith('part-') or child.name in wanted or child.name.endswith('.json') or child.is_dir():
      continue  # what the parts wrote stays until the manifest is there: without it this is done again
    if is_ours(child.name):
      child.unlink()  # of other settings, or of a worker that was killed
  totals = Counts(**_sums(mark['counts'] for mark in known))
  contents = {name: _sums(mark['contents'].get(name, {}) for mark in known) for name in splits}
  digests = {f: d for part, mark in zip(plan.parts, known, strict=True) for f, d in zip(part.files, mark['sources'])}
  sources = [
    {**entry, 'sha256': digests[file]} for entry, file in zip(plan.settings['sources'], plan.order, strict=True)
  ]
  settings = {**plan.settings, 'sources': sources}
  manifest = write_manifest(folder, settings, tokenizer, totals.totals(seq_len), splits, contents)
  for child in children(folder):
    if child.name.startswith('part-'):
      child.unlink()
  return manifest


def done(plan: Plan) -> list[Part]:
  """The parts whose marks are there."""
  names = {child.name for child in children(plan.folder)}
  return [part for part in plan.parts if _mark(part) in names]


def is_ours(name: str) -> bool:
  """Whether `prepare` gives files or folders such names."""
  return name.lstrip('.').startswith((shards.NAME, 'part-')) or name in (
    'tokenizer',
    'features.json',
    'dataset_info.json',
    FILE,
  )


def _held_out(plan: Plan, layout: shards.Layout) -> Shard:
  found: list[Shard] = []
  folder, size = epath.Path(plan.folder), len(layout.template)
  with shards.shard_file(folder / shards.shard_name('validation', 0), found.append) as add:
    for part in plan.parts:
      content = (folder / _held(part)).read_bytes() if part.holdout_rows else b''
      for start in range(0, len(content), size):
        add(content[start : start + size])
  return found[0]


def _read_mark(plan: Plan, part: Part) -> dict[str, Any] | None:
  """What there is to say about a part; None if it is not done, with these settings, or not as it was written."""
  file = epath.Path(plan.folder) / _mark(part)
  try:
    mark = parse_json(file.read_bytes())
    if mark.pop('sha256') != json_digest(mark) or mark['key'] != plan.key:
      return None
    held = (file.parent / _held(part)).read_bytes() if part.holdout_rows else b''
    whole = (file.parent / mark['shard']['file']).exists() and hashlib.sha256(held).hexdigest() == mark['held']
    return mark if whole else None
  except (FileNotFoundError, ValueError, KeyError, TypeError, AttributeError):
    return None


def _mark(part: Part) -> str:
  return f'part-{part.index:05d}.json'


def _held(part: Part) -> str:
  return f'part-{part.index:05d}.held'


def _seed(seed: int, part: int) -> int:
  """Random numbers of a part are independent of those of others, and of those of other seeds."""
  return random.Random(f'{seed}/{part}').getrandbits(62)


def _shares(sizes: Sequence[int], rows: int) -> list[int]:
  """Rows by size, in whole numbers that add up (largest remainder)."""
  total = max(1, sum(sizes))
  shares = [rows * size // total for size in sizes]
  rest = sorted(range(len(sizes)), key=lambda i: (-(rows * sizes[i] % total), i))
  for i in rest[: rows - sum(shares)]:
    shares[i] += 1
  return shares


def _sums(numbers: Iterable[Mapping[str, int]]) -> dict[str, int]:
  total: dict[str, int] = {}
  for entry in numbers:
    for name, value in entry.items():
      total[name] = total.get(name, 0) + value
  return total


Writer = Callable[[Plan, Tokenizer, int], None]
"""Writes the parts of a plan."""
