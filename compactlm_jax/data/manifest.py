"""manifest.json of a prepared dataset: what it holds, what it was made of, and the digests of its files."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import json
from collections.abc import Mapping
from typing import Any

from etils import epath

from compactlm_jax.data import text
from compactlm_jax.data.tokenizer import Tokenizer
from compactlm_jax.errors import DataError
from compactlm_jax.filenames import is_plain
from compactlm_jax.parse import parse_json
from compactlm_jax.storage import write_whole

FORMAT = 2
# Format 1 has the same manifest and records that take longer to read (`shards.find_layout`).
READABLE = (1, 2)
FILE = 'manifest.json'
_WRITERS = ('tokenizers', 'tensorflow-datasets', 'array_record')


@dataclasses.dataclass(frozen=True)
class Shard:
  """One ArrayRecord file of a split.

  Attributes:
    file: name inside the dataset.
    rows: records in it.
    bytes: its size.
    sha256: digest of its content, hex.
  """

  file: str
  rows: int
  bytes: int
  sha256: str


@dataclasses.dataclass(frozen=True)
class Manifest:
  """Content of manifest.json: no time, no path, no host name, so that equal datasets have equal manifests.

  Attributes:
    settings: everything that the rows depend on: mode, seq_len, seed, sources, tokenizer fingerprint, ...
    vocab_size: ids are below it.
    counts: documents, lines, rows, tokens, words, unknown_tokens, real_token_fraction.
    splits: shards of each split, in order.
    versions: libraries that wrote the files.
    contents: rows, tokens (special ones included) and words of each split; empty in manifests that are older than it.
      A word is a maximal run of characters that are not white space, of which at least one token was made; it belongs
      to the row with its first token, and is not counted if that was cut off. There is no word for the end of a line,
      where the word perplexities published for WikiText count an <eos>.
  """

  settings: Mapping[str, Any]
  vocab_size: int
  counts: Mapping[str, float]
  splits: Mapping[str, tuple[Shard, ...]]
  versions: Mapping[str, str]
  contents: Mapping[str, Mapping[str, int]] = dataclasses.field(default_factory=dict)

  @property
  def seq_len(self) -> int:
    """Row length in tokens."""
    return int(self.settings['seq_len'])

  @property
  def fingerprint(self) -> str:
    """Fingerprint of the tokenizer that made the ids."""
    return str(self.settings['tokenizer'])

  def rows(self, split: str) -> int:
    """Number of rows of a split."""
    return sum(s.rows for s in self.splits[split])

  def words_per_token(self, split: str) -> float:
    """Words per token that a causal model predicts (all but the first of each row); 0 if words were not counted."""
    content = self.contents.get(split)
    return content['words'] / max(1, content['tokens'] - content['rows']) if content else 0.0

  def dumps(self) -> str:
    """The text of manifest.json."""
    return json.dumps({'format': FORMAT, **dataclasses.asdict(self)}, indent=2, sort_keys=True) + '\n'


def read_manifest(folder: Any) -> Manifest:
  """Reads manifest.json of a prepared dataset.

  Raises:
    DataError: there is none, or it is damaged or of another format.
  """
  path = epath.Path(folder) / FILE
  remedy = 'write the dataset with: compactlm prepare --input=GLOB --tokenizer=DIR --output=DIR --seq_len=N'
  if not path.exists():
    raise DataError(f'{path}: not there, so {path.parent} is not a prepared dataset; {remedy}')
  try:
    raw = parse_json(path.read_bytes())
    if raw.pop('format') not in READABLE:
      raise DataError(f'{path}: another format than {READABLE[-1]}; {remedy}')
    raw['splits'] = {name: tuple(Shard(**s) for s in shards) for name, shards in raw['splits'].items()}
    return _checked(Manifest(**raw))
  except (ValueError, KeyError, TypeError, AttributeError) as e:
    raise DataError(f'{path}: damaged ({e}); {remedy}') from e


def write_manifest(
  folder: epath.Path,
  settings: Mapping[str, Any],
  tokenizer: Tokenizer,
  counts: Mapping[str, float],
  splits: Mapping[str, tuple[Shard, ...]],
  contents: Mapping[str, Mapping[str, int]],
) -> Manifest:
  """Writes the tokenizer and, last of all, manifest.json beside the shards.

  Args:
    folder: with the shards and dataset_info.json.
    settings: see `Manifest`, as are the others.
    tokenizer: that made the ids.
    counts: of all rows.
    splits: the shards.
    contents: of each split.

  Returns:
    The manifest, read back.
  """
  tokenizer.save(folder / 'tokenizer')
  versions = {name: importlib.metadata.version(name) for name in _WRITERS}
  write_whole(folder / FILE, Manifest(settings, tokenizer.vocab_size, counts, splits, versions, contents).dumps())
  return read_manifest(folder)


def _checked(found: Manifest) -> Manifest:
  """The manifest, in which every number is one, and every file lies in the folder."""
  settings, shards = found.settings, [shard for shards in found.splits.values() for shard in shards]
  counts = [number for content in found.contents.values() for number in content.values()]
  for number in (settings['seq_len'], found.vocab_size, *counts, *(n for s in shards for n in (s.rows, s.bytes))):
    if type(number) is not int or not 0 <= number < 1 << 62:
      raise ValueError(f'{number!r} is no count')
  if not settings['seq_len'] or not found.vocab_size or not all(found.splits.values()):
    raise ValueError('there is nothing in it')
  for content in found.contents.values():
    if not {'rows', 'tokens', 'words'} <= set(content):
      raise ValueError(f'contents {dict(content)} lack rows, tokens or words')
  for shard in shards:
    if not is_plain(shard.file):
      raise ValueError(f'{shard.file!r} is not a plain file name')
  if not all(isinstance(text, str) for text in (settings['tokenizer'], *(s.sha256 for s in shards))):
    raise ValueError('a digest is no text')
  for section in (found.counts, found.versions):
    section.items()
  return found


def verify_files(folder: Any, manifest: Manifest, *, digests: bool = False) -> None:
  """Compares the shard files with the manifest.

  Args:
    folder: the dataset.
    manifest: its manifest.
    digests: also read every file and compare SHA-256.

  Raises:
    DataError: a file is missing, has another size, or another content; named.
  """
  root = epath.Path(folder)
  for shard in (s for shards in manifest.splits.values() for s in shards):
    path = root / shard.file
    remedy = 'copy the dataset again, or prepare it again with overwrite'
    if not path.exists():
      raise DataError(f'{path}: a shard of the dataset is missing; {remedy}')
    if (size := int(path.stat().length)) != shard.bytes:
      raise DataError(f'{path}: {size} bytes, but {shard.bytes} were written; {remedy}')
    if digests and text.file_sha256(path) != shard.sha256:
      raise DataError(f'{path}: its content changed since it was written (SHA-256 differs); {remedy}')
