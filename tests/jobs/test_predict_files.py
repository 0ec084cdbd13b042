"""Prediction from file to file: rows in order, gaps where there is nothing to read, whole files or none."""

import gzip
import json

import numpy as np
import pytest
from predicting import LABELS, WORDS, make_bundle, make_texts

import compactlm_jax as clm
from compactlm_jax.cli.main import main
from compactlm_jax.errors import ConfigError, DataError
from compactlm_jax.interop.bundle import save_pretrained
from compactlm_jax.jobs import predict_files as module
from compactlm_jax.jobs.predict_files import predict_file


@pytest.fixture(scope='module')
def models(tmp_path_factory):
  folder = tmp_path_factory.mktemp('models')
  save_pretrained(make_bundle(), folder / 'classes')
  save_pretrained(make_bundle(1, ()), folder / 'scores')
  save_pretrained(make_bundle(2, (), head='span'), folder / 'spans')
  return {name: str(folder / name) for name in ('classes', 'scores', 'spans')}


def run(model, folder, name, content, output='out.tsv', **options):
  data = content.encode()
  (folder / name).write_bytes(gzip.compress(data) if name.endswith('.gz') else data)
  line = predict_file(model, str(folder / name), str(folder / output), **options)
  return line, (folder / output).read_text()


def table(text):
  header, *rows = [line.split('\t') for line in text.splitlines()]
  return [dict(zip(header, row, strict=True)) for row in rows]


@pytest.mark.parametrize('name', ['in.tsv', 'in.jsonl.gz', 'in.txt', 'in.tsv.gz'])
def test_every_kind_of_file_gives_the_predictions_of_the_function(name, models, tmp_path, monkeypatch):
  """Over several chunks. Mutation: write the rows from short to long."""
  texts = make_texts(11)
  lines = {'.tsv': ['id\ttext', *(f'{i}\t{t}' for i, t in enumerate(texts))], '.txt': texts}
  lines['.jsonl'] = [json.dumps({'text': t}) for t in texts]
  content = '\n'.join(lines['.' + name.split('.')[1]]) + '\n'
  monkeypatch.setattr(module, 'CHUNK', 4)
  line, written = run(models['classes'], tmp_path, name, content, batch_size=8)
  expected = clm.predict(make_bundle(), texts)
  rows = table(written)
  assert [row['prediction'] for row in rows] == list(expected.labels)
  shares = [[float(row[f'probability:{label}']) for label in LABELS] for row in rows]
  np.testing.assert_allclose(shares, expected.probabilities, rtol=0, atol=1e-5)
  assert line.startswith(f'{tmp_path / "out.tsv"}: 11 rows in ') and 'rows/s' in line and '% padding' in line
  assert 'cut' not in line and 'empty' not in line
  assert sorted(p.name for p in tmp_path.iterdir()) == sorted([name, 'out.tsv'])


def test_few_long_rows_are_in_memory_at_a_time():
  """Mutations: count rows only; drop what is left at the end."""
  rows = [('', ('a' * size,)) for size in (1, 9 << 20, 9 << 20, 1, 20 << 20, 5)]
  assert [len(chunk) for chunk in module._chunks(iter(rows))] == [3, 2, 1]
  assert [len(chunk) for chunk in module._chunks(iter(rows[:1] * 5000))] == [4096, 904]


@pytest.mark.parametrize('name', ['in.txt.tsv', 'in.txt.jsonl', 'in.tsv.txt.gz'])
def test_the_last_ending_is_the_kind_of_a_file(name, models, tmp_path):
  """Mutation: look at two endings (the header becomes a row)."""
  text = 'w1 w2'
  content = {'tsv': f'text\n{text}\n', 'jsonl': json.dumps({'text': text}), 'txt': text}[name.split('.')[2]]
  assert len(table(run(models['classes'], tmp_path, name, content)[1])) == 1
  with pytest.raises(ConfigError, match='in.tsv.old is of an unknown kind'):
    predict_file(models['classes'], str(tmp_path / 'in.tsv.old'), str(tmp_path / 'out.tsv'))


def test_pairs_and_json_lines(models, tmp_path):
  """Mutation: read the first column twice."""
  first, second = make_texts(3, 1, 8), make_texts(3, 2, 8)
  content = '\n'.join(json.dumps({'a': a, 'b': b}) for a, b in zip(first, second, strict=True))
  _, written = run(models['classes'], tmp_path, 'in.jsonl', content, 'out.jsonl', text_columns=('a', 'b'))
  rows, expected = [json.loads(line) for line in written.splitlines()], clm.predict(make_bundle(), first, pairs=second)
  assert [row['prediction'] for row in rows] == list(expected.labels)
  for row, shares in zip(rows, expected.probabilities, strict=True):
    np.testing.assert_allclose([row['probabilities'][label] for label in LABELS], shares, rtol=0, atol=1e-6)


def test_empty_and_long_rows_are_counted(models, tmp_path, monkeypatch):
  """The first chunk has no text at all. Mutation: leave empty rows out: the rest would move up."""
  monkeypatch.setattr(module, 'CHUNK', 2)
  content = '\n'.join(['', '  ', 'w1 w2', '', ' '.join(WORDS)]) + '\n'
  line, written = run(models['classes'], tmp_path, 'in.txt', content)
  rows = table(written)
  assert [bool(row['prediction']) for row in rows] == [False, False, True, False, True]
  assert rows[0] == dict.fromkeys(['prediction', *(f'probability:{label}' for label in LABELS)], '')
  assert '1 longer than the limit and cut' in line and '3 empty and not predicted' in line
  _, written = run(models['scores'], tmp_path, 'in.txt', 'w1\n\nw2 w3\n', 'out.jsonl')
  scores = [json.loads(row)['prediction'] for row in written.splitlines()]
  expected = clm.predict(make_bundle(1, ()), ['w1', 'w2 w3']).scores
  assert scores[1] is None
  np.testing.assert_allclose([scores[0], scores[2]], expected, rtol=0, atol=1e-5)


def test_answers_are_words_of_the_context(models, tmp_path):
  """A context of several windows. Mutation: give the answers to the wrong questions."""
  contexts = ['W5 w6', ' '.join(WORDS), '', 'w7 w8 w9']
  content = '\n'.join(json.dumps({'q': 'w1 w2', 'c': context}) for context in contexts)
  line, written = run(models['spans'], tmp_path, 'in.jsonl', content, 'o.jsonl', question='q', context='c', seq_len=20)
  rows = [json.loads(row) for row in written.splitlines()]
  for context, row in zip(contexts, rows, strict=True):
    assert (row['answer'] is None) == (not context)
    if context:
      assert row['answer'] and row['answer'] in context and 0 < row['probability'] <= 1
  assert '1 empty and not predicted' in line
  odds = [row['null_odds'] for row in rows if row['answer']]
  options = {'question': 'q', 'context': 'c', 'seq_len': 20, 'null_threshold': sorted(odds)[1]}
  _, written = run(models['spans'], tmp_path, 'in.jsonl', content, 'o.tsv', **options)
  answers = [row['answer'] for row in table(written)]
  assert [bool(a) for a in answers] == [bool(r['answer']) and r['null_odds'] < max(odds) for r in rows]


def test_a_failure_leaves_the_earlier_output(models, tmp_path, monkeypatch):
  """Damage after two good chunks. Mutation: write into the output itself."""
  monkeypatch.setattr(module, 'CHUNK', 2)
  (tmp_path / 'out.tsv').write_text('earlier')
  with pytest.raises(DataError, match=r'in\.tsv:6: 2 columns'):
    run(models['classes'], tmp_path, 'in.tsv', 'text\nw1\nw2\nw3\nw4\nw5\tw6\n')
  assert (tmp_path / 'out.tsv').read_text() == 'earlier'
  assert sorted(p.name for p in tmp_path.iterdir()) == ['in.tsv', 'out.tsv']


@pytest.mark.parametrize(
  ('model', 'name', 'content', 'options', 'error', 'message'),
  [
    ('classes', 'in.csv', 'text', {}, ConfigError, r'--input: .*in\.csv is of an unknown kind; use \.tsv, \.jsonl'),
    ('classes', 'in.tsv', 'words\nw1\n', {}, ConfigError, r"in\.tsv:2: no column 'text'; columns are words"),
    ('classes', 'in.tsv', 'text\n', {}, DataError, 'no rows'),
    ('classes', 'in.txt', 'w1', {'text_columns': ('a', 'b', 'c')}, ConfigError, '--text_columns: .* one or two'),
    ('classes', 'in.txt', 'w1', {'output': 'out.csv'}, ConfigError, r'--output: .* must end in \.tsv or \.jsonl'),
    ('classes', 'in.txt', 'w1', {'output': 'no/out.tsv'}, ConfigError, '--output: the folder of'),
    ('classes', 'in.txt', 'w1', {'seq_len': 500}, ConfigError, 'seq_len: 500'),
    ('classes', 'in.txt', 'w1', {'question': 'q'}, ConfigError, 'name both columns'),
    ('classes', 'in.tsv', 'q\tc\nw\tw', {'question': 'q', 'context': 'c'}, ConfigError, 'no trained head for answers'),
    ('spans', 'in.txt', 'w1', {}, ConfigError, 'a question and a context column'),
    ('classes', 'in.jsonl', '{"text": 3}', {}, DataError, r"in\.jsonl:1: column 'text' holds 3 instead of text"),
  ],
)
def test_what_cannot_be_read_is_refused(model, name, content, options, error, message, models, tmp_path):
  with pytest.raises(error, match=message):
    run(models[model], tmp_path, name, content, **options)
  assert not [p.name for p in tmp_path.iterdir() if 'out' in p.name]


def test_the_input_is_not_replaced(models, tmp_path):
  """By whatever name. Mutation: compare names, or nothing."""
  (tmp_path / 'link.tsv').symlink_to('in.tsv')
  for name in ('in.tsv', 'link.tsv'):
    with pytest.raises(ConfigError, match=f'--output: .*{name} is the file that is read; name another'):
      run(models['classes'], tmp_path, 'in.tsv', 'text\nw1\n', output=name)
  assert (tmp_path / 'in.tsv').read_text() == 'text\nw1\n'


def test_the_command(models, tmp_path, capsys):
  (tmp_path / 'in.tsv').write_text('a\tb\nw1\tw2\n')
  flags = [f'--input={tmp_path / "in.tsv"}', f'--output={tmp_path / "out.tsv"}', '--text_columns=a, b,']
  assert main(['predict', f'--model={models["classes"]}', *flags]) == 0
  assert ': 1 rows in ' in capsys.readouterr().out and len(table((tmp_path / 'out.tsv').read_text())) == 1
  assert main(['predict', f'--model={models["classes"]}', *flags, '--text_columns=a,c']) == 78
  assert "no column 'c'" in capsys.readouterr().err
  assert main(['predict', f'--model={tmp_path}', *flags]) == 65
