"""From starts and ends to answers: worked by hand, and against a loop over all pairs."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from compactlm_jax.scoring.nbest import answer_questions

WORDS = 'zero one two three four five six seven'.split()


def text(window, start, end):
  return ' '.join(WORDS[start : end + 1]) or 'backwards'


def everywhere(places):
  return np.ones(places.shape, bool)


def answer(outputs, question, shown=lambda p: p > 0, best_here=everywhere, **options):
  arrays = {name: np.asarray(value) for name, value in outputs.items()}
  ids = [f'q{i}' for i in range(max(question) + 1)]
  return answer_questions(arrays, ids, np.asarray(question), shown, best_here, text, **options)


TWO = {  # one question, two windows
  'starts': [[3, 1, 0], [2, 5, 0]],
  'start_logits': [[5.0, 4.0, -1e9], [3.0, 1.0, -1e9]],
  'ends': [[[2, 4, 0]], [[2, 6, 0]]],
  'end_logits': [[[6.0, 2.0, -1e9]], [[3.0, 2.0, -1e9]]],
}


def test_by_hand():
  """(3, 2) would be best but ends before it starts. Mutation: allow it; forget the second window."""
  found = answer(TWO, [0, 0], max_answer_length=4).nbest['q0']
  assert [(e['text'], e['start_logit'] + e['end_logit']) for e in found] == [
    ('one two', 10.0), ('three four', 7.0), ('one two three four', 6.0), ('two', 6.0), ('five six', 3.0),
  ]  # fmt: skip
  shares = np.exp(np.array([10, 7, 6, 6, 3]) - 10.0)
  np.testing.assert_allclose([e['probability'] for e in found], shares / shares.sum())


def test_limits():
  """Length, context and number. Mutation: count the length without the last token."""
  short = answer(TWO, [0, 0], max_answer_length=2).nbest['q0']
  assert [e['text'] for e in short] == ['one two', 'three four', 'two', 'five six']
  assert [e['text'] for e in answer(TWO, [0, 0], n_best=1).nbest['q0']] == ['one two']
  hidden = answer(TWO, [0, 0], best_here=lambda p: p != 1, max_answer_length=2).nbest['q0']
  assert [e['text'] for e in hidden] == ['three four', 'two', 'five six']
  assert answer(TWO, [0, 0], shown=lambda p: p < 0).best() == {'q0': ''}


def test_a_text_counts_once():
  """With its best score, whichever window has it. Mutation: keep the last."""
  alone = [(e['text'], e['start_logit']) for e in answer({n: rows[:1] for n, rows in TWO.items()}, [0]).nbest['q0']]
  for shift in (0.0, -0.5, 0.5):
    logits = np.array([TWO['start_logits'][0]] * 2) + [[0.0], [shift]]
    found = answer({**{n: [rows[0]] * 2 for n, rows in TWO.items()}, 'start_logits': logits}, [0, 0]).nbest['q0']
    assert [(e['text'], e['start_logit']) for e in found] == [(t, x + max(shift, 0)) for t, x in alone]


def test_null_odds_of_the_independent_head():
  """The least null score of the windows, less the best answer. Mutation: take the largest; the last window's."""
  outputs = {**TWO, 'null': [[4.0, 5.0], [1.0, 2.5]]}
  found = answer(outputs, [0, 0], version=2)
  assert found.null_odds == {'q0': 3.5 - 10.0} and found.best() == {'q0': 'one two'}
  null = next(e for e in found.nbest['q0'] if e['text'] == '')
  assert (null['start_logit'], null['end_logit']) == (1.0, 2.5)
  assert found.predictions(0.0) == {'q0': 'one two'}
  assert found.predictions(-6.5) == {'q0': 'one two'} and found.predictions(-6.6) == {'q0': ''}
  likely = answer({**TWO, 'null': [[40.0, 5.0], [10.0, 25.0]]}, [0, 0], version=2)
  assert likely.nbest['q0'][0]['text'] == '' and likely.best() == {'q0': 'one two'} and likely.null_odds['q0'] == 25.0


def test_a_head_that_decides_by_itself():
  found = answer({**TWO, 'impossible': [0.5, -2.0]}, [0, 0], version=2)
  assert found.null_odds == {'q0': -2.0} and all(e['text'] for e in found.nbest['q0'])
  assert found.predictions(-2.75) == {'q0': ''}


def test_v1_knows_no_null():
  found = answer({**TWO, 'null': [[99.0, 99.0]] * 2}, [0, 0])
  assert found.null_odds == {} and found.predictions(-99.0) == {'q0': 'one two'}
  assert all(e['text'] for e in found.nbest['q0'])


@given(st.integers(0, 2**32 - 1), st.sampled_from([1, 3]), st.integers(1, 4))
def test_the_best_answer_is_the_best_of_all_pairs(seed, lists, longest):
  """Three questions of one to three windows, ends for all starts or each. Mutation: always take list 0 of ends."""
  rng = np.random.default_rng(seed)
  question = np.repeat(np.arange(3), rng.integers(1, 4, 3))
  n = len(question)
  outputs = {
    'starts': rng.integers(0, 8, (n, 3)),
    'start_logits': rng.normal(size=(n, 3)),
    'ends': rng.integers(0, 8, (n, lists, 3)),
    'end_logits': rng.normal(size=(n, lists, 3)),
  }
  found = answer(outputs, question, max_answer_length=longest)
  for number in range(3):
    pairs = {}
    for w in np.flatnonzero(question == number):
      for i in range(3):
        for j in range(3):
          row = i if lists == 3 else 0
          start, end = outputs['starts'][w, i], outputs['ends'][w, row, j]
          if 0 < start <= end < start + longest:
            score = outputs['start_logits'][w, i] + outputs['end_logits'][w, row, j]
            pairs[text(w, start, end)] = max(score, pairs.get(text(w, start, end), -np.inf))
    entries = found.nbest[f'q{number}']
    expected = sorted(pairs.values(), reverse=True) or [0.0]
    np.testing.assert_allclose([e['start_logit'] + e['end_logit'] for e in entries], expected)
    assert entries[0]['text'] == (max(pairs, key=pairs.get) if pairs else '')
    assert sum(e['probability'] for e in entries) == pytest.approx(1)
