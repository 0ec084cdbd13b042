"""Evaluation of what is there: the numbers of the run, and the files that others read."""

import dataclasses
import json
import pathlib

import jax
import numpy as np
import pytest
from predicting import CONFIG, make_bundle, make_texts
from tiny import tiny_config, toy_task

import compactlm_jax as clm
from compactlm_jax.checkpoint import load_params
from compactlm_jax.cli.main import main
from compactlm_jax.config import DataConfig, FinetuneConfig, OptimizerConfig
from compactlm_jax.data.synthetic import synthetic_rows
from compactlm_jax.errors import ConfigError
from compactlm_jax.interop.bundle import save_pretrained
from compactlm_jax.jobs import evaluate as module
from compactlm_jax.jobs import load_model, run_export, run_train
from compactlm_jax.jobs.commands import evaluation
from compactlm_jax.jobs.data import EvalSet
from compactlm_jax.jobs.evaluate import run_evaluate
from compactlm_jax.train.loop import Job

ROOT = pathlib.Path(__file__).parents[2]
POOLED = dataclasses.replace(CONFIG, pooler=True)


def pairs(count, seed):
  first, second = make_texts(count, seed, 8), make_texts(count, seed + 1, 8)
  return [(a, b, ('entailment', 'neutral', 'contradiction')[len(a) % 3]) for a, b in zip(first, second, strict=True)]


def glue_folder(root):
  """MNLI in the official layout."""
  folder = root / 'MNLI'
  folder.mkdir(parents=True)
  for number, name in enumerate(('train', 'dev_matched', 'dev_mismatched', 'test_matched', 'test_mismatched')):
    labelled = 'test' not in name
    rows = ['sentence1\tsentence2' + '\tgold_label' * labelled]
    rows += [f'{a}\t{b}' + f'\t{c}' * labelled for a, b, c in pairs(20 if number == 0 else 9, number)]
    (folder / f'{name}.tsv').write_text('\n'.join(rows) + '\n')


def squad_file(path, count, seed):
  texts = make_texts(count, seed, 12)
  data = []
  for i, text in enumerate(texts):
    last = text.split()[-1]
    answers = [{'text': last, 'answer_start': text.rindex(last)}] if i % 3 else []
    data.append({'id': f'q{i}', 'question': f'w{i % 9}', 'context': text, 'answers': answers})
  path.write_text('\n'.join(map(json.dumps, data)) + '\n')


@pytest.fixture(scope='module')
def files(tmp_path_factory):
  """A model without a trained head, tables of classes and of scores, MNLI, questions."""
  folder = tmp_path_factory.mktemp('evaluate')
  start = make_bundle(config=POOLED)
  save_pretrained(dataclasses.replace(start, params={'encoder': start.params['encoder']}, labels=()), folder / 'model')
  for name, count in (('train', 24), ('dev', 11)):
    texts = make_texts(count, count)
    rows = [f'{t}\t{("no", "yes")[len(t) % 2]}\t{len(t.split()) / 4}' for t in texts]
    (folder / f'{name}.tsv').write_text('\n'.join(['text\tlabel\tscore', *rows]) + '\n')
    squad_file(folder / f'{name}.jsonl', count, count)
  glue_folder(folder)
  return folder


def config(files, kind='classes', **changes):
  data = {'seq_len': 16, 'train': str(files / 'train.tsv'), 'dev': str(files / 'dev.tsv')}
  tuning = {'dropout': 0.0}
  if kind == 'scores':
    data['score_column'], tuning['score_scale'] = 'score', 5.0
  elif kind == 'pooled':
    tuning['pooled'], data['buckets'] = True, (8,)
  elif kind == 'mnli':
    data, tuning = {'seq_len': 16, 'path': str(files)}, {'benchmark': 'mnli'}
  elif kind == 'squad':
    data |= {'seq_len': 24, 'train': str(files / 'train.jsonl'), 'dev': str(files / 'dev.jsonl')}
    tuning = {'benchmark': 'squad2'}
  fields = {'model': str(files / 'model'), 'data': DataConfig(**data), 'finetune': FinetuneConfig(**tuning)}
  made = tiny_config('finetune', steps=1, batch_size=8, **fields)
  if kind == 'squad':
    made = dataclasses.replace(made, span=dataclasses.replace(made.span, max_query_length=4, n_best=4))
  return dataclasses.replace(made, optimizer=OptimizerConfig(learning_rate=1e-2, decay='constant'), **changes)


@pytest.fixture(scope='module')
def runs(files):
  """kind -> (run directory, results), trained when first asked for."""
  done = {}

  def run(kind):
    if kind not in done:
      done[kind] = (str(files / f'run-{kind}'), run_train(config(files, kind), str(files / f'run-{kind}')))
    return done[kind]

  return run


@pytest.mark.parametrize('kind', ['pooled', pytest.param('scores', marks=pytest.mark.slow), 'squad'])
def test_a_run_evaluates_to_its_results_and_so_does_its_export(kind, files, runs, tmp_path):
  """Mutation: evaluate a fresh head, or scores without their scale."""
  workdir, results = runs(kind)
  found = run_evaluate(config(files, kind, model='elsewhere'), workdir, output=str(tmp_path / 'out'))
  assert found['metrics'] == results['metrics'] and found['step'] == 1 and found['split'] == 'dev'
  assert json.loads((tmp_path / 'out/results.json').read_text()) == found
  run_export(workdir, str(tmp_path / 'hf'))
  again = run_evaluate(config(files, kind), str(tmp_path / 'hf'))
  assert again['metrics'] == pytest.approx(results['metrics'], rel=1e-4, nan_ok=True) and 'step' not in again
  names = {p.name for p in (tmp_path / 'out').iterdir()}
  squad = {'predictions.json', 'nbest_predictions.json', 'null_odds.json'}
  assert names == {'results.json'} | (squad if kind == 'squad' else set())


def test_a_loaded_regression_speaks_in_units_of_the_labels(files, runs):
  """Mutation: leave the scale out of `load_model`."""
  workdir, _ = runs('scores')
  trained, bundle = load_params(workdir)[0]['classifier'], load_model(workdir)
  np.testing.assert_allclose(bundle.params['classifier']['kernel'], 5 * trained['kernel'], rtol=1e-6)
  np.testing.assert_allclose(bundle.params['classifier']['bias'], 5 * trained['bias'], rtol=1e-6)
  assert bundle.labels == () and clm.predict(bundle, ['w1 w2']).classes == ()
  assert load_model(runs('pooled')[0]).labels == ('no', 'yes')
  assert load_model(runs('pooled')[0]).config.pooler and not bundle.config.pooler


def test_test_sets_become_files_to_submit(files, runs, tmp_path, caplog):
  """Predictions of the exported model agree. Mutation: sort the rows of a test set by length."""
  workdir, _ = runs('mnli')
  asked = config(files, 'mnli')
  asked = dataclasses.replace(asked, data=dataclasses.replace(asked.data, buckets=(8,)))
  found = run_evaluate(asked, workdir, 'test', str(tmp_path / 'out'))
  assert found['metrics'] == {}
  assert {p.name for p in (tmp_path / 'out').iterdir()} == {'results.json', 'MNLI-m.tsv', 'MNLI-mm.tsv'}
  assert 'AX.tsv is left out' in caplog.text
  bundle = load_model(workdir)
  for number, name in ((3, 'MNLI-m.tsv'), (4, 'MNLI-mm.tsv')):
    first, second, _ = zip(*pairs(9, number), strict=True)
    expected = clm.predict(bundle, first, pairs=second, seq_len=16).labels
    lines = (tmp_path / 'out' / name).read_text().splitlines()
    assert lines == ['index\tprediction', *(f'{i}\t{label}' for i, label in enumerate(expected))]


def test_a_teacher_is_placed_beside_the_model():
  """A toy task whose metric is the sum of both. Mutation: leave out the frozen parameters."""
  rows = synthetic_rows(vocab_size=64, seq_len=16, rows=16)
  task = toy_task(None, {'encoder': {'embeddings': {'norm': {'bias': np.ones(2, np.float32)}}}})

  def evaluate(params, frozen, batch):
    total = sum(leaf.sum() for leaf in jax.tree.leaves((params, frozen)))
    return {'sum': (total * batch.weights.sum(), batch.weights.sum())}

  frozen = {'encoder': {'embeddings': {'norm': {'bias': np.full(3, 5.0, np.float32)}}}}
  job = Job(dataclasses.replace(task, evaluate=evaluate, frozen=frozen), tiny_config(), 1, None)
  held = evaluation(EvalSet(rows, files=lambda found: {'rows.txt': str(len(found))}), job.config)
  assert module._evaluate(job, task.init(None), (held,)) == ({'sum': 17.0}, {'rows.txt': '0'})


@pytest.mark.parametrize(
  ('change', 'message'),
  [
    ({'task': 'mlm'}, 'config.task: .* is a run of finetune, not of mlm'),
    ({'finetune': FinetuneConfig()}, 'was trained with finetune.pooled True, this configuration has False'),
    ({'data': {'score_column': 'score'}}, r"was trained with classes \['no', 'yes'\], this configuration has \[\]"),
    ({'data': {'dev': ''}}, 'names no held-out rows'),
  ],
)
def test_a_run_that_does_not_fit_is_refused(change, message, files, runs):
  asked = config(files, 'pooled')
  if isinstance(change.get('data'), dict):
    change = {'data': dataclasses.replace(asked.data, **change['data'])}
  if change.get('task'):
    change = {'task': 'mlm', 'model': '', 'data': DataConfig(seq_len=16, eval_rows=24), 'encoder': CONFIG}
  with pytest.raises(ConfigError, match=message):
    run_evaluate(dataclasses.replace(asked, **change), runs('pooled')[0])


def test_folders_that_do_not_fit_are_refused(files, runs, tmp_path):
  with pytest.raises(ConfigError, match='its head was never trained; fine-tune it first'):
    run_evaluate(config(files), str(files / 'model'))
  with pytest.raises(ConfigError, match='has no mlm_head, which the objective mlm evaluates'):
    run_evaluate(tiny_config('mlm'), str(files / 'model'))
  with pytest.raises(ConfigError, match='--output: name a folder'):
    run_evaluate(config(files, 'mnli'), str(files / 'model'), 'test')
  run_export(runs('pooled')[0], str(tmp_path / 'pooled'))
  with pytest.raises(ConfigError, match='finetune.pooled: the classifier of .* reads the pooler; set it to True'):
    run_evaluate(config(files), str(tmp_path / 'pooled'))
  other = dataclasses.replace(load_model(runs('pooled')[0]), labels=('up', 'down'))
  save_pretrained(other, tmp_path / 'other')
  with pytest.raises(ConfigError, match='its classes are up, down, those of the task no, yes'):
    run_evaluate(config(files, 'pooled'), str(tmp_path / 'other'))
  with pytest.raises(ConfigError, match='--split: test sets are those of the GLUE tasks'):
    run_evaluate(config(files, 'pooled'), runs('pooled')[0], 'test', str(tmp_path / 'out'))


def test_the_command(files, runs, tmp_path, capsys):
  """Mutation: print the metrics without writing them."""
  workdir, results = runs('scores')
  flags = [f'--config={ROOT}/configs/tiny.py:finetune', f'--config.model={workdir}', '--config.steps=1']
  flags += [f'--config.data.train={files}/train.tsv', f'--config.data.dev={files}/dev.tsv', '--config.data.seq_len=16']
  flags += ['--config.data.score_column=score', '--config.finetune.score_scale=5.0', '--config.batch_size=8']
  assert main(['evaluate', *flags, f'--checkpoint={workdir}', f'--output={tmp_path / "out"}']) == 0
  assert json.loads((tmp_path / 'out/results.json').read_text())['metrics'] == pytest.approx(results['metrics'])
  assert f'{tmp_path / "out"}: ' in capsys.readouterr().out
  assert main(['evaluate', *flags, f'--checkpoint={workdir}', '--split=test', '--output=x']) == 78
  assert '--split: test sets are those' in capsys.readouterr().err
