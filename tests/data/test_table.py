import dataclasses
import gzip
import json
import types
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from compactlm_jax.data import text
from compactlm_jax.data.batches import eval_batches
from compactlm_jax.data.table import Table, read_table, table_rows, tokenize_table
from compactlm_jax.data.text import MAX_ROW_BYTES
from compactlm_jax.data.tokenizer import load_tokenizer
from compactlm_jax.errors import ConfigError, DataError

WORDS = 'the a small large river house tree runs stands Café déjà'.split()
GLUE = Path(__file__).parents[2] / '../shared/data/glue'


def save(path, content):
  data = content.encode() if isinstance(content, str) else content
  path.write_bytes(gzip.compress(data) if path.suffix == '.gz' else data)
  return path


@pytest.mark.parametrize('name', ['t.tsv', 't.tsv.gz'])
def test_tsv(name, tmp_path):
  # Quotes are ordinary characters, a byte order mark and carriage returns are dropped.
  path = save(tmp_path / name, '\ufeffid\ttext\tlabel\r\n1\t"a\tpos\r\n\n2\tb "c"\tneg\n3\tc\tpos\n')
  table = read_table(path)
  assert table.texts == (('"a', 'b "c"', 'c'),) and table.classes == ('neg', 'pos')
  assert table.labels.tolist() == [1, 0, 1] and table.labels.dtype == np.int32 and len(table) == 3


def test_jsonl_pairs_and_integer_labels(tmp_path):
  rows = [{'a': 'x', 'b': 'y\tz', 'gold': n} for n in (10, 9, 2)]
  path = save(tmp_path / 't.jsonl.gz', '\n'.join(map(json.dumps, rows)))
  table = read_table(path, ('a', 'b'), 'gold')
  assert table.classes == ('2', '9', '10') and table.labels.tolist() == [2, 1, 0]
  assert table.texts == (('x', 'x', 'x'), ('y\tz',) * 3)


def test_dev_uses_the_classes_of_train(tmp_path):
  train = read_table(save(tmp_path / 'train.tsv', 'text\tlabel\na\tx\nb\ty\nc\tz\n'))
  dev = read_table(save(tmp_path / 'dev.tsv', 'text\tlabel\na\tz\nb\ty\n'), classes=train.classes)
  assert dev.labels.tolist() == [2, 1] and dev.classes == train.classes
  with pytest.raises(ConfigError, match=r"dev.tsv:3: label 'w' does not occur in the training table; it has x, y, z"):
    read_table(save(tmp_path / 'dev.tsv', 'text\tlabel\na\tz\nb\tw\n'), classes=train.classes)


def test_scores(tmp_path):
  table = read_table(save(tmp_path / 't.tsv', 'text\tlabel\na\t1.5\nb\t-2\n'), scores=True)
  assert table.labels.tolist() == [1.5, -2.0] and table.labels.dtype == np.float32 and table.classes == ()
  for score in ('nan', '-inf', '1e39'):
    with pytest.raises(DataError, match=f"t.tsv:3: the label '{score}' is not a finite number"):
      read_table(save(tmp_path / 't.tsv', f'text\tlabel\na\t1.5\nb\t{score}\n'), scores=True)


@pytest.mark.parametrize(
  'name, content, error, message',
  [
    ('t.tsv', '', DataError, 't.tsv: no rows'),
    ('t.tsv', 'text\tlabel\n', DataError, 't.tsv: no rows'),
    ('t.tsv', 'text\tlabel\na\tb\nc\n', DataError, r't.tsv:3: 1 columns, but the header has 2 \(text, label\)'),
    ('t.tsv', 'text\tclass\na\tb\n', ConfigError, "t.tsv:2: no column 'label'; columns are text, class"),
    ('t.tsv', 'text\tlabel\na\t \n', DataError, 't.tsv:2: the label is'),
    ('t.tsv', 'text\tlabel\na\tb\n \tb\n', DataError, "t.tsv:3: column 'text' is empty; fill it in or remove"),
    ('t.tsv', b'text\tlabel\na\tb\n\xff\tb\n', DataError, 't.tsv:3: not UTF-8 at byte 0'),
    ('t.jsonl', '{"text": "a", "label": 1}\n{"text"\n', DataError, 't.jsonl:2: not JSON'),
    ('t.jsonl', '[1]\n', DataError, 't.jsonl:1: expected one JSON object'),
    ('t.jsonl', '{"text": 3, "label": 1}\n', DataError, "t.jsonl:1: column 'text' holds 3 instead of text"),
    ('t.jsonl', '{"text": "a", "label": [1]}\n', DataError, r't.jsonl:1: the label is \[1\]'),
    ('t.jsonl', '{"text": "a", "label": null}\n', DataError, "t.jsonl:1: column 'label' is null; fill it in or remove"),
    ('t.jsonl', '{"text": null, "label": 1}\n', DataError, "t.jsonl:1: column 'text' is null"),
    ('t.tsv', 'text\tlabel\na\tb\n\t\nc\td\n', DataError, "t.tsv:3: column 'text' is empty; fill it in or remove"),
    ('t.tsv', 'text\na\n\nb\n', ConfigError, "t.tsv:2: no column 'label'; columns are text"),
    ('t.tsv', 'text\tlabel\tlabel\na\tb\tc\n', DataError, "t.tsv:1: two columns are named 'label'; rename or remove"),
    ('t.tsv', '\n\ntext\tlabel\ttext \na\tb\tc\n', DataError, "t.tsv:3: two columns are named 'text'"),
    ('t.jsonl', '{"text": "a", "label": 1, "label": 2}\n', DataError, "t.jsonl:1: not JSON .'label' stands twice.; co"),
    ('t.csv', 'text,label\n', ConfigError, 't.csv: unknown kind of table; use .tsv or .jsonl'),
  ],
)
def test_malformed_tables(name, content, error, message, tmp_path):
  with pytest.raises(error, match=message):
    read_table(save(tmp_path / name, content))


def test_columns_without_a_name_may_be_many(tmp_path):
  """As of a sheet with tabs behind its last column. Mutation: refuse them as columns of one name."""
  table = read_table(save(tmp_path / 't.tsv', 'text\tlabel\t\t\na\tx\t\t\nb\ty\t\t\n'))
  assert table.texts == (('a', 'b'),) and table.classes == ('x', 'y')


@pytest.mark.parametrize('name', ['t.tsv', 't.jsonl', 't.tsv.gz'])
def test_rows_have_a_limit(name, tmp_path):
  """A tokenizer takes 200 bytes for each of theirs. Mutation: the limit of `prepare`, 64 MiB."""
  head, row = ('text\tlabel\n', '{}\tx\n') if 'tsv' in name else ('\n', '{{"text": "{}", "label": "x"}}\n')
  room = MAX_ROW_BYTES - len(row.format(''))
  table = read_table(save(tmp_path / name, head + row.format('a' * room)))
  assert len(table.texts[0][0]) == room
  with pytest.raises(DataError, match=f'{name}:2: a line of more than 1048576 bytes; break it .* or cut its text'):
    read_table(save(tmp_path / name, head + row.format('a' * (room + 1))))


def test_long_texts_are_encoded_a_few_at_once(vocabulary, monkeypatch):
  """Mutation: all in one call, whose encodings take 200 bytes for each character."""
  monkeypatch.setattr(text, '_PART_CHARS', 20)
  tokenizer, calls = load_tokenizer(vocabulary), []

  def encode(texts, **options):
    calls.append(texts)
    return tokenizer.backend.encode_batch_fast(texts, **options)

  counted = dataclasses.replace(tokenizer, backend=types.SimpleNamespace(encode_batch_fast=encode))
  texts = ['the river', 'a tree', '', 'house ' * 9, 'runs', 'the small river runs']
  assert counted.encode(texts) == [tokenizer.encode([each])[0] for each in texts]
  assert calls == [texts[:3], texts[3:4], texts[4:5], texts[5:]] and counted.encode([]) == []


def test_empty_texts_are_rows(tmp_path):
  """Of one column too, except at the end. Mutations: skip them: the rest would move up; a row for each last line."""
  path = save(tmp_path / 't.tsv', '\n\ntext\n\na\n \n\nb\n\n\n')
  assert list(table_rows(path)) == [
    (4, {'text': ''}), (5, {'text': 'a'}), (6, {'text': ''}), (7, {'text': ''}), (8, {'text': 'b'}),
  ]  # fmt: skip
  pairs = save(tmp_path / 'pairs.tsv', 'a\tb\n\t\n\nx\ty\n\ty\n')
  assert [tuple(row.values()) for _, row in table_rows(pairs)] == [('', ''), ('x', 'y'), ('', 'y')]
  with pytest.raises(DataError, match="t.tsv:4: column 'text' is empty; fill it in or remove"):
    read_table(path, label_column='text')


def test_missing_and_damaged_files(tmp_path):
  with pytest.raises(DataError, match='none.tsv: no such file'):
    read_table(tmp_path / 'none.tsv')
  (tmp_path / 't.tsv.gz').write_bytes(gzip.compress(b'text\tlabel\n' + b'a\tb\n' * 999)[:-12])
  with pytest.raises(DataError, match='t.tsv.gz: damaged gzip file'):
    read_table(tmp_path / 't.tsv.gz')
  with pytest.raises(ConfigError, match='must name one or two columns'):
    read_table(tmp_path / 't.tsv', ('a', 'b', 'c'))


texts = st.lists(st.sampled_from(WORDS), max_size=12).map(' '.join)


@pytest.fixture(scope='module')
def reference(vocabulary):
  return pytest.importorskip('transformers').AutoTokenizer.from_pretrained(str(vocabulary))


@given(rows=st.lists(st.tuples(texts, texts), min_size=1, max_size=4), seq_len=st.integers(8, 24), pair=st.booleans())
def test_rows_equal_transformers(vocabulary, reference, rows, seq_len, pair):
  columns = tuple(zip(*rows, strict=True))[: 2 if pair else 1]
  table = Table(columns, np.zeros(len(rows), np.int32), ('0',), 't')
  source = tokenize_table(table, load_tokenizer(vocabulary), seq_len)
  theirs = reference(*map(list, columns), padding='max_length', truncation=True, max_length=seq_len)
  (batch,) = eval_batches(source, len(rows))
  assert batch.input_ids.tolist() == theirs['input_ids']
  assert batch.attention_mask.tolist() == theirs['attention_mask']
  assert batch.token_type_ids.tolist() == theirs['token_type_ids']


def test_labels_reach_the_batch(vocabulary):
  table = Table((('river', 'house', 'tree'),), np.array([2, 0, 1], np.int32), ('a', 'b', 'c'), 't')
  source = tokenize_table(table, load_tokenizer(vocabulary), 8)
  assert source.classes == ('a', 'b', 'c') and source.fingerprint == load_tokenizer(vocabulary).fingerprint()
  (batch,) = eval_batches(source, 3)
  assert batch.labels.tolist() == [2, 0, 1] and batch.labels.dtype == np.int32


@pytest.mark.skipif(not GLUE.exists(), reason='shared data is absent')
def test_real_tables(vocabulary):
  train = read_table(GLUE / 'RTE' / 'train.tsv.gz', ('sentence1', 'sentence2'))
  dev = read_table(GLUE / 'RTE' / 'dev.tsv.gz', ('sentence1', 'sentence2'), classes=train.classes)
  assert (len(train), len(dev), train.classes) == (2490, 277, ('entailment', 'not_entailment'))
  sst = read_table(GLUE / 'SST-2' / 'dev.tsv.gz', ('sentence',))
  assert len(sst) == 872 and sst.classes == ('0', '1') and sst.labels.sum() == 444
  row = tokenize_table(dev, load_tokenizer(vocabulary), 64)[0]
  assert row['length'] <= 64 and row['token_type_ids'].sum() > 0
