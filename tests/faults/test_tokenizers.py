"""Rows of one tokenizer and a model of another are refused before anything is written: row 8 of the fault matrix."""

import dataclasses
import os

import jax
import numpy as np
import pytest
from tiny import ENCODER, tiny_config

from compactlm_jax.config import DataConfig
from compactlm_jax.data.prepare import prepare
from compactlm_jax.data.wordpiece import train_wordpiece
from compactlm_jax.errors import ConfigError
from compactlm_jax.interop.bundle import Bundle, save_pretrained
from compactlm_jax.interop.folder import open_folder
from compactlm_jax.interop.tokenizer_files import read_tokenizer
from compactlm_jax.jobs import build_job, run_train
from compactlm_jax.nn.encoder import encoder_shapes

V = 60
WORDS = 'the small large river house tree runs stands falls under over near cold warm light blue'.split()


def _swap(folder, one, other):
  """The tokenizer A with two tokens that have each other's id."""

  def at(vocab):
    tokens = vocab.read_text().splitlines()
    i, j = tokens.index(one), tokens.index(other)
    tokens[i], tokens[j] = tokens[j], tokens[i]
    return tokens

  (folder / one).mkdir()
  (folder / one / 'vocab.txt').write_text('\n'.join(at(folder / 'A' / 'vocab.txt')) + '\n')
  return folder / one


@pytest.fixture(scope='module')
def files(tmp_path_factory):
  """A model with tokenizer A, and the same text prepared with A and with others."""
  folder = tmp_path_factory.mktemp('tokenizers')
  lines = [' '.join(np.random.default_rng(i).choice(WORDS, 8)) + '.' for i in range(100)]
  (folder / 'text.txt').write_text('\n'.join(lines) + '\n')
  (folder / 'other.txt').write_text('\n'.join(lines).replace('river', 'mountain') + '\n')
  train_wordpiece(str(folder / 'text.txt'), V, folder / 'A')
  train_wordpiece(str(folder / 'other.txt'), V, folder / 'other vocabulary')
  _swap(folder, 'a', 'b').rename(folder / 'one swapped token')
  _swap(folder, '[MASK]', '[CLS]').rename(folder / 'other special ids')
  encoder = dataclasses.replace(ENCODER, vocab_size=V)
  params = jax.tree.map(lambda s: np.zeros(s.shape, s.dtype), encoder_shapes(encoder))
  save_pretrained(Bundle(encoder, params, read_tokenizer(open_folder(folder / 'A'))), folder / 'model')
  for name in ('A', 'other vocabulary', 'one swapped token', 'other special ids'):
    held = 4 if name == 'A' else 0  # a second split would be refused as well
    prepare(str(folder / 'text.txt'), str(folder / name), str(folder / 'rows' / name), 16, holdout_rows=held)
  return folder


def config(files, task, rows='A', **data):
  models = {'teacher' if task == 'distill' else 'model': str(files / 'model')}
  encoder = dataclasses.replace(ENCODER, vocab_size=V, num_layers=1, causal=task == 'lm')
  data = DataConfig(path=str(files / 'rows' / rows), seq_len=16, **data)
  return tiny_config(task, steps=1, encoder=encoder, data=data, **models)


CASES = {
  **{name: {'rows': name} for name in ('other vocabulary', 'one swapped token', 'other special ids')},
  'rows of A, configuration of another': {'tokenizer': 'one swapped token'},
}


@pytest.mark.parametrize('task', ['distill', 'mlm', 'lm'])
@pytest.mark.parametrize('case', CASES)
def test_another_tokenizer_is_refused(case, task, files, tmp_path):
  """Exit 78, and the run directory is not even made. Mutation: open rows without the fingerprint of the model."""
  changes, message = dict(CASES[case]), 'was made with another tokenizer'
  if 'tokenizer' in changes:
    changes['tokenizer'], message = os.fspath(files / changes['tokenizer']), 'is not the tokenizer of'
  with pytest.raises(ConfigError, match=message) as refused:
    run_train(config(files, task, **changes), str(tmp_path / 'run'))
  assert refused.value.exit_code == 78 and not (tmp_path / 'run').exists()
  assert build_job(config(files, task)).identity['tokenizer']  # rows of A are taken
