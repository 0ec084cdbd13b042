"""Masks of parameter trees: exact counts, what is ranked, final masks, and the module that masks by itself."""

import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from compactlm_jax.compress.masks import final_masks, has_scores, make_masks, share, without_own
from compactlm_jax.config import EncoderConfig, PruneConfig
from compactlm_jax.errors import ConfigError
from compactlm_jax.nn.layers import MaskedDense
from compactlm_jax.tree import named_leaves, nested

ENCODER = EncoderConfig(
  vocab_size=64, hidden_size=16, num_layers=2, num_heads=2, intermediate_size=32, max_positions=16, scan_unroll=1
)
QUERY = 'encoder/layers/attention/query/kernel'


def drawn(masks, seed=0, scale=1.0):
  """A tree of kernels, biases and scores."""
  random = np.random.default_rng(seed)
  shapes = make_masks(ENCODER, PruneConfig(), 100, 10).shapes
  leaves = {name: scale * random.standard_normal(shape) for name, shape in shapes.items()}
  leaves |= {n.replace('kernel', 'bias'): random.standard_normal((2, s[-1])) for n, s in shapes.items()}
  if has_scores(masks.config):
    leaves |= {f'scores/{name}': random.standard_normal(shape) for name, shape in masks.shapes.items()}
  return nested({name: jnp.asarray(leaf, jnp.float32) for name, leaf in leaves.items()})


def highest(scores, density):
  """1 for the highest of scores that all differ, by sorting them."""
  return (scores >= jnp.sort(scores.ravel())[-int(density * scores.size)]).astype(scores.dtype)


@pytest.mark.parametrize(('scope', 'ties'), [('local', True), ('global', False)])
def test_counts_are_exact_at_every_step(scope, ties):
  """floor(v n) in double precision, also where v n is an integer up to rounding and where scores are equal.

  Mutation: densities in float32; keep what equals the threshold.
  """
  config = PruneConfig(density=0.29, scope=scope)
  masks = make_masks(ENCODER, config, 40, 4)
  values = named_leaves(drawn(masks)['scores'])
  if ties:
    values = {name: jnp.round(leaf) for name, leaf in values.items()}
  run = jax.jit(lambda values, step: (masks.top(values, step), masks.kept_fraction(step)))
  size = sum(leaf.size for leaf in values.values())
  for step in (0, 4, 5, 11, 20, 39, 40):
    found, fraction = run(values, step)
    density = masks.densities[step]
    if scope == 'local':
      for name, mask in found.items():
        assert set(mask.sum((1, 2)).tolist()) == {int(density * mask[0].size)}, (name, step)
    else:
      assert sum(int(mask.sum()) for mask in found.values()) == int(density * size)
    assert float(fraction) == pytest.approx(float(share(found)), abs=1e-7)
    if not ties:
      low = min(float(jnp.where(m == 1, values[n], np.inf).min()) for n, m in found.items())
      assert scope == 'local' or all(float(jnp.where(m == 0, values[n], -np.inf).max()) < low for n, m in found.items())


def test_what_is_ranked_is_the_score_or_the_mean_magnitude():
  """Signs of scores count. A head's magnitude is the mean |w| of what it covers. Mutations: |S|; a sum for the mean."""
  hard, sized = make_masks(ENCODER, PruneConfig(), 40, 4), PruneConfig('magnitude', 0.5, structure='heads')
  tree = drawn(hard)
  jax.tree.map(np.testing.assert_array_equal, hard.ranked(tree), named_leaves(tree['scores']))
  plain = make_masks(ENCODER, dataclasses.replace(sized, structure='none'), 40, 4)
  np.testing.assert_array_equal(plain.ranked(without_own(tree))[QUERY], jnp.abs(named_leaves(tree)[QUERY]))
  (found,) = make_masks(ENCODER, sized, 40, 4).ranked(without_own(tree)).values()
  leaves = {name: np.abs(leaf) for name, leaf in named_leaves(without_own(tree)).items()}
  for head in range(2):
    part = slice(8 * head, 8 * head + 8)
    covered = [leaves[f'encoder/layers/attention/{n}/kernel'][1][:, part] for n in ('query', 'key', 'value')]
    covered.append(leaves['encoder/layers/attention/output/kernel'][1][part])
    assert float(found[1, head]) == pytest.approx(np.concatenate([c.ravel() for c in covered]).mean(), rel=1e-5)


@pytest.mark.parametrize('method', ['hard_movement', 'soft_movement', 'l0'])
def test_final_masks_are_those_of_the_end_of_the_schedule(method):
  """Whatever the step; a finished run needs no schedule. Mutation: the first values for the last."""
  config = PruneConfig(method=method, density=0.2, threshold=0.3)
  masks = make_masks(ENCODER, config, 40, 4)
  tree = drawn(masks)
  found = jax.jit(final_masks(ENCODER, config).final)(tree)
  values = masks.ranked(tree)
  for name, mask in found.items():
    if method == 'soft_movement':
      expected = 1 / (1 + np.exp(-np.asarray(values[name], np.float64))) > 0.3
    elif method == 'l0':
      expected = np.clip(1.2 / (1 + np.exp(-np.asarray(values[name], np.float64))) - 0.1, 0, 1)
    else:
      expected = np.stack([highest(layer, 0.2) for layer in values[name]])
    np.testing.assert_allclose(mask, expected, atol=1e-6)


def test_scores_begin_as_asked_for():
  """Mutations: kaiming's bound from the outputs; the same draw for every matrix."""
  for how, scale, bound in (('constant', 2.197, 2.197), ('uniform', 0.3, 0.3), ('kaiming', 0.0, 32**-0.5)):
    masks = make_masks(ENCODER, PruneConfig(scores_init=how, scores_scale=scale), 40, 4)
    found = masks.init_scores(jax.random.key(1))
    leaf = np.asarray(found['encoder/layers/ffn_out/kernel'])
    assert np.abs(leaf).max() == pytest.approx(bound, rel=0.02) and np.abs(leaf).max() <= bound * (1 + 1e-6)
    assert (leaf.min() == leaf.max()) == (how == 'constant')
    key, query = (np.asarray(found[f'encoder/layers/attention/{n}/kernel']) for n in ('key', 'query'))
    assert how == 'constant' or np.all(key != query)
  grouped = dataclasses.replace(ENCODER, num_groups=2)
  masks = make_masks(grouped, PruneConfig(scores_init='kaiming'), 40, 4)
  leaf = np.asarray(masks.init_scores(jax.random.key(1))['encoder/layers/ffn_in/kernel'])
  assert np.abs(leaf).max() == pytest.approx((grouped.hidden_size / 2) ** -0.5, rel=0.02)
  drawn_once = make_masks(ENCODER, PruneConfig(method='random'), 40, 4).init_scores(jax.random.key(1))
  assert np.unique(drawn_once[QUERY]).size > 500


def test_methods_without_a_schedule_need_no_room_for_one():
  """Mutation: make the cubic schedule for all."""
  for config in (PruneConfig(method='post_hoc_magnitude'), PruneConfig(method='l0', regularization=1.0)):
    assert make_masks(ENCODER, config, 10, 4).last == 10
  with pytest.raises(ConfigError, match='leave nothing of 10 steps'):
    make_masks(ENCODER, PruneConfig(method='l0', control='density'), 10, 4)


def test_the_view_of_a_tree_is_the_layer_that_masks_by_itself():
  """MaskedDense with its collection of scores: same outputs, same gradients. Mutation: a factor in either."""
  config = PruneConfig(density=0.3)
  masks = make_masks(ENCODER, config, 40, 0)
  tree = drawn(masks)
  leaves = named_leaves(tree)
  bias = leaves[QUERY.replace('kernel', 'bias')][0]
  x = jax.random.normal(jax.random.key(2), (5, 16))
  layer = MaskedDense(16, ENCODER, mask_fn=lambda scores: highest(scores, 0.3))

  def by_module(kernel, scores):
    return (layer.apply({'params': {'kernel': kernel, 'bias': bias}, 'scores': {'kernel': scores}}, x) ** 2).sum()

  def by_view(tree):
    read = masks.apply(tree, masks.top(named_leaves(tree['scores']), 40), straight_through=True)
    assert set(read) == {'encoder'}
    return ((x @ named_leaves(read)[QUERY][0] + bias[None]) ** 2).sum()

  value, grads = jax.value_and_grad(by_module, argnums=(0, 1))(leaves[QUERY][0], leaves[f'scores/{QUERY}'][0])
  other, tree_grads = jax.jit(jax.value_and_grad(by_view))(tree)
  assert float(value) == pytest.approx(float(other), rel=1e-5)
  found = named_leaves(tree_grads)
  np.testing.assert_allclose(found[QUERY][0], grads[0], rtol=1e-4, atol=1e-5)
  np.testing.assert_allclose(found[f'scores/{QUERY}'][0], grads[1], rtol=1e-4, atol=1e-5)


def test_the_threshold_that_stays_is_a_score_and_leaves_one_more():
  """The original keeps int(v n) + 1 where scores differ, and its threshold is the next score. Mutation: one less."""
  masks = make_masks(ENCODER, PruneConfig(scope='global', threshold_every=25, density=0.1), 40, 4)
  values = named_leaves(drawn(masks)['scores'])
  every = np.sort(np.concatenate([np.asarray(leaf).ravel() for leaf in values.values()]))
  found = float(jax.jit(masks.global_threshold)(values, 40))
  kth = max(every.size - (int(every.size * 0.1) + 1), 1)
  assert found == every[kth - 1] and int((every > found).sum()) == int(every.size * 0.1) + 1


def test_schedules_that_do_not_fit_are_refused():
  """Mutation: make the schedule at the first step."""
  with pytest.raises(ConfigError, match='warmup'):
    make_masks(ENCODER, PruneConfig(), 30, 10)
  with pytest.raises(ConfigError, match='block'):
    make_masks(ENCODER, PruneConfig(structure='block', block=(5, 5)), 100, 10)


def test_pieces_count_by_the_weights_that_they_cover():
  """A head of this encoder covers 512 weights, a neuron 32. Mutation: count pieces."""
  config = PruneConfig(structure='heads+neurons', density=0.6)
  masks = make_masks(ENCODER, config, 40, 4)
  assert sorted(masks.weights.values()) == [1, 16]
  found = masks.top(named_leaves(drawn(masks)['scores']), masks.last)
  kept = (2 * 1 * 512 + 2 * 19 * 32) / (2 * 2 * 512 + 2 * 32 * 32)  # one head and 19 neurons of each layer
  assert float(masks.kept_fraction(masks.last)) == pytest.approx(kept)
  assert float(masks.fraction({name: mask.sum().astype(int) for name, mask in found.items()})) == pytest.approx(kept)
  whole = dataclasses.replace(masks, config=dataclasses.replace(config, scope='global'))
  assert float(whole.kept_fraction(masks.last)) == pytest.approx((2 * 512 + 38 * 32) / 4096)


@pytest.mark.parametrize(
  ('fields', 'message'),
  [
    (
      {'structure': 'heads', 'density': 0.3},
      r'0\.3 of 2 heads per layer keeps none; use at least 0\.5, or prune.scope',
    ),
    ({'structure': 'heads', 'density': 0.2, 'scope': 'global'}, r'0\.2 of 4 heads in all keeps none; .* 0\.25$'),
    ({'structure': 'heads+neurons', 'density': 0.02, 'method': 'random'}, '0.02 of 2 heads per layer'),
    (
      {'structure': 'block', 'block': (8, 8), 'density': 0.2},
      r'of 4 blocks of encoder/layers/attention/\w+ keeps none',
    ),
    ({'density': 1e-9, 'method': 'post_hoc_magnitude'}, r'1e-09 of 256 weights of .* at least 0\.004'),
  ],
)
def test_densities_that_keep_nothing_of_a_layer_are_refused_and_the_advice_is_enough(fields, message):
  """Mutation: look at all layers together, or at the first kind only."""
  with pytest.raises(ConfigError, match=message) as caught:
    make_masks(ENCODER, PruneConfig(**fields), 40, 4)
  least = float(str(caught.value).split('at least ')[1].split(', or')[0])
  masks = make_masks(ENCODER, PruneConfig(**{**fields, 'density': least}), 40, 4)
  with pytest.raises(ConfigError):
    make_masks(ENCODER, PruneConfig(**{**fields, 'density': 0.9 * least}), 40, 4)
  final_masks(ENCODER, PruneConfig(**fields))  # what was trained is exported whatever it keeps
  assert masks.last == 40


def test_a_structure_of_which_nothing_is_left_is_refused():
  """Of a model that lost all its heads and neurons. Mutation: leave it to the first step."""
  bare = dataclasses.replace(ENCODER, heads_per_layer=(0, 0), neurons_per_layer=(0, 0))
  for method, structure in (('soft_movement', 'block+neurons'), ('hard_movement', 'none'), ('magnitude', 'heads')):
    with pytest.raises(ConfigError, match=rf'config.model: .* nothing left that .*structure=.{re.escape(structure)}'):
      make_masks(bare, PruneConfig(method, structure=structure), 40, 4)
  half = dataclasses.replace(bare, neurons_per_layer=(0, 32))
  assert list(make_masks(half, PruneConfig(structure='heads+neurons'), 40, 4).kinds) == ['neurons']
