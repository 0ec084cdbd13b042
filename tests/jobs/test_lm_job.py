"""The job of a causal language model: which words its perplexity is counted by, and what it may start from."""

import dataclasses
import json
import math

import pytest
import tiny

from compactlm_jax.config import DataConfig
from compactlm_jax.data.manifest import read_manifest
from compactlm_jax.data.prepare import prepare
from compactlm_jax.data.wordpiece import train_wordpiece
from compactlm_jax.errors import ConfigError
from compactlm_jax.jobs.commands import build_job, run_train

TEXT = 'a river runs under the old bridge near the house\nthe house stands\n\nwater is cold\n'
CAUSAL = dataclasses.replace(tiny.ENCODER, causal=True)


@pytest.fixture(scope='module')
def folders(tmp_path_factory):
  """(dataset with a validation split, dataset of other text)."""
  root = tmp_path_factory.mktemp('lm')
  (root / 'text.txt').write_text(TEXT * 40)
  (root / 'other.txt').write_text('the old house is near\n' * 30)
  tokenizer = train_wordpiece(str(root / 'text.txt'), 64, root / 'tokenizer')
  held = prepare(str(root / 'text.txt'), tokenizer, root / 'rows', 16, holdout_rows=8)
  prepare(str(root / 'other.txt'), tokenizer, root / 'other', 16)
  return root / 'rows', root / 'other', held.vocab_size


def config(folders, encoder=CAUSAL, **data):
  data = {'path': str(folders[0]), **data}
  encoder = dataclasses.replace(encoder, vocab_size=folders[2])
  return tiny.tiny_config('lm', steps=2, batch_size=8, encoder=encoder, data=DataConfig(seq_len=16, **data))


def test_a_run_reports_both_perplexities(folders, tmp_path):
  metrics = run_train(config(folders), str(tmp_path / 'run'))['metrics']
  assert set(metrics) == {'loss', 'accuracy', 'perplexity_token', 'perplexity_word'}
  held = read_manifest(folders[0]).contents['validation']
  nats = metrics['loss'] * (held['tokens'] - held['rows'])
  assert metrics['perplexity_word'] == pytest.approx(math.exp(nats / held['words']))
  assert metrics['perplexity_token'] == pytest.approx(math.exp(metrics['loss']))
  assert json.loads((tmp_path / 'run/metrics.jsonl').read_text().splitlines()[-1])['step'] <= 2


def test_words_are_those_of_the_rows_that_are_evaluated(folders):
  """Mutation: take the words per token of the training rows."""

  def names(**changes):
    return build_job(config(folders, **changes)).task.summarize({'loss': 1.0})

  assert names()['perplexity_word'] == math.exp(1 / read_manifest(folders[0]).words_per_token('validation'))
  other = names(eval_path=str(folders[1]))['perplexity_word']
  assert other == math.exp(1 / read_manifest(folders[1]).words_per_token('train')) != names()['perplexity_word']
  # Rows held out in training, with words nobody counted.
  assert set(names(path=str(folders[1]), eval_rows=3)) == {'perplexity_token'}
  generated = tiny.tiny_config('lm', encoder=CAUSAL)
  assert set(build_job(generated).task.summarize({'loss': 1.0})) == {'perplexity_token'}


def test_it_must_be_causal_and_a_two_sided_model_becomes_so(folders, tmp_path):
  with pytest.raises(ConfigError, match='encoder.causal'):
    build_job(config(folders, tiny.ENCODER))
  run_train(dataclasses.replace(config(folders, tiny.ENCODER), task='mlm'), str(tmp_path / 'mlm'))
  again = dataclasses.replace(config(folders), model=str(tmp_path / 'mlm'))
  task = build_job(again).task
  assert task.model['encoder']['causal'] is True and task.model['encoder']['vocab_size'] == folders[2]
