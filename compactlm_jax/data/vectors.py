"""Word vectors in GloVe's text format."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator
from typing import Any

import numpy as np
from etils import epath
from jaxtyping import Float

from compactlm_jax.data.table import numbered_lines
from compactlm_jax.errors import DataError

MOST_WORDS = 100_000
"""Words that are read of a file, the most frequent ones first; the original's number."""

_BLOCK = 4096


@dataclasses.dataclass(frozen=True)
class WordVectors:
  """Words and their vectors.

  Attributes:
    words: no word twice.
    vectors_VE: of length one, in the order of the words.
  """

  words: tuple[str, ...]
  vectors_VE: Float[np.ndarray, 'V E']


def read_vectors(path: Any, most_words: int = MOST_WORDS) -> WordVectors:
  """Reads a word and its numbers from each line, separated by blanks.

  The line of counts that word2vec and fastText put first is skipped, as are words with blanks, a word's second line,
  '<unk>' and vectors of zeros.

  Args:
    path: a text file of GloVe, .gz or not.
    most_words: lines that are read.

  Returns:
    The vectors, each divided by its length.

  Raises:
    DataError: no such file, not UTF-8, no vectors, vectors of different length, or something that is no finite number;
      file and line are named.
  """
  file, words, blocks = epath.Path(path), [], []
  lines = itertools.islice(_split_lines(file), most_words)
  while block := list(itertools.islice(lines, _BLOCK)):
    try:
      with np.errstate(over='ignore'):  # an infinity is refused as such
        numbers = np.asarray([cells for _, _, cells in block], np.float32)
      good = np.isfinite(numbers).all(1)
    except ValueError:
      good = np.asarray([_numeric(cells) for _, _, cells in block])
    if not good.all():
      number, word, _ = block[int(good.argmin())]
      raise DataError(f'{file}:{number}: the vector of {word!r} holds something that is no finite number')
    words += [word for _, word, _ in block]
    blocks.append(numbers)
  if not words:
    raise DataError(f'{file}: no vectors; expected a word and its numbers on each line, as GloVe writes them')
  return normalized(words, np.concatenate(blocks))


def normalized(words: list[str], vectors_VE: np.ndarray) -> WordVectors:
  """Vectors of length one, without second vectors of a word, '<unk>' and vectors of zeros."""
  lengths = np.sqrt(np.square(vectors_VE, dtype=np.float64).sum(1))
  seen: set[str] = set()
  kept = []
  for place, word in enumerate(words):
    if word not in seen and word != '<unk>' and lengths[place] > 0:
      kept.append(place)
    seen.add(word)
  unit_VE = (vectors_VE[kept] / lengths[kept, None]).astype(np.float32)
  return WordVectors(tuple(words[place] for place in kept), unit_VE)


def _split_lines(file: epath.Path) -> Iterator[tuple[int, str, list[str]]]:
  """(line number, word, its numbers as text) of each line."""
  size = 0
  for number, line in numbered_lines(file):
    cells = line.rstrip(' ').split(' ')
    if number == 1 and len(cells) == 2 and all(cell.isdecimal() for cell in cells):
      continue
    size = size or len(cells) - 1
    if not size:
      raise DataError(f'{file}:{number}: expected a word and its numbers, separated by blanks, as GloVe writes them')
    extra = len(cells) - 1 - size
    if extra < 0 or (extra and _numeric(cells[1 : extra + 1])):
      raise DataError(
        f'{file}:{number}: {len(cells) - 1} numbers, but the lines before have {size}; vectors of one file are of one '
        'length: is it complete?'
      )
    if not extra:
      yield number, cells[0], cells[1:]


def _numeric(cells: list[str]) -> bool:
  try:
    with np.errstate(over='ignore'):
      return bool(np.isfinite(np.asarray(cells, np.float32)).all())
  except ValueError:
    return False
