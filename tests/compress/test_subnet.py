"""Sub-networks: sizes as published, slices that are the same function as masks, what is refused."""


import jax
import pytest
from hypothesis import given
from hypothesis import strategies as st
from ragged import ENCODERS, assert_same, dense, masked, masks_of, outputs

from compactlm_jax.compress.subnet import kept_layers, subnet, subnet_config
from compactlm_jax.config import AdaptConfig, Cell, EncoderConfig, cells
from compactlm_jax.errors import ConfigError
from compactlm_jax.nn.encoder import encoder_shapes
from compactlm_jax.nn.flops import encoder_flops
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


@given(st.integers(1, 60), st.integers(1, 1000))
def test_kept_layers_start_with_the_first_and_rise(layers, thousandths):
  depth = thousandths / 1000
  if not round(depth * layers):
    with pytest.raises(ConfigError, match='adapt.depths'):
      kept_layers(layers, depth)
    return
  kept = kept_layers(layers, depth)
  assert kept[0] == 0 and kept[-1] < layers
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


@pytest.mark.parametrize('name', ENCODERS)
def test_a_narrow_network_is_the_masked_one(name):
  """Mutation: leave the rows of taps, or one branch of ConvBERT's output, uncut; take neurons without groups."""
  config, params = dense(name)
  small = subnet_config(config, Cell(0.5))
  heads, neurons = config.num_heads // 2, config.intermediate_size // 2 // config.num_groups
  assert (small.num_heads, small.intermediate_size) == (heads, neurons * config.num_groups)
  masks = masks_of(config, [heads] * 3, [neurons] * 3)
  cut = subnet(params, config, Cell(0.5))
  assert shapes(cut) == shapes(encoder_shapes(small))
  assert_same(outputs(cut, small), outputs(masked(params, config, masks), config))
