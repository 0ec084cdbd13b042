"""Pre-training pairs in both directions: transformers' logits from its folders, ours from an exported run.

Shapes in the ratios of the published pairs: a generator of one head, of two heads of which one is left per branch, of
four of which two are left, with a grouped feed-forward.
"""

import dataclasses
import functools
import json

import jax
import numpy as np
import pytest

from compactlm_jax.config import ElectraConfig, EncoderConfig
from compactlm_jax.interop import names
from compactlm_jax.interop.bundle import Bundle, from_pretrained, save_pretrained
from compactlm_jax.interop.pretrained import electra_start, mlm_start, save_pretraining
from compactlm_jax.nn.encoder import encode
from compactlm_jax.nn.heads import MlmHead, RtdHead
from compactlm_jax.tasks.electra import generator_params
from compactlm_jax.tree import named_leaves, nested

pytestmark = pytest.mark.torch
TOLERANCE = 1e-5
SIZES = dict(vocab_size=37, num_layers=2, max_positions=32, scan_unroll=1)
mixed = functools.partial(EncoderConfig.mixed, head_ratio=2, conv_sees_padding=True, **SIZES)
QUARTER, THIRD = ElectraConfig(generator_size=0.25), ElectraConfig(generator_size=1 / 3)
PAIRS = {
  'electra-small': (EncoderConfig('electra', hidden_size=32, num_heads=4, embedding_size=12, **SIZES), QUARTER),
  'electra-base': (EncoderConfig('electra', hidden_size=24, num_heads=6, **SIZES), THIRD),
  'convbert-small, 2 heads': (
    mixed(heads=4, hidden_size=32, embedding_size=12),
    dataclasses.replace(QUARTER, generator_heads=2),
  ),
  'convbert-medium-small': (mixed(heads=8, hidden_size=48, embedding_size=16, num_groups=2), QUARTER),
  'convbert-base': (mixed(heads=12, hidden_size=48, conv_kernel_size=5), THIRD),
}


@functools.partial(jax.jit, static_argnames=('config', 'head'))
def _logits(params, config, batch, head):
  """Logits of a head; without one, the last hidden state."""
  x_BTD = encode(params, config, *batch).last_BTD
  if not head:
    return x_BTD
  if head == 'rtd_head':
    return RtdHead(config).apply({'params': params[head]}, x_BTD)
  return MlmHead(config).apply({'params': params[head]}, x_BTD, params['encoder']['embeddings']['word']['embedding'])


def _theirs(model, batch):
  """(last hidden state, logits if the class has any) of a transformers model."""
  import torch

  ids, mask, types = (torch.tensor(a, dtype=torch.long) for a in batch)
  with torch.no_grad():
    out = model.eval()(input_ids=ids, attention_mask=mask, token_type_ids=types, output_hidden_states=True)
  logits = out.get('logits')
  return out.hidden_states[-1].numpy(), None if logits is None else logits.numpy()


def _tree(encoder, electra):
  """A random trained tree of the task, embeddings shared; values five times as wide as initial ones."""
  rng = np.random.default_rng(3)
  generator = electra.generator_encoder(encoder)

  def draw(config, *parts):
    return {
      n: (n.endswith('scale') + 0.1 * rng.standard_normal(s)).astype(np.float32)
      for n, s in names.leaf_shapes(config, parts).items()
    }

  shared = tuple(f'encoder/embeddings/{part}/' for part in ('word', 'position', 'token_type', 'norm'))
  own = {n: a for n, a in draw(generator, 'encoder', 'mlm_head').items() if not n.startswith(shared)}
  return nested({**draw(encoder, 'encoder', 'rtd_head'), **{f'generator/{n}': a for n, a in own.items()}})


def _equal(a, b):
  a, b = named_leaves(a), named_leaves(b)
  return list(a) == list(b) and all(np.array_equal(a[n], b[n]) for n in a)


@pytest.mark.parametrize('pair', PAIRS)
def test_an_exported_run_has_transformers_logits_and_starts_the_same_run_again(pair, tools, tmp_path):
  """Ours -> transformers -> same logits; and back bit for bit, to the same files.

  Mutation: write 'num_attention_heads': config.num_heads for ConvBERT.
  """
  import transformers

  encoder, electra = PAIRS[pair]
  tree, generator_encoder = _tree(encoder, electra), electra.generator_encoder(encoder)
  discriminator = {name: tree[name] for name in ('encoder', 'rtd_head')}
  bundles = Bundle(encoder, discriminator), Bundle(generator_encoder, generator_params(tree, electra))
  save_pretraining(*bundles, tmp_path / 'e')
  batch = tools.random_batch(np.random.default_rng(1))
  kind = {'electra': 'Electra', 'convbert': 'ConvBert'}[encoder.architecture]

  folder = tmp_path / 'e/generator'
  assert json.loads((folder / 'config.json').read_text())['architectures'] == [f'{kind}ForMaskedLM']
  model, info = getattr(transformers, f'{kind}ForMaskedLM').from_pretrained(folder, output_loading_info=True)
  assert not info['missing_keys'] and not info['unexpected_keys']
  ours = _logits(bundles[1].params, generator_encoder, batch, 'mlm_head')
  np.testing.assert_allclose(ours, _theirs(model, batch)[1], rtol=0, atol=TOLERANCE)
  word = bundles[0].params['encoder']['embeddings']['word']['embedding']
  assert np.array_equal(model.get_output_embeddings().weight.detach().numpy(), word)
  assert model.config.pad_token_id == 0 and model.config.bos_token_id is None

  _check_discriminator(tmp_path / 'e', bundles[0], batch, kind)
  back = from_pretrained(tmp_path / 'e'), from_pretrained(folder)
  start, fresh = electra_start(*back, encoder, generator_encoder, 'embeddings')
  assert fresh == () and _equal(start, tree)
  save_pretraining(*back, tmp_path / 'second')
  files = [p.relative_to(tmp_path / 'e') for p in (tmp_path / 'e').rglob('*') if p.is_file()]
  assert all((tmp_path / 'e' / f).read_bytes() == (tmp_path / 'second' / f).read_bytes() for f in files)


def _check_discriminator(folder, bundle, batch, kind):
  """AutoModel reads the encoder; ELECTRA's class the replaced-token head too, ConvBERT has no class for it."""
  import transformers

  hidden = _logits(bundle.params, bundle.config, batch, '')
  auto = transformers.AutoModel.from_pretrained(folder)
  assert type(auto).__name__ == f'{kind}Model'
  np.testing.assert_allclose(hidden, _theirs(auto, batch)[0], rtol=0, atol=TOLERANCE)
  if kind == 'Electra':
    model, info = transformers.ElectraForPreTraining.from_pretrained(folder, output_loading_info=True)
    assert not info['missing_keys'] and not info['unexpected_keys']
    ours = _logits(bundle.params, bundle.config, batch, 'rtd_head')
    np.testing.assert_allclose(ours, _theirs(model, batch)[1], rtol=0, atol=TOLERANCE)
  else:
    _, info = transformers.ConvBertModel.from_pretrained(folder, output_loading_info=True)
    assert not info['missing_keys']
    assert {name.split('.')[0] for name in info['unexpected_keys']} == {'discriminator_predictions'}


@pytest.mark.parametrize('pair', ['electra-small', 'convbert-medium-small'])
def test_released_weights_start_a_run_with_transformers_logits(pair, tools, tmp_path):
  """transformers -> ours: the parts of the tree, put together again, give transformers' logits.

  The two folders' tables differ, as they do where each was saved from an untied pair: with sharing 'none' both keep
  theirs; what ConvBERT's folder lacks is fresh.
  """
  encoder, electra = PAIRS[pair]
  generator_encoder = electra.generator_encoder(encoder)
  kind = {'electra': 'Electra', 'convbert': 'ConvBert'}[encoder.architecture]
  cls = {'Electra': 'ElectraForPreTraining', 'ConvBert': 'ConvBertModel'}[kind]
  options = [_options(config) for config in (encoder, generator_encoder)]
  models = [tools.save_torch(cls, options[0], tmp_path / 'd'), tools.save_torch(f'{kind}ForMaskedLM', options[1],
            tmp_path / 'g')]  # fmt: skip
  discriminator, generator = from_pretrained(tmp_path / 'd'), from_pretrained(tmp_path / 'g')
  encoders = [dataclasses.replace(b.config, scan_unroll=1) for b in (discriminator, generator)]
  assert encoders[1] == dataclasses.replace(electra.generator_encoder(encoders[0]))
  start, fresh = electra_start(discriminator, generator, *encoders, 'none')
  assert fresh == (() if kind == 'Electra' else ('rtd_head',))
  batch = tools.random_batch(np.random.default_rng(1))
  ours = _logits(start['generator'], encoders[1], batch, 'mlm_head')
  np.testing.assert_allclose(ours, _theirs(models[1], batch)[1], rtol=0, atol=TOLERANCE)
  hidden, logits = _theirs(models[0], batch)
  np.testing.assert_allclose(_logits(start, encoders[0], batch, ''), hidden, rtol=0, atol=TOLERANCE)
  if kind == 'Electra':
    np.testing.assert_allclose(_logits(start, encoders[0], batch, 'rtd_head'), logits, rtol=0, atol=TOLERANCE)


def _options(config):
  """Arguments of transformers' configuration, written out here again."""
  options = dict(
    hidden_size=config.hidden_size,
    embedding_size=config.embedding_size,
    intermediate_size=config.intermediate_size,
    num_attention_heads=config.num_heads,
  )
  if config.architecture == 'electra':
    return options
  heads = config.hidden_size // config.head_size
  return {
    **options,
    'num_attention_heads': heads,
    'head_ratio': 2,
    'conv_kernel_size': config.conv_kernel_size,
    'num_groups': config.num_groups,
    'pad_token_id': 0,
  }


@pytest.mark.parametrize(
  ('kind', 'cls', 'causal'),
  [
    ('bert', 'BertForMaskedLM', False),
    ('electra', 'ElectraForMaskedLM', False),
    ('convbert', 'ConvBertForMaskedLM', False),
    ('bert', 'BertLMHeadModel', True),
    ('electra', 'ElectraForCausalLM', True),
  ],
)
def test_a_language_model_goes_out_and_comes_back(kind, cls, causal, tools, tmp_path):
  """Masked and causal language models; the causal one is a decoder for transformers. Mutation: drop is_decoder."""
  import transformers

  heads = dict(num_heads=2) if kind != 'convbert' else dict(num_heads=1, head_size=8, conv_kernel_size=3)
  config = EncoderConfig(
    kind, hidden_size=16, causal=causal, conv_sees_padding=kind == 'convbert', **heads, **SIZES
  )  # fmt: skip
  rng = np.random.default_rng(0)
  shapes = names.leaf_shapes(config, ('encoder', 'mlm_head'))
  params = nested({n: 0.2 * rng.standard_normal(s).astype(np.float32) for n, s in shapes.items()})
  save_pretrained(Bundle(config, params), tmp_path / 'e')
  assert json.loads((tmp_path / 'e/config.json').read_text())['architectures'] == [cls]
  model, info = getattr(transformers, cls).from_pretrained(tmp_path / 'e', output_loading_info=True)
  assert not info['missing_keys'] and not info['unexpected_keys']
  batch = tools.random_batch(np.random.default_rng(1))
  ours = _logits(params, config, batch, 'mlm_head')
  real = np.asarray(batch[1], bool)  # a padded query of a decoder reads what neither side defines
  np.testing.assert_allclose(ours[real], _theirs(model, batch)[1][real], rtol=0, atol=TOLERANCE)
  back = from_pretrained(tmp_path / 'e')
  assert back.config == config
  start, fresh = mlm_start(back, config)
  assert fresh == () and _equal(start, params)
