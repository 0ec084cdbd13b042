"""Exact match, F1 and null thresholds of SQuAD: cases worked out by hand, and properties."""

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from compactlm_jax.scoring.squad import (
  answer_scores,
  best_threshold,
  exact_match,
  normalize_answer,
  score_v1,
  score_v2,
  token_f1,
)

texts = st.text(alphabet='aAbthe n.,-\'" é', max_size=12)


@pytest.mark.parametrize(
  'text, normal',
  [
    ('The  Eiffel Tower!', 'eiffel tower'),
    ('a an the', ''),
    ('Anthem of the Other', 'anthem of other'),  # articles are whole words
    ('U.S.', 'us'),
    ('The-end', 'theend'),  # punctuation goes first: 'the-end' is one word and no article
    ('“quoted”', '“quoted”'),  # only ASCII punctuation
    ('ÉTÉ', 'été'),
  ],
)
def test_normalize(text, normal):
  """Mutation: remove articles before punctuation; remove every punctuation of Unicode."""
  assert normalize_answer(text) == normal


def test_f1_by_hand():
  """Mutation: count words as sets; take the mean over gold answers."""
  assert token_f1('the big red house', 'red house', 1) == pytest.approx(2 * 1 * (2 / 3) / (1 + 2 / 3))
  assert token_f1('no no yes', 'no no', 1) == pytest.approx(0.8)  # both 'no' are common
  assert token_f1('no no yes', 'no yes yes', 1) == pytest.approx(2 / 3)  # one 'no' and one 'yes' are
  assert token_f1('red', 'blue', 2) == 0
  assert answer_scores(['in 1066', '1066', 'October 1066'], '1066', 1) == (1.0, 1.0)
  assert answer_scores(['in 1066'], '1066', 2) == (0.0, pytest.approx(2 / 3))


def test_answers_without_words():
  """v1.1 gives no F1 where a side has no word, v2.0 gives 1 if both have none. Mutation: one rule for both."""
  assert answer_scores(['the'], 'a', 1) == (1.0, 0.0)
  assert answer_scores(['the'], '', 2) == (1.0, 1.0)  # such a gold answer does not count, so '' is right
  assert answer_scores([], '', 2) == (1.0, 1.0) and answer_scores([], 'x', 2) == (0.0, 0.0)
  assert answer_scores(['the', 'x'], '', 2) == (0.0, 0.0)


def test_v1_by_hand():
  golds = {'a': ['red house', 'house'], 'b': ['blue'], 'c': ['one two'], 'd': ['x']}
  found = score_v1(golds, {'a': 'The House', 'b': 'green', 'c': 'two'})
  assert found == {'exact': 25.0, 'f1': pytest.approx(100 * (1 + 2 / 3) / 4), 'total': 4.0}


V2 = ({'a': ['red'], 'b': ['blue sky'], 'c': [], 'd': []}, {'a': 'red', 'b': 'sky', 'c': 'tree', 'd': 'sun'})


def test_v2_by_hand():
  """a is right; b has F1 2/3; c is rightly not answered; d is wrongly answered. Mutation: use >= for the threshold."""
  odds = {'a': -3.0, 'b': 0.0, 'c': 1.0, 'd': -2.0}
  found = score_v2(*V2, odds, 0.0)
  assert found == {
    'exact': 50.0, 'f1': pytest.approx(100 * (1 + 2 / 3 + 1) / 4), 'total': 4.0,
    'HasAns_exact': 50.0, 'HasAns_f1': pytest.approx(100 * (1 + 2 / 3) / 2), 'HasAns_total': 2.0,
    'NoAns_exact': 50.0, 'NoAns_f1': 50.0, 'NoAns_total': 2.0,
    # No answer at all gives 2 of 4; a alone adds one; d costs one; b adds 2/3 of F1.
    'best_exact': 75.0, 'best_exact_thresh': -3.0, 'best_f1': 75.0, 'best_f1_thresh': -3.0,
  }  # fmt: skip
  everything = score_v2(*V2, odds, 5.0)
  assert (everything['NoAns_exact'], everything['HasAns_exact'], everything['best_f1']) == (0.0, 50.0, 75.0)
  nothing = score_v2(*V2, odds, -5.0)
  assert (nothing['NoAns_f1'], nothing['HasAns_f1'], nothing['f1']) == (100.0, 0.0, 50.0)
  only = score_v2({'a': ['red']}, {'a': 'red'}, {'a': -1.0})
  assert 'NoAns_exact' not in only and only['HasAns_exact'] == 100.0


def test_an_empty_text_costs_nothing_in_the_search():
  """As in the official script: '' for an unanswerable question is right whatever the threshold."""
  scores, has = {'a': 1.0, 'b': 0.0}, {'a': True, 'b': False}
  assert best_threshold(scores, {'a': 'x', 'b': ''}, {'a': 2.0, 'b': 1.0}, has) == (100.0, 2.0)
  assert best_threshold(scores, {'a': 'x', 'b': 'y'}, {'a': 2.0, 'b': 1.0}, has) == (50.0, 0.0)


@given(texts, texts)
def test_scores_are_symmetric_and_bounded(a, b):
  for version in (1, 2):
    assert 0 <= token_f1(a, b, version) <= 1 and token_f1(a, b, version) == token_f1(b, a, version)
  assert exact_match(a, b) <= token_f1(a, b, 2) and exact_match(a, a) == 1
  assert token_f1(a, a, 2) == 1


@given(st.lists(st.tuples(st.booleans(), st.sampled_from([0.0, 0.5, 1.0]), st.booleans()), min_size=1, max_size=7))
def test_no_threshold_beats_the_best_one(rows):
  """With different odds and no empty text, the search finds what trying every threshold finds.

  Mutation: sort from high odds to low.
  """
  ids = [str(i) for i in range(len(rows))]
  has = {i: row[0] for i, row in zip(ids, rows)}
  scores = {i: row[1] if row[0] else 0.0 for i, row in zip(ids, rows)}
  odds = {i: float((7 * n) % 11) - 3 for n, i in enumerate(ids)}
  best, threshold = best_threshold(scores, dict.fromkeys(ids, 'x'), odds, has)

  def at(limit):
    return sum(float(not has[i]) if odds[i] > limit else scores[i] for i in ids) * 100 / len(ids)

  assert best == pytest.approx(max(at(limit) for limit in itertools.chain([-99.0], odds.values())))
  assert best == pytest.approx(at(threshold)) or best == pytest.approx(at(-99.0))
