"""Words that may be replaced, copies of texts, and the rows of pairs."""

import numpy as np
import pytest
from augmenting import SEVERAL, SINGLE, STOPS, make_texts, make_tokenizer
from hypothesis import given, settings
from hypothesis import strategies as st

from compactlm_jax.data.augment import (
  STOP_WORDS,
  Text,
  Word,
  augmented_rows,
  check_word_pieces,
  find_words,
  make_copies,
  whole_words,
)
from compactlm_jax.errors import ConfigError


@pytest.fixture(scope='module')
def tokenizer(tmp_path_factory):
  return make_tokenizer(tmp_path_factory.mktemp('tokenizer'))


def test_words_of_letters_that_are_no_stop_words(tokenizer):
  """Contractions, digits, punctuation, accents and capitals. Mutation: compare stop words as they are written."""
  (found,) = find_words(["The Tréehouse don't   RUNS, 3d-road over"], tokenizer)
  assert [found.surface(word) for word in found.words] == ['Tréehouse', 'RUNS', 'road']
  assert [(word.piece, word.pieces) for word in found.words] == [(1, 2), (6, 1), (10, 1)]
  (other,) = find_words(['The road'], tokenizer, {'road'})
  assert [other.surface(word) for word in other.words] == ['The']


def test_stop_words_are_those_of_letters():
  """Mutation: leave out a line of the list."""
  assert all(word.isalpha() and word.islower() for word in STOP_WORDS)
  assert {'i', 'the', 'wouldn', 'don', 'further', 'been', 'each', 'll'} <= STOP_WORDS and 'would' not in STOP_WORDS
  assert len(STOP_WORDS) == 145


@settings(max_examples=40, deadline=None)
@given(st.lists(st.sampled_from([*SINGLE, *SEVERAL, *STOPS, '.', "'", '3d', 'Übung', '  ', '東京', 'x']), max_size=9))
def test_each_word_knows_its_characters_and_pieces(tokenizer, words):
  """Mutation: count the pieces of a word from the start of its neighbour."""
  text = ' '.join(words)
  (found,) = find_words([text], tokenizer)
  assert found.text == text and list(found.ids) == tokenizer.encode([text])[0]
  end = 0
  for word in found.words:
    surface = found.surface(word)
    assert word.start >= end and surface.isalpha() and surface not in STOP_WORDS
    assert tokenizer.encode([surface])[0] == list(found.ids[word.piece : word.piece + word.pieces])
    end = word.stop


def test_pieces_that_continue_a_word_and_special_tokens_are_no_candidates():
  """Mutation: keep the pieces."""
  assert whole_words([3, 0, 2, 1], ['[PAD]', None, '##a', 'b'], {0}) == ('b',)


def split_text(words):
  """A Text of words with a blank between them, without a tokenizer."""
  starts = np.cumsum([0, *(len(word) + 1 for word in words[:-1])]).tolist()
  spans = [Word(start, start + len(word), i, 1) for i, (start, word) in enumerate(zip(starts, words))]
  return Text(' '.join(words), (), tuple(spans))


@pytest.mark.parametrize('seed', range(3))
def test_copies_are_those_of_a_loop_over_copies_and_words(seed):
  """With the same draws, as the original's loop. Mutation: replace where the draw is above the probability."""
  words = ['tree', 'house', 'Road', 'bird', 'runs']
  candidates = [('a',), ('b', 'c', 'house'), ('stone', 'river'), (), tuple('vwxyz')]
  made = make_copies(split_text(words), candidates, 20, 0.4, np.random.default_rng(seed))
  rng = np.random.default_rng(seed)
  draws, picks = rng.random((20, 5)), rng.random((20, 5))
  expected, changed = [], 0
  for i in range(20):
    new = list(words)
    for j, own in enumerate(candidates):
      if own and draws[i, j] < 0.4:
        choice = own[int(np.floor(picks[i, j] * len(own)))]
        new[j] = choice.capitalize() if words[j] == 'Road' else choice
    if ' '.join(new) not in (' '.join(words), *expected):
      expected.append(' '.join(new))
      changed += sum(a != b for a, b in zip(words, new))
  assert made.texts == tuple(expected) and made.replaced == changed
  assert 0 < len(expected) < 20


def test_words_are_replaced_as_often_as_asked_by_each_candidate_alike():
  """Mutation: draw the candidate from the first half of the list."""
  words = [f'w{"abcdefghij"[i % 10]}{i}' for i in range(400)]
  options = tuple('pqrst')
  made = make_copies(split_text(words), [options] * 400, 30, 0.4, np.random.default_rng(0))
  cells = np.array([copy.split(' ') for copy in made.texts])
  assert abs((np.char.str_len(cells) == 1).mean() - 0.4) < 0.02
  for option in options:
    assert abs((cells == option).mean() - 0.08) < 0.01


def test_what_stands_between_words_stays(tokenizer):
  """Blanks, capitals and punctuation. Mutation: join the copies from tokens."""
  text = 'The  House, don\'t stand: (Tree)\u00a0"Road"'
  (found,) = find_words([text], tokenizer)
  made = make_copies(found, [('bird',)] * len(found.words), 3, 1.0, np.random.default_rng(0))
  assert made.texts == ('The  Bird, don\'t bird: (Bird)\u00a0"Bird"',) and made.replaced == 4


def test_rows_of_one_text_and_of_pairs():
  """By hand. Mutation: write the clean original twice."""
  assert augmented_rows(['t'], [['t1', 't2']]) == [['t'], ['t1'], ['t2']]
  assert augmented_rows(['t'], [['t1']], 'published') == [['t'], ['t1']]
  copies = [['a1', 'a2'], ['b1']]
  assert augmented_rows(['a', 'b'], copies) == [['a', 'b'], ['a1', 'b'], ['a2', 'b'], ['a', 'b1']]
  published = [['a', 'b'], ['a1', 'b'], ['a2', 'b'], ['a2', 'b'], ['a2', 'b1']]
  assert augmented_rows(['a', 'b'], copies, 'published') == published
  assert augmented_rows(['a', 'b'], [[], []]) == [['a', 'b']]


def test_a_tokenizer_without_whole_words_is_refused(tokenizer):
  """Mutation: let every tokenizer pass."""
  import dataclasses

  import tokenizers

  check_word_pieces(tokenizer)
  bpe = dataclasses.replace(tokenizer, backend=tokenizers.Tokenizer(tokenizers.models.BPE()))
  with pytest.raises(ConfigError, match='is BPE; augmentation needs whole words of a WordPiece'):
    check_word_pieces(bpe)
  assert make_texts()
