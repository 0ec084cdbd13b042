"""Rows of questions: windows and labels as transformers cuts them, contexts as BERT weighs them, and the way back."""

import dataclasses
import logging
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from compactlm_jax.data.batches import eval_batches
from compactlm_jax.data.squad import Question, Questions, read_squad
from compactlm_jax.data.tokenizer import load_tokenizer
from compactlm_jax.data.windows import make_windows
from compactlm_jax.errors import ConfigError

DATA = Path(__file__).parents[2] / '../shared/data/squad'
WORDS = 'the a small river trees runs Café déjà undertow warm x9'.split()
texts = st.lists(st.sampled_from(WORDS), min_size=1, max_size=40).map(' '.join)


@st.composite
def questions(draw):
  items = []
  for number in range(draw(st.integers(1, 4))):
    context, answers = draw(texts), ()
    if draw(st.booleans()):
      words = context.split()
      first = draw(st.integers(0, len(words) - 1))
      last = draw(st.integers(first, min(first + 4, len(words) - 1)))
      start = len(' '.join(words[:first])) + (first > 0)
      answers = ((' '.join(words[first : last + 1]), start),)
    asked = ' '.join(draw(st.lists(st.sampled_from(['the', 'a', 'runs', 'warm']), max_size=6)))
    items.append(Question(str(number), asked, context, answers))
  return Questions(tuple(items), 'drawn', '')


@pytest.fixture(scope='module')
def reference(vocabulary):
  return pytest.importorskip('transformers').AutoTokenizer.from_pretrained(str(vocabulary))


def label(theirs, row, answers, start_of_context):
  """Start and end place of an answer, found token by token."""
  if not answers:
    return [0, 0]
  text, start = answers[0]
  stop = start + len(text)
  inside = [
    place
    for place, (a, b) in enumerate(theirs['offset_mapping'][row])
    if theirs['token_type_ids'][row][place] == 1 and a < stop and b > start
  ]
  shown = [b for place, (a, b) in enumerate(theirs['offset_mapping'][row]) if theirs['token_type_ids'][row][place] == 1]
  first = theirs['offset_mapping'][row][start_of_context][0]
  whole = inside and first <= start and max(shown) >= stop
  return [inside[0], inside[-1]] if whole else [0, 0]


@settings(deadline=None, max_examples=60)
@given(data=questions(), seq_len=st.integers(12, 40), stride=st.integers(1, 20))
def test_windows_and_labels_equal_transformers(vocabulary, reference, data, seq_len, stride):
  """transformers counts the tokens that windows share, BERT and we those between their starts.

  Mutation: label a window that holds part of an answer; begin segment 1 at the second [SEP].
  """
  tokenizer, longest = load_tokenizer(vocabulary), 5
  windows = make_windows(data, tokenizer, seq_len, doc_stride=stride, max_query_length=longest)
  (batch,) = eval_batches(windows.rows, len(windows.rows))
  row = 0
  for number, question in enumerate(data.items):
    query = reference.decode(tokenizer.encode([question.question])[0][:longest])
    room = seq_len - 3 - len(tokenizer.encode([query])[0])
    theirs = reference(
      query,
      question.context,
      truncation='only_second',
      max_length=seq_len,
      stride=max(0, room - stride),
      return_overflowing_tokens=True,
      return_offsets_mapping=True,
      padding='max_length',
    )
    for part in range(len(theirs['input_ids'])):
      assert windows.question[row] == number
      assert batch.input_ids[row].tolist() == theirs['input_ids'][part]
      assert batch.attention_mask[row].tolist() == theirs['attention_mask'][part]
      assert batch.token_type_ids[row].tolist() == theirs['token_type_ids'][part]
      assert windows.rows.lengths[row] == sum(theirs['attention_mask'][part])
      expected = label(theirs, part, question.answers, windows.prefix[row])
      assert batch.labels[row].tolist() == [*expected, int(not question.answers)]
      if expected[1]:
        assert windows.text(row, *expected) == question.answers[0][0]
      row += 1
  assert row == len(windows.rows) == windows.report['windows']


@given(data=questions(), seq_len=st.integers(11, 24), stride=st.integers(1, 12))
def test_max_context_is_berts(vocabulary, data, seq_len, stride):
  """Against BERT's loop over windows. Mutation: let the last of equally good windows win."""
  windows = make_windows(data, load_tokenizer(vocabulary), seq_len, doc_stride=stride, max_query_length=4)
  places = np.tile(np.arange(seq_len), (len(windows.rows), 1))
  found, shown = windows.max_context(places), windows.shown(places)
  for row, number in enumerate(windows.question):
    family = [w for w in range(len(windows.question)) if windows.question[w] == number]
    for place in range(seq_len):
      inside = 0 <= place - windows.prefix[row] < windows.count[row]
      assert shown[row, place] == inside
      token, best, best_score = place - windows.prefix[row] + windows.first[row], None, None
      for w in family:
        end = windows.first[w] + windows.count[w] - 1
        if windows.first[w] <= token <= end:
          score = min(token - windows.first[w], end - token) + 0.01 * windows.count[w]
          if best_score is None or score > best_score:
            best, best_score = w, score
      assert found[row, place] == (inside and best == row)


def test_a_window_with_part_of_the_answer_points_to_cls(vocabulary):
  """Windows of 4 tokens, 2 apart, over 8; the answer is tokens 3 to 5. Mutation: label what it shows."""
  tokenizer = load_tokenizer(vocabulary)
  word = next(w for w in WORDS if len(tokenizer.encode([w])[0]) == 1)
  context = ' '.join([word] * 8)
  start = 3 * len(word) + 3
  windows = make_windows(
    one('', context, (context[start : start + 3 * len(word) + 2], start)),
    tokenizer,
    7,
    doc_stride=2,
    max_query_length=3,
  )
  assert windows.first.tolist() == [0, 2, 4] and windows.count.tolist() == [4, 4, 4]
  labels = windows.rows.fetch(np.arange(3))['label'].tolist()
  assert labels == [[0, 0, 0], [2 + 3 - 2, 2 + 5 - 2, 0], [0, 0, 0]]


def one(question, context, *answers):
  return Questions((Question('q', question, context, tuple(answers)),), 'one', '')


def test_texts_are_those_of_the_context(vocabulary):
  """Accents, upper case and blanks come back as they were. Mutation: join tokens."""
  context = 'The  CAFÉ, under\tthe tree — déjà.'
  windows = make_windows(one('tree?', context, ('CAFÉ, under', 5)), load_tokenizer(vocabulary), 40, max_query_length=4)
  (row,) = [windows.rows[0]]
  start, end, impossible = row['label']
  assert windows.text(0, start, end) == 'CAFÉ, under' and not impossible
  last = windows.prefix[0] + windows.count[0] - 1
  assert windows.text(0, windows.prefix[0], last) == context


def test_what_does_not_fit_is_counted(vocabulary, caplog):
  """Mutation: leave unaligned answers out of evaluation too."""
  tokenizer = load_tokenizer(vocabulary)
  cut = one('small ' * 9, 'river house', ('river', 0))
  with caplog.at_level(logging.INFO):
    windows = make_windows(cut, tokenizer, 24, max_query_length=4)
  assert windows.report == {
    'questions': 1, 'windows': 1, 'truncated_questions': 1, 'unaligned_answers': 0, 'widened_answers': 0,
  }  # fmt: skip
  assert "'truncated_questions': 1" in caplog.text and windows.prefix.tolist() == [6]
  wide = make_windows(one('x', 'the river', ('ive', 5)), tokenizer, 24, max_query_length=4)
  assert wide.report['widened_answers'] == 1 and wide.text(0, *wide.rows[0]['label'][:2]) in ('river', 'ive', 'rive')
  lost = one('x', 'river \u200d house', ('\u200d', 6))  # a character that the tokenizer drops
  assert make_windows(lost, tokenizer, 24, max_query_length=4).report['unaligned_answers'] == 1
  both = dataclasses.replace(lost, items=(*lost.items, dataclasses.replace(cut.items[0], id='r')))
  trained = make_windows(both, tokenizer, 24, max_query_length=4, train=True)
  assert [q.id for q in trained.questions] == ['r'] and trained.report['unaligned_answers'] == 1
  held = make_windows(both, tokenizer, 24, max_query_length=4)
  assert [q.id for q in held.questions] == ['q', 'r'] and held.rows[0]['label'].tolist() == [0, 0, 0]
  with pytest.raises(ConfigError, match='no answer could be aligned'):
    make_windows(lost, tokenizer, 24, max_query_length=4, train=True)


def test_rows_must_hold_a_question(vocabulary):
  with pytest.raises(ConfigError, match='config.data.seq_len: 67 tokens do not hold a question of config.span.max_que'):
    make_windows(one('x', 'y'), load_tokenizer(vocabulary), 67)
  assert make_windows(one('', 'tree'), load_tokenizer(vocabulary), 68).rows[0]['length'] == 4


@pytest.mark.skipif(not DATA.exists(), reason='shared data is absent')
def test_half_of_the_real_dev_set(tmp_path):
  """6,078 questions become 6,449 windows of 384 with 8,000 word pieces; each answer's text is found again."""
  from compactlm_jax.data.wordpiece import train_wordpiece

  dev = read_squad(DATA / 'squad_v2_dev_cs224n_half.json.gz', 'dev')
  contexts = list(dict.fromkeys(q.context for q in dev.items))
  (tmp_path / 'text.txt').write_text('\n'.join(contexts), encoding='utf-8')
  windows = make_windows(dev, train_wordpiece(str(tmp_path / 'text.txt'), 8000, tmp_path / 'tok'), 384)
  report = windows.report
  assert (report['questions'], report['unaligned_answers'], report['truncated_questions']) == (6078, 0, 0)
  assert 6078 < report['windows'] < 7000 and report['widened_answers'] < 20
  labels = windows.rows.fetch(np.arange(len(windows.rows)))['label']
  wrong = sum(
    windows.text(row, *labels[row, :2]) != windows.questions[windows.question[row]].answers[0][0]
    for row in np.flatnonzero(labels[:, 1])
  )
  # Windows of one answer may both show it, so that there may be more of them than widened answers.
  assert wrong <= 2 * report['widened_answers'] and labels[:, 1].astype(bool).sum() >= 2910 - 5
