"""What pruning left: shares against NumPy, one histogram for two models, nothing of dense ones."""

import dataclasses

import numpy as np
import pytest
from ragged import ENCODERS, random_tree

from compactlm_jax.analysis.plots import remaining_picture, survivors_picture
from compactlm_jax.analysis.sparsity import BINS, sparsities
from compactlm_jax.analysis.statistics import analysed
from compactlm_jax.compress.structure import maskable
from compactlm_jax.tree import map_named, named_leaves

CONFIG = ENCODERS['bert']


def pruned(tree, config, keep):
  """The tree with keep(kernel) on its maskable kernels, layer by layer."""
  names = maskable(config)

  def cut(name, leaf):
    if name not in names:
      return leaf
    return np.stack([np.where(keep(layer), layer, 0) for layer in np.asarray(leaf)]).astype(np.float32)

  return map_named(cut, tree)


@pytest.fixture(scope='module')
def models():
  """One of whose weights only the large remain, and the dense one."""
  tree = random_tree(CONFIG)
  return {
    'model': analysed(pruned(tree, CONFIG, lambda w: np.abs(w) > 0.8), CONFIG),
    'compare': analysed(tree, CONFIG),
  }


def test_shares_are_those_of_numpy(models):
  """Mutations: zeros for what remains; columns of another matrix; embeddings too."""
  found = sparsities(models)['model']
  leaves = named_leaves(models['model'].params)
  kernels = {name: np.asarray(leaves[name]) for name in maskable(CONFIG)}
  assert found.by_matrix_NM.shape == (CONFIG.num_layers, len(found.matrices)) == (3, 6)
  for column, matrix in enumerate(found.matrices):
    own = kernels[f'encoder/layers/{matrix}/kernel']
    np.testing.assert_allclose(found.by_matrix_NM[:, column], [np.mean(layer != 0) for layer in own])
  whole = np.concatenate([leaf.ravel() for leaf in kernels.values()])
  assert found.found['density'] == pytest.approx(np.mean(whole != 0)) and found.found['nonzero'] == np.sum(whole != 0)


def test_histograms_share_their_bins_and_leave_zeros_out(models):
  """Mutations: bins of each model; count zeros; take magnitudes; drop the last bin's edge."""
  found = sparsities(models)
  one, other = found['model'], found['compare']
  np.testing.assert_array_equal(one.edges, other.edges)
  leaves = named_leaves(models['compare'].params)
  whole = np.concatenate([np.asarray(leaves[name]).ravel() for name in maskable(CONFIG)])
  assert one.edges[-1] == -one.edges[0] == pytest.approx(np.abs(whole).max()) and len(one.counts) == BINS
  assert one.counts.sum() == np.sum(np.abs(whole) > 0.8) and other.counts.sum() == whole.size
  assert one.beyond == other.beyond == 0
  middle = slice(*np.searchsorted(one.edges, [-0.6, 0.6]))
  assert not one.counts[middle].any() and other.counts[middle].any()
  np.testing.assert_array_equal(one.counts[-10:], other.counts[-10:])
  assert other.counts[:40].sum() == np.sum(whole < one.edges[40])


def test_dense_models_and_models_of_zeros(models):
  """Nothing of the first; no division by nothing of the second. Mutation: an empty picture for a dense model."""
  assert sparsities({'model': models['compare']}) == {}
  nothing = analysed(pruned(models['compare'].params, CONFIG, lambda w: np.zeros(w.shape, bool)), CONFIG)
  found = sparsities({'model': nothing})['model']
  assert found.counts.sum() == 0 and found.found['density'] == 0 and not found.by_matrix_NM.any()
  pytest.importorskip('matplotlib')
  assert remaining_picture(found.by_matrix_NM, found.matrices, 'none').startswith(b'\x89PNG')
  assert survivors_picture(found.edges, {'a': found.counts}, 'none').startswith(b'\x89PNG')


def test_convbert_has_its_own_matrices():
  """Mutation: the six of BERT."""
  config = ENCODERS['convbert']
  tree = pruned(random_tree(config), config, lambda w: w > 0)
  found = sparsities({'model': analysed(tree, config)})['model']
  assert {'attention/conv/taps', 'attention/conv/value', 'attention/conv/pointwise'} < set(found.matrices)
  assert np.isfinite(found.by_matrix_NM).all() and 0.3 < found.found['density'] < 0.7


def test_a_few_huge_weights_do_not_stretch_the_bins():
  """They are counted apart. Mutation: bins up to the largest weight."""
  config = dataclasses.replace(CONFIG, hidden_size=64, intermediate_size=256)
  tree = pruned(random_tree(config), config, lambda w: w > 0)
  leaves = named_leaves(tree)
  leaves['encoder/layers/ffn_in/kernel'][1, 0, :3] = [70, -80, 90]
  found = sparsities({'model': analysed(tree, config)})['model']
  assert found.edges[-1] < 5 and found.counts.sum() + found.beyond == found.found['nonzero']
  assert 3 <= found.beyond <= 1e-4 * found.found['nonzero'] + 1
