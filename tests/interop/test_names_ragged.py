"""Tensors of encoders whose layers differ: the usual names, shapes of their own, nothing where nothing is left."""

import dataclasses

import jax
import numpy as np
import pytest
from ragged import ENCODERS

from compactlm_jax.errors import ConfigError, DataError
from compactlm_jax.interop import names
from compactlm_jax.nn.encoder import encoder_shapes
from compactlm_jax.tree import named_leaves

RAGGED = {
  name: dataclasses.replace(
    ENCODERS[name],
    heads_per_layer=(2, 0, 1),
    neurons_per_layer=(4, 0, 2),
  )
  for name in ('bert', 'electra', 'convbert grouped', 'dynamic')
}
RAGGED['two equal layers'] = dataclasses.replace(ENCODERS['bert'], neurons_per_layer=(2, 2, 6))
RAGGED['nothing'] = dataclasses.replace(ENCODERS['convbert'], heads_per_layer=(0, 0, 0), neurons_per_layer=(0, 0, 0))


def random_tree(config):
  rng = np.random.default_rng(0)
  return jax.tree.map(lambda s: rng.standard_normal(s.shape).astype(np.float32), encoder_shapes(config))


@pytest.mark.parametrize('name', RAGGED)
def test_the_table_covers_a_ragged_tree_exactly(name):
  """Mutation: one stack for all layers, or sizes of the first run for all."""
  config = RAGGED[name]
  leaves = {n: leaf.shape for n, leaf in named_leaves(encoder_shapes(config)).items()}
  assert names.leaf_shapes(config, ('encoder',)) == leaves


@pytest.mark.parametrize('name', RAGGED)
def test_import_inverts_export_bit_for_bit(name):
  """Mutation: index a stack by the number of the layer in the model."""
  config = RAGGED[name]
  tree = random_tree(config)
  tensors = names.export_tensors(tree, config)
  back = names.import_tensors(tensors, config)
  assert jax.tree.structure(back) == jax.tree.structure(tree)
  assert jax.tree.all(jax.tree.map(np.array_equal, tree, back))
  assert names.count_parameters(tree) == sum(t.size for t in tensors.values())


def test_names_are_those_of_transformers_with_what_is_left():
  config = RAGGED['bert']
  tree = random_tree(config)
  tensors = names.export_tensors(tree, config)
  last = tree['encoder']['layers_2']
  np.testing.assert_array_equal(
    tensors['encoder.layer.2.attention.self.query.weight'], last['attention']['query']['kernel'][0].T
  )
  assert tensors['encoder.layer.2.intermediate.dense.weight'].shape == (2, 8)
  assert sorted(name.removeprefix('encoder.layer.1.') for name in tensors if '.layer.1.' in name) == [
    'attention.output.LayerNorm.bias',
    'attention.output.LayerNorm.weight',
    'attention.output.dense.bias',
    'output.LayerNorm.bias',
    'output.LayerNorm.weight',
    'output.dense.bias',
  ]


def test_files_of_other_sizes_are_refused_by_tensor():
  config = RAGGED['bert']
  tensors = names.export_tensors(random_tree(config), config)
  with pytest.raises(ConfigError, match=r'layer\.0\.\S+: found shape \(.*4.*\), expected \(.*6.*\)'):
    names.import_tensors(tensors, dataclasses.replace(config, heads_per_layer=(3, 0, 1)))
  with pytest.raises(DataError, match=r'layer\.1\.attention\.self\.query\.weight.*missing'):
    names.import_tensors(tensors, dataclasses.replace(config, heads_per_layer=(2, 1, 1)))
  with pytest.raises(DataError, match=r'layer\.2\.intermediate\.dense\.\w+: unexpected'):
    names.import_tensors(tensors, dataclasses.replace(config, neurons_per_layer=(4, 0, 0)))
