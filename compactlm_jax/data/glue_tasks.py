"""The tasks of GLUE (Wang et al. 2019): official files, columns, classes, metrics and submission files.

Folders, files and columns are those of the official archives; the order of classes is that of TFDS, Hugging Face
`datasets` and transformers. ELECTRA's own code orders MNLI as contradiction, entailment, neutral: only the numbers of
outputs differ.
"""

from __future__ import annotations

import dataclasses
import difflib

from compactlm_jax.errors import ConfigError


@dataclasses.dataclass(frozen=True)
class GlueSplit:
  """One split of a task.

  Attributes:
    name: 'train', 'dev', 'test', and for MNLI 'dev_mismatched', 'test_mismatched', 'ax' (the diagnostic set).
    file: official file without its suffix.
    dataset: its name in TFDS and Hugging Face datasets.
    prefix: of its metrics, where a task has several labelled splits to score.
    submission: file that GLUE's server takes predictions of it in; '' where it takes none.
  """

  name: str
  file: str
  dataset: str
  prefix: str = ''
  submission: str = ''


@dataclasses.dataclass(frozen=True)
class GlueTask:
  """One task.

  Attributes:
    name: as in `config.finetune.benchmark`, and in TFDS and Hugging Face datasets.
    folder: official folder.
    texts: text columns of the files, one or two.
    label: label column of the files.
    classes: class names in the order of their indices, as datasets have them; empty for scores.
    written: the classes as files and submissions write them.
    metrics: what GLUE scores it by; names of `scoring.classification`.
    fields: text fields in datasets, where they differ from `texts`.
    splits: what it is divided into.
    header: columns of the labelled files, where these have no header row.
    score_range: least and greatest score.
    skips_short_lines: whether the original readers leave out lines with too few columns.
  """

  name: str
  folder: str
  texts: tuple[str, ...]
  label: str = 'label'
  classes: tuple[str, ...] = ()
  written: tuple[str, ...] = ()
  metrics: tuple[str, ...] = ('accuracy',)
  fields: tuple[str, ...] = ()
  splits: tuple[GlueSplit, ...] = ()
  header: tuple[str, ...] = ()
  score_range: tuple[float, float] = (0.0, 0.0)
  skips_short_lines: bool = False

  @property
  def dev_splits(self) -> tuple[GlueSplit, ...]:
    """The labelled splits that are not trained on: two for MNLI."""
    return tuple(split for split in self.splits if split.name.startswith('dev'))

  @property
  def test_splits(self) -> tuple[GlueSplit, ...]:
    """The splits with a submission file; MNLI's include the diagnostic set."""
    return tuple(split for split in self.splits if split.submission)


def _splits(submission: str) -> tuple[GlueSplit, ...]:
  return (
    GlueSplit('train', 'train', 'train'),
    GlueSplit('dev', 'dev', 'validation'),
    GlueSplit('test', 'test', 'test', submission=submission),
  )


_PAIR = ('sentence1', 'sentence2')
_BINARY = ('0', '1')
_ENTAILED = ('entailment', 'not_entailment')
_NLI = ('entailment', 'neutral', 'contradiction')

TASKS = (
  GlueTask(
    'cola',
    'CoLA',
    ('sentence',),
    classes=('unacceptable', 'acceptable'),
    written=_BINARY,
    metrics=('matthews',),
    splits=_splits('CoLA.tsv'),
    header=('source', 'label', 'mark', 'sentence'),
  ),
  GlueTask(
    'sst2', 'SST-2', ('sentence',), classes=('negative', 'positive'), written=_BINARY, splits=_splits('SST-2.tsv')
  ),
  GlueTask(
    'mrpc',
    'MRPC',
    ('#1 String', '#2 String'),
    label='Quality',
    classes=('not_equivalent', 'equivalent'),
    written=_BINARY,
    metrics=('accuracy', 'f1'),
    fields=_PAIR,
    splits=_splits('MRPC.tsv'),
  ),
  GlueTask(
    'stsb',
    'STS-B',
    _PAIR,
    label='score',
    metrics=('pearson', 'spearman'),
    splits=_splits('STS-B.tsv'),
    score_range=(0.0, 5.0),
  ),
  GlueTask(
    'qqp',
    'QQP',
    ('question1', 'question2'),
    label='is_duplicate',
    classes=('not_duplicate', 'duplicate'),
    written=_BINARY,
    metrics=('accuracy', 'f1'),
    splits=_splits('QQP.tsv'),
    skips_short_lines=True,
  ),
  GlueTask(
    'mnli',
    'MNLI',
    _PAIR,
    label='gold_label',
    classes=_NLI,
    written=_NLI,
    fields=('premise', 'hypothesis'),
    splits=(
      GlueSplit('train', 'train', 'train'),
      GlueSplit('dev', 'dev_matched', 'validation_matched'),
      GlueSplit('dev_mismatched', 'dev_mismatched', 'validation_mismatched', 'mismatched_'),
      GlueSplit('test', 'test_matched', 'test_matched', submission='MNLI-m.tsv'),
      GlueSplit('test_mismatched', 'test_mismatched', 'test_mismatched', submission='MNLI-mm.tsv'),
      GlueSplit('ax', 'diagnostic', 'test', submission='AX.tsv'),
    ),
  ),
  GlueTask('qnli', 'QNLI', ('question', 'sentence'), classes=_ENTAILED, written=_ENTAILED, splits=_splits('QNLI.tsv')),
  GlueTask('rte', 'RTE', _PAIR, classes=_ENTAILED, written=_ENTAILED, splits=_splits('RTE.tsv')),
  GlueTask('wnli', 'WNLI', _PAIR, classes=_ENTAILED[::-1], written=_BINARY, splits=_splits('WNLI.tsv')),
  GlueTask(
    'ax',
    'diagnostic',
    _PAIR,
    classes=_NLI,
    written=_NLI,
    fields=('premise', 'hypothesis'),
    splits=(GlueSplit('test', 'diagnostic', 'test', submission='AX.tsv'),),
  ),
)
"""The nine tasks, and the diagnostic set, which a model of MNLI answers."""


def glue_task(name: str, field: str = 'config.finetune.benchmark') -> GlueTask:
  """The task of a name such as 'rte', which was written in `field`.

  Raises:
    ConfigError: no such task; the message suggests one.
  """
  tasks = {task.name: task for task in TASKS}
  if name in tasks:
    return tasks[name]
  spelt = {alias: task for task in TASKS for alias in (task.name, task.folder.lower().replace('-', ''))}
  close = difflib.get_close_matches(name.lower().replace('-', ''), spelt, 1)
  hint = f'did you mean {spelt[close[0]].name}?' if close else f'use one of {", ".join(tasks)}'
  raise ConfigError(f'{field}: GLUE has no task {name!r}; {hint}')


def glue_split(name: str, split: str) -> tuple[GlueTask, GlueSplit]:
  """The task and split of two names. MNLI's 'ax' is the test set of the task 'ax'.

  Raises:
    ConfigError: no such task or split.
  """
  task = glue_task('ax' if (name, split) == ('mnli', 'ax') else name)
  for known in task.splits:
    if known.name == split or (name, split) == ('mnli', 'ax'):
      return task, known
  known_names = ', '.join(known.name for known in task.splits)
  raise ConfigError(f'GLUE task {name} has no split {split!r}; use one of {known_names}')
