"""Tokenizers: reading a Hugging Face tokenizer folder. `data.wordpiece` makes one."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import tokenizers
from etils import epath
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors

from compactlm_jax.data import text
from compactlm_jax.errors import ConfigError, first_line
from compactlm_jax.filenames import TOKENIZER_FILES
from compactlm_jax.parse import json_digest, parse_json
from compactlm_jax.storage import require_inside

SPECIAL_TOKENS = ('[PAD]', '[UNK]', '[CLS]', '[SEP]', '[MASK]')
"""Special tokens of trained vocabularies, in the order of their ids."""

ROLES = ('pad', 'unk', 'cls', 'sep', 'mask')
"""What they are for."""

_KEPT = ('PreTrainedTokenizerFast', 'TokenizersBackend', 'ConvBertTokenizer', 'ConvBertTokenizerFast')
"""Values of `tokenizer_class` for which transformers takes the normaliser of tokenizer.json as it is."""

_MOST_BYTES = 256 << 20


@dataclasses.dataclass(frozen=True)
class Tokenizer:
  """A tokenizer that adds no special tokens, pads nothing and truncates nothing by itself.

  Attributes:
    backend: the `tokenizers` object.
    folder: where it was read from.
    vocab_size: one more than the largest id.
    pad_id, unk_id, cls_id, sep_id, mask_id: ids of the special tokens.
  """

  backend: tokenizers.Tokenizer
  folder: str
  vocab_size: int
  pad_id: int
  unk_id: int
  cls_id: int
  sep_id: int
  mask_id: int

  def encode(self, texts: Sequence[str]) -> list[list[int]]:
    """Token ids of each text, without special tokens; '[SEP]' written in a text is ordinary text."""
    return [encoding.ids for encoding in self._encoded(self.backend.encode_batch_fast, texts)]

  def encodings(self, texts: Iterable[str]) -> Iterator[tokenizers.Encoding]:
    """As `encode`, with the offsets and the words of the tokens."""
    return self._encoded(self.backend.encode_batch, texts)

  def _encoded(self, encode: Callable[..., list[tokenizers.Encoding]], texts: Iterable[str]) -> Iterator[Any]:
    for part in text.in_parts(texts):
      with _no_panic(self.folder):
        found = encode(part, add_special_tokens=False)
      yield from found

  def fingerprint(self) -> str:
    """SHA-256 (hex) over vocabulary, normaliser, splitting and special ids: equal iff texts get equal ids."""
    state = json.loads(self.backend.to_str())
    # vocab.txt and tokenizer.json of one tokenizer must agree, so only what changes ids is digested.
    model = {k: v for k, v in state['model'].items() if k not in ('vocab', 'merges')}
    parts = {
      'vocab': sorted((i, t) for t, i in self.backend.get_vocab(with_added_tokens=True).items()),
      'merges': state['model'].get('merges'),
      'model': model,
      'normalizer': state['normalizer'],
      'pre_tokenizer': state['pre_tokenizer'],
      'special': [self.pad_id, self.unk_id, self.cls_id, self.sep_id, self.mask_id],
    }
    return json_digest(parts)

  def save(self, folder: Any) -> None:
    """Copies the original tokenizer files into `folder`, which is made if need be."""
    target = epath.Path(folder)
    target.mkdir(parents=True, exist_ok=True)
    for name in TOKENIZER_FILES:
      if (file := epath.Path(self.folder) / name).exists():
        (target / name).write_bytes(file.read_bytes())


@contextlib.contextmanager
def one_thread_each() -> Iterator[None]:
  """Keeps the library's own threads off, so that as many threads tokenise as callers do."""
  before = os.environ.get('TOKENIZERS_PARALLELISM')
  os.environ['TOKENIZERS_PARALLELISM'] = 'false'
  try:
    yield
  finally:
    if before is None:
      del os.environ['TOKENIZERS_PARALLELISM']
    else:
      os.environ['TOKENIZERS_PARALLELISM'] = before


@contextlib.contextmanager
def _no_panic(where: str) -> Iterator[None]:
  """Raises ConfigError where the library panics: on a broken normaliser, or a pattern that takes for ever."""
  try:
    yield
  except BaseException as e:  # a PanicException is no Exception, and has no name to import
    if type(e).__name__ != 'PanicException':
      raise
    raise ConfigError(f'{where}: the tokenizers library gives up on it ({first_line(e)}); repair the tokenizer') from e


def load_tokenizer(folder: Any) -> Tokenizer:
  """Reads a Hugging Face tokenizer folder: tokenizer.json, or vocab.txt with tokenizer_config.json.

  Padding and truncation stored in tokenizer.json are switched off. Nothing is downloaded or executed.

  Args:
    folder: path of the folder.

  Returns:
    The tokenizer.

  Raises:
    ConfigError: a file or a special token is missing, a file cannot be read, or files contradict each other.
    DataError: a file is a link that leads out of the folder.
  """
  path = epath.Path(folder)
  for name in TOKENIZER_FILES:
    _require_sane(path / name, path)
  given = _read_json(path / 'tokenizer_config.json')
  config = {**given, **_read_json(path / 'special_tokens_map.json')}
  if (path / 'tokenizer.json').exists():
    with _no_panic(str(path / 'tokenizer.json')):
      try:
        backend = tokenizers.Tokenizer.from_str((path / 'tokenizer.json').read_text(encoding='utf-8'))
      except Exception as e:  # the library raises bare Exception
        raise ConfigError(f'{path / "tokenizer.json"}: cannot be read ({e}); save the tokenizer again') from e
    _require_same_ids(backend, path / 'tokenizer.json')
    _require_same_normalizer(backend, given, path / 'tokenizer_config.json')
  elif (path / 'vocab.txt').exists():
    backend = _from_vocab(path / 'vocab.txt', config)
  else:
    raise ConfigError(
      f'{path}: neither tokenizer.json nor vocab.txt is there; give a Hugging Face tokenizer folder, '
      'or make one with: compactlm tokenizer --input=GLOB --vocab_size=N --output=DIR'
    )
  unknown = getattr(backend.model, 'unk_token', None)
  if unknown is not None and backend.model.token_to_id(unknown) is None:  # found out at the first unknown word only
    raise ConfigError(f'{path}: the unk_token {unknown!r} of the model is not in its vocabulary; save it again')
  backend.no_padding()
  backend.no_truncation()
  backend.encode_special_tokens = True
  ids, special = {}, _special(config, path)
  for role, token in special.items():
    if (found := backend.token_to_id(token)) is None:
      raise ConfigError(
        f'{path}: the {role} token {token!r} is not in the vocabulary; set {role}_token in tokenizer_config.json'
      )
    ids[f'{role}_id'] = found
  _require_added(backend, given, path, special.values())
  vocab_size = max(backend.get_vocab(with_added_tokens=True).values()) + 1
  return Tokenizer(backend=backend, folder=str(path), vocab_size=vocab_size, **ids)


def _require_sane(file: epath.Path, folder: epath.Path) -> None:
  """No link out of the folder, as `Tokenizer.save` copies every file; no more than is ever needed."""
  require_inside(file, folder)
  if file.exists() and (size := file.stat().length) > _MOST_BYTES:
    raise ConfigError(f'{file}: {size} bytes, more than the {_MOST_BYTES} that are read of such a file')


def _read_json(path: epath.Path) -> dict[str, Any]:
  if not path.exists():
    return {}
  try:
    value = parse_json(path.read_bytes())
  except ValueError as e:
    raise ConfigError(f'{path}: not JSON ({e}); save the tokenizer again') from e
  if not isinstance(value, dict):
    raise ConfigError(f'{path}: expected a JSON object; save the tokenizer again')
  return value


def _require_same_ids(backend: tokenizers.Tokenizer, file: epath.Path) -> None:
  """No added token whose id the library would replace by the next free one."""
  for entry in _read_json(file).get('added_tokens') or []:
    if (found := backend.token_to_id(entry['content'])) != entry['id']:
      raise ConfigError(
        f'{file}: the added token {entry["content"]!r:.60} has id {entry["id"]}, but the tokenizers library gives it '
        f'{found}; ids must go on from the vocabulary without a gap or a second use'
      )


def _special(config: dict[str, Any], where: Any) -> dict[str, str]:
  """Role -> special token; each stands in the files as text or as an object with a content."""
  out = {}
  for role, default in zip(ROLES, SPECIAL_TOKENS, strict=True):
    token = config.get(f'{role}_token') or default
    token = token.get('content') if isinstance(token, dict) else token
    if not isinstance(token, str) or not token:
      raise ConfigError(f'{where}: {role}_token {config[f"{role}_token"]!r:.60} is no text; save the tokenizer again')
    out[role] = token
  return out


def _require_same_normalizer(backend: tokenizers.Tokenizer, given: dict[str, Any], file: epath.Path) -> None:
  """No setting that transformers obeys and tokenizer.json does not have."""
  normalizer = backend.normalizer
  if given.get('tokenizer_class') in _KEPT or not isinstance(normalizer, normalizers.BertNormalizer):
    return
  lowercase, accents = normalizer.lowercase, normalizer.strip_accents
  pairs = [
    ('do_lower_case', _switch(given, 'do_lower_case', None), lowercase),
    ('tokenize_chinese_chars', _switch(given, 'tokenize_chinese_chars', None), normalizer.handle_chinese_chars),
  ]
  if 'strip_accents' in given:  # null: as lowercase is
    asked, own = _switch(given, 'strip_accents', None), lowercase if accents is None else accents
    pairs += [('strip_accents', lowercase if asked is None else asked, own)]
  for name, asked, own in pairs:
    if asked not in (None, own):
      raise ConfigError(
        f'{file}: {name} is {json.dumps(given[name])}, but the normalizer of tokenizer.json does the opposite; correct '
        'the one that is wrong, or load the folder with transformers, which obeys the first, and save it again'
      )


def _require_added(backend: tokenizers.Tokenizer, given: dict[str, Any], path: epath.Path, special: Any) -> None:
  """No token that transformers would add to the vocabulary, or take out of words, and the backend does not."""
  file, added = path / 'added_tokens.json', list(_read_json(path / 'added_tokens.json'))
  if 'added_tokens_decoder' in given:  # stands for the older file, which is not read then
    file = path / 'tokenizer_config.json: added_tokens_decoder'
    try:
      added = [str(entry['content']) for entry in given['added_tokens_decoder'].values()]
    except (AttributeError, LookupError, TypeError) as e:
      raise ConfigError(f'{file} holds no tokens with their content by id ({e!r}); save the tokenizer again') from e
  known = {token.content for token in backend.get_added_tokens_decoder().values()}.union(special)
  for token in added:
    if token not in known:
      raise ConfigError(
        f'{file}: the added token {token!r:.60} is not in tokenizer.json, and would be read as several; load the '
        'folder with transformers and save it again, which writes all tokens there'
      )


def _switch(config: dict[str, Any], name: str, default: bool | None) -> bool | None:
  value = config.get(name, default)
  if value is not None and not isinstance(value, bool):
    raise ConfigError(f'tokenizer_config.json: {name} {value!r:.60} must be true, false or null')
  return value


def _from_vocab(path: epath.Path, config: dict[str, Any]) -> tokenizers.Tokenizer:
  # Only '\n' separates: a vocabulary may hold other Unicode line ends as tokens.
  try:
    tokens = path.read_bytes().decode('utf-8').split('\n')
  except UnicodeDecodeError as e:
    raise ConfigError(f'{path}: not UTF-8 at byte {e.start} ({e.reason}); save the tokenizer again') from e
  tokens = [t.rstrip('\r') for t in (tokens[:-1] if tokens[-1] == '' else tokens)]
  return bert_backend({t: i for i, t in enumerate(tokens)}, config)


def bert_backend(vocab: dict[str, int], config: dict[str, Any]) -> tokenizers.Tokenizer:
  """BERT's tokenizer of a vocabulary (google-research/bert `tokenization.py`)."""
  special = _special(config, 'tokenizer_config.json')
  missing = [t for t in special.values() if t not in vocab]
  if missing:
    raise ConfigError(
      f'vocab.txt: the special token {missing[0]!r} is not in the vocabulary; set it in tokenizer_config.json'
    )
  backend = tokenizers.Tokenizer(models.WordPiece(vocab, unk_token=special['unk'], max_input_chars_per_word=100))
  backend.normalizer = bert_normalizer(_switch(config, 'do_lower_case', True) is not False, config)
  backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
  backend.decoder = decoders.WordPiece(prefix='##')
  cls, sep = special['cls'], special['sep']
  backend.post_processor = processors.TemplateProcessing(
    single=f'{cls}:0 $A:0 {sep}:0',
    pair=f'{cls}:0 $A:0 {sep}:0 $B:1 {sep}:1',
    special_tokens=[(cls, vocab[cls]), (sep, vocab[sep])],
  )
  backend.add_special_tokens(list(special.values()))
  return backend


def bert_normalizer(lowercase: bool, config: dict[str, Any]) -> normalizers.BertNormalizer:
  """BERT's normaliser; accents go, unless the configuration says otherwise, where letters are lowered."""
  return normalizers.BertNormalizer(
    clean_text=True,
    handle_chinese_chars=_switch(config, 'tokenize_chinese_chars', True) is not False,
    strip_accents=_switch(config, 'strip_accents', None),
    lowercase=lowercase,
  )
