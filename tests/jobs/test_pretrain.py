"""Pre-training jobs on real files: from scratch, resumed, exported, continued from released weights, refused."""

import dataclasses
import json
import logging
import shutil

import jax
import numpy as np
import pytest
from tiny import tiny_config

from compactlm_jax.config import DataConfig, ElectraConfig, EncoderConfig, OptimizerConfig
from compactlm_jax.data.prepare import prepare
from compactlm_jax.data.wordpiece import train_wordpiece
from compactlm_jax.errors import ConfigError
from compactlm_jax.jobs import build_job, load_generator, load_model, run_export, run_train
from compactlm_jax.tree import named_leaves

V = 120
ENCODER = EncoderConfig(
  architecture='electra', vocab_size=V, hidden_size=16, num_layers=1, num_heads=4, embedding_size=8, max_positions=16,
  scan_unroll=1,
)  # fmt: skip
WORDS = 'the small large river house tree runs stands falls under over near cold warm light blue'.split()


@pytest.fixture(scope='module')
def files(tmp_path_factory):
  """text.txt, tokenizer/, rows/ (16 tokens, with a validation split)."""
  folder = tmp_path_factory.mktemp('pretrain')
  rng = np.random.default_rng(0)
  lines = [' '.join(rng.choice(WORDS, rng.integers(2, 12))) + '.' for _ in range(200)]
  (folder / 'text.txt').write_text('\n'.join(lines) + '\n')
  train_wordpiece(str(folder / 'text.txt'), V, folder / 'tokenizer')
  prepare(str(folder / 'text.txt'), str(folder / 'tokenizer'), str(folder / 'rows'), 16, holdout_rows=16)
  return folder


def config(files, task='electra', **changes):
  vocabulary = json.loads((files / 'rows' / 'manifest.json').read_text())['vocab_size']
  fields = {
    'steps': 4,
    'checkpoint_every': 2,
    'encoder': dataclasses.replace(ENCODER, vocab_size=vocabulary),
    'electra': ElectraConfig(generator_size=0.5),
    'data': DataConfig(path=str(files / 'rows')),
    **changes,
  }
  return tiny_config(task, **fields)


@pytest.fixture(scope='module')
def exported(files):
  """(run directory, its export)."""
  run_train(config(files), str(files / 'run'))
  run_export(str(files / 'run'), str(files / 'hf'))
  return files / 'run', files / 'hf'


def test_a_run_leaves_metrics_and_two_models(exported):
  """Mutation: export the generator without the tables that it shares."""
  run, hf = exported
  metrics = json.loads((run / 'results.json').read_text())['metrics']
  assert {'loss', 'mlm_loss', 'rtd_loss', 'precision_replaced', 'recall_original', 'replaced_fraction'} <= set(metrics)
  np.testing.assert_allclose(metrics['loss'], metrics['mlm_loss'] + 50 * metrics['rtd_loss'], rtol=1e-6)
  ours, theirs = load_model(run), load_model(hf)
  assert set(theirs.params) == {'encoder', 'rtd_head'} and theirs.tokenizer is not None
  small, read = load_generator(run), load_generator(hf)
  assert small.config.hidden_size == 8 and set(read.params) == {'encoder', 'mlm_head'}
  for a, b in ((ours, theirs), (small, read)):
    jax.tree.map(np.testing.assert_array_equal, a.params, b.params)
  np.testing.assert_array_equal(
    read.params['encoder']['embeddings']['word']['embedding'],
    theirs.params['encoder']['embeddings']['word']['embedding'],
  )


def test_continuing_from_both_models_starts_nothing_fresh(files, exported, caplog):
  """Mutation: leave out a head."""
  run, hf = exported
  caplog.set_level(logging.INFO, 'compactlm_jax')
  both = config(files, model=str(hf), electra=ElectraConfig(generator_size=0.5, generator=str(hf)))
  start = build_job(both).task.init(jax.random.key(5))
  assert 'fresh' not in caplog.text
  jax.tree.map(np.testing.assert_array_equal, start['encoder'], load_model(run).params['encoder'])
  small = load_generator(run).params
  jax.tree.map(np.testing.assert_array_equal, start['generator']['mlm_head'], small['mlm_head'])
  build_job(config(files, model=str(hf)))
  assert 'starting fresh: generator' in caplog.text


def test_a_generator_of_another_vocabulary_is_refused(files, exported, tmp_path):
  """Two words change places: sizes fit, meanings do not. Mutation: compare the number of tokens only."""
  hf = tmp_path / 'hf'
  shutil.copytree(exported[1], hf)
  for name in ('tokenizer.json', 'vocab.txt'):
    path = hf / 'generator' / name
    if path.exists():
      path.write_text(path.read_text().replace('river', 'RIVER').replace('house', 'river').replace('RIVER', 'house'))
  (hf / 'generator' / 'manifest.json').unlink()  # it was changed on purpose
  both = config(files, model=str(exported[1]), electra=ElectraConfig(generator_size=0.5, generator=str(hf)))
  with pytest.raises(ConfigError, match=r'electra\.generator: the tokenizer in .* has id \d+ there and \d+ here'):
    build_job(both)


def test_mlm_starts_from_an_encoder(files, exported, caplog):
  caplog.set_level(logging.INFO, 'compactlm_jax')
  job = build_job(config(files, 'mlm', model=str(exported[1])))
  assert 'starting fresh: mlm_head' in caplog.text
  assert set(job.task.init(jax.random.key(0))) == {'encoder', 'mlm_head'}


def test_an_mlm_run_is_exported_with_its_head(files, tmp_path):
  run_train(config(files, 'mlm', steps=2), str(tmp_path / 'run'))
  run_export(str(tmp_path / 'run'), str(tmp_path / 'hf'))
  described = json.loads((tmp_path / 'hf' / 'config.json').read_text())
  assert described['architectures'] == ['ElectraForMaskedLM']
  a, b = load_model(tmp_path / 'run').params, load_model(tmp_path / 'hf').params
  assert set(named_leaves(a)) == set(named_leaves(b)) and 'mlm_head' in b


@pytest.mark.parametrize(
  ('changes', 'message'),
  [
    (
      {'encoder': dataclasses.replace(ENCODER, vocab_size=99)},
      'config.encoder.vocab_size: the model has 99 and the da',
    ),
    ({'encoder': None}, 'config.encoder.max_positions: the rows have 16 tokens, the model positions for 8'),
    ({'electra': ElectraConfig(generator_size=0.3)}, 'config.electra.generator_size: 0.3 of hidden_size 16 is 4.80'),
    ({'optimizer': OptimizerConfig(warmup_steps=4)}, 'config.optimizer.warmup_steps: the run has 4 steps and would w'),
    ({'model': 'hf', 'data': DataConfig()}, 'config.data.path: name a dataset written by'),
    ({'model': 'hf', 'electra': ElectraConfig(generator_size=0.25, generator='hf')}, 'config.electra.generator_size: '),
  ],
)
def test_bad_input_names_the_field(files, exported, changes, message):
  """Before anything is computed. Mutation: drop a check."""
  base = config(files)
  if changes.get('encoder', 0) is None:
    changes = {'encoder': dataclasses.replace(base.encoder, max_positions=8)}
  changes = {name: str(files / 'hf') if value == 'hf' else value for name, value in changes.items()}
  if 'electra' in changes and changes['electra'].generator:
    changes['electra'] = dataclasses.replace(changes['electra'], generator=str(files / 'hf'))
  with pytest.raises(ConfigError) as refused:
    build_job(dataclasses.replace(base, **changes))
  assert str(refused.value).startswith(message)
