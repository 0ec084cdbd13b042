"""Data augmentation of TinyBERT and DynaBERT: copies of texts in which words are replaced by candidates.

Source: huawei-noah/Pretrained-Language-Model, `TinyBERT/data_augmentation.py` (Jiao et al. 2020, algorithm 1). Other
than there, a candidate takes the place of its word in the text as it was written, so that case, accents and blanks of
everything else stay.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Collection, Iterable, Sequence

import numpy as np

from compactlm_jax.data.tokenizer import Tokenizer
from compactlm_jax.errors import ConfigError

COPIES = {'cola': 30, 'sst2': 20, 'mrpc': 30, 'stsb': 30, 'qqp': 10, 'mnli': 10, 'qnli': 20, 'rte': 30}
"""Copies of each sentence by GLUE task, as published."""

DEFAULT_COPIES = 30
"""Copies of each sentence of other tables: the original's default."""

PAIRS = ('clean', 'published')
"""Rows of a pair: see `augmented_rows`."""

STOP_WORDS = frozenset(
  """
  i me my myself we our ours ourselves you your yours yourself yourselves he him his himself she her hers herself it its
  itself they them their theirs themselves this that these those am is are was were be been being have has had having do
  does did doing a an the and but if or because as until while of at by for with about against between into through
  during before after above below to from up down in out on off over under again further then once here there all any
  both each few more most other some such no nor not only own same so than too very can will just should now
  s t d m o y re ve ll ma don ain aren couldn didn doesn hadn hasn haven isn mightn mustn needn shan shouldn wasn weren
  won wouldn
  """.split()
)
"""English words that are never replaced, with the halves of contractions: those of the original that are letters."""


@dataclasses.dataclass(frozen=True)
class Word:
  """A word that may be replaced.

  Attributes:
    start, stop: characters of the text.
    piece: its first word piece.
    pieces: how many it has.
  """

  start: int
  stop: int
  piece: int
  pieces: int


@dataclasses.dataclass(frozen=True)
class Text:
  """A text with what may be replaced in it.

  Attributes:
    text: as written.
    ids: its word pieces, without special tokens.
    words: alphabetic words that are not stop words, in their order.
  """

  text: str
  ids: tuple[int, ...]
  words: tuple[Word, ...]

  def surface(self, word: Word) -> str:
    """The word as it is written here."""
    return self.text[word.start : word.stop]


@dataclasses.dataclass(frozen=True)
class Copies:
  """What became of one text.

  Attributes:
    texts: the copies that differ from the text and from each other, at most as many as were asked for.
    replaced: words that were replaced in them by another word.
  """

  texts: tuple[str, ...]
  replaced: int


def check_word_pieces(tokenizer: Tokenizer) -> None:
  """Raises ConfigError unless the tokenizer cuts words into WordPiece's pieces, '##' in front of inner ones."""
  if type(tokenizer.backend.model).__name__ != 'WordPiece':
    raise ConfigError(
      f'{tokenizer.folder}: its tokenizer is {type(tokenizer.backend.model).__name__}; augmentation needs whole words '
      'of a WordPiece vocabulary: name a masked language model with one'
    )


def find_words(
  texts: Sequence[str], tokenizer: Tokenizer, stop_words: Collection[str] = STOP_WORDS
) -> tuple[Text, ...]:
  """The words of texts that may be replaced: of letters only, and no stop words.

  Args:
    texts: as written.
    tokenizer: of the masked language model.
    stop_words: in lower case.

  Returns:
    A Text for each.
  """
  found = []
  for text, encoding in zip(texts, tokenizer.encodings(texts), strict=True):
    pieces = zip(encoding.word_ids, encoding.offsets, range(len(encoding.ids)), strict=True)
    words = []
    for _, group in itertools.groupby(pieces, key=lambda piece: piece[0]):
      own = list(group)
      word = Word(own[0][1][0], own[-1][1][1], own[0][2], len(own))
      surface = text[word.start : word.stop]
      if surface.isalpha() and surface.lower() not in stop_words:
        words.append(word)
    found.append(Text(text, tuple(encoding.ids), tuple(words)))
  return tuple(found)


def whole_words(ids: Iterable[int], pieces: Sequence[str | None], special: Collection[int]) -> tuple[str, ...]:
  """The pieces of some ids without those that continue a word, and without special tokens.

  Args:
    ids: in the order that is kept.
    pieces: the vocabulary by id; None where an id is not used.
    special: ids of special tokens.
  """
  named = ((i, pieces[i]) for i in ids)
  return tuple(piece for i, piece in named if piece and i not in special and not piece.startswith('##'))


def make_copies(
  text: Text, candidates: Sequence[Sequence[str]], copies: int, probability: float, rng: np.random.Generator
) -> Copies:
  """Copies of a text in which each word is replaced with a given probability by one of its candidates.

  A candidate of a capitalised word is capitalised. Copies that are the text itself or that exist already are dropped,
  as the original does.

  Args:
    text: the text.
    candidates: those of each of its words, drawn with equal chance; none leave the word alone.
    copies: how many are tried.
    probability: of replacing a word.
    rng: decides; its draws do not depend on the candidates.

  Returns:
    The copies.
  """
  shape = (copies, len(text.words))
  taken, drawn = rng.random(shape) < probability, rng.random(shape)
  seen, kept, replaced = {text.text}, [], 0
  surfaces = [text.surface(word) for word in text.words]
  for take, draw in zip(taken, drawn, strict=True):
    parts, end, changed = [], 0, 0
    for word, surface, choices, replace, share in zip(text.words, surfaces, candidates, take, draw, strict=True):
      if not replace or not choices:
        continue
      choice = _cased(choices[int(share * len(choices))], surface)
      parts += [text.text[end : word.start], choice]
      end, changed = word.stop, changed + (choice != surface)
    copy = ''.join([*parts, text.text[end:]])
    if copy not in seen:
      seen.add(copy)
      kept.append(copy)
      replaced += changed
  return Copies(tuple(kept), replaced)


def augmented_rows(texts: Sequence[str], copies: Sequence[Sequence[str]], pairs: str = 'clean') -> list[list[str]]:
  """The rows that one row becomes, the original first.

  Args:
    texts: its one or two texts.
    copies: of each text.
    pairs: 'clean': the copies of one text stand beside the other text as written. 'published': as the original, which
      writes copies into the row that it reads: those of the second text, and the second text as written, stand beside
      the last copy of the first.

  Returns:
    Rows of as many texts.
  """
  rows, current = [], list(texts)
  for column, (text, own) in enumerate(zip(texts, copies, strict=True)):
    # The clean original is written once, the published one before the copies of either text.
    first = [text] if pairs == 'published' or not column else []
    for copy in (*first, *own):
      current[column] = copy
      rows.append(list(current))
    if pairs == 'clean':
      current[column] = text
  return rows


def _cased(candidate: str, surface: str) -> str:
  return candidate[:1].upper() + candidate[1:] if surface[:1].isupper() else candidate
