"""Fine-tuning jobs: GLUE's files, tables of scores, a part of the rows, and teachers that know nothing."""

import dataclasses
import shutil

import jax
import numpy as np
import pytest
from tiny import ENCODER, tiny_config

from compactlm_jax.config import DataConfig, FinetuneConfig, MeshConfig, OptimizerConfig, PruneConfig
from compactlm_jax.data.wordpiece import train_wordpiece
from compactlm_jax.errors import ConfigError
from compactlm_jax.interop.bundle import Bundle, save_pretrained
from compactlm_jax.interop.folder import open_folder
from compactlm_jax.interop.tokenizer_files import read_tokenizer
from compactlm_jax.jobs import build_job, load_model, run_export, run_train
from compactlm_jax.jobs.commands import evaluation
from compactlm_jax.jobs.finetune import finetune_job
from compactlm_jax.nn.encoder import init_encoder
from compactlm_jax.parallel import make_mesh
from compactlm_jax.train.evaluate import make_evaluate
from compactlm_jax.tree import named_leaves

V = 120
MODEL = dataclasses.replace(ENCODER, vocab_size=V, initializer_range=0.2)
WORDS = 'the small large river house tree runs stands falls under over near cold warm light blue'.split()


@pytest.fixture(scope='module')
def files(tmp_path_factory):
  """model/, glue/RTE/{train,dev}.tsv in the official layout, scores.tsv, and classes.tsv sorted by class."""
  folder, rng = tmp_path_factory.mktemp('finetune'), np.random.default_rng(0)
  lines = [' '.join(rng.choice(WORDS, rng.integers(2, 6))) for _ in range(120)]
  (folder / 'text.txt').write_text('\n'.join(lines))
  train_wordpiece(str(folder / 'text.txt'), V, folder / 'tokenizer')
  params = init_encoder(MODEL, jax.random.key(0))
  save_pretrained(Bundle(MODEL, params, read_tokenizer(open_folder(folder / 'tokenizer'))), folder / 'model')
  (folder / 'glue' / 'RTE').mkdir(parents=True)
  pairs = list(zip(lines[:60], lines[60:], strict=True))
  names = ['entailment' if 'cold' in a else 'not_entailment' for a, _ in pairs]
  rows = [f'{i}\t{a}\t{b}\t{name}' for i, ((a, b), name) in enumerate(zip(pairs, names, strict=True))]
  for name, part in (('train', rows[:40]), ('dev', rows[40:])):
    text = '\n'.join(['index\tsentence1\tsentence2\tlabel', *part]) + '\n'
    (folder / 'glue' / 'RTE' / f'{name}.tsv').write_text(text)
  scored = [f'{a}\t{b}\t{len(a) / 10}' for a, b in pairs]
  (folder / 'scores.tsv').write_text('\n'.join(['a\tb\tscore', *scored]) + '\n')
  found = sorted(zip(names, [a for a, _ in pairs], strict=True))
  (folder / 'classes.tsv').write_text('\n'.join(['label\ttext', *(f'{n}\t{a}' for n, a in found)]) + '\n')
  return folder


def glue(files, data=None, finetune=None, **changes):
  data = DataConfig(path=str(files / 'glue'), seq_len=16, **(data or {}))
  task = FinetuneConfig(**{'benchmark': 'rte', 'dropout': 0.0, **(finetune or {})})
  return tiny_config('finetune', **{'model': str(files / 'model'), 'data': data, 'finetune': task, **changes})


def own(files, name='classes.tsv', **changes):
  data = DataConfig(train=str(files / name), dev=str(files / name), seq_len=16)
  return tiny_config('finetune', **{'model': str(files / 'model'), 'data': data, **changes})


def test_a_benchmark_is_read_from_its_official_files(files, tmp_path):
  """Mutation: sort the classes by name, or score with accuracy alone."""
  config = glue(files, {'buckets': (8, 12), 'group_by_length': True}, steps=4)
  job = build_job(config)
  assert job.task.model['classes'] == ['entailment', 'not_entailment'] and len(job.evals) == 1
  assert {job.batches.batch(i).input_ids.shape[1] for i in range(3)} <= {8, 12, 16}
  results = run_train(config, str(tmp_path / 'run'))
  assert set(results['metrics']) == {'accuracy', 'loss'}


def test_buckets_and_grouping_do_not_change_what_is_measured(files):
  """Evaluated short rows first, scored in their own order. Mutation: hand the score rows in the order of evaluation."""
  seen = []
  for buckets in ((), (6, 8, 12)):
    config, order = glue(files, {'buckets': buckets}), {}
    task, data = finetune_job(config)

    def score(rows, order=order):
      order.update(rows)
      return {}

    held = evaluation(dataclasses.replace(data.evals[0], score=score), config)
    make_evaluate(task, make_mesh(MeshConfig()))(task.init(jax.random.key(1)), None, held)
    seen.append(order)
  assert seen[0].keys() == seen[1].keys() == {'outputs', 'labels'}
  np.testing.assert_array_equal(seen[0]['labels'], seen[1]['labels'])
  np.testing.assert_allclose(seen[0]['outputs'], seen[1]['outputs'], atol=1e-5)


def scored(files, **changes):
  data = DataConfig(
    train=str(files / 'scores.tsv'), dev=str(files / 'scores.tsv'), seq_len=16, text_columns=('a', 'b'),
    score_column='score',
  )  # fmt: skip
  config = dataclasses.replace(own(files), data=data, finetune=FinetuneConfig(dropout=0.0, score_scale=2.0), steps=60)
  return dataclasses.replace(config, optimizer=OptimizerConfig(learning_rate=3e-3), **changes)


def test_scores_of_pairs(files, tmp_path):
  """Mutation: read the score column as classes."""
  results = run_train(scored(files), str(tmp_path / 'run'))
  assert set(results['metrics']) == {'loss', 'pearson', 'spearman', 'mse'} and results['metrics']['pearson'] > 0.3


@pytest.mark.slow
def test_a_regression_is_pruned_loaded_and_exported(files, tmp_path):
  """Half of the weights remain; a sparse folder has the same bits. Mutation: `tasks.prune.bake` without the masks."""
  prune = PruneConfig(density=0.5, initial_warmup=0, final_warmup=0, freeze_embeddings=False)
  results = run_train(scored(files, task='prune', prune=prune), str(tmp_path / 'run'))
  assert results['metrics']['pearson'] > 0.3 and results['density'] == pytest.approx(0.5)
  run_export(str(tmp_path / 'run'), str(tmp_path / 'out'), format='sparse')
  run, back = (load_model(str(tmp_path / name)) for name in ('run', 'out'))
  assert run.labels == back.labels == () and run.params['classifier']['bias'].shape == (1,)
  jax.tree.map(np.testing.assert_array_equal, run.params, back.params)


def test_pairs_in_the_other_order_are_trained_on_too(files):
  plain, swapped = (build_job(glue(files, finetune={'swap_pairs': s}, steps=0, epochs=1.0)) for s in (False, True))
  assert (plain.total_steps, swapped.total_steps) == (3, 5)
  with pytest.raises(ConfigError, match='config.finetune.swap_pairs: is for pairs'):
    build_job(own(files, finetune=FinetuneConfig(swap_pairs=True)))


def test_a_part_of_the_rows_is_the_same_for_every_seed(files):
  """Mutation: draw it with the run's seed."""
  rows = [
    sorted(build_job(glue(files, {'train_rows': 16}, seed=seed)).batches.batch(0).input_ids.tolist()) for seed in (0, 1)
  ]
  assert rows[0] == rows[1]
  with pytest.raises(ConfigError, match='config.data.train_rows: 41, but .*train.tsv has 40 rows'):
    build_job(glue(files, {'train_rows': 41}))


def test_a_teacher_is_fine_tuned_first(files, tmp_path):
  """Mutation: do not look at what the teacher predicts, or look at the first rows of a sorted table only."""
  with pytest.raises(ConfigError, match='config.teacher: this model has no classifier; fine-tune it'):
    build_job(own(files, teacher=str(files / 'model')))
  optimizer = OptimizerConfig(learning_rate=3e-3)
  fresh = str(tmp_path / 'fresh')
  run_train(own(files, steps=1, optimizer=OptimizerConfig(learning_rate=1e-9)), fresh)
  with pytest.raises(ConfigError, match='the head of .*fresh predicts the training rows no better than a constant'):
    build_job(own(files, teacher=fresh))
  taught = str(tmp_path / 'taught')
  assert run_train(own(files, steps=80, optimizer=optimizer), taught)['metrics']['accuracy'] > 0.9
  results = run_train(own(files, steps=5, teacher=taught), str(tmp_path / 'student'))
  assert set(results['metrics']) == {'loss', 'accuracy', 'f1'}
  other = tmp_path / 'other.tsv'
  other.write_text((files / 'classes.tsv').read_text().replace('not_entailment', 'none'))
  shutil.copy(other, tmp_path / 'dev.tsv')
  data = DataConfig(train=str(other), dev=str(tmp_path / 'dev.tsv'), seq_len=16)
  with pytest.raises(ConfigError, match='config.teacher: .* knows the classes entailment, not_ent'):
    build_job(own(files, teacher=taught, data=data))


def test_benchmarks_have_no_tables_of_their_own(files):
  config = glue(files)
  with pytest.raises(ConfigError, match='config.data.train: rte is read from config.data.path'):
    build_job(dataclasses.replace(config, data=dataclasses.replace(config.data, train='x.tsv')))
  with pytest.raises(ConfigError, match="config.finetune.benchmark: 'sst-3' is unknown; did you mean sst2"):
    FinetuneConfig(benchmark='sst-3')


def test_results_say_what_is_left_of_the_encoder(files, tmp_path):
  """Of all layers, also of those that are not kept. Mutations: count the kept layers as all; nothing for dense runs."""
  whole = run_train(own(files, steps=1), str(tmp_path / 'whole'))
  finetune = FinetuneConfig(dropout=0.0, keep_layers=(2,))
  dropping = own(files, steps=1, finetune=finetune, encoder=dataclasses.replace(ENCODER, layer_drop=0.2))
  kept = run_train(dropping, str(tmp_path / 'kept'))
  leaves = named_leaves(load_model(str(tmp_path / 'whole')).params)
  kernels = [leaf for name, leaf in leaves.items() if 'encoder/layers' in name and name.endswith('kernel')]
  weights = sum(leaf.size for leaf in kernels)
  assert (whole['density'], whole['nonzero'], whole['weights']) == (1.0, weights, weights)
  assert (kept['density'], kept['nonzero'], kept['weights']) == (0.5, weights // 2, weights)
  assert load_model(str(tmp_path / 'kept')).config.num_layers == 1


@pytest.mark.parametrize('task', ['finetune', 'prune', 'adapt'])
def test_files_that_would_not_be_read_are_refused(task):
  """Without a training table rows are generated; adaptive networks may learn them from a model.

  Mutation: leave one of the fields out, or the look at all.
  """
  read = {'dev': 'd.tsv', 'path': 'glue', 'eval_path': 'held', 'train_rows': 3, 'tokenizer': 't'}
  named = {f'data.{name}': {'data': DataConfig(**{name: value})} for name, value in read.items()}
  named |= {} if task == 'adapt' else {'model': {'model': 'm'}, 'teacher': {'teacher': 't'}}
  for field, changes in named.items():
    with pytest.raises(
      ConfigError, match=rf'config\.{field}: .* config\.data\.train is not set.*name your table, or set'
    ):
      build_job(tiny_config(task, **changes))
