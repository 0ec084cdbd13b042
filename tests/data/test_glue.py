"""GLUE's official files, datasets and submission files."""

import gzip
import logging
import sys
import types
from pathlib import Path

import numpy as np
import pytest
import tensorflow_datasets as tfds
from hypothesis import given
from hypothesis import strategies as st

from compactlm_jax.config.finetune import GLUE as BENCHMARKS
from compactlm_jax.data.glue import read_glue, submission
from compactlm_jax.data.glue_tasks import TASKS, glue_task
from compactlm_jax.errors import ConfigError, DataError, NumericsError
from compactlm_jax.scoring.classification import CLASS_METRICS, SCORE_METRICS

REAL = Path(__file__).parents[2] / '../shared/data/glue'
MNLI = 'index promptID pairID genre sentence1_binary_parse sentence2_binary_parse sentence1_parse sentence2_parse'
STSB = 'index\tgenre\tfilename\tyear\told_index\tsource1\tsource2\tsentence1\tsentence2'
HEADERS = {
  'cola': ('', 'index\tsentence'),
  'sst2': ('sentence\tlabel', 'index\tsentence'),
  'mrpc': ('Quality\t#1 ID\t#2 ID\t#1 String\t#2 String', 'index\t#1 ID\t#2 ID\t#1 String\t#2 String'),
  'stsb': (STSB + '\tscore', STSB),
  'qqp': ('id\tqid1\tqid2\tquestion1\tquestion2\tis_duplicate', 'id\tquestion1\tquestion2'),
  'mnli': ('\t'.join([*MNLI.split(), 'sentence1', 'sentence2', 'label1', 'gold_label']),
           '\t'.join([*MNLI.split(), 'sentence1', 'sentence2'])),
  'qnli': ('index\tquestion\tsentence\tlabel', 'index\tquestion\tsentence'),
  'rte': ('index\tsentence1\tsentence2\tlabel', 'index\tsentence1\tsentence2'),
  'wnli': ('index\tsentence1\tsentence2\tlabel', 'index\tsentence1\tsentence2'),
}  # fmt: skip
LABELS = {
  'stsb': (['5.000', '0', '2.75'], [5, 0, 2.75]),
  'mnli': (['neutral', 'contradiction', 'entailment'], [1, 2, 0]),
  'qnli': (['entailment', 'not_entailment', 'entailment'], [0, 1, 0]),
  'rte': (['entailment', 'not_entailment', 'entailment'], [0, 1, 0]),
}
LABEL_COLUMNS = {'mrpc': 'Quality', 'stsb': 'score', 'qqp': 'is_duplicate', 'mnli': 'gold_label'}
TEXT_COLUMNS = {
  'cola': ('sentence',),
  'sst2': ('sentence',),
  'mrpc': ('#1 String', '#2 String'),
  'qqp': ('question1', 'question2'),
  'qnli': ('question', 'sentence'),
}


def write(folder, name, text):
  folder.mkdir(parents=True, exist_ok=True)
  data = text.encode() if isinstance(text, str) else text
  (folder / name).write_bytes(gzip.compress(data) if name.endswith('.gz') else data)


def lines(name, labelled):
  """Three lines in the official layout: texts 'a "0', 'b 0', ..."""
  columns = (HEADERS[name][not labelled] or 'source\tlabel\tmark\tsentence').split('\t')
  for i, label in enumerate(LABELS.get(name, (['1', '0', '1'],))[0]):
    cells = {**dict.fromkeys(columns, '7'), LABEL_COLUMNS.get(name, 'label'): label}
    cells |= {
      text: f'{letter} "{i}'
      for letter, text in zip('ab', TEXT_COLUMNS.get(name, ('sentence1', 'sentence2')), strict=False)
    }
    yield '\t'.join(cells[c] for c in columns)


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
  """All tasks with three rows per split, every other file compressed, one with CRs and a byte order mark."""
  root = tmp_path_factory.mktemp('glue')
  for number, task in enumerate(TASKS[:-1]):
    for place, split in enumerate(s for s in task.splits if s.name != 'ax'):
      labelled = not split.submission
      text = [*filter(None, [HEADERS[task.name][not labelled]]), *lines(task.name, labelled)]
      end, mark = ('\r\n', '\ufeff') if task.name == 'rte' else ('\n', '')
      suffix = '.tsv.gz' if (number + place) % 2 else '.tsv'
      write(root / task.folder, split.file + suffix, mark + ''.join(line + end for line in text))
  write(root / 'diagnostic', 'diagnostic.tsv', 'index\tsentence1\tsentence2\n0\tx\ty\n')
  return root


@pytest.mark.parametrize('task', TASKS[:-1], ids=lambda t: t.name)
def test_every_split_of_every_task(task, folder):
  """Mutation: MNLI's label1 for its gold label; the classes of WNLI in the order of RTE's."""
  for split in task.splits:
    for root in (folder, str(folder), folder / task.folder):
      if split.name == 'ax' and root == folder / task.folder:
        continue
      table = read_glue(task.name, root, split.name)
      assert table.classes == task.classes and table.name.startswith(str(folder))
      if split.name == 'ax':
        assert table.texts == (('x',), ('y',)) and table.labels is None
        continue
      assert table.texts == tuple(tuple(f'{a} "{i}' for i in range(3)) for a in 'ab'[: len(task.texts)])
      if split.submission:
        assert table.labels is None
      else:
        assert table.labels.tolist() == LABELS.get(task.name, (0, [1, 0, 1]))[1]
        assert table.labels.dtype == (np.int32 if task.classes else np.float32)


def test_the_tasks_are_those_of_the_configuration_with_known_metrics():
  assert tuple(t.name for t in TASKS) == (*BENCHMARKS, 'ax')
  for task in TASKS:
    assert set(task.metrics) <= set(CLASS_METRICS if task.classes else SCORE_METRICS)
    assert len(task.classes) == len(task.written) and len(task.texts) == len(task.fields or task.texts)
  assert [(s.name, s.prefix) for s in glue_task('mnli').dev_splits] == [('dev', ''), ('dev_mismatched', 'mismatched_')]
  assert {t.name: t.metrics for t in TASKS if t.metrics != ('accuracy',)} == {
    'cola': ('matthews',),
    'mrpc': ('accuracy', 'f1'),
    'stsb': ('pearson', 'spearman'),
    'qqp': ('accuracy', 'f1'),
  }


@pytest.mark.parametrize('name', ['cola', 'mrpc', 'qnli', 'rte', 'sst2', 'stsb', 'wnli', 'mnli', 'qqp', 'ax'])
def test_classes_are_in_the_order_of_tfds(name):
  """An independent statement of fields and classes. Mutation: RTE's classes sorted the other way."""
  from tensorflow_datasets.text.glue import Glue

  theirs = next(c for c in Glue.BUILDER_CONFIGS if c.name == name)
  task = glue_task(name)
  assert task.classes == tuple(theirs.label_classes or ())
  assert (task.fields or task.texts) == tuple(theirs.text_features)
  if name not in ('mrpc', 'cola'):
    assert task.texts == tuple(theirs.text_features.values())


def test_lines_of_qqp_that_are_too_short_are_left_out_and_reported(tmp_path, caplog):
  """Mutation: also for RTE. Mutation: without the report."""
  head, rows = HEADERS['qqp'][0], list(lines('qqp', True))
  write(tmp_path / 'QQP', 'train.tsv', '\n'.join([head, rows[0], '7\t8\tcut off', rows[1], '9\t8']) + '\n')
  with caplog.at_level(logging.WARNING):
    table = read_glue('qqp', tmp_path, 'train')
  assert len(table) == 2 and table.labels.tolist() == [1, 0]
  assert 'train.tsv: 2 of 4 lines have too few columns and are left out' in caplog.text and 'lines 3, 5' in caplog.text
  write(tmp_path / 'QQP', 'train.tsv', '\n'.join([head, *rows, *['7\t8'] * 11]))
  with pytest.raises(DataError, match='train.tsv: 11 of 14 lines have too few columns, the first is line 5'):
    read_glue('qqp', tmp_path, 'train')
  # A submission needs every row of a test set.
  write(tmp_path / 'QQP', 'test.tsv', 'id\tquestion1\tquestion2\n0\ta\tb\n1\ta\n')
  with pytest.raises(DataError, match=r'test.tsv:3: 2 columns, expected 3 \(id, question1, question2\)'):
    read_glue('qqp', tmp_path, 'test')


def test_empty_texts_are_kept_and_reported(tmp_path, caplog):
  write(tmp_path / 'QQP', 'dev.tsv', HEADERS['qqp'][0] + '\n1\t2\t3\ta\t\t0\n1\t2\t3\ta\tb\t1\n')
  assert read_glue('qqp', tmp_path, 'dev').texts == (('a', 'a'), ('', 'b'))
  assert '1 of 2 rows have an empty text and are kept; the first is ' in caplog.text and 'dev.tsv:2' in caplog.text


RTE = HEADERS['rte'][0] + '\n'


@pytest.mark.parametrize(
  'name, content, message',
  [
    ('rte', RTE + '0\ta\tb\tentailment\n1\ta\tb\tneutral\n', "tsv:3: label 'neutral' is not one of entailment, not_"),
    ('rte', RTE + '0\ta\tentailment\n', 'tsv:2: 3 columns, expected 4'),
    ('rte', RTE + '0\ta\tb\tc\tentailment\n', 'tsv:2: 5 columns, expected 4'),
    (
      'rte',
      'index\tsentence1\tsentence2\n0\ta\tb\n',
      "tsv: no column 'label'; columns are index, sentence1, sentence2",
    ),
    ('rte', 'index\tsentence1\tsentence2\tlabel\tlabel\n', "two columns are named 'label'"),
    ('rte', HEADERS['qnli'][0] + '\n0\ta\tb\tentailment\n', "tsv: no column 'sentence1'.*the file of RTE"),
    ('rte', RTE, 'tsv: no rows'),
    ('rte', '', 'tsv: no rows'),
    ('rte', b'\xff\tsentence1\n', 'tsv:1: not UTF-8'),
    ('cola', 'gj04\t1\t\ta\ngj04\t2\t*\tb\n', "tsv:2: label '2' is not one of 0, 1"),
    ('cola', 'gj04\t1\ta\n', r'tsv:1: 3 columns, expected 4 \(source, label, mark, sentence\)'),
    ('stsb', HEADERS['stsb'][0] + '\n' + '7\t' * 9 + '5.2\n', "tsv:2: score '5.2' is not a number from 0 to 5"),
    ('stsb', HEADERS['stsb'][0] + '\n' + '7\t' * 9 + 'nan\n', "tsv:2: score 'nan' is not"),
    ('stsb', HEADERS['stsb'][0] + '\n' + '7\t' * 9 + 'x\n', "tsv:2: score 'x' is not"),
  ],
)
def test_malformed_files(name, content, message, tmp_path):
  write(tmp_path / glue_task(name).folder, 'dev.tsv', content)
  with pytest.raises(DataError, match=message):
    read_glue(name, tmp_path, 'dev')


def test_cola_with_a_header_and_a_labelled_test_set(tmp_path):
  """Some copies add a header to CoLA; MRPC's test file of Microsoft has labels."""
  write(tmp_path / 'CoLA', 'dev.tsv', 'source\tlabel\tmark\tsentence\nx\t0\t*\tlabel\n')
  table = read_glue('cola', tmp_path, 'dev')
  assert table.texts == (('label',),) and table.labels.tolist() == [0]
  write(tmp_path / 'MRPC', 'test.tsv', HEADERS['mrpc'][0] + '\n1\t8\t9\ta\tb\n')
  assert read_glue('mrpc', tmp_path, 'test').labels.tolist() == [1]


def test_missing_files_and_names(tmp_path):
  write(tmp_path / 'RTE', 'dev.tsv', RTE + '0\ta\tb\tentailment\n')
  with pytest.raises(DataError, match=r'no RTE/train.tsv \(or .tsv.gz\) there; config.data.path must be the folder'):
    read_glue('rte', tmp_path, 'train')
  # The dev.tsv in another task's folder has the same columns as ours.
  with pytest.raises(DataError, match=r'no WNLI/dev.tsv'):
    read_glue('wnli', tmp_path / 'RTE', 'dev')
  with pytest.raises(ConfigError, match="GLUE has no task 'SST2'; did you mean sst2"):
    read_glue('SST2', tmp_path, 'dev')
  with pytest.raises(ConfigError, match="no task 'xyz'; use one of cola, sst2"):
    read_glue('xyz', tmp_path, 'dev')
  with pytest.raises(ConfigError, match="rte has no split 'dev_mismatched'; use one of train, dev, test"):
    read_glue('rte', tmp_path, 'dev_mismatched')
  with pytest.raises(ConfigError, match="name the folder of GLUE, 'tfds:glue' or"):
    read_glue('rte', '', 'dev')


class Entailment(tfds.core.GeneratorBasedBuilder):
  """RTE in the form of TFDS, but with its classes in the other order."""

  VERSION = tfds.core.Version('1.0.0')

  def _info(self):
    names = tfds.features.ClassLabel(names=['not_entailment', 'entailment'])
    texts = {'sentence1': tfds.features.Text(), 'sentence2': tfds.features.Text()}
    features = tfds.features.FeaturesDict({**texts, 'label': names, 'idx': np.int32})
    return tfds.core.DatasetInfo(builder=self, features=features, disable_shuffling=True)

  def _split_generators(self, dl_manager):
    return {
      'validation': self._generate_examples([0, 1, 1]),
      'test': self._generate_examples([-1, -1]),
      'train': self._generate_examples([0, -1]),
    }

  def _generate_examples(self, labels):
    for i, label in enumerate(labels):
      yield i, {'sentence1': f'café {i}', 'sentence2': 'b', 'label': label, 'idx': 9 - i}


@pytest.fixture(scope='module')
def entailment(tmp_path_factory):
  builder = Entailment(data_dir=str(tmp_path_factory.mktemp('tfds')), file_format='array_record')
  builder.download_and_prepare()
  return builder


def test_tfds(entailment):
  """Without TensorFlow. Class 0 of the dataset is our class 1, and the last row has the smallest number.

  Mutation: take the dataset's numbers as they are. Mutation: keep the order of the dataset.
  """
  table = read_glue('rte', f'tfds:{entailment.data_dir}', 'dev')
  assert table.texts == (('café 2', 'café 1', 'café 0'), ('b', 'b', 'b'))
  assert table.labels.tolist() == [0, 0, 1] and table.classes == ('entailment', 'not_entailment')
  assert read_glue('rte', f'tfds:{entailment.data_dir}', 'test').labels is None
  with pytest.raises(DataError, match='row 1: has no label; 1 of 2 rows have none'):
    read_glue('rte', f'tfds:{entailment.data_dir}', 'train')
  with pytest.raises(ConfigError, match="no field 'sentence'; it has .*Is it the dataset of sst2"):
    read_glue('sst2', f'tfds:{entailment.data_dir}', 'dev')
  with pytest.raises(ConfigError, match='classes are not_entailment, entailment, those of mrpc are not_equivalent'):
    read_glue('mrpc', f'tfds:{entailment.data_dir}', 'dev')


@pytest.mark.parametrize('root', ['tfds:', 'tfds:glue'])
def test_the_default_tfds_dataset_is_glue(root, monkeypatch):
  """Not built here: the message names it. MNLI's diagnostic set is a dataset of its own."""
  from compactlm_jax.data import text

  monkeypatch.setattr(text, '_is_tfds_dir', lambda name: False)
  with pytest.raises(ConfigError, match="input tfds:glue/ax, split 'test': cannot be opened"):
    read_glue('mnli', root, 'ax')
  with pytest.raises(ConfigError, match="input tfds:glue/mnli, split 'validation_mismatched': cannot be opened"):
    read_glue('mnli', root, 'dev_mismatched')


class Rows(list):
  """What `datasets` returns, as far as it is used."""

  def __init__(self, rows, names=None):
    super().__init__(rows)
    self.features = {**dict.fromkeys(rows[0], types.SimpleNamespace()), 'label': types.SimpleNamespace(names=names)}


@pytest.mark.parametrize(
  'root, loaded',
  [
    ('hf:nyu-mll/glue', ('nyu-mll/glue', 'mnli', 'validation_matched')),
    ('hf:glue:mnli', ('glue', 'mnli', 'validation_matched')),
    ('hf:some/nli', ('some/nli', None, 'validation_matched')),
  ],
)
def test_hugging_face(root, loaded, monkeypatch):
  calls = []
  fake = types.ModuleType('datasets')
  rows = [{'premise': 'a', 'hypothesis': 'b', 'label': label, 'idx': 0} for label in (2, 0, 1)]

  def load_dataset(path, config, split):
    calls.append((path, config, split))
    return Rows(rows, ['entailment', 'neutral', 'contradiction'])

  fake.load_dataset = load_dataset
  monkeypatch.setitem(sys.modules, 'datasets', fake)
  table = read_glue('mnli', root, 'dev')
  assert calls == [loaded] and table.texts == (('a',) * 3, ('b',) * 3) and table.labels.tolist() == [2, 0, 1]
  for row in rows:
    row['label'] = -1
  assert read_glue('mnli', root, 'test').labels is None
  with pytest.raises(DataError, match='row 0: has no label; 3 of 3 rows have none'):
    read_glue('mnli', root, 'dev')
  rows[1]['label'] = 3
  with pytest.raises(DataError, match='row 1: label 3 is not one of entailment, neutral, contradiction'):
    read_glue('mnli', root, 'dev')
  rows[0]['premise'] = None
  with pytest.raises(DataError, match="row 0: field 'premise' holds None instead of text"):
    read_glue('mnli', root, 'dev')


def test_hugging_face_scores_and_plain_labels(monkeypatch):
  fake = types.ModuleType('datasets')
  monkeypatch.setitem(sys.modules, 'datasets', fake)
  fake.load_dataset = lambda *_, split: Rows([{'sentence1': 'a', 'sentence2': 'b', 'label': s} for s in (2.5, 5.0)])
  assert read_glue('stsb', 'hf:nyu-mll/glue', 'train').labels.tolist() == [2.5, 5.0]
  fake.load_dataset = lambda *_, split: Rows([{'sentence': 'a', 'label': name} for name in (1, '0', 'positive')])
  assert read_glue('sst2', 'hf:nyu-mll/glue', 'train').labels.tolist() == [1, 0, 1]
  monkeypatch.setitem(sys.modules, 'datasets', None)
  with pytest.raises(ConfigError, match='needs the package .datasets.'):
    read_glue('sst2', 'hf:nyu-mll/glue', 'train')


@pytest.mark.skipif(not REAL.exists(), reason='shared data is absent')
@pytest.mark.parametrize(
  'name, split, rows, ones',
  [
    ('cola', 'train', 8551, 6023),
    ('cola', 'dev', 1043, 721),
    ('cola', 'test', 1063, None),
    ('sst2', 'train', 67349, 37569),
    ('sst2', 'dev', 872, 444),
    ('sst2', 'test', 1821, None),
    ('mrpc', 'train', 3668, 2474),
    ('mrpc', 'dev', 408, 279),
    ('mrpc', 'test', 1725, 1147),
    ('stsb', 'train', 5749, None),
    ('stsb', 'dev', 1500, None),
    ('stsb', 'test', 1379, None),
    ('qnli', 'dev', 5463, 2761),
    ('qnli', 'test', 5463, None),
    ('rte', 'train', 2490, 1241),
    ('rte', 'dev', 277, 131),
    ('rte', 'test', 3000, None),
    ('wnli', 'train', 635, 312),
    ('wnli', 'dev', 71, 31),
    ('wnli', 'test', 146, None),
    ('mnli', 'ax', 1104, None),
    ('ax', 'test', 1104, None),
  ],
)
def test_real_files(name, split, rows, ones):
  """Published numbers of rows; the label sums of CoLA, SST-2, MRPC and WNLI are those of the datasets' cards."""
  table = read_glue(name, REAL, split)
  assert len(table) == rows == len(table.texts[-1])
  assert (table.labels is None) == (split in ('test', 'ax') and name != 'mrpc')
  if ones is not None:
    assert table.labels.sum() == ones


def test_submission_files():
  """Mutation: class names as datasets have them for CoLA; two decimals."""
  two = np.array([[1.0, 0.0], [0.0, 2.0]])
  assert submission('cola', 'test', two) == ('CoLA.tsv', 'index\tprediction\n0\t0\n1\t1\n')
  assert submission('rte', 'test', two) == ('RTE.tsv', 'index\tprediction\n0\tentailment\n1\tnot_entailment\n')
  assert submission('wnli', 'test', two)[1] == submission('cola', 'test', two)[1]
  name, text = submission('stsb', 'test', np.array([[-1.0], [2.34567], [7.0]]))
  assert (name, text) == ('STS-B.tsv', 'index\tprediction\n0\t0.000\n1\t2.346\n2\t5.000\n')
  three = np.eye(3)[[2, 1, 0]]
  expected = 'index\tprediction\n0\tcontradiction\n1\tneutral\n2\tentailment\n'
  for split, file in (('test', 'MNLI-m.tsv'), ('test_mismatched', 'MNLI-mm.tsv'), ('ax', 'AX.tsv')):
    assert submission('mnli', split, three) == (file, expected)
  names = [submission(t.name, 'test', np.zeros((1, len(t.classes) or 1)))[0] for t in TASKS]
  assert names == 'CoLA SST-2 MRPC STS-B QQP MNLI-m QNLI RTE WNLI AX'.replace(' ', '.tsv ').split()[:-1] + ['AX.tsv']


@given(st.lists(st.integers(0, 1), min_size=1, max_size=20), st.sampled_from(['sst2', 'qqp', 'qnli', 'mrpc']))
def test_what_is_submitted_reads_back_as_the_labels(predictions, name):
  _, text = submission(name, 'test', np.eye(2)[predictions])
  head, *rows = text.splitlines()
  written = [row.split('\t') for row in rows]
  assert head == 'index\tprediction' and [int(i) for i, _ in written] == list(range(len(predictions)))
  assert [glue_task(name).written.index(label) for _, label in written] == predictions


@pytest.mark.parametrize(
  'call, error, message',
  [
    (lambda: submission('rte', 'dev', np.ones((1, 2))), ConfigError, "split 'dev' has no submission file; use test"),
    (lambda: submission('rte', 'test', np.ones((1, 3))), DataError, r'outputs \(1, 3\) must be \[rows, 2\]'),
    (lambda: submission('stsb', 'test', np.ones((1, 2))), DataError, r'must be \[rows\] or \[rows, 1\]'),
    (lambda: submission('stsb', 'test', np.array([np.nan])), NumericsError, 'STS-B.tsv: some outputs are not finite'),
  ],
)
def test_submissions_that_make_no_sense(call, error, message):
  with pytest.raises(error, match=message):
    call()
