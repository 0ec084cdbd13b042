"""Sub-networks: sizes as published, slices that are the same function as masks, what is refused."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from ragged import ENCODERS, SMALL, assert_same, masked, masks_of, outputs, random_tree

from compactlm_jax.compress.layers import take_layers
from compactlm_jax.compress.shrink import shrink
from compactlm_jax.compress.subnet import kept_layers, subnet, subnet_config
from compactlm_jax.config import AdaptConfig, Cell, EncoderConfig, cells
from compactlm_jax.errors import ConfigError
from compactlm_jax.nn.encoder import encoder_shapes
from compactlm_jax.nn.flops import encoder_flops
from compactlm_jax.nn.heads import Classifier, MlmHead, RtdHead
from compactlm_jax.nn.span import JointSpanHead, SpanHead
from compactlm_jax.tree import named_leaves

BASE = EncoderConfig(pooler=True)  # BERT-base
SIZES = {  # (width, depth) -> millions of parameters, FLOPs of the encoder in billions at 128 tokens; DynaBERT's grid
  (1, 1): (109.5, 22.3),
  (1, 0.75): (88.2, 16.8),
  (1, 0.5): (67.0, 11.2),
  (0.75, 1): (88.2, 16.8),
  (0.75, 0.75): (72.3, 12.6),
  (0.75, 0.5): (56.3, 8.4),
  (0.5, 1): (67.0, 11.2),
  (0.5, 0.75): (56.3, 8.4),
  (0.5, 0.5): (45.7, 5.6),
  (0.25, 1): (45.7, 5.6),
  (0.25, 0.75): (40.4, 4.2),
  (0.25, 0.5): (35.1, 2.8),
}


def shapes(tree):
  return {name: leaf.shape for name, leaf in named_leaves(tree).items()}


@pytest.mark.parametrize(('layers', 'depth', 'kept'), [
  (12, 1, tuple(range(12))),
  (12, 0.75, (0, 1, 2, 4, 5, 6, 8, 9, 10)),
  (12, 0.5, (0, 2, 4, 6, 8, 10)),
  (12, 0.25, (0, 4, 8)),
  (6, 0.5, (0, 2, 4)),
  (6, 4 / 6, (0, 1, 3, 4)),
  (6, 0.6667, (0, 1, 3, 4)),
  (6, 0.75, (0, 1, 2, 4)),
  (24, 0.75, tuple(i for i in range(24) if i % 4 != 3)),
])  # fmt: skip
def test_kept_layers_of_the_published_depths(layers, depth, kept):
  """Mutation: floor(i / depth) in floats keeps layer 2 of .6667; round half up keeps five of six at .75."""
  assert kept_layers(layers, depth) == kept


@settings(deadline=None)
@given(st.integers(1, 60), st.integers(1, 1000))
@example(1, 501)
@example(3, 167)
def test_kept_layers_start_with_the_first_and_rise(layers, thousandths):
  """Mutation: round the share up, or one layer more: the last number then is `layers`; count 501/1000 as 1/2."""
  depth = thousandths / 1000
  if not round(depth * layers):
    with pytest.raises(ConfigError, match='adapt.depths'):
      kept_layers(layers, depth)
    return
  kept = kept_layers(layers, depth)
  assert len(kept) == round(depth * layers) and kept[0] == 0 and kept[-1] < layers
  assert all(a < b for a, b in zip(kept, kept[1:]))


def test_sizes_of_bert_base_are_the_published_grid():
  """Mutation: scale the neurons by the width of the heads before rounding, or keep the pooler out."""
  found = {}
  for cell in cells(AdaptConfig(), BASE):
    config = subnet_config(BASE, cell)
    count = sum(leaf.size for leaf in jax.tree.leaves(encoder_shapes(config)))
    found[cell.width, cell.depth] = (round(count / 1e6, 1), round(128 * encoder_flops(config, 128) / 1e9, 1))
  assert found == SIZES
  narrow = subnet_config(BASE, Cell(0.25))
  assert (narrow.num_heads, narrow.head_size, narrow.intermediate_size, narrow.hidden_size) == (3, 64, 768, 768)


def test_hidden_sizes_of_pre_training():
  """The (L, H) table of the authors: 6 layers of 768 and smaller, heads of 64, F = 4 H."""
  six = EncoderConfig(num_layers=6)
  grid = AdaptConfig(widths=(1.0,), depths=(4 / 6, 1.0), hidden_sizes=(128, 256, 512, 768))
  found = [subnet_config(six, cell) for cell in cells(grid, six)]
  assert [(c.num_layers, c.hidden_size, c.num_heads, c.intermediate_size, c.embedding_size) for c in found] == [
    (n, h, h // 64, 4 * h, h) for n in (6, 4) for h in (768, 512, 256, 128)
  ]


@functools.cache
def even(name):
  """(configuration, parameters on the host): an encoder of `ENCODERS` whose 8 neurons can be halved in each group."""
  config = dataclasses.replace(ENCODERS[name], intermediate_size=8)
  return config, jax.tree.map(np.asarray, random_tree(config))


@pytest.mark.parametrize('name', ENCODERS)
def test_a_narrow_network_is_what_shrinking_leaves_of_the_masked_one(name):
  """Mutation: leave the rows of taps, or one branch of ConvBERT's output, uncut; take neurons without groups."""
  config, params = even(name)
  heads, neurons = config.num_heads // 2, 4 // config.num_groups
  shrunk, smaller = shrink(masked(params, config, masks_of(config, [heads] * 3, [neurons] * 3)), config)
  assert subnet_config(config, Cell(0.5)) == smaller
  assert (smaller.num_heads, smaller.intermediate_size) == (heads, 4)
  cut = subnet(params, config, Cell(0.5))
  assert shapes(cut) == shapes(shrunk)
  assert jax.tree.all(jax.tree.map(np.array_equal, cut, shrunk))


def test_a_narrow_network_is_the_function_of_the_masked_one():
  config, params = even('convbert grouped')
  masks = masks_of(config, [1] * 3, [2] * 3)
  cut = subnet(params, config, Cell(0.5))
  assert_same(outputs(cut, subnet_config(config, Cell(0.5))), outputs(masked(params, config, masks), config))


@pytest.mark.parametrize('name', ['bert', 'convbert grouped'])
def test_a_shallow_network_has_the_chosen_layers(name):
  """Depth 2/3 of 3 layers keeps the first and the second. Mutation: keep the last ones."""
  config, params = even(name)
  cut = subnet(params, config, Cell(1.0, 2 / 3))
  expected = {'encoder': take_layers(params['encoder'], (1, 2))}
  assert jax.tree.all(jax.tree.map(np.array_equal, cut, expected))
  deep = EncoderConfig('bert', num_heads=4, **{**SMALL, 'num_layers': 12})
  tree = jax.tree.map(np.asarray, random_tree(deep))
  for depth in (0.75, 0.5, 0.25, 5 / 12):
    layers = tuple(i + 1 for i in kept_layers(12, depth))
    expected = take_layers(tree['encoder'], layers)
    cut = subnet(tree, deep, Cell(1.0, depth))['encoder']
    assert jax.tree.all(jax.tree.map(np.array_equal, cut, expected))
    assert all(isinstance(leaf, np.ndarray) for leaf in jax.tree.leaves(cut))


def channels(size, smaller, groups):
  return [i for i in range(size) if i % (size // groups) < smaller // groups]


def dense_kernels(layers, groups):
  """The feed-forward of stacked layers as matrices [N, in, out], zeros between groups."""
  for name in ('ffn_in', 'ffn_out'):
    kernel = np.asarray(layers[name]['kernel'])
    if groups == 1:
      yield kernel
      continue
    count, _, rows, columns = kernel.shape
    out = np.zeros((count, groups * rows, groups * columns))
    for n, g in np.ndindex(count, groups):
      out[n, g * rows : (g + 1) * rows, g * columns : (g + 1) * columns] = kernel[n, g]
    yield out


@pytest.mark.parametrize('name', ENCODERS)
def test_a_hidden_size_takes_the_first_channels_of_each_group(name):
  """Every parameter against fancy indexing; a grouped feed-forward as the matrix with zeros that it is.

  Mutation: the first channels of the whole stream where there are groups; leave LayerNorms or the depthwise kernel.
  """
  config, params = even(name)
  cell = Cell(0.5, 1.0, 4)
  cut, small = subnet(params, config, cell), subnet_config(config, cell)
  assert shapes(cut) == shapes(encoder_shapes(small))
  assert small.embedding_size == (4 if config.embedding_size == 8 else config.embedding_size)
  kept, neurons = channels(8, 4, config.num_groups), channels(8, 4, config.num_groups)
  for before, after, index in zip(
    dense_kernels(params['encoder']['layers'], config.num_groups),
    dense_kernels(cut['encoder']['layers'], config.num_groups),
    (np.ix_(range(3), kept, neurons), np.ix_(range(3), neurons, kept)),
  ):
    np.testing.assert_array_equal(after, before[index])
  inner = range(config.num_heads // 2 * config.head_size)
  before, after = named_leaves(params['encoder']), named_leaves(cut['encoder'])
  for leaf, index in (
    ('layers/attention/query/kernel', np.ix_(range(3), kept, inner)),
    ('layers/attention/conv/depthwise/kernel', np.ix_(range(3), range(3), kept)),
    ('layers/ffn_norm/scale', np.ix_(range(3), kept)),
    ('pooler/kernel', np.ix_(kept, kept)),
    ('embeddings/projection/kernel', np.ix_(range(6), kept)),
    ('embeddings/word/embedding', np.ix_(range(20), kept if config.embedding_size == 8 else range(6))),
  ):
    if leaf in before:
      np.testing.assert_array_equal(after[leaf], np.asarray(before[leaf])[index], err_msg=leaf)


def test_a_narrow_stream_runs():
  config, params = even('electra')
  cell = Cell(0.5, 2 / 3, 4)
  hidden_NBTD, *_ = outputs(subnet(params, config, cell), subnet_config(config, cell))
  assert hidden_NBTD.shape == (3, 3, 7, 4) and np.isfinite(hidden_NBTD).all()


def heads_on(config):
  """A tree of every head that hangs on an encoder, as shapes."""
  x_BD, x_BTD = jnp.zeros((1, config.hidden_size)), jnp.zeros((1, 1, config.hidden_size))
  table = jnp.zeros((config.vocab_size, config.embedding_size))
  made = {
    'classifier': lambda key: Classifier(3, config).init(key, x_BD),
    'mlm_head': lambda key: MlmHead(config).init(key, x_BD, table),
    'rtd_head': lambda key: RtdHead(config).init(key, x_BTD),
    'span': lambda key: SpanHead(config).init(key, x_BTD),
    'joint span': lambda key: JointSpanHead(config).init(key, x_BTD, jnp.ones((1, 1), bool)),
  }
  return {name: jax.eval_shape(init, jax.random.key(0))['params'] for name, init in made.items()}


@pytest.mark.parametrize('name', ['bert', 'convbert'])
def test_heads_follow_the_hidden_size(name):
  """Mutation: cut the joint head's pair of states as one; forget the columns of the RTD head."""
  config, params = even(name)
  cell = Cell(0.5, 1.0, 4)
  expected = heads_on(subnet_config(config, cell))
  rng = np.random.default_rng(0)
  for head, like in heads_on(config).items():
    part = head.split()[-1]
    tree = jax.tree.map(lambda leaf: rng.standard_normal(leaf.shape), like)
    cut = subnet({**params, part: tree, 'generator': tree}, config, cell)
    assert shapes(cut[part]) == shapes(expected[head]), head
    assert cut['generator'] is tree
    assert subnet({**params, part: tree}, config, Cell(0.5))[part] is tree
    if head == 'joint span':
      rows = [0, 1, 2, 3, 8, 9, 10, 11]
      np.testing.assert_array_equal(cut[part]['end_hidden']['kernel'], tree['end_hidden']['kernel'][rows])


def test_the_full_network_is_the_tree_itself():
  """Mutation: slice always."""
  config, params = even('bert')
  for cell in (Cell(), Cell(0.99), Cell(1.0, 1.0, 8)):
    assert subnet(params, config, cell) is params
    assert subnet_config(config, cell) == config


@pytest.mark.parametrize('cell', [Cell(0.5, 2 / 3), Cell(0.5, 1.0, 4)])
def test_slices_are_static_differentiable_and_the_same_on_the_host(cell):
  """No gather and no scatter, forward and backward; what is left out has a gradient of exactly 0.

  Mutation: take layers by an index array; convert the leaves with jnp.asarray.
  """
  config, params = even('convbert grouped')
  host = subnet(params, config, cell)
  assert all(isinstance(leaf, np.ndarray) for leaf in jax.tree.leaves(host))
  cut = jax.jit(lambda tree: subnet(tree, config, cell))(params)
  assert jax.tree.all(jax.tree.map(np.array_equal, cut, host))

  def total(tree):
    return sum(leaf.sum() for leaf in jax.tree.leaves(subnet(tree, config, cell)))

  gradient = jax.jit(jax.grad(total))
  leaves = jax.tree.leaves(gradient(params))
  assert sum(np.sum(leaf) for leaf in leaves) == sum(leaf.size for leaf in jax.tree.leaves(cut))
  assert all(np.isin(leaf, (0, 1)).all() for leaf in leaves)
  text = str(jax.make_jaxpr(gradient)(params))
  assert 'gather' not in text and 'scatter' not in text


RAGGED = dataclasses.replace(ENCODERS['bert'], heads_per_layer=(4, 2, 4))


@pytest.mark.parametrize(('name', 'cell', 'message'), [
  ('bert', Cell(0.1), 'adapt.widths: 0.1 of 4 heads is none'),
  ('bert', Cell(0.0), 'adapt.widths: 0 is no share'),
  ('bert', Cell(1.5), 'adapt.widths: 1.5 is no share'),
  ('bert', Cell(1.0, 0.1), 'adapt.depths: 0.1 of 3 layers is none'),
  ('bert', Cell(1.0, 2.0), 'adapt.depths: 2 of 3 layers: .* more layers than there are'),
  ('bert', Cell(1.0, 1.0, 16), 'adapt.hidden_sizes: 16 must be between 1 and 8'),
  ('bert', Cell(1.0, 1.0, -1), 'adapt.hidden_sizes: -1 must be between 1 and 8'),
  ('bert', Cell(0.1, 1.0, 1), 'adapt.hidden_sizes: 1: its share 0.1 of 4 heads is none; use a larger one'),
  ('convbert grouped', Cell(0.5), 'adapt.widths: 0.5 leaves 3 neurons.* 2 groups'),
  ('convbert grouped', Cell(1.0, 1.0, 3), 'adapt.hidden_sizes: 3 does not divide over the 2 groups'),
  ('electra', Cell(1.0, 1.0, 6), 'adapt.hidden_sizes: 6 is the size of the factorised embeddings'),
])  # fmt: skip
def test_cells_that_cannot_be_cut(name, cell, message):
  """A tie rounds to even, so that half of one head is none.

  Mutations: leave out any of the checks; name the widths of a hidden size.
  """
  with pytest.raises(ConfigError, match=message):
    subnet_config(ENCODERS[name], cell)


def test_what_else_cannot_be_cut():
  """Mutation: let an unknown part, scores or a tree of other sizes through."""
  config, params = even('bert')
  with pytest.raises(ConfigError, match='layers of the encoder differ'):
    subnet_config(RAGGED, Cell(0.5))
  with pytest.raises(ConfigError, match='neurons is none'):
    subnet_config(dataclasses.replace(config, intermediate_size=1), Cell(0.5))
  with pytest.raises(ConfigError, match='0.5 of 1 heads is none'):
    subnet_config(dataclasses.replace(config, num_heads=1), Cell(0.5))
  with pytest.raises(ConfigError, match='parameter scores'):
    subnet({**params, 'scores': {}}, config, Cell(0.5))
  with pytest.raises(ConfigError, match='ffn_in/kernel: found shape'):
    subnet(params, ENCODERS['bert'], Cell(0.5))
  other = {**params, 'other': np.zeros(8)}
  assert subnet(other, config, Cell(0.5))['other'] is other['other']
  with pytest.raises(ConfigError, match='parameter other'):
    subnet(other, config, Cell(0.5, 1.0, 4))
  with pytest.raises(ConfigError, match='parameter classifier/gate'):
    subnet({**params, 'classifier': {'gate': np.zeros(8)}}, config, Cell(0.5, 1.0, 4))
