"""What pruning left: shares against NumPy, one histogram for two models, pictures, and nothing of dense models."""

import dataclasses
import json

import numpy as np
import pytest
from ragged import ENCODERS, random_tree

from compactlm_jax import cli
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
  """Mutations: bins of each model; count zeros; take magnitudes; drop the largest weight."""
  found = sparsities(models)
  one, other = found['model'], found['compare']
  np.testing.assert_array_equal(one.edges, other.edges)
  leaves = named_leaves(models['compare'].params)
  whole = np.concatenate([np.asarray(leaves[name]).ravel() for name in maskable(CONFIG)])
  assert one.edges[-1] == -one.edges[0] == pytest.approx(np.abs(whole).max()) and len(one.counts) == BINS
  assert one.counts.sum() == np.sum(np.abs(whole) > 0.8) and other.counts.sum() == whole.size
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


@pytest.fixture
def folders(models, tmp_path):
  """pruned/, dense/ and ragged/ with a tokenizer, and text.txt."""
  from compactlm_jax.data.tokenizer import train_wordpiece
  from compactlm_jax.interop.bundle import Bundle, save_pretrained
  from compactlm_jax.interop.folder import open_folder
  from compactlm_jax.interop.tokenizer_files import read_tokenizer

  words = ' '.join('the small large river house tree runs stands'.split() * 9)
  (tmp_path / 'text.txt').write_text(f'{words}\n' * 3)
  train_wordpiece(str(tmp_path / 'text.txt'), 40, tmp_path / 'tokenizer')
  tokenizer = read_tokenizer(open_folder(tmp_path / 'tokenizer'))
  config = dataclasses.replace(CONFIG, vocab_size=40, num_layers=2)
  tree = random_tree(config)
  cut = pruned(tree, config, lambda w: np.abs(w) > 0.8)
  for name, params in (('pruned', cut), ('dense', tree)):
    save_pretrained(Bundle(config, params, tokenizer), tmp_path / name)
  return tmp_path


def test_the_command_draws_what_is_left(folders, capsys):
  """Mutations: no pictures; the histogram of one model; shares in the report only."""
  pytest.importorskip('matplotlib')
  flags = [f'--text={folders}/text.txt', f'--output={folders}/out', '--seq_len=8', f'--compare={folders}/dense']
  assert cli.main(['analyze', f'--model={folders}/pruned', *flags]) == 0
  found = json.loads((folders / 'out' / 'analysis.json').read_text())
  left = found['sparsity']
  assert left['compare']['density'] == 1 and 0.1 < left['model']['density'] < 0.5
  assert sum(left['model']['counts']) == left['model']['nonzero'] and len(left['model']['edges']) == BINS + 1
  assert {'model_remaining.png', 'surviving_weights.png'} < set(found['pictures'])
  assert 'compare_remaining.png' not in found['pictures']
  report = (folders / 'out' / 'report.md').read_text()
  assert f'{left["model"]["nonzero"]:,} remain ({100 * left["model"]["density"]:.2f} %)' in report


def test_layers_of_different_sizes_are_refused(folders, capsys):
  """Mutation: let JAX complain."""
  pytest.importorskip('matplotlib')
  from ragged import masked, masks_of

  from compactlm_jax.compress.shrink import shrink
  from compactlm_jax.interop.bundle import Bundle, from_pretrained, save_pretrained

  dense = from_pretrained(folders / 'dense')
  small = shrink(masked(dense.params, dense.config, masks_of(dense.config, (2, 1), (3, 6))), dense.config)
  save_pretrained(Bundle(small[1], small[0], dense.tokenizer), folders / 'ragged')
  flags = [f'--model={folders}/ragged', f'--text={folders}/text.txt', f'--output={folders}/o']
  assert cli.main(['analyze', *flags]) == 78
  assert 'layers of different sizes' in capsys.readouterr().err
