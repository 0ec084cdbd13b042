"""Densities against counts by hand."""

import json

import numpy as np
from ragged import dense, masked, masks_of

from compactlm_jax.compress.density import covered_density, densities
from compactlm_jax.compress.shrink import shrink
from compactlm_jax.compress.structure import kernel_shapes
from compactlm_jax.config import PruneConfig
from compactlm_jax.tree import named_leaves


def test_a_dense_encoder():
  config, params = dense('electra')
  found = densities(params, config)
  assert found['density'] == 1 and found['by_layer'] == [1, 1, 1]
  assert json.loads(json.dumps(found)) == found
  assert sorted(found['by_matrix'])[0] == 'attention/key' and set(map(tuple, found['by_matrix'].values())) == {
    (1, 1, 1)
  }


def test_zeros_are_counted_per_matrix_and_layer():
  """Mutation: count biases too."""
  config, params = dense('bert')
  baked = masked(params, config, masks_of(config, (4, 2, 0), (6, 3, 0)))
  found = densities(baked, config)
  assert found['by_layer'] == [1, 0.5, 0] and found['density'] == 0.5
  assert found['by_matrix']['ffn_in'] == [1, 0.5, 0]
  leaves = named_leaves(baked)
  kept = sum(int(np.count_nonzero(leaves[name])) for name in kernel_shapes(config))
  assert found['density'] == kept / sum(np.prod(shape) for shape in kernel_shapes(config).values())


def test_shrinking_keeps_the_count():
  """What was removed counts as zero. Mutation: divide by the sizes that are left."""
  config, params = dense('bert')
  baked = masked(params, config, masks_of(config, (4, 2, 0), (6, 3, 0)))
  assert densities(*shrink(baked, config)) == densities(baked, config)


def test_the_density_that_is_asked_for_is_of_what_is_masked():
  """Mutation: of all kernels, whatever the structure."""
  config, params = dense('bert')
  baked = masked(params, config, masks_of(config, (4, 2, 1), (6, 3, 0)))
  both = PruneConfig(structure='heads+neurons')
  assert covered_density(baked, config, both) == densities(baked, config)['density']
  assert covered_density(baked, config, PruneConfig(structure='heads')) == 7 / 12
  assert covered_density(baked, config, PruneConfig(structure='neurons')) == 9 / 18
