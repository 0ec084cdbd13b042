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
from compactlm_jax.storage import require_inside, write_whole

FORMAT = 2
# Format 1 has the same manifest and records that take longer to read (`shards.find_layout`).
READABLE = (1, 2)
FILE = 'manifest.json'
_FEATURES, _INFO = 'features.json', 'dataset_info.json'
_FIELDS = {'input_ids': ('uint16', 'int32'), 'token_type_ids': ('uint8',), 'length': ('int32',)}
_CLASSES = tuple(f'tensorflow_datasets.core.features.{name}' for name in ('tensor_feature.Tensor', 'scalar.Scalar'))
_ALL_FIELDS = 'tensorflow_datasets.core.features.features_dict.FeaturesDict'
_MOST_BYTES = 64 << 20
_REMEDY = 'copy the dataset again, or prepare it again with overwrite'
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
  """Compares the shard files, and what TFDS is told of them, with the manifest.

  Args:
    folder: the dataset.
    manifest: its manifest.
    digests: also read every shard and compare SHA-256.

  Raises:
    DataError: a file is missing, a link that leads out of the folder, has another size, or another content; named.
  """
  root = epath.Path(folder)
  for shard in (s for shards in manifest.splits.values() for s in shards):
    path = root / shard.file
    size = _size(path, 'a shard')
    if size != shard.bytes:
      raise DataError(f'{path}: {size} bytes, but {shard.bytes} were written; {_REMEDY}')
    if digests and text.file_sha256(path) != shard.sha256:
      raise DataError(f'{path}: its content changed since it was written (SHA-256 differs); {_REMEDY}')
  for path in (root / _FEATURES, root / _INFO):
    if (size := _size(path, 'a file')) > _MOST_BYTES:
      raise DataError(f'{path}: {size} bytes, more than the {_MOST_BYTES} that are read of such a file; {_REMEDY}')
  _require_features(root / _FEATURES, manifest.seq_len)


def _size(path: epath.Path, what: str) -> int:
  if not path.exists():
    raise DataError(f'{path}: {what} of the dataset is missing; {_REMEDY}')
  require_inside(path, path.parent)
  return int(path.stat().length)


def _require_features(file: epath.Path, seq_len: int) -> None:
  """That the file says what `shards.row_features` does, in any format.

  TFDS imports the modules that it names, and shapes are made room for.
  """
  try:
    raw = parse_json(file.read_bytes())
    fields = raw['featuresDict']['features']
    if set(raw) != {'featuresDict', 'pythonClassName'} or raw['pythonClassName'] != _ALL_FIELDS:
      raise ValueError('not a dictionary of features')
    found = {name: _kind(field) for name, field in fields.items()}
  except (ValueError, KeyError, TypeError, AttributeError) as e:
    raise DataError(f'{file}: damaged ({e}); {_REMEDY}') from e
  if unknown := sorted(set(found) - set(_FIELDS)):
    raise DataError(f'{file}: rows have no field {unknown[0]!r:.60}; {_REMEDY}')
  for name, dtypes in _FIELDS.items():
    allowed = [f'{dtype}{[] if name == "length" else [seq_len]}' for dtype in dtypes]
    if found.get(name) not in allowed:
      raise DataError(f'{file}: {name} is {found.get(name, "missing")} instead of {" or ".join(allowed)}; {_REMEDY}')


def _kind(field: Any) -> str:
  """Type and shape, as 'uint16[128]'."""
  tensor = field['tensor']
  if field['pythonClassName'] not in _CLASSES or tensor.get('encoding', 'none') not in ('none', 'bytes'):
    raise ValueError(f'a field of another kind: {field!r:.200}')
  return f'{tensor["dtype"]}[{", ".join(map(str, tensor["shape"].get("dimensions", ())))}]'
