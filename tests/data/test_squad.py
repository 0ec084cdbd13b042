"""SQuAD's files and other forms of the same, good and bad."""

import gzip
import json
import sys
import types
from pathlib import Path

import numpy as np
import pytest

from compactlm_jax.data.squad import find_squad, read_squad
from compactlm_jax.errors import ConfigError, DataError

DATA = Path(__file__).parents[2] / '../shared/data/squad'
CONTEXT = 'The small river runs under the large house.'


def qa(name, text, start, **more):
  answers = [{'text': text, 'answer_start': start}] if text else []
  return {'id': name, 'question': f'what is {name}?', 'answers': answers, **more}


def official(*questions, context=CONTEXT):
  return {'version': 'v', 'data': [{'title': 'Rivers', 'paragraphs': [{'context': context, 'qas': list(questions)}]}]}


def save(path, content):
  data = (
    content if isinstance(content, bytes) else (content if isinstance(content, str) else json.dumps(content)).encode()
  )
  path.write_bytes(gzip.compress(data) if path.suffix == '.gz' else data)
  return path


TWO = official(qa('a', 'small river', 4, is_impossible=False), qa('b', '', 0, is_impossible=True, plausible_answers=[]))


@pytest.mark.parametrize('name', ['dev.json', 'dev.json.gz'])
def test_official_files(tmp_path, name):
  found = read_squad(save(tmp_path / name, TWO), 'dev')
  assert [q.id for q in found.items] == ['a', 'b'] and found.items[0].context == CONTEXT
  assert found.items[0].answers == (('small river', 4),) and found.items[1].answers == ()
  assert len(found) == 2 and [q.id for q in found.answerable().items] == ['a']


def test_every_form_gives_the_same_questions(tmp_path, monkeypatch):
  """Official JSON, both kinds of JSON lines, a TFDS and a Hugging Face dataset.

  Mutation: leave bytes as they are in `_question`; take the digest over the file.
  """
  lines = [
    {'id': 'a', 'context': CONTEXT, 'question': 'what is a?', 'answer': 'small river', 'answer_start': 4},
    {'id': 'b', 'context': CONTEXT, 'question': 'what is b?', 'answer': '', 'answer_start': -1},
  ]
  columns = [
    {**{k: r[k] for k in ('id', 'context', 'question')}, 'answers': {'text': texts, 'answer_start': starts}}
    for r, texts, starts in zip(lines, (['small river'], []), ([4], []))
  ]
  numpy = [
    {
      **{k: r[k].encode() for k in ('id', 'context', 'question')},
      'answers': {
        'text': np.array([t.encode() for t in r['answers']['text']], object),
        'answer_start': np.array(r['answers']['answer_start'], np.int32),
      },
      'is_impossible': np.bool_(not r['answers']['text']),
    }
    for r in columns
  ]
  import tensorflow_datasets as tfds

  asked = []
  builder = types.SimpleNamespace(as_data_source=lambda split: asked.append(split) or numpy)
  monkeypatch.setattr(tfds, 'builder', lambda name, file_format: builder)
  fake = types.SimpleNamespace(load_dataset=lambda path, config, split: asked.append((path, config, split)) or columns)
  monkeypatch.setitem(sys.modules, 'datasets', fake)
  forms = [
    read_squad(save(tmp_path / 'x.json', TWO)),
    read_squad(save(tmp_path / 'x.jsonl', '\n'.join(map(json.dumps, lines)))),
    read_squad(save(tmp_path / 'y.jsonl.gz', '\n\n'.join(map(json.dumps, columns)))),
    read_squad('tfds:squad/v2.0', 'dev'),
    read_squad('hf:owner/squad_v2:plain', 'train'),
  ]
  assert len({f.digest for f in forms}) == 1 and len({f.items for f in forms}) == 1
  assert asked == ['validation', ('owner/squad_v2', 'plain', 'train')]


def test_the_digest_follows_the_content(tmp_path):
  other = official(qa('a', 'large house', 31), qa('b', '', 0))
  assert read_squad(save(tmp_path / 'a.json', TWO)).digest != read_squad(save(tmp_path / 'b.json', other)).digest


@pytest.mark.parametrize(
  'content, message',
  [
    (official(qa('a', 'small river', 5)), r"question 'a': the answer 'small river' is not in the context at "
     r"answer_start 5 \(there is 'mall river '\); correct answer_start"),
    (official(qa('a', 'house.', -6)), "'a': the answer 'house.' is not in the context at answer_start -6"),
    (official(qa('a', 'x', 10**6)), "'a': the answer 'x' is not in the context"),
    (official(qa('a', '', 0), qa('a', '', 0)), "article 'Rivers', paragraph 0: id 'a' occurs twice"),
    (official(qa('a', '', 0), context=' \n'), "question 'a' has an empty context; leave it out"),
    (official({'id': 'a', 'question': 'x?', 'answers': [{'text': 'x'}]}), 'an answer needs text and answer_start'),
    (official({'id': 'a', 'question': 'x?', 'answers': [{'text': '', 'answer_start': 0}]}), "the answer '' is no text"),
    (official(qa('a', 'small river', 4, is_impossible='no')), "is_impossible is 'no'; expected true or false"),
    (official(qa('a', 'small river', 4, is_impossible=1)), 'is_impossible is 1; expected'),
    (official(qa('a', 'The', False)), 'answer_start is False; expected a whole number of characters, from 0'),
    (official(qa('a', 'small river', '4')), "answer_start is '4'; expected"),
    (official(qa('a', 'small river', 4.0)), 'answer_start is 4.0; expected'),
    (official({'id': 'a', 'question': 'x?', 'answer': False, 'answer_start': 0}), 'the answer False is no text'),
    (official({'id': 'a', 'question': 'x?'}), "no answers; give 'answers'"),
    (official({'id': 'a', 'question': 'x?', 'answers': {'text': 1, 'answer_start': [0]}}), 'lists of one length'),
    (official({'id': 'a', 'question': 'x?', 'answers': {'text': ['x'], 'answer_start': []}}), 'lists of one length'),
    (official({'id': 'a', 'answers': []}), "'question' is missing or no text"),
    (official(), 'no questions'),
    ('{"data": [', 'not JSON'),
    ('[]', 'not in the form data / paragraphs / qas'),
    ('{"data": [{"paragraphs": [{"qas": [{}]}]}]}', 'not in the form data / paragraphs / qas'),
    (b'\xff{}', 'not UTF-8 at byte 0'),
  ],
)  # fmt: skip
def test_bad_files_name_the_question_and_the_remedy(tmp_path, content, message):
  """Mutation: compare the answer without its place; keep the last of two questions with one id; take what Python takes
  for true, or for a whole number.
  """
  with pytest.raises(DataError, match=message):
    read_squad(save(tmp_path / 'bad.json', content))


def test_other_bad_input(tmp_path, monkeypatch):
  with pytest.raises(DataError, match='none.json: no such file'):
    read_squad(tmp_path / 'none.json')
  with pytest.raises(ConfigError, match='unknown kind of file; use .json'):
    read_squad(save(tmp_path / 'x.csv', 'a,b'))
  with pytest.raises(DataError, match='x.jsonl:2: not JSON'):
    read_squad(save(tmp_path / 'x.jsonl', json.dumps(qa('a', '', 0, context=CONTEXT)) + '\n{'))
  with pytest.raises(DataError, match="x.jsonl:1: not JSON .'id' stands twice"):
    read_squad(save(tmp_path / 'x.jsonl', '{"id": 1, ' + json.dumps(qa('a', '', 0, context=CONTEXT))[1:]))
  with pytest.raises(DataError, match='x.jsonl:1: expected an object'):
    read_squad(save(tmp_path / 'x.jsonl', '3'))
  save(tmp_path / 'x.json.gz', TWO)
  (tmp_path / 'x.json.gz').write_bytes((tmp_path / 'x.json.gz').read_bytes()[:-9])
  with pytest.raises(DataError, match='damaged gzip'):
    read_squad(tmp_path / 'x.json.gz')
  monkeypatch.setitem(sys.modules, 'datasets', None)
  with pytest.raises(ConfigError, match='pip install datasets'):
    read_squad('hf:squad')
  with pytest.raises(ConfigError, match="tfds:no_such_squad, split 'validation': cannot be opened"):
    read_squad('tfds:no_such_squad', 'dev')


def test_the_official_layout(tmp_path):
  file = save(tmp_path / 'dev-v2.0.json.gz', TWO)
  assert find_squad(tmp_path, 2, 'dev') == str(file) and find_squad('hf:squad', 1, 'dev') == 'hf:squad'
  with pytest.raises(DataError, match=r'no train-v1.1.json \(or .gz\) there'):
    find_squad(tmp_path, 1, 'train')


@pytest.mark.skipif(not DATA.exists(), reason='shared data is absent')
def test_real_files():
  dev = read_squad(DATA / 'squad_v2_dev_cs224n_half.json.gz', 'dev')
  assert len(dev) == 6078 and len(dev.answerable()) == 6078 - 3168
  assert len(read_squad(DATA / 'squad_v1_train_subset.jsonl.gz').answerable()) == 8149
