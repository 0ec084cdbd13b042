import numpy as np
import pytest

from compactlm_jax.data.batches import Batches, eval_batches
from compactlm_jax.data.synthetic import CLS, PAD, SEP, synthetic_rows, synthetic_table
from compactlm_jax.errors import ConfigError


def everything(source):
  (batch,) = eval_batches(source, len(source))
  return batch


def test_rows_are_valid_and_repeatable():
  source = synthetic_rows(rows=300, seq_len=16, vocab_size=60, seed=1)
  batch, again = everything(source), everything(synthetic_rows(rows=300, seq_len=16, vocab_size=60, seed=1))
  np.testing.assert_array_equal(batch.input_ids, again.input_ids)
  assert (everything(synthetic_rows(rows=300, seq_len=16, vocab_size=60, seed=2)).input_ids != batch.input_ids).any()
  assert batch.input_ids.min() == 0 and batch.input_ids.max() == 59 and source.vocab_size == 60
  real = batch.attention_mask == 1
  assert ((batch.input_ids == PAD) == ~real).all()
  assert (batch.input_ids[:, 0] == CLS).all()
  last = batch.attention_mask.sum(1) - 1
  assert (batch.input_ids[np.arange(300), last] == SEP).all() and 0.1 < (last < 15).mean() < 0.35
  assert Batches(source, 8, 0).batch(3).input_ids.shape == (8, 16) and batch.labels is None


def test_bigrams_can_be_learnt():
  ids = everything(synthetic_rows(rows=2000, seq_len=32, vocab_size=100)).input_ids
  counts = np.zeros((100, 100))
  inner = (ids[:, 1:-2] >= 5) & (ids[:, 2:-1] >= 5)
  np.add.at(counts, (ids[:, 1:-2][inner], ids[:, 2:-1][inner]), 1)
  # The best guess of the next token is right 70 % of the time given the previous one, else hardly ever.
  assert 0.66 < counts.max(1).sum() / counts.sum() < 0.76
  assert counts.sum(0).max() / counts.sum() < 0.12


def test_classes_can_be_learnt_and_held_out_rows_share_the_problem():
  options = {'rows': 600, 'seq_len': 24, 'vocab_size': 120, 'num_classes': 3}
  train, test = synthetic_table(**options), synthetic_table(**options, rows_seed=1)
  assert train.classes == ('0', '1', '2')
  fit, check = everything(train), everything(test)
  assert (fit.input_ids != check.input_ids).any() and set(fit.labels.tolist()) == {0, 1, 2}

  def bags(batch):
    return np.stack([np.bincount(row, minlength=120) for row in batch.input_ids])[:, 5:]

  means = np.log(np.stack([bags(fit)[fit.labels == c].mean(0) for c in range(3)]) + 0.01)
  assert np.mean((bags(check) @ means.T).argmax(1) == check.labels) > 0.9


def test_sizes_are_checked():
  with pytest.raises(ConfigError, match='vocab_size 10 at least 13'):
    synthetic_rows(vocab_size=10)
  with pytest.raises(ConfigError, match='num_classes 1'):
    synthetic_table(num_classes=1)
