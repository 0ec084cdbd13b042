"""Training a WordPiece vocabulary."""

from __future__ import annotations

import collections
import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import tokenizers
from etils import epath
from tokenizers import models, normalizers, pre_tokenizers, trainers

from compactlm_jax.data import text
from compactlm_jax.data.tokenizer import (
  ROLES,
  SPECIAL_TOKENS,
  Tokenizer,
  bert_backend,
  bert_normalizer,
  load_tokenizer,
)
from compactlm_jax.errors import ConfigError, DataError
from compactlm_jax.filenames import TOKENIZER_FILES
from compactlm_jax.storage import write_whole

_BATCH = 1000
_SPECIAL = {f'{role}_token': token for role, token in zip(ROLES, SPECIAL_TOKENS, strict=True)}
_LEARNT = ('tokenizer.json', 'vocab.txt')


def train_wordpiece(
  inputs: str,
  vocab_size: int,
  output: Any,
  lowercase: bool = True,
  *,
  min_frequency: int = 2,
  max_alphabet: int = 1000,
  model_max_length: int = 512,
  overwrite: bool = False,
) -> Tokenizer:
  """Trains a WordPiece vocabulary and writes a complete Hugging Face tokenizer folder.

  The same text and settings give the same bytes: the library numbers word-inner characters in the order of a random
  hash map and breaks ties by number, so they are numbered here first (as extra special tokens of the trainer).

  Args:
    inputs: as in `prepare`.
    vocab_size: entries, special tokens included; fewer if the text does not yield them.
    output: folder to write.
    lowercase: lower-case and strip accents.
    min_frequency: occurrences that a merged token needs.
    max_alphabet: distinct characters kept, the most frequent; words with others become [UNK].
    model_max_length: written into tokenizer_config.json.
    overwrite: replace the files of another tokenizer in `output`.

  Returns:
    The tokenizer, read back from `output`.

  Raises:
    ConfigError: vocab_size is too small, or `output` holds another tokenizer than the one that this call makes.
    DataError: no text.
  """
  target = epath.Path(output)
  if vocab_size < len(SPECIAL_TOKENS) + 4:
    raise ConfigError(f'vocab_size {vocab_size} is too small; use at least {len(SPECIAL_TOKENS) + 4}')
  config = _config(lowercase, model_max_length)
  settings = _settings(config)
  if not overwrite:  # what does not depend on the text, before it is read
    foreign = [name for name in TOKENIZER_FILES if name not in (*settings, *_LEARNT)]
    _require_same(target, {**settings, **dict.fromkeys(foreign)})
  vocab = _vocabulary(text.open_text(inputs), vocab_size, bert_normalizer(lowercase, {}), min_frequency, max_alphabet)
  learnt = _learnt(vocab, config)
  if not overwrite:
    _require_same(target, learnt)
  _write(target, {**settings, **learnt})
  return load_tokenizer(target)


def _vocabulary(
  sources: Sequence[text.TextSource],
  vocab_size: int,
  normalizer: normalizers.BertNormalizer,
  min_frequency: int,
  max_alphabet: int,
) -> dict[str, int]:
  """Word piece -> id, by id."""
  room = (vocab_size - len(SPECIAL_TOKENS)) // 2
  alphabet = _alphabet(sources, normalizer, min(max_alphabet, room))
  trainer = trainers.WordPieceTrainer(
    vocab_size=vocab_size,
    min_frequency=min_frequency,
    special_tokens=[*SPECIAL_TOKENS, *('##' + c for c in alphabet)],
    initial_alphabet=alphabet,
    limit_alphabet=len(alphabet),
    show_progress=False,
  )
  scratch = tokenizers.Tokenizer(models.WordPiece(unk_token='[UNK]'))
  scratch.normalizer = normalizer
  scratch.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
  scratch.train_from_iterator(_batches(sources, 'count words'), trainer)
  return dict(sorted(scratch.get_vocab(with_added_tokens=True).items(), key=lambda item: item[1]))


def _batches(sources: Sequence[text.TextSource], what: str) -> Iterator[list[str]]:
  batch: list[str] = []
  with text.progress(sources, what) as on_bytes:
    for source in sources:
      for line in source.lines(on_bytes):
        if line:
          batch.append(line)
        if len(batch) == _BATCH:
          yield batch
          batch = []
  if batch:
    yield batch


def _alphabet(sources: Sequence[text.TextSource], normalizer: normalizers.BertNormalizer, limit: int) -> list[str]:
  counts: collections.Counter[str] = collections.Counter()
  for batch in _batches(sources, 'count characters'):
    counts.update(normalizer.normalize_str('\n'.join(batch)))
  chars = sorted((c for c in counts if not c.isspace()), key=lambda c: (-counts[c], c))
  if not chars:
    raise DataError(f'input {", ".join(s.name for s in sources)}: no text to train a vocabulary on')
  return sorted(chars[:limit])


def _require_same(target: epath.Path, files: Mapping[str, bytes | None]) -> None:
  """Raises ConfigError for a file that is there with another content; None stands for no file."""
  for name, content in files.items():
    if (target / name).exists() and (target / name).read_bytes() != content:
      raise ConfigError(f'{target} holds another tokenizer ({name} differs); choose another output or set overwrite')


def _write(target: epath.Path, files: Mapping[str, bytes]) -> None:
  """In their order: settings first, so that no half of a folder is read with others."""
  target.mkdir(parents=True, exist_ok=True)
  for name in set(TOKENIZER_FILES) - set(files):
    (target / name).unlink(missing_ok=True)
  for name, content in files.items():
    write_whole(target / name, content)


def _config(lowercase: bool, model_max_length: int) -> dict[str, Any]:
  return {
    'do_lower_case': lowercase,
    'model_max_length': model_max_length,
    'strip_accents': None,
    'tokenize_chinese_chars': True,
    'tokenizer_class': 'BertTokenizer',
    **_SPECIAL,
  }


def _settings(config: Mapping[str, Any]) -> dict[str, bytes]:
  files = {'tokenizer_config.json': config, 'special_tokens_map.json': _SPECIAL}
  return {name: (json.dumps(value, indent=2, sort_keys=True) + '\n').encode() for name, value in files.items()}


def _learnt(vocab: dict[str, int], config: dict[str, Any]) -> dict[str, bytes]:
  return {
    'tokenizer.json': bert_backend(vocab, config).to_str(pretty=True).encode(),
    'vocab.txt': ''.join(t + '\n' for t in vocab).encode(),
  }
