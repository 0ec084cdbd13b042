"""Pieces: their names and shapes, what each covers, and how gradients come back to them."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ragged import ENCODERS, IDS, MASK, dense, masked, run

from compactlm_jax.compress.shrink import shrink
from compactlm_jax.compress.structure import acting_masks, expand, kernel_shapes, maskable, piece_weights, score_shapes
from compactlm_jax.config import EncoderConfig
from compactlm_jax.errors import ConfigError
from compactlm_jax.nn.encoder import encode
from compactlm_jax.ops.masks import masked_weight
from compactlm_jax.tree import named_leaves, nested

LAYERS, HEADS, NEURONS = 'encoder/layers/', 'encoder/layers/attention/heads', 'encoder/layers/neurons'
STRUCTURES = ('none', 'heads', 'neurons', 'heads+neurons', 'block', 'block+neurons')


@pytest.mark.parametrize('name', ENCODERS)
def test_maskable_kernels_are_those_of_the_tree(name):
  """Mutation: leave out a matrix of the convolution."""
  config, params = dense(name)
  leaves = named_leaves(params)
  wanted = [n for n in leaves if n.startswith(LAYERS) and n.endswith('/kernel') and 'depthwise' not in n]
  assert sorted(maskable(config)) == sorted(wanted)
  assert kernel_shapes(config) == {n: leaves[n].shape for n in maskable(config)}


def test_bert_has_six_kernels():
  names = [n.removeprefix(LAYERS).removesuffix('/kernel') for n in maskable(ENCODERS['bert'])]
  assert sorted(names) == sorted(
    [*(f'attention/{n}' for n in ('query', 'key', 'value', 'output')), 'ffn_in', 'ffn_out']
  )


def test_names_and_shapes_of_each_structure():
  config = ENCODERS['bert']  # 3 layers of 4 heads of 2 channels, 8 wide, 6 neurons
  assert score_shapes(config, 'none') == kernel_shapes(config)
  assert score_shapes(config, 'heads+neurons') == {HEADS: (3, 4), NEURONS: (3, 6)}
  hybrid = score_shapes(config, 'block+neurons', (4, 2))
  attention = {f'{LAYERS}attention/{n}/blocks': (3, 2, 4) for n in ('query', 'key', 'value', 'output')}
  assert hybrid == attention | {NEURONS: (3, 6)}
  ffn = {LAYERS + 'ffn_in/blocks': (3, 4, 3), LAYERS + 'ffn_out/blocks': (3, 3, 4)}
  assert score_shapes(config, 'block', (2, 2)) == {n: (3, 4, 4) for n in attention} | ffn
  grouped = score_shapes(ENCODERS['convbert grouped'], 'block', (1, 1))
  assert grouped[LAYERS + 'ffn_in/blocks'] == (3, 2, 4, 3)
  assert LAYERS + 'attention/conv/pointwise/blocks' in grouped and LAYERS + 'attention/conv/taps/blocks' not in grouped


@pytest.mark.parametrize('structure', STRUCTURES)
@pytest.mark.parametrize('name', ENCODERS)
def test_every_piece_covers_whole_parameters(name, structure):
  """Expanded arrays have the parameters' shapes, and every maskable weight but taps of a block is in one piece."""
  config, params = dense(name)
  leaves, covered = named_leaves(params), []
  for piece, shape in score_shapes(config, structure, (1, 1)).items():
    for parameter, array in expand(config, piece, jnp.zeros(shape)).items():
      assert array.shape == leaves[parameter].shape, parameter
      covered.append(parameter)
  assert len(set(covered)) == len(covered)
  kernels = {n for n in covered if n.endswith('/kernel')}
  part = {'heads': 'attention/', 'neurons': 'ffn_'}.get(structure, '')
  wanted = {n for n in maskable(config) if LAYERS + part in n and not (structure.startswith('block') and 'taps' in n)}
  assert kernels == wanted


def test_gradients_of_neurons_and_heads_are_sums_over_what_they_cover():
  """Against a loop over weights. Mutation: mean instead of sum; leave out a bias, or one of the two matrices."""
  config, params = dense('convbert grouped')  # 2 heads of 2 channels, 2 taps branches, 2 groups of 3 neurons
  rng = np.random.default_rng(1)
  g = {n: rng.standard_normal(leaf.shape) for n, leaf in named_leaves(params).items()}
  back = {}
  for name, shape in score_shapes(config, 'heads+neurons').items():
    spec = jax.ShapeDtypeStruct(shape, jnp.float32)
    one = {n: jnp.asarray(g[n], jnp.float32) for n in expand(config, name, jnp.zeros(shape))}
    (back[name],) = jax.linear_transpose(lambda leaf, name=name: expand(config, name, leaf), spec)(one)
  layers, heads, neurons = 3, np.zeros((3, 2)), np.zeros((3, 6))
  for n in range(layers):
    for f in range(6):
      group, own = f // 3, f % 3
      neurons[n, f] += g[LAYERS + 'ffn_in/bias'][n, f]
      for d in range(4):
        neurons[n, f] += g[LAYERS + 'ffn_in/kernel'][n, group, d, own] + g[LAYERS + 'ffn_out/kernel'][n, group, own, d]
    for h in range(2):
      for matrix in ('query', 'key', 'value', 'conv/pointwise', 'conv/value'):
        for channel in (2 * h, 2 * h + 1):
          heads[n, h] += g[f'{LAYERS}attention/{matrix}/kernel'][n, :, channel].sum()
          heads[n, h] += g[f'{LAYERS}attention/{matrix}/bias'][n, channel]
      for tap in range(3 * h, 3 * h + 3):
        heads[n, h] += g[LAYERS + 'attention/conv/taps/kernel'][n, :, tap].sum()
        heads[n, h] += g[LAYERS + 'attention/conv/taps/bias'][n, tap]
      for row in (2 * h, 2 * h + 1, 4 + 2 * h, 4 + 2 * h + 1):
        heads[n, h] += g[LAYERS + 'attention/output/kernel'][n, row].sum()
  np.testing.assert_allclose(back[HEADS], heads, atol=1e-4)
  np.testing.assert_allclose(back[NEURONS], neurons, atol=1e-4)


def test_blocks_are_rectangles():
  config = ENCODERS['bert']
  scores = np.arange(3 * 2 * 4, dtype=np.float32).reshape(3, 2, 4)
  (wide,) = expand(config, LAYERS + 'attention/query/blocks', jnp.asarray(scores)).values()
  np.testing.assert_array_equal(wide, np.kron(scores, np.ones((1, 4, 2), np.float32)))


@functools.cache
def straight_through(name):
  """(scores, masks of parameters) -> dL/dscores, as `masked_weight` passes it on."""
  config, params = dense(name)

  def loss(scores, masks):
    read = named_leaves(params)
    for piece, score in scores.items():
      for n, own in expand(config, piece, score).items():
        read[n] = masked_weight(read[n], own, masks[n])
    return scalar(run(nested(read), config, IDS, MASK).last_BTD)

  return jax.jit(jax.grad(loss))


def scalar(out_BTD):
  return (out_BTD * jnp.sin(jnp.arange(out_BTD.size)).reshape(out_BTD.shape)).sum()


def scores_gradient(name, masks, *, acting):
  """dL/dscores at the given masks; `acting` as training has them, or on everything that is covered."""
  config, _ = dense(name)
  wide = {}
  for piece, mask in masks.items():
    mask = jnp.asarray(mask, jnp.float32)
    wide |= acting_masks(config, piece, mask, baked=False) if acting else expand(config, piece, mask)
  return straight_through(name)({piece: jnp.zeros(mask.shape) for piece, mask in masks.items()}, wide)


@pytest.mark.parametrize('name', ['bert', 'convbert grouped'])
def test_scores_of_masked_pieces_still_move(name):
  """With zeros on both sides of a piece its gradient would be zero for good; with zeros where it acts it is not.

  Mutation: mask everything that is covered in training too.
  """
  config, _ = dense(name)
  masks = {HEADS: np.ones((3, config.num_heads)), NEURONS: np.ones((3, 6))}
  masks[HEADS][:, 0] = masks[NEURONS][:, 0] = 0
  dead, alive = (scores_gradient(name, masks, acting=acting) for acting in (False, True))
  for piece in (HEADS, NEURONS):
    if name == 'bert':  # a head without a query of a ConvBERT still has taps
      np.testing.assert_array_equal(dead[piece][:, 0], 0)
    assert (np.abs(alive[piece][:, 0]) > 1e-5).all()
    np.testing.assert_allclose(alive[piece][:, 1:], dead[piece][:, 1:], rtol=1e-3, atol=1e-4)


def test_the_gradient_of_a_kept_piece_is_the_sum_of_gradient_times_weight():
  config, params = dense('bert')
  got = scores_gradient('bert', {NEURONS: np.ones((3, 6)), HEADS: np.ones((3, 4))}, acting=True)

  grads = jax.jit(jax.grad(lambda p: scalar(run(p, config, IDS, MASK).last_BTD)))(params)
  products = jax.tree.map(lambda p, g: np.asarray(p) * np.asarray(g), params, grads)
  layer = products['encoder']['layers']
  want = layer['ffn_in']['kernel'].sum(1) + layer['ffn_in']['bias'] + layer['ffn_out']['kernel'].sum(2)
  np.testing.assert_allclose(got[NEURONS], want, rtol=1e-3, atol=1e-4)
  attention = layer['attention']
  want = attention['output']['kernel'].sum(2)
  for name in ('query', 'key', 'value'):
    want = want + attention[name]['kernel'].sum(1) + attention[name]['bias']
  np.testing.assert_allclose(got[HEADS], want.reshape(3, 4, 2).sum(2), rtol=1e-3, atol=1e-4)


def test_gates_act_once_and_stay_what_they_were_when_baked():
  """Gates between 0 and 1 (L0): a neuron's output is multiplied by its gate, in training and baked.

  Mutation: bake the gate into `ffn_in` too.
  """
  config, params = dense('convbert grouped')
  rng = np.random.default_rng(2)
  gates = {HEADS: rng.uniform(size=(3, 2)), NEURONS: rng.uniform(size=(3, 6))}
  gates[NEURONS][:, 2] = 0
  trained, baked = (masked(params, config, gates, baked=baked) for baked in (False, True))
  first, second = (run(tree, config, IDS, MASK).last_BTD for tree in (trained, baked))
  np.testing.assert_allclose(first, second, atol=1e-6)
  np.testing.assert_array_equal(
    trained['encoder']['layers']['ffn_in']['bias'], params['encoder']['layers']['ffn_in']['bias']
  )
  assert (np.asarray(baked['encoder']['layers']['ffn_in']['bias'])[:, 2] == 0).all()


def test_the_view_and_the_masked_module_agree():
  """Masks on the tree, and `MaskedDense` with a collection of scores: the same output and gradients.

  Mutation: leave the scores of one matrix out of the view.
  """
  config, params = dense('convbert')
  rng = np.random.default_rng(3)
  shapes = score_shapes(config, 'none')
  scores = {name: jnp.asarray(rng.standard_normal(shape), jnp.float32) for name, shape in shapes.items()}
  keep = lambda s: (s > 0).astype(s.dtype)  # noqa: E731

  def by_view(p, s):
    leaves = named_leaves(p)
    for name, score in s.items():
      for n, mask in expand(config, name, keep(score)).items():
        leaves[n] = masked_weight(leaves[n], expand(config, name, score)[n], mask)
    return scalar(encode(nested(leaves), config, IDS, MASK).last_BTD)

  def by_module(p, s):
    return scalar(encode({**p, 'scores': nested(s)}, config, IDS, MASK, mask_fn=keep).last_BTD)

  both = [jax.jit(jax.value_and_grad(f, argnums=(0, 1)))(params, scores) for f in (by_view, by_module)]
  for a, b in zip(*(jax.tree.leaves(found) for found in both), strict=True):
    np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4)


def test_a_shrunk_encoder_has_pieces_of_its_own():
  config, params = dense('bert')
  masks = {HEADS: np.array([[1, 1, 0, 0], [1, 1, 0, 0], [0, 0, 0, 0]])}
  _, smaller = shrink(masked(params, config, masks), config)
  assert score_shapes(smaller, 'heads+neurons') == {
    'encoder/layers_0/attention/heads': (2, 2),
    'encoder/layers_0/neurons': (2, 6),
    'encoder/layers_1/neurons': (1, 6),
  }
  assert maskable(smaller)[-2:] == ('encoder/layers_1/ffn_in/kernel', 'encoder/layers_1/ffn_out/kernel')


@pytest.mark.parametrize(
  ('structure', 'block', 'message'),
  [
    ('rows', (2, 2), "prune.structure: 'rows' is unknown; use one of 'none', 'heads'"),
    ('block', (3, 2), r'blocks of 3 rows do not divide encoder/layers/attention/query/kernel, which has 8.*1, 2, 4, 8'),
    ('block', (2, 4), r'blocks of 4 columns do not divide encoder/layers/ffn_in/kernel, which has 6.*1, 2, 3, 6'),
    ('block+neurons', (2,), 'prune.block: .* two positive numbers'),
  ],
)
def test_structures_that_do_not_fit_are_refused(structure, block, message):
  with pytest.raises(ConfigError, match=message):
    score_shapes(ENCODERS['bert'], structure, block)


def test_unknown_names_are_refused():
  with pytest.raises(ConfigError, match='scores/encoder/layers/attention/neurons'):
    expand(EncoderConfig(), 'encoder/layers/attention/neurons', jnp.zeros((12, 3072)))


def test_what_a_piece_covers():
  """BERT-base: a head covers as many weights as 128 neurons; ConvBERT's also its part of the taps.

  Mutation: count biases too.
  """

  def weights(encoder, structure):
    found = piece_weights(encoder, score_shapes(encoder, structure, (32, 32)))
    return {name.rpartition('/')[2]: weight for name, weight in found.items()}

  assert weights(EncoderConfig(), 'heads+neurons') == {'heads': 128, 'neurons': 1}
  assert weights(EncoderConfig(), 'block+neurons') == {'blocks': 2, 'neurons': 3}
  assert weights(EncoderConfig(), 'none') == {'kernel': 1} and weights(EncoderConfig(), 'block') == {'blocks': 1}
  encoder = ENCODERS['convbert']
  kernels = kernel_shapes(encoder)
  found = weights(encoder, 'heads+neurons')
  heads = sum(np.prod(shape[1:]) for name, shape in kernels.items() if '/attention/' in name) / encoder.num_heads
  assert found['heads'] / found['neurons'] == heads / (2 * encoder.hidden_size)
