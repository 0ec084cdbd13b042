"""The variants of mixed attention: causal, plain dynamic convolution, convolution alone."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from compactlm_jax.config import EncoderConfig
from compactlm_jax.errors import ConfigError
from compactlm_jax.nn.attention import MixedAttention
from compactlm_jax.nn.encoder import encode, encoder_shapes, init_encoder
from compactlm_jax.parallel import PARAM_RULES
from compactlm_jax.tree import match_one, named_leaves

SIZES = {'vocab_size': 16, 'hidden_size': 12, 'num_heads': 2, 'num_layers': 2, 'max_positions': 16}
VARIANTS = {
  'attention': {},
  'mixed': {'conv_kernel_size': 5},
  'dynamic': {'conv_kernel_size': 5, 'conv_kind': 'dynamic'},
  'span alone': {'conv_kernel_size': 5, 'self_attention': False},
  'dynamic alone': {'conv_kernel_size': 5, 'conv_kind': 'dynamic', 'self_attention': False},
}
LENGTH = 12  # more than a tap's reach


def variant(name, **changes):
  config = EncoderConfig(**{'scan_unroll': 1, **SIZES, **VARIANTS[name], **changes})
  params = init_encoder(config, jax.random.key(0))
  # Larger than initialised, so that nothing that matters rounds to zero.
  return config, jax.tree.map(lambda x: x * 20 if x.ndim > 2 else x, params)


@pytest.mark.parametrize('name', VARIANTS)
@pytest.mark.parametrize('key', [None, 3], ids=['evaluation', 'dropout'])
def test_causal_encoder_passes_exactly_nothing_back_from_the_future(name, key):
  """Each token has its own row of the word table; the gradient of position t's output reaches rows 0 to t only.

  Through two layers. Mutations: `causal` not given to attention, to the depthwise or to the dynamic convolution.
  """
  config, params = variant(name, causal=True)
  ids = jnp.arange(LENGTH)[None] + 2

  @jax.jit
  def jacobian(params):
    def outputs(word):
      tree = {**params['encoder'], 'embeddings': {**params['encoder']['embeddings'], 'word': {'embedding': word}}}
      dropout_key = None if key is None else jax.random.key(key)
      return encode({'encoder': tree}, config, ids, dropout_key=dropout_key).last_BTD[0, :, 0]

    return jax.jacrev(outputs)(params['encoder']['embeddings']['word']['embedding'])

  reached = np.abs(np.asarray(jacobian(params))[:, 2 : 2 + LENGTH]).sum(-1)  # [output, input]
  assert not np.triu(reached, 1).any()
  reach = LENGTH if config.self_attention else 2 * 4  # two layers of five taps
  expected = np.tril(np.triu(np.ones_like(reached), -reach))
  if key is None:
    np.testing.assert_array_equal(reached > 0, expected > 0)


@pytest.mark.parametrize('name', VARIANTS)
def test_causal_outputs_do_not_read_later_tokens(name):
  config, params = variant(name, causal=True)
  ids = jnp.arange(LENGTH)[None] + 2
  run = jax.jit(lambda ids: encode(params, config, ids).last_BTD)
  np.testing.assert_array_equal(run(ids)[:, :7], run(ids.at[:, 7:].set(1))[:, :7])


def softmax(x):
  weights = np.exp(x - x.max())
  return weights / weights.sum()


def convolution(weights, config, x, q):
  """One row's convolution branch by loops: x [T, D], q [T, H * K] -> [T, H * K]."""
  taps, size, length = config.conv_kernel_size, config.head_size, len(x)
  back = taps - 1 if config.causal else taps // 2
  value = x @ weights['value']['kernel'] + weights['value']['bias']
  out = np.zeros_like(q)
  for t in range(length):
    near = [(j, t + j - back) for j in range(taps) if 0 <= t + j - back < length]
    merged = q[t]
    if config.conv_kind == 'span':
      span = sum(x[s] * weights['depthwise']['kernel'][j] for j, s in near)
      merged = merged * (span @ weights['pointwise']['kernel'] + weights['pointwise']['bias'])
    logits = (merged @ weights['taps']['kernel'] + weights['taps']['bias']).reshape(-1, taps)
    for h in range(config.num_heads):
      channels = slice(h * size, (h + 1) * size)
      out[t, channels] = sum(softmax(logits[h])[j] * value[s, channels] for j, s in near)
  return out


@pytest.mark.parametrize('name', ['span alone', 'dynamic alone'])
@pytest.mark.parametrize('causal', [False, True])
def test_convolution_alone_equals_loops(name, causal):
  """Mutation: leave out the softmax, or multiply by the span in 'dynamic' as well."""
  config, params = variant(name, causal=causal)
  weights = jax.tree.map(lambda leaf: np.asarray(leaf[0], np.float64), params['encoder']['layers']['attention'])
  x = np.random.default_rng(0).normal(size=(2, LENGTH, config.hidden_size))
  q = x @ weights['query']['kernel'] + weights['query']['bias']
  heads = np.stack([convolution(weights['conv'], config, *row) for row in zip(x, q)])
  want = heads @ weights['output']['kernel'] + weights['output']['bias']
  tree = jax.tree.map(lambda leaf: leaf[0], params['encoder']['layers']['attention'])
  mask = jnp.ones(x.shape[:2], jnp.int32)
  got, qkv = MixedAttention(config).apply({'params': tree}, jnp.asarray(x, jnp.float32), mask, None, 0)
  assert qkv is None
  np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize('name', VARIANTS)
def test_parameters_of_each_variant_have_a_placement(name):
  config = EncoderConfig(**SIZES, **VARIANTS[name])
  shapes = {n: leaf.shape for n, leaf in named_leaves(encoder_shapes(config)).items()}
  for leaf in shapes:
    match_one(PARAM_RULES, leaf, 'sharding')
  parts = {n.removeprefix('encoder/layers/attention/') for n in shapes if '/attention/' in n and 'kernel' in n}
  attention = {'query/kernel', 'output/kernel'} | ({'key/kernel', 'value/kernel'} if config.self_attention else set())
  conv = {'conv/taps/kernel', 'conv/value/kernel'} if config.conv_kernel_size else set()
  span = {'conv/depthwise/kernel', 'conv/pointwise/kernel'} if conv and config.conv_kind == 'span' else set()
  assert parts == attention | conv | span
  branches = config.self_attention + bool(conv)
  assert shapes['encoder/layers/attention/output/kernel'] == (2, 12 * branches, 12)


def test_queries_keys_and_values_need_self_attention():
  config, params = variant('span alone')
  with pytest.raises(ConfigError, match='encoder.self_attention'):
    encode(params, config, jnp.ones((1, 4), jnp.int32), qkv_layers=(1,))
