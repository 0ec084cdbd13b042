"""Published dev scores of GLUE and SQuAD, to stand beside one's own. None of them was measured by this package.

Where a source does not say which of a task's two metrics it gives, `metric` is ''.
"""

from __future__ import annotations

import dataclasses

ELECTRA = 'ELECTRA README, dev, median over many seeds'
ELECTRA_SPREAD = 'spread over fine-tuning seeds of the reproduction richarddwang/electra_pytorch'
CONVBERT = "ConvBERT authors' answer to reviewers (NeurIPS 2020), dev, median and standard error of 9 runs"
CONVBERT_BASE = 'reproduction JunnYu/paddle_convbert, dev'
MINILM = 'MiniLM paper (arXiv:2002.10957), dev, mean of 4 runs'
MINILM_REVIEW = "MiniLM authors' answer to reviewers (NeurIPS 2020), dev"
EM = 'exact'


@dataclasses.dataclass(frozen=True)
class Published:
  """A score of a publication.

  Attributes:
    model: as its authors call it, with its parameters in millions where they say so.
    metric: name that it has in this package; '' where the source does not say.
    value: in the unit of this package: a fraction for GLUE, per cent for SQuAD.
    stderr: standard error in the same unit, where given.
    std: standard deviation over seeds, where given.
    source: where it stands.
  """

  model: str
  metric: str
  value: float
  stderr: float | None
  std: float | None
  source: str


_ELECTRA_TASKS = 'cola sst2 mrpc stsb qqp mnli qnli rte squad1 squad2'
_MINILM_TASKS = 'squad2 mnli sst2 qnli cola rte mrpc qqp'
_REVIEW_TASKS = 'squad2 mnli qnli sst2 mrpc'
_CONVBERT_TASKS = 'mnli qnli qqp rte sst2 mrpc cola stsb'
# ConvBERT's code is ELECTRA's, whose README names these metrics.
_ELECTRA_METRICS = {'cola': 'matthews', 'stsb': 'spearman', 'squad1': EM, 'squad2': EM}
_MINILM_METRICS = {'cola': 'matthews', 'squad2': 'f1', 'mrpc': '', 'qqp': ''}

_ROWS: tuple[tuple[str, str, str, dict[str, str], str, str], ...] = (
  ('ELECTRA-Small++ (14M)', ELECTRA, _ELECTRA_TASKS, _ELECTRA_METRICS,
   '57.0 91.2 88.0 87.5 89.0 81.3 88.4 66.7 75.8 70.1', ''),
  ('ELECTRA-Small-OWT (14M)', f'{ELECTRA}; {ELECTRA_SPREAD}', _ELECTRA_TASKS, _ELECTRA_METRICS,
   '56.8 88.3 87.4 86.8 88.3 78.9 87.9 68.5', 'std 1.30 .49 .70 .29 .10 .15 .33 1.93'),
  ('ELECTRA-Base++ (110M)', ELECTRA, _ELECTRA_TASKS, _ELECTRA_METRICS,
   '67.7 95.1 89.5 91.2 91.5 88.8 93.2 82.7 86.8 80.5', ''),
  ('ELECTRA-Large (335M)', ELECTRA, _ELECTRA_TASKS, _ELECTRA_METRICS,
   '69.1 96.9 90.8 92.6 92.4 90.9 95.0 88.0 89.7 88.1', ''),
  ('ConvBERT-small (14M)', CONVBERT, _CONVBERT_TASKS, _ELECTRA_METRICS,
   '81.4 88.3 90.3 67.4 90.2 86.7 59.4 87.8', 'stderr .2 .1 .1 .8 .4 .6 1.4 .3'),
  ('ConvBERT-base (106M)', CONVBERT_BASE, 'cola sst2 mrpc stsb qqp mnli qnli rte squad1 squad2', _ELECTRA_METRICS,
   '69.2 94.6 90.4 90.7 92.0 88.1 93.0 83.4 84.8 80.9', ''),
  ('ConvBERT-base (106M)', CONVBERT_BASE, 'mrpc stsb qqp mnli squad1 squad2',
   {'mrpc': 'f1', 'stsb': 'pearson', 'qqp': 'f1', 'mnli': 'mismatched_accuracy', 'squad1': 'f1', 'squad2': 'f1'},
   '93.1 90.8 89.4 87.9 91.3 83.9', ''),
  ('BERT-base (109M)', MINILM, _MINILM_TASKS, _MINILM_METRICS, '76.8 84.5 93.2 91.7 58.9 68.6 87.3 91.3', ''),
  ('DistilBERT (66M)', MINILM, _MINILM_TASKS, _MINILM_METRICS, '70.7 79.0 90.7 85.3 43.6 59.9 87.5 84.9', ''),
  ('TinyBERT (66M)', MINILM, _MINILM_TASKS, _MINILM_METRICS, '73.1 83.5 91.6 90.5 42.8 72.2 88.4 90.6', ''),
  ('MiniLM 6x768 (66M)', MINILM, _MINILM_TASKS, _MINILM_METRICS, '76.4 84.0 92.0 91.0 49.2 71.5 88.4 91.0', ''),
  ('MiniLM 12x384 (33M)', MINILM, _MINILM_TASKS, _MINILM_METRICS, '81.7 85.7 93.0 91.5 58.5 73.3 89.5 91.3', ''),
  ('MiniLM 6x384 (22M)', MINILM, _MINILM_TASKS, _MINILM_METRICS, '75.6 83.3 91.5 90.5 47.5 68.8 88.9 90.6', ''),
  ('MiniLM L12-H384-E128 (25M)', MINILM_REVIEW, _REVIEW_TASKS, _MINILM_METRICS, '80.6 85.2 91.7 92.1 89.5', ''),
  ('MobileBERT (25M)', MINILM_REVIEW, _REVIEW_TASKS, _MINILM_METRICS, '80.2 84.4 91.5 92.5 87.0', ''),
)  # fmt: skip


def published(benchmark: str) -> tuple[Published, ...]:
  """Dev scores of a GLUE task or SQuAD version, by source; none for '' and for tasks that have none (wnli)."""
  found = []
  for model, source, tasks, metrics, scores, spread in _ROWS:
    kind, *spreads = spread.split() or ['']
    if benchmark not in tasks.split()[: len(scores.split())]:
      continue
    i, unit = tasks.split().index(benchmark), 1.0 if benchmark.startswith('squad') else 100.0
    width = float(spreads[i]) / unit if spreads else None
    found.append(
      Published(
        model=model,
        metric=metrics.get(benchmark, 'accuracy'),
        value=float(scores.split()[i]) / unit,
        stderr=width if kind == 'stderr' else None,
        std=width if kind == 'std' else None,
        source=source,
      )
    )
  return tuple(found)
