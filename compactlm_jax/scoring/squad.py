"""Exact match and F1 of SQuAD, as its official scripts compute them (evaluate-v1.1.py, evaluate-v2.0.py)."""

from __future__ import annotations

import collections
import re
import string
from collections.abc import Mapping, Sequence

_ARTICLES = re.compile(r'\b(a|an|the)\b')
_PUNCTUATION = str.maketrans('', '', string.punctuation)


def normalize_answer(text: str) -> str:
  """Lower case, without ASCII punctuation and the articles a, an, the; words separated by one blank."""
  return ' '.join(_ARTICLES.sub(' ', text.lower().translate(_PUNCTUATION)).split())


def exact_match(gold: str, predicted: str) -> float:
  """1 if both are the same after `normalize_answer`, else 0."""
  return float(normalize_answer(gold) == normalize_answer(predicted))


def token_f1(gold: str, predicted: str, version: int) -> float:
  """Harmonic mean of precision and recall of the words after `normalize_answer`.

  Args:
    gold: an annotator's answer.
    predicted: the model's.
    version: 1 or 2. If one of them has no word, v2.0 gives 1 where both have none, v1.1 gives 0.
  """
  words, guesses = normalize_answer(gold).split(), normalize_answer(predicted).split()
  if version == 2 and not (words and guesses):
    return float(words == guesses)
  same = sum((collections.Counter(words) & collections.Counter(guesses)).values())
  return 2 * same / (len(words) + len(guesses)) if same else 0.0


def answer_scores(golds: Sequence[str], predicted: str, version: int) -> tuple[float, float]:
  """(exact match, F1) of one question: the best over the gold answers.

  Args:
    golds: texts of the annotators; none means that the right prediction is '' (v2.0).
    predicted: the model's text, '' for no answer.
    version: 1 or 2; v2.0 passes over gold answers of which `normalize_answer` leaves nothing.
  """
  if version == 2:
    golds = [gold for gold in golds if normalize_answer(gold)]
  golds = golds or ['']
  return max(exact_match(g, predicted) for g in golds), max(token_f1(g, predicted, version) for g in golds)


def score_v1(answers: Mapping[str, Sequence[str]], predictions: Mapping[str, str]) -> dict[str, float]:
  """SQuAD v1.1: 'exact' and 'f1' in percent, 'total' questions.

  Args:
    answers: gold texts by id.
    predictions: predicted texts by id; a question without one counts as wrong.
  """
  scores = {i: answer_scores(golds, predictions[i], 1) for i, golds in answers.items() if i in predictions}
  return _percent(scores, list(answers))


def score_v2(
  answers: Mapping[str, Sequence[str]],
  predictions: Mapping[str, str],
  null_odds: Mapping[str, float],
  null_threshold: float = 0.0,
) -> dict[str, float]:
  """SQuAD v2.0: all figures of the official script.

  Args:
    answers: gold texts by id; none for unanswerable questions.
    predictions: the best text of each question, whether or not it is then held to be unanswerable.
    null_odds: how much rather unanswerable, by id.
    null_threshold: no answer is given where the odds exceed it.

  Returns:
    'exact', 'f1', 'total'; the same with 'HasAns_' and 'NoAns_' for either kind of question that there is; and
    'best_exact', 'best_exact_thresh', 'best_f1', 'best_f1_thresh' (see `best_threshold`). Scores in percent.
  """
  raw = {i: answer_scores(golds, predictions[i], 2) for i, golds in answers.items()}
  has = {i: bool(golds) for i, golds in answers.items()}
  kept = {
    i: (float(not has[i]),) * 2 if null_odds[i] > null_threshold else scores for i, scores in raw.items()
  }  # fmt: skip
  found = _percent(kept, list(answers))
  for prefix, kind in (('HasAns_', True), ('NoAns_', False)):
    if ids := [i for i in answers if has[i] is kind]:
      found |= {prefix + name: value for name, value in _percent(kept, ids).items()}
  for number, name in enumerate(('exact', 'f1')):
    scores = {i: pair[number] for i, pair in raw.items()}
    found[f'best_{name}'], found[f'best_{name}_thresh'] = best_threshold(scores, predictions, null_odds, has)
  return found


def best_threshold(
  scores: Mapping[str, float],
  predictions: Mapping[str, str],
  null_odds: Mapping[str, float],
  has_answer: Mapping[str, bool],
) -> tuple[float, float]:
  """The null threshold that serves these very questions best: an upper bound, not a result.

  As the official `find_best_thresh`: it begins with no answer at all (threshold 0 stands for that), then answers the
  questions one by one from low odds to high; equal odds are passed one by one too.

  Args:
    scores: score of each answer, in [0, 1], before any threshold.
    predictions: the texts.
    null_odds: how much rather unanswerable.
    has_answer: whether the question has an answer.

  Returns:
    (mean score in percent, threshold).
  """
  current = best = float(sum(not has_answer[i] for i in scores))
  threshold = 0.0
  for i in sorted(null_odds, key=lambda i: null_odds[i]):
    if i in scores:
      current += scores[i] if has_answer[i] else -float(bool(predictions[i]))
      if current > best:
        best, threshold = current, float(null_odds[i])
  return 100 * best / len(scores), threshold


def _percent(scores: Mapping[str, tuple[float, ...]], ids: Sequence[str]) -> dict[str, float]:
  sums = [sum(scores[i][number] for i in ids if i in scores) for number in (0, 1)]
  return {'exact': 100 * sums[0] / len(ids), 'f1': 100 * sums[1] / len(ids), 'total': float(len(ids))}
