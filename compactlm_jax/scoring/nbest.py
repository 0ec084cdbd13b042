"""From the best starts and ends of each window to the n best answers of each question, and to prediction files."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np


@dataclasses.dataclass(frozen=True)
class Answers:
  """What a model answers.

  Attributes:
    nbest: by id, answers from the best on, each {'text', 'probability', 'start_logit', 'end_logit'}: the content of
      SQuAD's nbest_predictions.json. An entry with the text '' is the null answer.
    null_odds: by id, how much rather the question has no answer: the content of null_odds.json. Empty for v1.1.
  """

  nbest: dict[str, list[dict[str, Any]]]
  null_odds: dict[str, float]

  def best(self) -> dict[str, str]:
    """The best text of each question that is not the null answer; '' if there is none."""
    return {i: next((e['text'] for e in entries if e['text']), '') for i, entries in self.nbest.items()}

  def predictions(self, null_threshold: float = 0.0) -> dict[str, str]:
    """The content of predictions.json: `best`, and '' where the null odds exceed the threshold."""
    return {i: '' if self.null_odds.get(i, -np.inf) > null_threshold else text for i, text in self.best().items()}


def answer_questions(
  outputs: Mapping[str, np.ndarray],
  ids: Sequence[str],
  question: np.ndarray,
  shown: Callable[[np.ndarray], np.ndarray],
  max_context: Callable[[np.ndarray], np.ndarray],
  text: Callable[[int, int, int], str],
  *,
  n_best: int = 20,
  max_answer_length: int = 30,
  version: int = 1,
) -> Answers:
  """Joins the windows of each question.

  An answer starts and ends at tokens of the context, does not end before it starts, is at most `max_answer_length`
  tokens long, and its start has its largest context in this window. Answers of one text count once, with the best
  score.

  Args:
    outputs: of each window, in order: 'starts' [n, k] places in the row and their 'start_logits', 'ends' [n, 1 or k,
      m] (for each start, or for all) and their 'end_logits'; for v2.0 also 'null' [n, 2] (start and end logit of no
      answer) or, of a model that decides by itself, 'impossible' [n] (log odds of no answer).
    ids: of the questions.
    question: number of the question of each window, int [n], ascending.
    shown: places [n, any] -> whether they show a token of the context.
    max_context: places [n, k] -> whether this window shows the token best; see `data.windows`.
    text: (window, start place, end place) -> text.
    n_best: answers kept for each question.
    max_answer_length: tokens.
    version: 1 or 2.

  Returns:
    The answers. Null odds are the least null score over the windows minus the best answer's score, or the least
    'impossible'.

  Source: google-research/bert `run_squad.write_predictions`, google-research/electra `finetune/qa/qa_metrics.py`.
  These take the best starts and ends of all tokens and then drop what does not lie in the context; here `outputs` are
  taken from the context alone, so that none of the n are lost. Texts come from the original characters, where the
  originals align word pieces with text by a heuristic (`get_final_text`).
  """
  starts, ends = outputs['starts'].astype(np.int64), outputs['ends'].astype(np.int64)
  scores = outputs['start_logits'].astype(np.float64)[:, :, None] + outputs['end_logits'].astype(np.float64)
  length = ends - starts[:, :, None] + 1
  ends_shown = shown(ends.reshape(len(ends), -1)).reshape(ends.shape)
  valid = (shown(starts) & max_context(starts))[:, :, None] & ends_shown & (length >= 1) & (length <= max_answer_length)
  scores = np.where(valid & np.isfinite(scores), scores, -np.inf)
  bounds = np.searchsorted(question, np.arange(len(ids) + 1))
  nbest: dict[str, list[dict[str, Any]]] = {}
  odds: dict[str, float] = {}
  for number, name in enumerate(ids):
    windows = slice(int(bounds[number]), int(bounds[number + 1]))
    entries = _best_texts(outputs, scores, windows, text, n_best)
    if version == 2:
      odds[name] = _null_odds(outputs, windows, entries)
      if 'null' in outputs:
        entries.append(_null_entry(outputs['null'][windows]))
    entries = entries or [{'text': '', 'start_logit': 0.0, 'end_logit': 0.0}]
    nbest[name] = _with_probabilities(entries)
  return Answers(nbest, odds)


def _best_texts(
  outputs: Mapping[str, np.ndarray],
  scores: np.ndarray,
  windows: slice,
  text: Callable[[int, int, int], str],
  n_best: int,
) -> list[dict[str, Any]]:
  """The n best entries with different texts of some windows."""
  found: dict[str, dict[str, Any]] = {}
  part = scores[windows]
  flat = part.reshape(-1)
  order = np.argsort(-flat, kind='stable')  # equal scores keep the order of windows, starts, ends, as in the originals
  for at in order[: int(np.isfinite(flat).sum())]:
    if len(found) == n_best:
      break
    window, i, j = (int(x) for x in np.unravel_index(at, part.shape))
    window += windows.start
    row = min(i, outputs['ends'].shape[1] - 1)  # one list of ends may serve all starts
    words = text(window, int(outputs['starts'][window, i]), int(outputs['ends'][window, row, j]))
    if words and words not in found:
      found[words] = {
        'text': words,
        'start_logit': float(outputs['start_logits'][window, i]),
        'end_logit': float(outputs['end_logits'][window, row, j]),
      }
  return list(found.values())


def _null_entry(null: np.ndarray) -> dict[str, Any]:
  start, end = null[int(null.sum(-1).argmin())]
  return {'text': '', 'start_logit': float(start), 'end_logit': float(end)}


def _null_odds(outputs: Mapping[str, np.ndarray], windows: slice, entries: list[dict[str, Any]]) -> float:
  if 'impossible' in outputs:
    return float(outputs['impossible'][windows].min())
  null = float(outputs['null'][windows].astype(np.float64).sum(-1).min())
  return null - (entries[0]['start_logit'] + entries[0]['end_logit'] if entries else 0.0)


def _with_probabilities(entries: list[dict[str, Any]]) -> list[dict[str, Any]]:
  """The entries from the best on, with the softmax of their scores."""
  entries = sorted(entries, key=lambda e: -(e['start_logit'] + e['end_logit']))
  scores = np.asarray([e['start_logit'] + e['end_logit'] for e in entries])
  shares = np.exp(scores - scores.max())
  return [
    {'text': e['text'], 'probability': float(p), 'start_logit': e['start_logit'], 'end_logit': e['end_logit']}
    for e, p in zip(entries, shares / shares.sum(), strict=True)
  ]
