"""Damaged files, for every reader of bytes that this library did not write: a value or one of our own errors.

benchmarks/fuzz.py does the same with a hundred thousand cases.
"""

import pathlib
import pickle
import socket
import subprocess
import sys

import pytest
from foreign import Cases, Change, OtherError, Reader, check, damaged, stored
from foreign_readers import READERS
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from compactlm_jax.parse import parse_json, parse_row

BY_NAME = {reader.name: reader for reader in READERS}
EXAMPLES = 120


@pytest.fixture(scope='module')
def cases(tmp_path_factory):
  """reader -> its cases, in a folder that its examples share."""
  made = {}

  def of(reader):
    if reader.name not in made:
      made[reader.name] = Cases(reader, tmp_path_factory.mktemp('case'))
    return made[reader.name]

  return of


@pytest.mark.parametrize('reader', READERS, ids=lambda r: r.name)
def test_a_damaged_file_is_read_or_refused(reader, cases):
  """Mutation: json.loads in place of parse_json or parse_row in any of the readers."""
  mine = cases(reader)
  for file in mine.valid:  # few of the examples are as deep
    mine.run(Change(file, stored(file, DEEP + b'\n')))

  @settings(max_examples=EXAMPLES, derandomize=True, database=None, deadline=None, suppress_health_check=HealthCheck)
  @given(st.data())
  def holds(data):
    mine.run(damaged(lambda n: data.draw(st.integers(0, n - 1)), mine.valid))

  holds()


DEEP = b'[' * 100_000

# Each of these ended in another exception, a hang, or a file outside the folder.
FOUND = [
  ('model folder', 'config.json', (b'"num_hidden_layers": 2', b'"num_hidden_layers": 2147483647'), 'ConfigError'),
  ('model folder', 'config.json', (b'"layer_norm_eps": 1e-12', b'"layer_norm_eps": 1e400'), 'DataError'),
  ('model folder', 'config.json', (b'"hidden_act"', b'"vocab_size": 9, "hidden_act"'), 'DataError'),
  ('vocab.txt', 'special_tokens_map.json', (None, b'{"pad_token": 1.5}'), 'ConfigError'),
  ('vocab.txt', 'special_tokens_map.json', (None, b'{"pad_token": {"id": 0}}'), 'ConfigError'),
  ('vocab.txt', 'tokenizer_config.json', (b'"strip_accents": null', b'"strip_accents": 3'), 'ConfigError'),
  ('tokenizer.json', 'tokenizer_config.json', (None, DEEP), 'DataError'),
  ('tokenizer.json', 'tokenizer.json', (b'"unk_token":"[UNK]"', b'"unk_token":"[NIL]"'), 'ConfigError'),
  ('manifest of prepare', 'manifest.json', (b'"tokens": 40', b'"tokens": "40"'), 'DataError'),
  ('manifest of prepare', 'manifest.json', (b'"words": 20', b'"wards": 20'), 'DataError'),
  ('manifest of prepare', 'manifest.json', (b'"file": "rows-0"', b'"file": "../rows-0"'), 'DataError'),
  ('manifest of prepare', 'manifest.json', (None, DEEP), 'DataError'),
  ('manifest of prepare', 'features.json', (b'"8"', b'"99999999999999"'), 'DataError'),
  ('manifest of prepare', 'features.json', (b'uint16', b'int16'), 'DataError'),
  ('manifest of prepare', 'features.json', (None, DEEP), 'DataError'),
  ('records of a run', 'best.json', (None, b'null'), 'StorageError'),
  ('records of a run', 'best.json', (None, DEEP), 'StorageError'),
  ('records of a run', 'metrics.jsonl', (None, DEEP + b'\n'), 'read'),
  ('records of a run', 'metrics.jsonl', (b'"loss"', b'"lo\xff"'), 'read'),
  ('records of a run', 'results.json', (b'"steps": 10', b'"steps": Infinity'), 'ConfigError'),
  ('configuration', 'run.json', (b'"learning_rate": 0.0005', b'"learning_rate": ' + b'9' * 400), 'ConfigError'),
  ('configuration', 'run.json', (b'"text_columns": "text"', b'"text_columns": ["a,b"]'), 'ConfigError'),
  ('configuration', 'run.json', (b'"buckets": ""', b'"buckets": [8.5]'), 'ConfigError'),
  ('records of a run', 'metrics.jsonl', (b'"loss": 0.5', b'"loss": [1]'), 'read'),
  ('records of a run', 'metrics.jsonl', (b'"loss": 0.5', b'"loss": "abc"'), 'read'),
  ('table .tsv', 't.tsv', (b'text\tlabel\tn', b'text\tlabel\tlabel'), 'DataError'),
  ('table .jsonl', 't.jsonl', (b'"n": 1', b'"text": "b"'), 'DataError'),
  ('SQuAD .json', 's.json', (b'"is_impossible": false', b'"is_impossible": "no"'), 'DataError'),
  ('SQuAD .json', 's.json', (b'"answer_start": 4', b'"answer_start": false'), 'DataError'),
  ('table .jsonl', 't.jsonl', (b'"warm"', DEEP), 'DataError'),
  ('table .jsonl', 't.jsonl', (b'"warm"', b'"\\ud800"'), 'DataError'),
  ('SQuAD .json', 's.json', (b'"answer_start": 4', b'"answer_start": 1e400'), 'DataError'),
  ('SQuAD .json', 's.json', (None, DEEP), 'DataError'),
  ('SQuAD .jsonl', 's.jsonl', (b'"answer_start": 4', b'"answer_start": Infinity'), 'DataError'),
  ('word vectors', 'v.txt', (b'a 1 2 3', b'a 1 2 1e39'), 'DataError'),
]  # fmt: skip


@pytest.mark.parametrize(('name', 'file', 'edit', 'expected'), FOUND, ids=range(len(FOUND)))
def test_what_fuzzing_found_stays_mended(name, file, edit, expected, cases):
  """Mutation: the state before; each was seen to fail."""
  mine = cases(BY_NAME[name])
  old, new = edit
  content = mine.valid[file]
  assert old is None or old in content, content
  changed = new if old is None else content.replace(old, new, 1)
  assert mine.run(Change(file, stored(file, changed))) == expected


@pytest.mark.parametrize(
  ('text', 'problem'),
  [('[' * 100_000, 'deep'), ('[' * 66 + ']' * 66, 'deep'),
   ('{"a": {"b": 1, "b": 2}}', "'b' stands twice"), ('[NaN]', 'NaN'), ('[1e999]', 'too large'),
   ('9' * 301, '301 digits'), ('"\\udc00"', 'surrogate'), (b'"\xff"', 'utf-8'), ('', 'Expecting')],
)  # fmt: skip
def test_json_says_one_thing_only(text, problem):
  """Mutation: drop a hook of parse_json, or its bound of the depth; let parse_row take the last of equal names."""
  with pytest.raises(ValueError, match=problem):
    parse_json(text)
  if 'NaN' in problem or 'large' in problem:
    parse_row(text)
  else:
    with pytest.raises(ValueError, match=problem):
      parse_row(text)
  assert parse_json('[' * 64 + ']' * 64)
  assert parse_json(b'{"a": ["\\ud83d\\ude00", 1e308, 1000000000000000019884624838656]}')['a'][0] == '\U0001f600'


def _hog(folder):
  bytearray(512 << 20)


def _unpickle(folder):
  return pickle.loads(pickle.dumps(pathlib.Path))  # noqa: S301


@pytest.mark.parametrize(
  ('read', 'told'),
  [
    (lambda f: {}['a'], 'KeyError'),
    (lambda f: (f.parent / 'outside').write_text(''), 'open .*outside'),
    (lambda f: pathlib.Path('/etc/passwd').read_text(), 'open /etc/passwd'),
    (_unpickle, 'pickle.find_class'),
    (lambda f: subprocess.run([sys.executable, '-c', '']), 'subprocess.Popen'),
    (lambda f: socket.getaddrinfo('localhost', 1), 'socket.getaddrinfo'),
    (_hog, 'bytes more memory'),
  ],
  ids=['error', 'write', 'read', 'pickle', 'process', 'network', 'memory'],
)
def test_the_property_catches_what_it_is_for(read, told, tmp_path):
  """Mutation: leave an event out of the watch."""
  with pytest.raises(OtherError, match=told):
    check(Reader('bad', dict, read), tmp_path)
  assert check(Reader('good', dict, lambda f: (f / 'a').write_text('')), tmp_path) == 'read'
