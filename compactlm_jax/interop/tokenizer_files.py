"""The tokenizer of a bundle: its files as bytes, checked against the model, loaded by transformers when asked."""

from __future__ import annotations

import dataclasses
import functools
import logging
import pathlib
import tempfile
from collections.abc import Mapping
from typing import Any

from etils import epath

from compactlm_jax.config import EncoderConfig
from compactlm_jax.errors import ConfigError, DataError
from compactlm_jax.filenames import TOKENIZER_FILES
from compactlm_jax.interop.folder import Folder
from compactlm_jax.parse import parse_json

log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class TokenizerFiles:
  """A tokenizer that knows no path, so that an export copies it byte for byte.

  Attributes:
    files: file name -> content, of `TOKENIZER_FILES`.
  """

  files: Mapping[str, bytes]

  @functools.cached_property
  def vocab(self) -> dict[str, int]:
    """Token -> id, from tokenizer.json, else vocab.txt.

    Raises:
      DataError: neither can be read.
      ConfigError: both are there and disagree.
    """
    lines = _lines(self.files['vocab.txt']) if 'vocab.txt' in self.files else None
    if 'tokenizer.json' not in self.files:
      return {token: i for i, token in enumerate(lines or ())}
    raw = self._json('tokenizer.json')
    try:
      model, added = raw['model']['vocab'], raw.get('added_tokens') or []
      if isinstance(model, list):  # SentencePiece unigram, as in XLM-R: [token, score] by id
        model = {entry[0]: i for i, entry in enumerate(model)}
      vocab = {str(token): int(i) for token, i in model.items()}
      vocab |= {str(entry['content']): int(entry['id']) for entry in added}
    except (LookupError, TypeError, AttributeError, ValueError) as e:
      raise DataError(f'tokenizer.json: holds no vocabulary of the form token -> id ({e!r})') from e
    for i, token in enumerate(lines or ()):
      if vocab.get(token, i) != i:
        raise ConfigError(
          f'vocab.txt: {token!r} is {i} there but {vocab[token]} in tokenizer.json; keep only one of them'
        )
    return vocab

  @functools.cached_property
  def pad_token_id(self) -> int | None:
    """Id of the padding token, [PAD] unless a file names another; None if the vocabulary lacks it."""
    for name in ('tokenizer_config.json', 'special_tokens_map.json'):
      token = self._json(name).get('pad_token') if name in self.files else None
      token = token.get('content') if isinstance(token, dict) else token
      if isinstance(token, str):
        return self.vocab.get(token)
    return self.vocab.get('[PAD]')

  def load(self) -> Any:
    """A transformers tokenizer of these files. Code that a file might name is never run."""
    import transformers  # heavy

    with tempfile.TemporaryDirectory() as folder:
      self.write(folder)
      # Without config.json in the folder, tokenizer_config.json must name the class; a bare vocabulary is BERT's.
      named = 'tokenizer_config.json' in self.files and 'tokenizer_class' in self._json('tokenizer_config.json')
      cls = transformers.AutoTokenizer if named else transformers.BertTokenizer
      return cls.from_pretrained(folder, trust_remote_code=False, local_files_only=True)

  def write(self, folder: epath.PathLike) -> None:
    """Writes the files into an existing folder."""
    for name, data in self.files.items():
      (epath.Path(folder) / pathlib.PurePosixPath(name).name).write_bytes(data)

  def _json(self, name: str) -> dict[str, Any]:
    try:
      value = parse_json(self.files[name])
    except ValueError as e:
      raise DataError(f'{name}: not valid JSON ({e})') from e
    if not isinstance(value, dict):
      raise DataError(f'{name}: expected a JSON object, found {type(value).__name__}')
    return value


def _lines(data: bytes) -> list[str]:
  try:
    return data.decode('utf-8').replace('\r\n', '\n').rstrip('\n').split('\n')
  except UnicodeDecodeError as e:
    raise DataError(f'vocab.txt: not UTF-8 ({e})') from e


def read_tokenizer(folder: Folder) -> TokenizerFiles | None:
  """The tokenizer of a folder, None if it has no vocabulary.

  Raises:
    DataError: a file that cannot be read.
  """
  files = {name: folder.read(name) for name in TOKENIZER_FILES if folder.has(name)}
  return TokenizerFiles(files) if {'vocab.txt', 'tokenizer.json'} & set(files) else None


def matched(config: EncoderConfig, tokenizer: TokenizerFiles | None) -> EncoderConfig:
  """The configuration, checked against the tokenizer of its bundle.

  A ConvBERT whose config.json carries transformers' default pad_token_id 1, where its vocabulary pads with another
  token, takes the tokenizer's: the id changes no output, the attention mask decides.

  Raises:
    ConfigError: more tokens than rows of the word table, or another padding id.
  """
  if tokenizer is None:
    return config
  top = max(tokenizer.vocab.items(), key=lambda item: item[1], default=None)
  if top is None:
    raise ConfigError('tokenizer: its vocabulary is empty')
  if top[1] >= config.vocab_size or min(tokenizer.vocab.values()) < 0:
    raise ConfigError(
      f'tokenizer: token {top[0]!r} has id {top[1]}, but the word table of this model has vocab_size '
      f'{config.vocab_size} rows; this tokenizer belongs to another model'
    )
  pad = tokenizer.pad_token_id
  if pad is None or pad == config.pad_token_id:
    return config
  if config.architecture == 'convbert' and config.pad_token_id == 1:
    log.warning('config.json has the ConvBERT default pad_token_id 1; the tokenizer pads with %d, which is used', pad)
    return dataclasses.replace(config, pad_token_id=pad)
  raise ConfigError(f'tokenizer: pads with id {pad}, but the model says pad_token_id {config.pad_token_id}')
