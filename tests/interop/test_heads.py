"""Heads of fine-tuned models: what transformers computes from our folders, and we from its."""

import dataclasses
import json

import jax
import numpy as np
import pytest
import safetensors.numpy

from compactlm_jax.config import EncoderConfig
from compactlm_jax.errors import ConfigError, DataError
from compactlm_jax.interop import first_token
from compactlm_jax.interop.bundle import Bundle, from_pretrained, save_pretrained
from compactlm_jax.interop.hf_config import labels_of
from compactlm_jax.nn.encoder import encode, encoder_shapes
from compactlm_jax.nn.span import JointSpanHead

SMALL = dict(vocab_size=37, hidden_size=16, num_layers=1, num_heads=4, max_positions=32)
KINDS = {
  'bert': dict(hidden_size=16, num_attention_heads=4),
  'electra': dict(hidden_size=16, num_attention_heads=4, embedding_size=8),
  'convbert': dict(hidden_size=16, num_attention_heads=4, embedding_size=8),
}
NAMES = {'bert': 'Bert', 'electra': 'Electra', 'convbert': 'ConvBert'}
_ENCODE = jax.jit(encode, static_argnums=1)
LABELS = ('no', 'yes', 'maybe')


def _bundle(kind='bert', classes=0, span=False, labels=(), **fields):
  mixed = {'num_heads': 2, 'head_size': 4, 'conv_kernel_size': 3, 'conv_sees_padding': True}
  config = EncoderConfig(kind, **{**SMALL, **(mixed if kind == 'convbert' else {}), **fields})
  rng = np.random.default_rng(5)
  params = jax.tree.map(lambda s: (rng.standard_normal(s.shape) / 3).astype(s.dtype), encoder_shapes(config))
  sizes = {'classifier': classes, 'span': 2 * span}
  for name, size in sizes.items():
    if size:
      kernel = rng.standard_normal((config.hidden_size, size)).astype(np.float32)
      params[name] = {'kernel': kernel, 'bias': rng.standard_normal(size).astype(np.float32)}
  return Bundle(config, params, labels=labels)


def _outputs(bundle, batch, head):
  """Logits of a head by NumPy on our hidden states."""
  out = _ENCODE(bundle.params, dataclasses.replace(bundle.config, scan_unroll=1), *batch)
  if head == 'classifier':
    x = out.pooled_BD if bundle.config.pooler else out.last_BTD[:, 0]
  else:
    x = out.last_BTD
  return np.asarray(x) @ np.asarray(bundle.params[head]['kernel']) + np.asarray(bundle.params[head]['bias'])


def _theirs(model, batch):
  import torch

  ids, mask, types = (torch.tensor(a, dtype=torch.long) for a in batch)
  with torch.no_grad():
    out = model.eval()(input_ids=ids, attention_mask=mask, token_type_ids=types)
  if hasattr(out, 'start_logits'):
    return np.stack([out.start_logits.numpy(), out.end_logits.numpy()], -1)
  return out.logits.numpy()


def _written(folder):
  return json.loads((folder / 'config.json').read_text())


@pytest.mark.torch
@pytest.mark.parametrize('kind', KINDS)
def test_spans_equal_transformers_both_ways(kind, tools, tmp_path):
  """Start and end logits of every token. Mutation: swap the two columns of qa_outputs."""
  transformers = pytest.importorskip('transformers')
  cls = NAMES[kind] + 'ForQuestionAnswering'
  model = tools.save_torch(cls, {**KINDS[kind], 'num_labels': 2}, tmp_path / 'theirs')
  batch = tools.random_batch(np.random.default_rng(1))
  bundle = from_pretrained(tmp_path / 'theirs')
  assert set(bundle.params) == {'encoder', 'span'} and bundle.labels == ()
  np.testing.assert_allclose(_outputs(bundle, batch, 'span'), _theirs(model, batch), rtol=0, atol=1e-5)

  ours = _bundle(kind, span=True)
  save_pretrained(ours, tmp_path / 'ours')
  assert _written(tmp_path / 'ours')['architectures'] == [cls]
  again, info = getattr(transformers, cls).from_pretrained(tmp_path / 'ours', output_loading_info=True)
  assert not info['missing_keys'] and not info['unexpected_keys']
  np.testing.assert_allclose(_theirs(again, batch), _outputs(ours, batch, 'span'), rtol=0, atol=1e-5)
  back = from_pretrained(tmp_path / 'ours')
  assert jax.tree.all(jax.tree.map(np.array_equal, back.params, ours.params))


@pytest.mark.torch
@pytest.mark.parametrize('classes', [1, 3])
@pytest.mark.parametrize('kind', [*KINDS, 'pooler'])
def test_classifiers_equal_transformers(kind, classes, tools, tmp_path):
  """On the first token, and on BERT's pooled vector. Mutation: leave the negatives out of `dense`; SMALL = .01."""
  transformers = pytest.importorskip('transformers')
  kind, pooler = ('bert', True) if kind == 'pooler' else (kind, False)
  ours = _bundle(kind, classes, labels=LABELS if classes == 3 else (), pooler=pooler)
  save_pretrained(ours, tmp_path / 'ours')
  cls = NAMES[kind] + 'ForSequenceClassification'
  model, info = getattr(transformers, cls).from_pretrained(tmp_path / 'ours', output_loading_info=True)
  assert not info['missing_keys'] and not info['unexpected_keys'] and model.num_labels == classes
  if classes == 3:
    assert model.config.id2label == dict(enumerate(LABELS)) and model.config.label2id['yes'] == 1
  else:
    assert model.config.problem_type == 'regression'
  batch = tools.random_batch(np.random.default_rng(2))
  expected = _outputs(ours, batch, 'classifier')
  np.testing.assert_allclose(_theirs(model, batch), expected, rtol=0, atol=1e-5)
  model.save_pretrained(tmp_path / 'theirs')
  for folder in ('ours', 'theirs'):
    back = from_pretrained(tmp_path / folder)
    assert back.labels == ours.labels
    assert jax.tree.all(jax.tree.map(np.array_equal, back.params, ours.params))


def test_a_classifier_that_does_not_fit_stays_beside_the_encoder(tmp_path, caplog):
  """More classes than half the width have no room in ELECTRA's head."""
  bundle = _bundle('electra', classes=9)
  save_pretrained(bundle, tmp_path / 'm')
  assert _written(tmp_path / 'm')['architectures'] == ['ElectraModel']
  assert 'transformers will ignore classifier' in caplog.text
  back = from_pretrained(tmp_path / 'm')
  assert np.array_equal(back.params['classifier']['kernel'], bundle.params['classifier']['kernel'])


@pytest.mark.parametrize('dtype', ['float32', 'float16', 'bfloat16'])
def test_a_bert_whose_pooler_passes_the_first_token_is_ours(dtype, tmp_path):
  """Whoever saves the folder in half precision loses no more than that. Mutation: compare in half precision alone."""
  ours = _bundle(classes=2)
  save_pretrained(ours, tmp_path / 'm')
  (tmp_path / 'm/manifest.json').unlink()
  tensors = safetensors.numpy.load_file(tmp_path / 'm/model.safetensors')
  half = {name: tensor.astype(dtype) for name, tensor in tensors.items()}
  safetensors.numpy.save_file(half, tmp_path / 'm/model.safetensors')
  back = from_pretrained(tmp_path / 'm')
  assert not back.config.pooler and 'pooler' not in back.params['encoder']
  kernel = ours.params['classifier']['kernel']
  np.testing.assert_allclose(back.params['classifier']['kernel'], kernel.astype(dtype).astype(np.float32), rtol=1e-6)
  half['bert.pooler.dense.weight'][3, 2] = 1
  safetensors.numpy.save_file(half, tmp_path / 'm/model.safetensors')
  assert from_pretrained(tmp_path / 'm').config.pooler


@pytest.mark.parametrize('answerable', [False, True])
def test_the_joint_span_head_stays_beside_the_encoder(answerable, tmp_path, caplog):
  """Mutation: leave out the layers of answerability."""
  bundle = _bundle('electra', embedding_size=8)
  head = JointSpanHead(bundle.config, answerable=answerable)
  fresh = head.init(jax.random.key(0), np.zeros((1, 2, 16), np.float32), np.ones((1, 2), bool))['params']
  full = dataclasses.replace(bundle, params={**bundle.params, 'span': dict(fresh)})
  save_pretrained(full, tmp_path / 'm')
  assert 'transformers will ignore joint span' in caplog.text
  assert _written(tmp_path / 'm')['architectures'] == ['ElectraModel']
  back = from_pretrained(tmp_path / 'm')
  assert jax.tree.structure(back.params) == jax.tree.structure(jax.tree.map(np.asarray, full.params))
  assert jax.tree.all(jax.tree.map(np.array_equal, back.params, full.params))


def test_a_trained_two_layer_head_is_refused(tmp_path):
  """Mutation: take the first rows of `dense` without a look at the rest."""
  save_pretrained(_bundle('electra', classes=2), tmp_path / 'm')
  (tmp_path / 'm/manifest.json').unlink()
  tensors = safetensors.numpy.load_file(tmp_path / 'm/model.safetensors')
  tensors['classifier.dense.weight'][7, 3] += 1e-3
  safetensors.numpy.save_file(tensors, tmp_path / 'm/model.safetensors')
  with pytest.raises(DataError, match='classifier of two layers was trained here'):
    from_pretrained(tmp_path / 'm')
  for shape in ((), (2,), (0, 16)):
    with pytest.raises(DataError, match='two layers'):
      first_token.narrowed({'classifier.out_proj.weight': np.zeros(shape, np.float32)}, EncoderConfig('electra'))


@pytest.mark.parametrize(
  ('raw', 'labels'),
  [
    ({}, ()),
    ({'id2label': {'0': 'LABEL_0', '1': 'LABEL_1'}}, ()),
    ({'id2label': {'1': 'b', '0': 'a'}}, ('a', 'b')),
    ({'id2label': {str(i): f'c{i}' for i in range(11)}}, tuple(f'c{i}' for i in range(11))),
  ],
)
def test_labels_are_read_by_number(raw, labels):
  """Mutation: sort the keys as text."""
  assert labels_of(raw) == labels


@pytest.mark.parametrize('named', [['a'], {'1': 'a'}, {'0': 3}, {'0': 'a', '1': 'a'}, 'x'])
def test_labels_that_make_no_sense_are_refused(named):
  with pytest.raises(ConfigError, match='id2label'):
    labels_of({'id2label': named})


def test_labels_must_be_as_many_as_outputs(tmp_path):
  with pytest.raises(ConfigError, match='labels: 2 names for the 3 outputs'):
    save_pretrained(_bundle('electra', classes=3, labels=('a', 'b')), tmp_path / 'm')
  save_pretrained(_bundle('electra', classes=3, labels=LABELS), tmp_path / 'm')
  (tmp_path / 'm/manifest.json').unlink()
  raw = _written(tmp_path / 'm') | {'id2label': {'0': 'a', '1': 'b'}}
  (tmp_path / 'm/config.json').write_text(json.dumps(raw))
  with pytest.raises(ConfigError, match='id2label names 2 classes, the classifier has 3'):
    from_pretrained(tmp_path / 'm')
