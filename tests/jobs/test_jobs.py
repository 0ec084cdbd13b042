"""Jobs: real files through every task, chains of runs, and files that do not belong together."""

import dataclasses
import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny import ENCODER, tiny_config

import compactlm_jax as clm
from compactlm_jax.config import DataConfig, DistillConfig, FinetuneConfig, to_json
from compactlm_jax.data.prepare import prepare
from compactlm_jax.data.wordpiece import train_wordpiece
from compactlm_jax.errors import ConfigError, DataError
from compactlm_jax.interop.bundle import Bundle, save_pretrained
from compactlm_jax.interop.folder import open_folder
from compactlm_jax.interop.tokenizer_files import read_tokenizer
from compactlm_jax.jobs import build_job, load_model, params_digest, run_export, run_train, tokenizer_of
from compactlm_jax.nn.encoder import init_encoder
from compactlm_jax.tree import named_leaves

V = 120
MODEL = dataclasses.replace(ENCODER, vocab_size=V, pooler=True, initializer_range=0.2)
WORDS = 'the small large river house tree runs stands falls under over near cold warm light blue'.split()


def text(seed, lines=200):
  rng = np.random.default_rng(seed)
  return '\n'.join(' '.join(rng.choice(WORDS, rng.integers(2, 12))) + '.' for _ in range(lines)) + '\n'


@pytest.fixture(scope='module')
def files(tmp_path_factory):
  """text.txt, tokenizer/, model/ (a teacher), rows/ (prepared), table.tsv and dev.tsv."""
  folder = tmp_path_factory.mktemp('jobs')
  (folder / 'text.txt').write_text(text(0))
  train_wordpiece(str(folder / 'text.txt'), V, folder / 'tokenizer')
  params = jax.jit(init_encoder, static_argnums=0)(MODEL, jax.random.key(0))
  save_pretrained(Bundle(MODEL, params, read_tokenizer(open_folder(folder / 'tokenizer'))), folder / 'model')
  prepare(str(folder / 'text.txt'), str(folder / 'tokenizer'), str(folder / 'rows'), 16, holdout_rows=8)
  rows = [f'{line}\t{"cold" if "cold" in line else "warm"}' for line in text(1, 60).splitlines()]
  for name, part in (('table.tsv', rows[:40]), ('dev.tsv', rows[40:])):
    (folder / name).write_text('\n'.join(['text\tlabel', *part]) + '\n')
  return folder


def distill(files, **changes):
  student = dataclasses.replace(MODEL, num_layers=1, initializer_range=0.02)
  fields = {
    'teacher': str(files / 'model'),
    'data': DataConfig(path=str(files / 'rows')),
    'encoder': student,
    **changes,
  }
  return tiny_config('distill', **fields)


def finetune(files, **changes):
  data = DataConfig(train=str(files / 'table.tsv'), dev=str(files / 'dev.tsv'), seq_len=16)
  return tiny_config('finetune', **{'model': str(files / 'model'), 'data': data, **changes})


def test_a_distillation_from_files_knows_what_it_reads(files):
  """Mutation: leave the teacher out of the identity."""
  job = build_job(distill(files))
  assert set(job.identity) == {'data', 'tokenizer', 'teacher'} and job.task.name == 'distill'
  assert job.identity['tokenizer'] == tokenizer_of(files / 'tokenizer').fingerprint()
  assert {name.split('/')[0] for name in job.files} == {'tokenizer'} and 'tokenizer/vocab.txt' in job.files
  batch = job.batches.batch(0)
  assert batch.input_ids.shape == (16, 16) and batch.input_ids.max() < V
  held = sum(float(batch.weights.sum()) for batch in job.evals[0].batches())
  assert held == 8  # the 'validation' split


def test_what_a_run_reads_identifies_it(files, tmp_path):
  """Mutation: leave 'eval' or 'start' out of the identity."""
  identity = build_job(finetune(files)).identity
  assert set(identity) == {'data', 'eval', 'tokenizer', 'start'}
  dev, model = tmp_path / 'dev.tsv', tmp_path / 'model'
  lines = (files / 'dev.tsv').read_text().splitlines(keepends=True)
  dev.write_text(''.join(lines[:-1]))
  bundle = load_model(files / 'model')
  save_pretrained(dataclasses.replace(bundle, params=jax.tree.map(lambda leaf: leaf + 1, bundle.params)), model)
  data = DataConfig(train=str(files / 'table.tsv'), dev=str(dev), seq_len=16)
  other = build_job(finetune(files, data=data, model=str(model))).identity
  assert {name for name in identity if identity[name] != other[name]} == {'eval', 'start'}
  again = build_job(distill(files, data=DataConfig(path=str(files / 'rows'), eval_path=str(files / 'rows')))).identity
  assert again['eval'] and 'start' not in again


@pytest.mark.parametrize('task', ['mlm', 'electra', 'lm', 'distill'])
def test_fields_that_a_task_on_text_does_not_read_are_refused(files, task):
  """Labelled tables never; of generated rows neither held-out ones nor a tokenizer. Mutation: leave a field out."""
  named = {'train': 't.tsv', 'dev': 'd.tsv', 'train_rows': 3}
  for field, value in {**named, 'eval_path': 'held', 'tokenizer': 't'}.items():
    with pytest.raises(ConfigError, match=rf'config\.data\.{field}: {value} would not be read: '):
      build_job(tiny_config(task, data=DataConfig(seq_len=16, **{field: value})))
  fields = {'teacher': str(files / 'model')} if task == 'distill' else {}
  for field, value in named.items():
    with pytest.raises(ConfigError, match=rf'config\.data\.{field}: {value} would not be read: '):
      build_job(tiny_config(task, data=DataConfig(path=str(files / 'rows'), **{field: value}), **fields))
  unread = 'model' if task == 'distill' else 'teacher'
  with pytest.raises(ConfigError, match=rf'config\.{unread}: x would not be read: '):
    build_job(tiny_config(task, **{unread: 'x'}))


def test_epochs_become_steps(files):
  """Mutation: round down: the last rows would never be seen."""
  assert build_job(finetune(files, steps=0, epochs=2.0, batch_size=32)).total_steps == 3
  assert build_job(finetune(files, steps=0, epochs=0.01, batch_size=16)).total_steps == 1
  assert build_job(finetune(files, steps=7, epochs=2.0)).total_steps == 7


@pytest.mark.parametrize(
  ('change', 'message'),
  [
    ({'teacher': ''}, 'config.teacher: name a model folder'),
    ({'data': DataConfig()}, 'config.data.path: name a dataset'),
    ({'encoder': dataclasses.replace(MODEL, vocab_size=100)}, 'config.encoder.vocab_size: the student has 100'),
    ({'encoder': dataclasses.replace(MODEL, num_heads=4, head_size=4)}, 'config.distill.relation_heads: 0 compares'),
    ({'distill': DistillConfig(relation_heads=5)}, 'config.distill.relation_heads: 5 does not divide'),
    ({'distill': DistillConfig(teacher_layer=3)}, 'config.distill.teacher_layer: 3 is above'),
  ],
)
def test_pairs_that_do_not_fit_are_refused(files, change, message):
  with pytest.raises(ConfigError, match=message):
    build_job(distill(files, **change))


def test_data_of_another_tokenizer_is_refused(files, tmp_path):
  """Mutation: open the dataset without the teacher's fingerprint."""
  (tmp_path / 'text.txt').write_text(text(5).replace('river', 'mountain'))
  train_wordpiece(str(tmp_path / 'text.txt'), V, tmp_path / 'tokenizer')
  prepare(str(tmp_path / 'text.txt'), str(tmp_path / 'tokenizer'), str(tmp_path / 'rows'), 16)
  with pytest.raises(ConfigError, match='was made with another tokenizer'):
    build_job(distill(files, data=DataConfig(path=str(tmp_path / 'rows'))))
  named = {'path': str(files / 'rows'), 'tokenizer': str(files / 'tokenizer')}
  build_job(distill(files, data=DataConfig(**named)))
  with pytest.raises(ConfigError, match='config.data.tokenizer: .* is not the tokenizer of'):
    build_job(distill(files, data=DataConfig(**{**named, 'tokenizer': str(tmp_path / 'tokenizer')})))


@pytest.mark.parametrize(
  ('change', 'error', 'message'),
  [
    ({'model': ''}, ConfigError, 'config.model: name the model folder'),
    ({'data': {'seq_len': 64}}, ConfigError, 'config.data.seq_len: 64 is more than the 16 positions'),
    ({'data': {'train': 'none.tsv'}}, DataError, 'none.tsv'),
    ({'data': {'text_columns': ('words',)}}, (ConfigError, DataError), 'words'),
    ({'data': {'label_column': 'class'}}, (ConfigError, DataError), 'class'),
    ({'finetune': FinetuneConfig(num_classes=3)}, ConfigError, 'config.finetune.num_classes: 3, but .* 2 classes'),
  ],
)
def test_tables_that_do_not_fit_are_refused(files, change, error, message):
  config = finetune(files)
  if isinstance(change.get('data'), dict):
    change = {'data': dataclasses.replace(config.data, **change['data'])}
  with pytest.raises(error, match=message):
    build_job(dataclasses.replace(config, **change))


def test_a_model_that_knows_no_second_texts_is_refused_for_pairs(files, tmp_path):
  """Its embeddings would be NaN. Mutation: drop `_check_segments`."""
  bundle = load_model(files / 'model')
  one = dataclasses.replace(bundle.config, type_vocab_size=1)
  embeddings = bundle.params['encoder']['embeddings']
  cut = {**embeddings, 'token_type': {'embedding': embeddings['token_type']['embedding'][:1]}}
  params = {'encoder': {**bundle.params['encoder'], 'embeddings': cut}}
  save_pretrained(dataclasses.replace(bundle, config=one, params=params), tmp_path / 'model')
  lines = (files / 'table.tsv').read_text().splitlines()
  table = tmp_path / 'pairs.tsv'
  table.write_text('\n'.join(['text\tmore\tlabel', *(f'{line.partition(chr(9))[0]}\t{line}' for line in lines[1:])]))
  data = DataConfig(train=str(table), text_columns=('text', 'more'), seq_len=16)
  with pytest.raises(ConfigError, match='config.model: it has embeddings for 1 kinds of tokens'):
    build_job(finetune(files, data=data, model=str(tmp_path / 'model')))
  build_job(finetune(files, model=str(tmp_path / 'model')))


def test_sizes_come_from_the_model_and_options_from_the_run(files):
  """Mutation: take the whole encoder of the run, or of the model."""
  asked = dataclasses.replace(ENCODER, num_layers=7, hidden_dropout=0.3, remat=True)
  model = build_job(finetune(files, encoder=asked)).task.model
  assert model['encoder']['num_layers'] == 2 and model['encoder']['vocab_size'] == V
  assert model['encoder']['hidden_dropout'] == 0.3 and model['encoder']['remat'] is True
  assert model['classes'] == ['cold', 'warm']


def test_digest_sees_every_change():
  """Mutation: hash the values only."""
  base = {'a': {'kernel': np.arange(6, dtype=np.float32).reshape(2, 3)}, 'b': np.zeros(2, np.float32)}
  flipped = base['a']['kernel'].copy()
  flipped[1, 1] = np.nextafter(flipped[1, 1], 9)
  others = [
    {**base, 'a': {'kernel': flipped}},
    {**base, 'a': {'kernel': base['a']['kernel'].reshape(3, 2)}},
    {**base, 'a': {'kernels': base['a']['kernel']}},
    {**base, 'b': np.zeros(2, np.int32)},
    {'a': base['a']},
  ]
  digests = [params_digest(tree) for tree in (base, *others)]
  assert len(set(digests)) == len(digests)
  assert params_digest({'b': jnp.zeros(2), 'a': {'kernel': jnp.asarray(base['a']['kernel'])}}) == digests[0]


def test_chain_of_runs_from_teacher_to_classifier(files, tmp_path):
  """Teacher -> assistant -> student -> classifier -> export, each from the run before it, one step each.

  Mutation: keep the pooler that the classifier does not read; read the tokenizer of the teacher's folder only.
  """
  run_train(distill(files, steps=1), str(tmp_path / 'assistant'))
  shutil.copytree(files / 'rows', tmp_path / 'rows')
  assistant = load_model(tmp_path / 'assistant')
  assert assistant.config.num_layers == 1 and to_json(assistant.config)['vocab_size'] == V
  job = build_job(distill(files, teacher=str(tmp_path / 'assistant'), data=DataConfig(path=str(tmp_path / 'rows'))))
  taught = named_leaves(job.task.frozen)['encoder/layers/attention/query/kernel']
  np.testing.assert_array_equal(taught, assistant.params['encoder']['layers']['attention']['query']['kernel'])
  results = run_train(finetune(files, model=str(tmp_path / 'assistant'), steps=1), str(tmp_path / 'tuned'))
  assert set(results['metrics']) == {'loss', 'accuracy', 'f1'} and 0 <= results['metrics']['accuracy'] <= 1
  tuned = load_model(tmp_path / 'tuned')
  assert not tuned.config.pooler and 'pooler' not in tuned.params['encoder'] and 'classifier' in tuned.params
  assert tuned.tokenizer.files == assistant.tokenizer.files == load_model(files / 'model').tokenizer.files
  run_export(str(tmp_path / 'tuned'), str(tmp_path / 'hf'))
  back = clm.from_pretrained(tmp_path / 'hf')
  assert params_digest(back.params) == params_digest(tuned.params)
  assert json.loads((tmp_path / 'hf' / 'config.json').read_text())['num_hidden_layers'] == 1


def test_what_is_not_over_and_what_are_many_is_said(files, tmp_path, caplog):
  """Mutation: drop the warning of `load_run_params`, or the look for seeds."""
  run_train(finetune(files, steps=2), str(tmp_path / 'run/seed-0'))
  with pytest.raises(ConfigError, match='holds the runs of 1 seeds; name one of them, for example .*run/seed-0'):
    load_model(tmp_path / 'run')
  load_model(tmp_path / 'run/seed-0')
  assert 'not over' not in caplog.text
  (tmp_path / 'run/seed-0/results.json').unlink()
  load_model(tmp_path / 'run/seed-0')
  assert 'step 2 of a run that is not over' in caplog.text
