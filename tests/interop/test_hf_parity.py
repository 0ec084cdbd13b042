"""Hidden states and logits equal PyTorch's, after import and after export, on random weights and configurations."""

import dataclasses
import functools
import json

import jax
import numpy as np
import pytest

from compactlm_jax.interop.bundle import from_pretrained, save_pretrained
from compactlm_jax.nn.encoder import encode
from compactlm_jax.nn.heads import MlmHead, RtdHead

pytestmark = pytest.mark.torch
TOLERANCE = 1e-5


def _reference(model, batch):
  """(hidden states, pooled, head outputs by our names) of a transformers model."""
  import torch

  ids, mask, types = (torch.tensor(a, dtype=torch.long) for a in batch)
  with torch.no_grad():
    out = model(input_ids=ids, attention_mask=mask, token_type_ids=types, output_hidden_states=True)
  name = type(model).__name__
  heads = {}
  if name.endswith('ForMaskedLM'):
    heads['mlm_head'] = out.logits.numpy()
  elif name == 'BertForPreTraining':
    heads['mlm_head'] = out.prediction_logits.numpy()
  elif name == 'ElectraForPreTraining':
    heads['rtd_head'] = out.logits.numpy()
  elif name.endswith('Classification'):
    heads['classifier'] = out.logits.numpy()
  pooled = getattr(out, 'pooler_output', None)
  return [h.numpy() for h in out.hidden_states], None if pooled is None else pooled.numpy(), heads


@functools.partial(jax.jit, static_argnames='config')
def _ours(params, config, batch):
  config = dataclasses.replace(config, scan_unroll=1)  # compiles faster
  out = encode(params, config, *batch, all_hidden=True)
  heads = {}
  if 'mlm_head' in params:
    word = params['encoder']['embeddings']['word']['embedding']
    heads['mlm_head'] = MlmHead(config).apply({'params': params['mlm_head']}, out.last_BTD, word)
  if 'rtd_head' in params:
    heads['rtd_head'] = RtdHead(config).apply({'params': params['rtd_head']}, out.last_BTD)
  if 'classifier' in params:
    vector = out.pooled_BD if config.pooler else out.last_BTD[:, 0]
    heads['classifier'] = vector @ params['classifier']['kernel'] + params['classifier']['bias'][None]
  return out.hidden_NBTD, out.pooled_BD, heads


def _assert_equal(ours, theirs):
  """All hidden states (padded positions too), the pooled vector and the logits of every head."""
  hidden, pooled, heads = ours
  hidden_ref, pooled_ref, heads_ref = theirs
  assert len(hidden) == len(hidden_ref)
  for layer, reference in zip(hidden, hidden_ref, strict=True):
    np.testing.assert_allclose(layer, reference, rtol=0, atol=TOLERANCE)
  if pooled_ref is not None:
    np.testing.assert_allclose(pooled, pooled_ref, rtol=0, atol=TOLERANCE)
  assert set(heads_ref) <= set(heads)
  for name, reference in heads_ref.items():
    np.testing.assert_allclose(heads[name], reference, rtol=0, atol=TOLERANCE)


def _files(folder):
  return {p.name: p.read_bytes() for p in folder.iterdir()}


def test_import_export_and_reload_agree_with_transformers(case, tools, tmp_path):
  """Mutation: swap two rows of the table, or write conv heads before attention heads: fails."""
  import transformers

  cls, options = case
  model = tools.save_torch(cls, options, tmp_path / 'theirs')
  batch = tools.random_batch(np.random.default_rng(1), options.get('type_vocab_size', 2))
  bundle = from_pretrained(tmp_path / 'theirs')
  ours = _ours(bundle.params, bundle.config, batch)
  _assert_equal(ours, _reference(model, batch))

  save_pretrained(bundle, tmp_path / 'ours')
  written = json.loads((tmp_path / 'ours/config.json').read_text())['architectures'][0]
  again, info = getattr(transformers, written).from_pretrained(tmp_path / 'ours', output_loading_info=True)
  assert not info['missing_keys'] - {'pooler.dense.weight', 'pooler.dense.bias'}
  assert not info['unexpected_keys'] - {'bert.pooler.dense.weight', 'bert.pooler.dense.bias'}
  expected = 'BertForMaskedLM' if cls == 'BertForPreTraining' else cls
  assert written == expected
  theirs = model.state_dict()
  for name, value in again.state_dict().items():
    assert np.array_equal(value.numpy(), theirs[name].numpy()), name
  _assert_equal(ours, _reference(again.eval(), batch))

  back = from_pretrained(tmp_path / 'ours')
  assert back.config == bundle.config
  assert jax.tree.all(jax.tree.map(lambda a, b: bool((a == b).all()), bundle.params, back.params))
  save_pretrained(back, tmp_path / 'second')
  assert _files(tmp_path / 'second') == _files(tmp_path / 'ours')


@pytest.mark.parametrize('cls', ['BertModel', 'ElectraForMaskedLM', 'ConvBertForMaskedLM'])
def test_prefix_and_shards_do_not_matter(cls, tools, tmp_path):
  """One file, shards with an index, with and without 'bert.': the same tree bit for bit."""
  import safetensors.numpy

  model = tools.save_torch(cls, dict(hidden_size=16, num_attention_heads=4), tmp_path / 'one')
  model.save_pretrained(tmp_path / 'shards', max_shard_size='8KB')
  assert len(list((tmp_path / 'shards').glob('*.safetensors'))) > 2
  prefix = model.base_model_prefix + '.'
  tensors = safetensors.numpy.load_file(tmp_path / 'one/model.safetensors')
  if any(name.startswith(prefix) for name in tensors):
    other = {name.removeprefix(prefix): value for name, value in tensors.items()}
  else:
    other = {prefix + name: value for name, value in tensors.items()}
  assert set(other) != set(tensors)
  (tmp_path / 'other').mkdir()
  (tmp_path / 'other/config.json').write_bytes((tmp_path / 'one/config.json').read_bytes())
  safetensors.numpy.save_file(other, tmp_path / 'other/model.safetensors')
  one = from_pretrained(tmp_path / 'one')
  for name in ('shards', 'other'):
    same = from_pretrained(tmp_path / name)
    assert same.config == one.config
    assert jax.tree.all(jax.tree.map(lambda a, b: bool((a == b).all()), one.params, same.params))


@pytest.mark.parametrize('cls', ['BertModel', 'ElectraModel', 'ConvBertModel'])
def test_heads_of_a_new_model_survive_and_transformers_reads_the_encoder(cls, tools, tmp_path):
  """A tree of ours with every head: our reload is bit-equal, transformers' hidden states agree."""
  import transformers

  options = dict(hidden_size=16, num_attention_heads=4) | ({} if cls == 'BertModel' else {'embedding_size': 8})
  tools.save_torch(cls, options, tmp_path / 'theirs')
  bundle = from_pretrained(tmp_path / 'theirs')
  config, key = bundle.config, jax.random.key(3)
  x_BTD = np.zeros((1, 2, config.hidden_size), np.float32)
  word = bundle.params['encoder']['embeddings']['word']['embedding']
  heads = {
    'mlm_head': MlmHead(config).init(key, x_BTD, word)['params'],
    'rtd_head': RtdHead(config).init(key, x_BTD)['params'],
    'classifier': {
      'kernel': jax.random.normal(key, (config.hidden_size, 3)),
      'bias': jax.random.normal(key, (3,)),
    },
  }
  full = type(bundle)(config, {**bundle.params, **heads})
  save_pretrained(full, tmp_path / 'ours')
  back = from_pretrained(tmp_path / 'ours')
  assert jax.tree.structure(back.params) == jax.tree.structure(full.params)
  assert jax.tree.all(jax.tree.map(lambda a, b: bool((a == b).all()), full.params, back.params))
  model = getattr(transformers, cls).from_pretrained(tmp_path / 'ours').eval()
  batch = tools.random_batch(np.random.default_rng(2))
  _assert_equal(_ours(back.params, back.config, batch), _reference(model, batch))


@pytest.mark.parametrize('dtype', ['float16', 'bfloat16'])
def test_half_precision_is_cast_up(dtype, tools, tmp_path):
  import torch

  model = tools.torch_model('BertModel', dict(hidden_size=16, num_attention_heads=4)).to(getattr(torch, dtype))
  model.save_pretrained(tmp_path)
  params = from_pretrained(tmp_path).params
  assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {np.dtype('float32')}
  expected = model.embeddings.word_embeddings.weight.detach().float().numpy()
  assert np.array_equal(params['encoder']['embeddings']['word']['embedding'], expected)
