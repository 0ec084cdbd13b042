"""SQuAD from files to scores: gold answers score 100, tiny runs train, teach and are loaded again."""

import dataclasses
import json
import logging
from pathlib import Path

import jax
import numpy as np
import pytest
from tiny import STILL, tiny_config

from compactlm_jax.config import DataConfig, FinetuneConfig, OptimizerConfig, PruneConfig, SpanConfig
from compactlm_jax.data.squad import read_squad
from compactlm_jax.data.windows import make_windows
from compactlm_jax.data.wordpiece import train_wordpiece
from compactlm_jax.errors import ConfigError, DataError
from compactlm_jax.interop.bundle import Bundle, from_pretrained, save_pretrained
from compactlm_jax.interop.folder import open_folder
from compactlm_jax.interop.tokenizer_files import read_tokenizer
from compactlm_jax.jobs import build_job, load_model, run_export, run_train
from compactlm_jax.jobs.squad import span_files, span_score
from compactlm_jax.nn.encoder import init_encoder
from compactlm_jax.tasks.span import span_logits

DATA = Path(__file__).parents[2] / '../shared/data/squad'
WORDS = 'the small large river house tree runs stands falls under over near cold warm light blue'.split()
MODEL = dataclasses.replace(STILL, num_layers=1, vocab_size=120, max_positions=40, pooler=True, initializer_range=0.2)
SPAN = SpanConfig(doc_stride=10, max_query_length=6, n_best=4, beam=3)


def official(seed, paragraphs):
  """Paragraphs of 4 to 40 words with three questions each, one of them without an answer."""
  rng, content = np.random.default_rng(seed), []
  for p in range(paragraphs):
    words = [str(w) for w in rng.choice(WORDS, rng.integers(4, 40))]
    questions = []
    for q in range(3):
      first = int(rng.integers(0, len(words) - 1))
      start = len(' '.join(words[:first])) + (first > 0)
      answer = {'text': ' '.join(words[first : first + 2]), 'answer_start': start}
      answers = [answer] if q else []
      questions.append({'id': f'{seed}-{p}-{q}', 'question': f'near {words[0]}?', 'answers': answers})
    content.append({'context': ' '.join(words), 'qas': questions})
  return json.dumps({'data': [{'title': 't', 'paragraphs': content}]})


@pytest.fixture(scope='module')
def files(tmp_path_factory):
  """model/, and the official layout of v1.1 and v2.0 (of the same content)."""
  folder = tmp_path_factory.mktemp('squad')
  (folder / 'text.txt').write_text('\n'.join(' '.join(WORDS[i:] + WORDS[:i]) for i in range(16)))
  train_wordpiece(str(folder / 'text.txt'), 120, folder / 'tokenizer')
  params = init_encoder(MODEL, jax.random.key(0))
  save_pretrained(Bundle(MODEL, params, read_tokenizer(open_folder(folder / 'tokenizer'))), folder / 'model')
  for version in ('1.1', '2.0'):
    (folder / f'train-v{version}.json').write_text(official(0, 12))
    (folder / f'dev-v{version}.json').write_text(official(1, 5))
  return folder


def config(files, benchmark='squad2', data=None, **changes):
  fields = {
    'model': str(files / 'model'),
    'data': DataConfig(**{'path': str(files), 'seq_len': 32, **(data or {})}),
    'span': SPAN,
    'finetune': FinetuneConfig(benchmark=benchmark),
    'encoder': MODEL,
    'steps': 4,
    **changes,
  }
  return tiny_config('finetune', **fields)


def gold_outputs(windows):
  """What a model that knows the answers would say of each window."""
  labels = windows.rows.fetch(np.arange(len(windows.rows)))['label'].astype(np.int64)
  known = labels[:, 1] > 0
  score = np.where(known, 9.0, -9.0)
  return {
    'starts': labels[:, :1], 'start_logits': score[:, None], 'ends': labels[:, None, 1:2],
    'end_logits': score[:, None, None], 'null': np.where(labels[:, 2:] > 0, [[20.0, 20.0]], [[0.0, 0.0]]),
  }  # fmt: skip


@pytest.mark.parametrize('name', ['tiny', 'real'])
def test_gold_spans_score_100(files, name):
  """Where tokens end with the answers, exact match is 100; of the real half dev set all but a few answers are.

  Mutation: take the text of the tokens one further; give windows of one question other ids.
  """
  if name == 'real' and not DATA.exists():
    pytest.skip('shared data is absent')
  path = DATA / 'squad_v2_dev_cs224n_half.json.gz' if name == 'real' else files / 'dev-v2.0.json'
  questions, sizes = read_squad(path, 'dev'), {'doc_stride': 128} if name == 'real' else {'doc_stride': 10}
  tokenizer = build_tokenizer(questions, files) if name == 'real' else load_tokenizer_of(files)
  seq_len, longest = (384, 64) if name == 'real' else (32, 6)
  windows = make_windows(questions, tokenizer, seq_len, max_query_length=longest, **sizes)
  span = SpanConfig(max_answer_length=100)
  found = span_score(windows, span, 2)(gold_outputs(windows))
  wrong = windows.report['widened_answers'] if name == 'real' else 0
  assert found['NoAns_exact'] == 100.0 and found['total'] == len(questions)
  assert found['HasAns_exact'] >= 100.0 - 100.0 * wrong / len(questions.answerable())
  assert found['f1'] > 99.9 and found['best_f1'] > 99.9 and found['windows'] == len(windows.rows)
  texts = span_files(windows, span, 2)(gold_outputs(windows))
  assert set(texts) == {'predictions.json', 'nbest_predictions.json', 'null_odds.json'}
  predictions = json.loads(texts['predictions.json'])
  assert all((predictions[q.id] == '') == (not q.answers) for q in questions.items)


def load_tokenizer_of(files):
  from compactlm_jax.jobs import tokenizer_of

  return tokenizer_of(files / 'model')


def build_tokenizer(questions, files):
  text = files / 'real.txt'
  text.write_text('\n'.join(dict.fromkeys(q.context for q in questions.items)), encoding='utf-8')
  return train_wordpiece(str(text), 6000, files / 'real')


def test_runs_train_and_are_loaded_again(files, tmp_path):
  """The joint head on few questions. Mutation: leave 'span' out of the parameters."""
  joint = dataclasses.replace(SPAN, head='joint')
  results = run_train(config(files, span=joint, data={'train_rows': 30}, steps=2), str(tmp_path / 'joint'))
  assert results['task'] == 'finetune' and results['metrics']['total'] == 15
  for name in ('exact', 'f1', 'HasAns_f1', 'NoAns_f1', 'best_f1', 'loss', 'answerable_loss', 'windows'):
    assert np.isfinite(results['metrics'][name])
  assert set(load_model(tmp_path / 'joint').params['span']) == {
    'start', 'end_hidden', 'end_output', 'answerable_hidden', 'answerable_output',
  }  # fmt: skip


def test_a_run_that_drops_layers_is_loaded_again(files, tmp_path):
  """Mutation: `tuple(...)` of `keep_layers`, which the description of span models holds as text."""
  dropping = config(files, finetune=FinetuneConfig(benchmark='squad2', keep_layers=(1,)), steps=1)
  run_train(dropping, str(tmp_path / 'run'))
  assert load_model(tmp_path / 'run').config.num_layers == 1


@pytest.mark.slow
def test_a_run_that_prunes_is_scored_loaded_and_exported(files, tmp_path):
  """One head and half of the neurons go; what is exported answers as the run does.

  Mutation: `tasks.prune.bake` without the masks.
  """
  prune = PruneConfig(structure='heads+neurons', density=0.5, initial_warmup=0, final_warmup=0)
  pruning = dataclasses.replace(config(files, steps=8), task='prune', prune=prune)
  results = run_train(pruning, str(tmp_path / 'run'))
  assert results['metrics']['total'] == 15 and np.isfinite(results['metrics']['f1'])
  assert results['density'] == pytest.approx(0.5)
  dense = load_model(tmp_path / 'run')
  assert set(dense.params) == {'encoder', 'span'}
  run_export(str(tmp_path / 'run'), str(tmp_path / 'out'), layout='shrunk')
  small = from_pretrained(tmp_path / 'out')
  assert (small.config.num_heads, small.config.intermediate_size) == (1, 16)
  batch = build_job(config(files)).batches.batch(0)
  for found, expected in zip(*(span_logits(b.params, b.config, batch) for b in (small, dense)), strict=True):
    np.testing.assert_allclose(found, expected, atol=1e-5)


def test_a_teacher_must_have_learnt(files, tmp_path):
  """A fresh head is refused, as a run's and as a folder's; one that knows what has no answer is taken.

  Mutation: leave the look at the training rows out.
  """
  learnt = OptimizerConfig(learning_rate=1e-2, decay='constant')
  data = {'path': '', 'train': str(files / 'train-v2.0.json')}
  run_train(config(files, data=data, steps=60, log_every=60, optimizer=learnt), str(tmp_path / 'run'))
  bundle = load_model(tmp_path / 'run')
  assert set(bundle.params) == {'encoder', 'span'} and bundle.params['span']['kernel'].shape == (16, 2)
  job = build_job(config(files, teacher=str(tmp_path / 'run')))
  assert 'teacher' in job.identity and set(job.task.frozen) == {'encoder', 'span'}
  fresh = job.task.init(jax.random.key(5))
  save_pretrained(dataclasses.replace(bundle, params={**bundle.params, 'span': fresh['span']}), tmp_path / 'fresh')
  with pytest.raises(ConfigError, match='config.teacher: the span head of .* does no better .* than guessing'):
    build_job(config(files, teacher=str(tmp_path / 'fresh')))


def test_v1_leaves_out_what_has_no_answer(files, caplog):
  """Counted, never silent. Mutation: score them as v2.0 does."""
  with caplog.at_level(logging.WARNING):
    job = build_job(config(files, 'squad1'))
  assert '12 of 36 questions have no answer; squad1 leaves them out' in caplog.text
  questions = read_squad(files / 'dev-v1.1.json', 'dev').answerable()
  windows = make_windows(questions, load_tokenizer_of(files), 32, doc_stride=10, max_query_length=6)
  found = job.evals[0].score(gold_outputs(windows))
  assert (found['exact'], found['f1'], found['total']) == (100.0, 100.0, 10.0) and 'NoAns_f1' not in found
  assert set(job.evals[0].files(gold_outputs(windows))) == {'predictions.json', 'nbest_predictions.json'}


def test_evaluation_does_not_depend_on_buckets(files):
  """The scores of one model with and without buckets. Mutation: give the score rows from short to long."""
  from compactlm_jax.parallel import make_mesh
  from compactlm_jax.train.evaluate import make_evaluate

  found = []
  for buckets in ((), (16, 24)):
    job = build_job(config(files, data={'buckets': buckets}))
    params = job.task.init(jax.random.key(3))
    found.append(make_evaluate(job.task, make_mesh(job.config.mesh, jax.devices()[:1]))(params, None, job.evals[0]))
  assert found[0].keys() == found[1].keys() and found[0]['HasAns_f1'] > 0
  for name, value in found[0].items():
    np.testing.assert_allclose(found[1][name], value, rtol=1e-4)


def test_fields_and_files_that_do_not_fit(files, tmp_path):
  missing = tmp_path / 'empty'
  missing.mkdir()
  train = str(files / 'train-v2.0.json')
  for error, message, changes in (
    (ConfigError, 'config.data.path: name the folder', {'data': {'path': ''}}),
    (DataError, 'no train-v2.0.json', {'data': {'path': str(missing)}}),
    (ConfigError, 'config.model: name the model', {'model': ''}),
    (ConfigError, 'config.data.seq_len: 41 is more than the 40 positions', {'data': {'seq_len': 41}}),
    (ConfigError, 'config.data.seq_len: 9 tokens do not hold', {'data': {'seq_len': 9}}),
    (ConfigError, 'config.data.train_rows: 99, but .* has 36 rows', {'data': {'train_rows': 99}}),
    (ConfigError, 'config.teacher: this model has no trained span head', {'teacher': str(files / 'model')}),
  ):
    with pytest.raises(error, match=message):
      build_job(config(files, **changes))
  job = build_job(config(files, data={'path': '', 'train': train}))
  assert job.evals == ()
  lines = [{'id': 'a', 'context': 'the river', 'question': 'x', 'answers': []}]
  (tmp_path / 'none.jsonl').write_text(json.dumps(lines[0]))
  with pytest.raises(DataError, match='no question has an answer; SQuAD v1.1 needs them'):
    build_job(config(files, 'squad1', data={'train': str(tmp_path / 'none.jsonl')}))
