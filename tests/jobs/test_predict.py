"""Prediction: the same for a text alone, in any company, in any bucket; in the order of the input."""

import dataclasses

import jax
import numpy as np
import pytest
from predicting import CONFIG, LABELS, SIZES, VOCAB, WORDS, make_bundle, make_texts

import compactlm_jax as clm
from compactlm_jax.config import EncoderConfig
from compactlm_jax.errors import ConfigError, DataError, NumericsError
from compactlm_jax.jobs import predict as module
from compactlm_jax.nn.encoder import encode
from compactlm_jax.tree import named_leaves, nested

CONVBERT = dataclasses.replace(
  EncoderConfig('convbert', num_heads=2, head_size=4, conv_kernel_size=7, conv_sees_padding=True, **SIZES), num_layers=2
)
CLS, SEP = 2, 3
_ENCODE = jax.jit(encode, static_argnums=1)


def alone(bundle, text, pair=None):
  """Logits of one row without padding, by NumPy on the hidden states."""
  index = {word: i for i, word in enumerate(VOCAB.split('\n'))}
  ids = [CLS, *(index[w] for w in text.split()), SEP]
  types = [0] * len(ids)
  if pair is not None:
    second = [*(index[w] for w in pair.split()), SEP]
    ids, types = ids + second, types + [1] * len(second)
  mask = np.zeros((1, 24), np.int32)
  mask[0, : len(ids)] = 1
  full = np.zeros((2, 1, 24), np.int32)
  full[0, 0, : len(ids)], full[1, 0, : len(ids)] = ids, types
  out = _ENCODE(bundle.params, bundle.config, full[0], mask, full[1])
  x_D = np.asarray(out.pooled_BD if bundle.config.pooler else out.last_BTD[:, 0])[0]
  return x_D @ bundle.params['classifier']['kernel'] + bundle.params['classifier']['bias']


@pytest.mark.parametrize('pooler', [False, True])
def test_each_text_is_predicted_as_alone(pooler):
  """Mutation: return the rows from short to long."""
  bundle, texts = make_bundle(config=dataclasses.replace(CONFIG, pooler=pooler)), make_texts()
  found = clm.predict(bundle, texts, batch_size=8, buckets=(4, 8))
  expected = np.stack([alone(bundle, text) for text in texts])
  np.testing.assert_allclose(found.outputs, expected, rtol=0, atol=1e-5)
  assert found.labels == tuple(LABELS[i] for i in expected.argmax(1)) and found.outputs.dtype == np.float32
  shares = np.exp(expected) / np.exp(expected).sum(1, keepdims=True)
  np.testing.assert_allclose(found.probabilities, shares, rtol=0, atol=1e-5)
  assert found.truncated == 0 and found.usage.rows == 13
  assert found.usage.tokens == sum(len(text.split()) + 2 for text in texts)


def test_pairs_are_read_in_two_segments():
  """Mutation: give all tokens segment 0."""
  bundle, first, second = make_bundle(), make_texts(5, 1, 9), make_texts(5, 2, 9)
  found = clm.predict(bundle, first, pairs=second)
  expected = np.stack([alone(bundle, a, b) for a, b in zip(first, second, strict=True)])
  np.testing.assert_allclose(found.outputs, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize('buckets', [(), (8,), (5, 11, 23), (512,)])
@pytest.mark.parametrize('batch_size', [8, 16])
def test_buckets_and_batches_do_not_change_predictions(buckets, batch_size):
  """Mutation: pad to the bucket of the first row of a batch: the longest row loses its end."""
  bundle, texts = make_bundle(), make_texts(21)
  expected = clm.predict(bundle, texts, buckets=(), batch_size=32)
  found = clm.predict(bundle, texts, buckets=buckets, batch_size=batch_size)
  np.testing.assert_allclose(found.outputs, expected.outputs, rtol=0, atol=1e-5)
  assert found.usage.tokens == expected.usage.tokens


def test_short_texts_are_padded_to_short_lengths():
  """Two batches of eight rows: lengths 8 and 24. Mutation: do not sort."""
  texts = ['w1 w2', ' '.join(WORDS[:20])] * 8
  usage = clm.predict(make_bundle(), texts, batch_size=8, buckets=(8,)).usage
  assert usage.computed == 8 * 8 + 8 * 24 and usage.padding == pytest.approx(1 - (8 * 4 + 8 * 22) / 256)


def test_compiled_programs_are_used_again():
  """Mutation: make the jitted function anew in each call."""
  bundle, texts = make_bundle(), make_texts(17)
  clm.predict(bundle, texts, batch_size=8)
  before = module._classify._cache_size()
  clm.predict(bundle, texts[::-1], batch_size=8)
  clm.predict(make_bundle(labels=()), texts[:9], batch_size=8)
  assert module._classify._cache_size() == before


def test_a_convbert_that_reads_padding_gets_enough_of_it():
  """Rows of all lengths are predicted as if padded to the end, though some stop before. Mutation: margin 0."""
  bundle = make_bundle(config=CONVBERT)
  texts = [' '.join(WORDS[:n]) for n in range(23)]
  expected = np.stack([alone(bundle, text) for text in texts])  # padded to 24
  for length in (10, 13):
    found = clm.predict(bundle, texts, buckets=(length,), batch_size=8)
    np.testing.assert_allclose(found.outputs, expected, rtol=0, atol=1e-5)
  assert clm.predict(bundle, texts[:8], buckets=(16,), batch_size=8).usage.computed == 8 * 16  # 7 + 2 + 6 fit


def test_long_texts_are_cut_counted_and_logged(caplog):
  """Mutation: count texts that fit exactly."""
  texts = [' '.join(WORDS[:n]) for n in (6, 7, 30)]
  found = clm.predict(make_bundle(), texts, seq_len=8)
  assert found.truncated == 2 and '2 of 3 texts are longer than 8 tokens' in caplog.text
  expected = clm.predict(make_bundle(), [' '.join(WORDS[:6])] * 3, seq_len=8)
  np.testing.assert_allclose(found.outputs, expected.outputs, rtol=0, atol=1e-5)


def test_scores_names_and_empty_input():
  bundle = make_bundle(1, ())
  found = clm.predict(bundle, ['w1', '', 'w2 w3'])
  assert found.classes == () and found.labels == () and found.scores.shape == (3,)
  np.testing.assert_allclose(found.scores[1], alone(bundle, '')[0], rtol=0, atol=1e-5)
  nothing = clm.predict(make_bundle(), [])
  assert nothing.outputs.shape == (0, 3) and nothing.labels == () and nothing.usage.padding == 0
  assert clm.predict(make_bundle(2, ()), ['w1']).labels[0] in ('LABEL_0', 'LABEL_1')


def test_chunks_are_joined_in_order(monkeypatch):
  """Mutation: sort over the chunk and forget its offset."""
  bundle, texts = make_bundle(), make_texts(29)
  expected = clm.predict(bundle, texts)
  monkeypatch.setattr(module, 'CHUNK', 8)
  found = clm.predict(bundle, texts)
  np.testing.assert_allclose(found.outputs, expected.outputs, rtol=0, atol=1e-5)
  assert found.usage.rows == 29


def test_outputs_that_are_not_finite_are_no_predictions():
  """Of one text among others. Mutation: return them."""
  bundle = make_bundle()
  leaves = named_leaves(bundle.params)
  table = leaves['encoder/embeddings/word/embedding'].copy()
  table[bundle.tokenizer.vocab['w7']] = np.nan
  params = nested({**leaves, 'encoder/embeddings/word/embedding': table})
  with pytest.raises(NumericsError, match=r'model: its outputs are not finite, of row 2 \(from 0\) first'):
    clm.predict(dataclasses.replace(bundle, params=params), ['w1', 'w2 w3', 'w7'])


@pytest.mark.parametrize(
  ('change', 'arguments', 'error', 'message'),
  [
    ({'params': {'encoder': {}, 'mlm_head': {}}}, {}, ConfigError, r'never trained \(heads: mlm_head\); fine-tune it'),
    ({'params': {'encoder': {}, 'span': {}}}, {}, ConfigError, 'a question and a context column'),
    ({'tokenizer': None}, {}, ConfigError, 'has no tokenizer'),
    ({}, {'texts': 'one text'}, ConfigError, 'not one text'),
    ({}, {'texts': ['w1', 3]}, DataError, r'number 1 \(from 0\) is 3 instead of text'),
    ({}, {'texts': ['w1'], 'pairs': []}, ConfigError, '0 second texts for 1 first'),
    ({}, {'seq_len': 25}, ConfigError, 'seq_len: 25 must be between 4 and the 24 positions'),
    ({}, {'batch_size': 0}, ConfigError, 'must be positive'),
    ({}, {'buckets': (0, 8)}, ConfigError, 'must be positive'),
  ],
)
def test_what_cannot_be_predicted_is_refused(change, arguments, error, message):
  bundle = dataclasses.replace(make_bundle(), **change)
  with pytest.raises(error, match=message):
    clm.predict(bundle, **{'texts': ['w1'], **arguments})
