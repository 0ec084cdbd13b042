"""The encoder: published sizes, cuts of the stack, padding, options."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from compactlm_jax.config import EncoderConfig
from compactlm_jax.errors import ConfigError
from compactlm_jax.nn import encoder as module
from compactlm_jax.nn.encoder import encoder_shapes, init_encoder
from compactlm_jax.nn.heads import RtdHead
from compactlm_jax.tree import named_leaves

mixed = EncoderConfig.mixed
encode = jax.jit(module.encode, static_argnames=('config', 'all_hidden', 'qkv_layers', 'skip_above'))

# Published sizes, exact from the shapes; a generator's word table belongs to its discriminator, but is counted there.
PUBLISHED = {
  'bert-base': (EncoderConfig(pooler=True), 109_482_240),
  'electra-base': (EncoderConfig(architecture='electra'), 108_891_648),
  'electra-small': (
    EncoderConfig(architecture='electra', hidden_size=256, num_heads=4, embedding_size=128),
    13_483_008,
  ),
  'convbert-small': (mixed(heads=4, head_ratio=2, hidden_size=256, embedding_size=128), 13_143_768),
  'convbert-medium-small': (
    mixed(heads=8, head_ratio=2, hidden_size=384, embedding_size=128, num_groups=2),
    17_475_888,
  ),
  'convbert-base': (mixed(heads=12, head_ratio=2, hidden_size=768), 105_680_520),
  'convbert-small-generator': (mixed(heads=1, head_ratio=2, hidden_size=64, embedding_size=128), 4_743_852),
  'convbert-medium-small-generator': (
    mixed(heads=2, head_ratio=2, hidden_size=96, embedding_size=128, num_groups=2),
    4_844_748,
  ),
  'convbert-base-generator': (mixed(heads=4, head_ratio=2, hidden_size=256, embedding_size=768), 33_171_928),
  'minilm-l12-h384': (EncoderConfig(hidden_size=384, pooler=True), 33_360_000),
  'minilm-l6-h384': (EncoderConfig(hidden_size=384, num_layers=6, pooler=True), 22_713_216),
  'minilm-l6-h768': (EncoderConfig(num_layers=6, pooler=True), 66_955_008),
  'minilm-l4-h384': (EncoderConfig(hidden_size=384, num_layers=4, pooler=True), 19_164_288),
  'minilm-l3-h384': (EncoderConfig(hidden_size=384, num_layers=3, pooler=True), 17_389_824),
  'minilm-l12-h384-e128': (EncoderConfig(hidden_size=384, embedding_size=128, pooler=True), 25_463_808),
}


@pytest.mark.parametrize('name', PUBLISHED)
def test_published_parameter_counts(name):
  config, count = PUBLISHED[name]
  assert sum(leaf.size for leaf in jax.tree.leaves(encoder_shapes(config))) == count


def test_parameter_names_of_every_part():
  config = mixed(heads=4, head_ratio=2, hidden_size=16, embedding_size=8, num_groups=2, num_layers=2, vocab_size=11)
  shapes = {n: leaf.shape for n, leaf in named_leaves(encoder_shapes(config)).items()}
  assert shapes['encoder/embeddings/word/embedding'] == (11, 8)
  assert shapes['encoder/embeddings/projection/kernel'] == (8, 16)
  assert shapes['encoder/layers/attention/query/kernel'] == (2, 16, 8)
  assert shapes['encoder/layers/attention/conv/depthwise/kernel'] == (2, 9, 16)
  assert shapes['encoder/layers/attention/conv/taps/kernel'] == (2, 8, 18)
  assert shapes['encoder/layers/attention/output/kernel'] == (2, 16, 16)
  assert shapes['encoder/layers/ffn_in/kernel'] == (2, 2, 8, 32)
  assert len(shapes) == 30  # 7 in the embeddings, 8 + 7 in attention, 8 in the feed-forward and norms


TINY = {
  'bert': EncoderConfig(vocab_size=40, hidden_size=16, num_layers=3, num_heads=2, pooler=True, scan_unroll=1),
  'odd-heads': EncoderConfig(vocab_size=40, hidden_size=16, num_layers=3, num_heads=3, head_size=5, scan_unroll=1),
  'convbert': mixed(
    heads=4,
    head_ratio=2,
    vocab_size=40,
    hidden_size=16,
    num_layers=3,
    embedding_size=8,
    conv_kernel_size=3,
    num_groups=2,
    scan_unroll=1,
  ),
}


@pytest.fixture(scope='module', params=TINY)
def model(request):
  config = TINY[request.param]
  return config, jax.jit(init_encoder, static_argnums=0)(config, jax.random.key(1))


def tokens(rows=3, length=9, vocab=40):
  ids = np.random.default_rng(0).integers(0, vocab, (rows, length))
  mask = (np.arange(length) < np.array([[length], [5], [3]])).astype(np.int32)
  return jnp.asarray(ids), jnp.asarray(mask), jnp.asarray((np.arange(length) > 3) * np.ones((rows, 1), np.int32), int)


def test_cutting_the_stack_changes_nothing(model):
  """Mutation: fold the dropout key by position in the cut instead of by layer."""
  config, params = model
  args, key = tokens(), jax.random.key(5)
  whole = encode(params, config, *args, dropout_key=key, all_hidden=True)
  cut = encode(params, config, *args, dropout_key=key, all_hidden=True, qkv_layers=(3, 1))
  np.testing.assert_allclose(whole.hidden_NBTD, cut.hidden_NBTD, atol=1e-6)  # the same numbers, fused differently
  assert len(whole.hidden_NBTD) == config.num_layers + 1
  np.testing.assert_array_equal(whole.hidden_NBTD[-1], whole.last_BTD)
  below = encode(params, config, *args, dropout_key=key, qkv_layers=(1,), skip_above=True)
  np.testing.assert_allclose(below.last_BTD, whole.hidden_NBTD[1], atol=1e-6)
  np.testing.assert_allclose(below.qkv[0].q_BTHK, cut.qkv[1].q_BTHK, atol=1e-6)


def test_what_the_encoder_does_not_have_is_refused(model):
  """Mutation: number layers from 0; look up positions with NaN beyond the table."""
  config, params = model
  ids = tokens()[0]
  for layer in (-1, 0, config.num_layers + 1):
    with pytest.raises(ConfigError, match=f'layers are numbered from 1 to {config.num_layers}'):
      module.encode(params, config, ids, qkv_layers=(layer,))
  short = dataclasses.replace(config, max_positions=ids.shape[1] - 1)
  with pytest.raises(ConfigError, match=f'config.encoder.max_positions: rows of {ids.shape[1]} tokens'):
    module.encode(params, short, ids)


def test_qkv_is_the_projection_of_the_layers_input(model):
  config, params = model
  out = encode(params, config, *tokens(), all_hidden=True, qkv_layers=(2,))
  weights = params['encoder']['layers']['attention']
  for name, got in (('query', out.qkv[0].q_BTHK), ('key', out.qkv[0].k_BTHK), ('value', out.qkv[0].v_BTHK)):
    kernel, bias = (np.asarray(weights[name][part][1]) for part in ('kernel', 'bias'))
    want = np.asarray(out.hidden_NBTD[1]) @ kernel + bias
    np.testing.assert_allclose(got.reshape(want.shape), want, atol=1e-5)
    assert got.shape[2:] == (config.num_heads, config.head_size)


def test_padding_changes_nothing_in_clean_mode(model):
  """Mutation: drop `* real_BT1` in SpanDynamicConv."""
  config, params = model
  ids, mask, types = tokens()
  longer = [jnp.pad(x, ((0, 0), (0, 6)), constant_values=c) for x, c in ((ids, 7), (mask, 0), (types, 1))]
  short = encode(params, config, ids, mask, types).last_BTD
  long = encode(params, config, *longer).last_BTD
  real = np.asarray(mask, bool)
  np.testing.assert_allclose(short[real], long[:, : ids.shape[1]][real], atol=2e-6)


def test_parity_mode_of_the_convolution_sees_padding():
  config = dataclasses.replace(TINY['convbert'], conv_sees_padding=True)
  params = jax.jit(init_encoder, static_argnums=0)(config, jax.random.key(1))
  ids, mask, types = tokens()
  other = jnp.where(mask > 0, ids, (ids + 1) % 40)
  a, b = (encode(params, config, x, mask, types).last_BTD for x in (ids, other))
  assert float(jnp.abs(a - b)[np.asarray(mask, bool)].max()) > 1e-4


@pytest.mark.parametrize(
  'change', [{'remat': True}, {'scan_unroll': 0}, pytest.param({'scan_unroll': 2}, marks=pytest.mark.slow)]
)
def test_remat_and_unroll_keep_values_and_gradients(model, change):
  config, params = model
  key = jax.random.key(2)

  @functools.partial(jax.jit, static_argnums=1)
  @jax.value_and_grad
  def value(params, config):
    return encode(params, config, *tokens(), dropout_key=key).last_BTD.sum(axis=-1)[0, 0]

  want = value(params, config)
  got = value(params, dataclasses.replace(config, **change))
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-5), got, want)


@pytest.mark.parametrize('unroll', [0, 1, pytest.param(2, marks=pytest.mark.slow)])
def test_remat_computes_layers_again(model, unroll):
  """However they are unrolled. Mutation: let XLA merge the recomputation of unrolled layers with the forward pass."""
  config, params = model

  def flops(remat):
    changed = dataclasses.replace(config, remat=remat, scan_unroll=unroll)
    value = jax.jit(jax.grad(lambda params: encode(params, changed, *tokens()).last_BTD.sum()))
    return value.lower(params).compile().cost_analysis()['flops']

  assert flops(True) > 1.05 * flops(False)  # merged: 1.0004


def test_jit_equals_eager(model):
  config, params = model
  eager = module.encode(params, config, *tokens()).last_BTD
  np.testing.assert_allclose(encode(params, config, *tokens()).last_BTD, eager, atol=2e-6)


def test_bfloat16_keeps_float32_parameters_and_is_close(model):
  config, params = model
  half = dataclasses.replace(config, dtype='bfloat16')
  assert {leaf.dtype.name for leaf in jax.tree.leaves(init_encoder(half, jax.random.key(0)))} == {'float32'}
  out = encode(params, half, *tokens()).last_BTD
  assert out.dtype == jnp.bfloat16
  np.testing.assert_allclose(out.astype(jnp.float32), encode(params, config, *tokens()).last_BTD, atol=0.1)


@pytest.mark.parametrize('bad', [-1, 40])
def test_an_id_outside_the_vocabulary_is_never_another_row(model, bad):
  """Mutation: index with signed ids, and -1 reads the last row."""
  config, params = model
  ids, mask, types = tokens()
  assert bool(jnp.isnan(encode(params, config, ids.at[0, 0].set(bad), mask, types).last_BTD[0, 0]).all())


def test_dropout_does_not_depend_on_the_number_of_devices(model):
  config, params = model
  args = [jnp.tile(x[:1], (8, 1)) for x in tokens()]
  key = jax.random.key(9)
  mesh = jax.make_mesh((8,), ('data',), axis_types=(jax.sharding.AxisType.Auto,))
  rows = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec('data'))
  one = encode(params, config, *args, dropout_key=key).last_BTD
  eight = encode(params, config, *[jax.device_put(x, rows) for x in args], dropout_key=key).last_BTD
  np.testing.assert_allclose(one, eight, atol=2e-6)
  assert float(jnp.abs(one[0] - one[1]).max()) > 1e-3


@pytest.mark.parametrize(
  ('fields', 'name'),
  [
    ({'hidden_size': 10, 'num_heads': 3}, 'num_heads'),
    ({'hidden_size': 12, 'num_heads': 3, 'num_groups': 5}, 'num_groups'),
    ({'conv_kernel_size': 4}, 'conv_kernel_size'),
    ({'architecture': 'gpt'}, 'architecture'),
    ({'hidden_dropout': 1.0}, 'hidden_dropout'),
    ({'dtype': 'float16'}, 'dtype'),
  ],
)
def test_invalid_sizes_name_the_field(fields, name):
  with pytest.raises(ConfigError, match=name):
    EncoderConfig(**fields)


def test_head_ratio_as_published():
  """n = int(A / ratio), at least 1; the head size stays d / A (ConvBERT)."""
  got = [(c.num_heads, c.head_size) for a in (1, 2, 4, 12) for c in [mixed(heads=a, head_ratio=2, hidden_size=48)]]
  assert got == [(1, 48), (1, 24), (2, 12), (6, 4)]


def test_the_published_start_of_projections():
  """Glorot: uniform within sqrt(6 / (inputs + outputs)). Mutation: use it for every layer, or for none."""
  sizes = {'vocab_size': 8, 'hidden_size': 96, 'num_layers': 1, 'num_heads': 4, 'embedding_size': 32}
  for glorot in (False, True):
    config = EncoderConfig('electra', max_positions=8, glorot_projections=glorot, **sizes)
    encoder = init_encoder(config, jax.random.key(0))['encoder']
    head = RtdHead(config).init(jax.random.key(0), jnp.zeros((1, 2, 96)))['params']
    for kernel in (encoder['embeddings']['projection']['kernel'], head['output']['kernel']):
      bound = (6 / sum(kernel.shape)) ** 0.5 if glorot else 0.04
      assert 0.9 * bound < np.abs(kernel).max() <= bound
    assert np.abs(head['dense']['kernel']).max() <= 0.04
    assert np.abs(encoder['layers']['ffn_in']['kernel']).max() <= 0.04
