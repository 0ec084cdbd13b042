"""What may stand in place of a word: the guesses of a masked language model, and neighbours of word vectors."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from compactlm_jax.config import EncoderConfig
from compactlm_jax.data.augment import Text, Word, check_word_pieces, whole_words
from compactlm_jax.data.source import RowSource
from compactlm_jax.data.tokenizer import Tokenizer
from compactlm_jax.data.vectors import WordVectors, normalized
from compactlm_jax.errors import ConfigError
from compactlm_jax.interop.bundle import Bundle
from compactlm_jax.jobs.models import load_generator, load_model
from compactlm_jax.jobs.predict import Reader
from compactlm_jax.tasks.mlm import mlm_logits
from compactlm_jax.types import Batch, Masked, Params

CONTEXTS = ('published', 'sentence')
"""What a masked language model reads: see `Finder`."""

BUCKETS = (16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512)
"""Lengths that rows are padded to; finer than those of prediction, since each sentence is read many times."""

_QUERIES = 256
"""Words whose neighbours are looked up together: always one shape."""


def load_masked_model(path: str) -> Bundle:
  """A masked language model: a folder or run that has such a head, or that holds a generator.

  Raises:
    ConfigError: none is there, it reads only what stands before a word, or it has no WordPiece tokenizer.
    DataError, StorageError: see `load_model`.
  """
  bundle: Bundle | None = load_model(path)
  heads = ', '.join(sorted(set(bundle.params) - {'encoder'})) if bundle else ''
  if bundle and 'mlm_head' not in bundle.params:
    bundle = load_generator(path)
  if bundle is None or 'mlm_head' not in bundle.params:
    raise ConfigError(
      f'--model: {path} has no head that guesses hidden words (heads: {heads or "none"}); name a masked language '
      'model, or a run that trained one or a generator (task mlm or electra)'
    )
  if bundle.config.causal:
    raise ConfigError(f'--model: {path} reads only what stands before a word; name a masked language model')
  return bundle


@dataclasses.dataclass(frozen=True)
class Finder:
  """Finds candidates on the devices of this host.

  A word of one piece is hidden and guessed; with the context 'published' the model reads the text with the gap and,
  as second segment, the text without it, so that it mostly guesses words near the hidden one; with 'sentence' it reads
  the gap alone, which is half as long. A text that is too long is cut around the word. A word of several pieces gets
  the words whose vectors have the largest cosine with its own.

  Attributes:
    reader: the masked language model.
    count: candidates of a word, before pieces that continue a word and special tokens are dropped.
    context: see above; one of CONTEXTS.
    pieces: the vocabulary by id; None where an id is not used.
    vectors: the words that may be neighbours.
    unit_VE: their vectors, on the device.
    own: whether the vectors are the encoder's, so that a word has the mean of its pieces.
  """

  reader: Reader
  count: int
  context: str
  pieces: tuple[str | None, ...]
  vectors: WordVectors
  unit_VE: Float[Array, 'V E']
  own: bool

  @classmethod
  def of(
    cls,
    bundle: Bundle,
    vectors: WordVectors | None = None,
    *,
    count: int = 15,
    context: str = 'published',
    batch_size: int = 128,
    seq_len: int = 0,
  ) -> Finder:
    """Checks the options and places what is read.

    Args:
      bundle: of `load_masked_model`.
      vectors: word vectors; None takes the token embeddings of the encoder.
      count: see Finder; the original's M.
      context: see Finder.
      batch_size: rows computed together, each with one gap.
      seq_len: most tokens of a row; 0 takes the positions of the model.

    Raises:
      ConfigError: an option that is not possible, or a tokenizer without whole words.
    """
    if context not in CONTEXTS:
      raise ConfigError(f'--context: {context!r}; use one of {", ".join(CONTEXTS)}')
    if not 1 <= count <= bundle.config.vocab_size:
      raise ConfigError(
        f'--candidates: {count} must be between 1 and the {bundle.config.vocab_size} tokens of the model'
      )
    reader = Reader.of(bundle, ('mlm_head',), batch_size, BUCKETS, seq_len or None)
    check_word_pieces(reader.tokenizer)
    pieces = tuple(map(reader.tokenizer.backend.id_to_token, range(bundle.config.vocab_size)))
    known = vectors or own_vectors(bundle, pieces, _special(reader.tokenizer))
    return cls(reader, count, context, pieces, known, jnp.asarray(known.vectors_VE), vectors is None)

  def find(self, texts: Sequence[Text]) -> list[list[tuple[str, ...]]]:
    """The candidates of each word of each text, the likeliest first; () for a word that has none.

    All gaps of all texts are sorted by length and share batches.
    """
    places = [(i, j) for i, text in enumerate(texts) for j in range(len(text.words))]
    found: dict[tuple[int, int], tuple[str, ...]] = {}
    single = [(i, j) for i, j in places if texts[i].words[j].pieces == 1]
    several = [(i, j) for i, j in places if texts[i].words[j].pieces > 1]
    for these, search in ((single, self._guessed), (several, self._neighbours)):
      if these:
        found |= zip(these, search([(texts[i], texts[i].words[j]) for i, j in these]), strict=True)
    return [[found[i, j] for j in range(len(text.words))] for i, text in enumerate(texts)]

  def _guessed(self, gaps: Sequence[tuple[Text, Word]]) -> list[tuple[str, ...]]:
    source = gap_rows(gaps, self.reader.tokenizer, self.reader.seq_len, self.context)
    config = self.reader.bundle.config
    forward = functools.partial(_guess, config, self.reader.tokenizer.mask_id, self.count)
    outputs, _ = self.reader.run(source, forward)
    special = _special(self.reader.tokenizer)
    return [whole_words(ids, self.pieces, special) for ids in outputs['ids'].tolist()]

  def _neighbours(self, words: Sequence[tuple[Text, Word]]) -> list[tuple[str, ...]]:
    count = min(self.count, len(self.vectors.words) - 1)
    spelt = [text.surface(word) for text, word in words]
    queries = self._queries(dict(zip(spelt, words)))
    found: dict[str, tuple[str, ...]] = {}
    for start in range(0, len(queries) if count > 0 else 0, _QUERIES):
      names = list(queries)[start : start + _QUERIES]
      batch_BE = np.zeros((_QUERIES, self.unit_VE.shape[1]), np.float32)
      own_B = np.full(_QUERIES, -1, np.int32)
      for place, name in enumerate(names):
        batch_BE[place], own_B[place] = queries[name]
      ids = jax.device_get(_nearest(count, self.unit_VE, batch_BE, own_B))
      found |= {name: tuple(self.vectors.words[i] for i in row) for name, row in zip(names, ids)}
    return [found.get(name, ()) for name in spelt]

  def _queries(self, words: dict[str, tuple[Text, Word]]) -> dict[str, tuple[np.ndarray, int]]:
    """(vector, place of the word that is no neighbour or -1) of each word that has a vector."""
    index = {word: i for i, word in enumerate(self.vectors.words)}
    if self.own:
      table_VE = _word_table(self.reader.bundle)
      parts = {name: list(text.ids[word.piece : word.piece + word.pieces]) for name, (text, word) in words.items()}
      # The mean is always near its first piece, which may be a word itself but says little about this one.
      return {name: (table_VE[ids].mean(0), index.get(self.pieces[ids[0]] or '', -1)) for name, ids in parts.items()}
    places = {name: index.get(name, index.get(name.lower(), -1)) for name in words}
    return {name: (self.vectors.vectors_VE[i], i) for name, i in places.items() if i >= 0}


def own_vectors(bundle: Bundle, pieces: Sequence[str | None], special: Sequence[int]) -> WordVectors:
  """The token embeddings of the words of letters in an encoder's vocabulary."""
  words = whole_words(range(len(pieces)), pieces, special)
  index = {piece: i for i, piece in enumerate(pieces)}
  letters = [word for word in words if word.isalpha()]
  return normalized(letters, _word_table(bundle)[[index[word] for word in letters]])


def gap_rows(gaps: Sequence[tuple[Text, Word]], tokenizer: Tokenizer, seq_len: int, context: str) -> RowSource:
  """A row for each word, which is hidden: [CLS] text [SEP], with the context 'published' text [SEP] behind it.

  Args:
    gaps: texts and a word of one piece of each.
    tokenizer: theirs.
    seq_len: most tokens of a row. The text with the gap has precedence, and is cut to the tokens around it.
    context: one of CONTEXTS.
  """
  paired = context == 'published'
  room = seq_len - (3 if paired else 2)
  first = np.asarray([min(len(text.ids), room) for text, _ in gaps], np.int64)
  second = np.asarray([min(len(text.ids), room - n) if paired else 0 for (text, _), n in zip(gaps, first)], np.int64)
  lengths = (first + second + (3 if paired else 2)).astype(np.int32)

  def fetch(indices: np.ndarray) -> dict[str, np.ndarray]:
    input_ids = np.full((len(indices), seq_len), tokenizer.pad_id, np.int32)
    token_type_ids = np.zeros((len(indices), seq_len), np.int32)
    for place, i in enumerate(indices):
      (text, word), kept, also = gaps[i], first[i], second[i]
      start = max(0, min(word.piece - kept // 2, len(text.ids) - kept))
      row = [tokenizer.cls_id, *text.ids[start : start + kept], tokenizer.sep_id]
      row[1 + word.piece - start] = tokenizer.mask_id
      if paired:
        row += [*text.ids[start : start + also], tokenizer.sep_id]
        token_type_ids[place, kept + 2 : lengths[i]] = 1
      input_ids[place, : len(row)] = row
    return {'input_ids': input_ids, 'token_type_ids': token_type_ids, 'length': lengths[indices]}

  return RowSource(fetch, len(gaps), tokenizer.vocab_size, seq_len, '', lengths=lengths)


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _guess(config: EncoderConfig, mask_id: int, count: int, params: Params, batch: Batch) -> dict[str, Any]:
  """Ids of the likeliest tokens at the first gap of each row: the head reads no other position."""
  positions_BP = jnp.argmax(batch.input_ids == mask_id, axis=1)[:, None]
  if config.type_vocab_size < 2:
    batch = dataclasses.replace(batch, token_type_ids=jnp.zeros_like(batch.token_type_ids))
  masked = Masked(batch.input_ids, positions_BP, jnp.zeros_like(positions_BP), jnp.ones(positions_BP.shape))
  logits_BPV = mlm_logits(params, config, masked, batch, None)
  return {'ids': jax.lax.top_k(logits_BPV[:, 0], count)[1]}


@functools.partial(jax.jit, static_argnums=0)
def _nearest(
  count: int, unit_VE: Float[Array, 'V E'], queries_BE: Float[Array, 'B E'], own_B: Int[Array, ' B']
) -> Int[Array, 'B P']:
  # Vectors are rounded to bfloat16 by default on a TPU, which mixes up near neighbours.
  scores_BV = jnp.einsum('be,ve->bv', queries_BE, unit_VE, precision='highest')
  itself_BV = jnp.arange(unit_VE.shape[0])[None] == own_B[:, None]
  return jax.lax.top_k(jnp.where(itself_BV, -jnp.inf, scores_BV), count)[1]


def _word_table(bundle: Bundle) -> np.ndarray:
  return np.asarray(bundle.params['encoder']['embeddings']['word']['embedding'], np.float32)


def _special(tokenizer: Tokenizer) -> tuple[int, ...]:
  return (tokenizer.pad_id, tokenizer.unk_id, tokenizer.cls_id, tokenizer.sep_id, tokenizer.mask_id)
