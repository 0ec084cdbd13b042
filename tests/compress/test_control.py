"""The controller of the density: where it leads scores, with a simulated optimiser in place of a model."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from compactlm_jax.compress.control import make_controller, solved_strength, target_of
from compactlm_jax.compress.masks import make_masks, share
from compactlm_jax.config import EncoderConfig, OptimizerConfig, PruneConfig
from compactlm_jax.errors import ConfigError
from compactlm_jax.losses.prune import l0_penalty, soft_penalty
from compactlm_jax.ops.masks import prox_reweighted_l1
from compactlm_jax.train.optimizer import learning_rate_schedule, make_optimizer

ENCODER = EncoderConfig(
  vocab_size=64, hidden_size=16, num_layers=2, num_heads=2, intermediate_size=32, max_positions=16, scan_unroll=1
)
OPTIMIZER = OptimizerConfig(learning_rate=1e-3, warmup_fraction=0.1, weight_decay=0.0)


def controlled(config, steps, encoder=ENCODER):
  schedule = learning_rate_schedule(OPTIMIZER, steps)
  masks = make_masks(encoder, config, steps, steps // 10)
  return masks, make_controller(masks, schedule, steps // 10)


def drift(config, steps, density, seed, noise, encoder=ENCODER):
  """The density after a run; each score has a constant gradient and noise. Single weights are of one matrix."""
  config = dataclasses.replace(config, density=density, control='density')
  masks, controller = controlled(config, steps, encoder)
  tx = make_optimizer(
    dataclasses.replace(OPTIMIZER, learning_rate=config.scores_learning_rate), steps, (('.*', True),)
  )  # fmt: skip
  penalty = l0_penalty if config.method == 'l0' else soft_penalty
  keys = jax.random.split(jax.random.key(seed))
  shapes = {'only': (2, 32, 64)} if config.structure == 'none' else masks.shapes
  scores = {name: jnp.full(shape, config.scores_scale) for name, shape in shapes.items()}
  own = {name: jax.random.split(jax.random.fold_in(keys[0], i)) for i, name in enumerate(scores)}
  use = {name: 0.5 * noise * jax.random.normal(own[name][0], shape) for name, shape in shapes.items()}

  def step(carry, index):
    scores, opt_state, state = carry
    state = controller.update(state, scores, index)
    grads = jax.grad(lambda s: controller.penalty(state, s, lambda part: penalty(part, config.penalty)))(scores)
    for name, grad in grads.items():
      draw = jax.random.normal(jax.random.fold_in(own[name][1], index), grad.shape)
      grads[name] = grad + use[name] + noise * draw
    updates, opt_state = tx.update(grads, opt_state, scores)
    scores = jax.tree.map(jnp.add, scores, updates)
    return (scores, opt_state, state), state['regularization']

  @jax.jit
  def run(scores):
    start = (scores, tx.init(scores), controller.init(scores))
    (scores, _, state), weights = jax.lax.scan(step, start, jnp.arange(steps))
    last = masks.gates(scores, None) if config.method == 'l0' else masks.above(scores, masks.last)
    counts = {name: jnp.sum(mask != 0, dtype=jnp.int32) for name, mask in last.items()}
    return share(last) if config.structure == 'none' else masks.fraction(counts), state, weights

  found, state, weights = run(scores)
  assert np.all(np.isfinite(weights)) and all(np.isfinite(x) and x.dtype == jnp.float32 for x in state.values())
  assert weights[0] == 0 and np.any(weights > 0)
  return float(found)


SOFT = PruneConfig(method='soft_movement', scores_learning_rate=0.06)
GATES = PruneConfig(method='l0', scores_scale=2.197, scores_learning_rate=0.15)


@pytest.mark.parametrize(
  ('config', 'steps', 'density', 'seed', 'noise'),
  [
    (SOFT, 150, 0.5, 0, 1e-3),
    (dataclasses.replace(SOFT, scores_learning_rate=0.02, penalty='sum'), 500, 0.1, 2, 1e-2),
    (GATES, 150, 0.03, 3, 1e-5),
  ],
  ids=['soft 50 %', 'soft 10 %, sum', 'l0 3 %'],
)
def test_runs_end_within_half_a_point(config, steps, density, seed, noise):
  """Gradients over three orders of magnitude. Mutations: no braking; no damping; a scale that does not adapt."""
  assert abs(drift(config, steps, density, seed, noise) - density) <= 0.005


@pytest.mark.parametrize(
  ('config', 'structure', 'density', 'seed'),
  [(SOFT, 'heads+neurons', 0.5, 1), (GATES, 'heads+neurons', 0.5, 1), (GATES, 'block+neurons', 0.3, 2)],
  ids=['soft, heads', 'l0, heads', 'l0, blocks'],
)
def test_pieces_of_two_sizes_end_within_half_a_point_of_the_weights(config, structure, density, seed):
  """A head covers as much as 16 neurons. Mutations: count a head as one neuron; one weight for both kinds."""
  encoder = dataclasses.replace(ENCODER, num_heads=4, intermediate_size=256)
  config = dataclasses.replace(config, structure=structure, block=(8, 8))
  assert abs(drift(config, 150, density, seed, 1e-3, encoder) - density) <= 0.005


def test_how_many_pieces_of_each_kind_remain():
  """Of BERT-base a tenth: 14 of 144 heads, neurons for the rest of the weights. Mutation: a tenth of the neurons."""

  def parts(density, method='soft_movement', structure='heads+neurons', encoder=None):
    config = PruneConfig(method, density, structure=structure, control='density', scores_learning_rate=0.1)
    return controlled(config, 500, encoder or EncoderConfig())[1]

  found = parts(0.1)
  head, neuron, whole = 4 * 768 * 64, 2 * 768, 12 * 12 * 768 * 768
  assert found.asked['heads_'] == 14 and found.coarse == 'heads_'
  assert found.asked['neurons_'] == pytest.approx((0.1 * whole - 14 * head) / neuron)
  # A block of 32 * 32 is smaller than a neuron, and takes what is left.
  assert parts(0.1, structure='block+neurons').coarse == 'neurons_'
  assert parts(0.999).parts.keys() == {'neurons_'}  # every head stays, and nothing moves them
  assert parts(0.01, 'l0', encoder=ENCODER).asked['heads_'] == 0
  for structure in ('none', 'block'):
    alike = parts(0.1, structure=structure)
    assert alike.coarse is None and list(alike.parts) == ['']


def test_a_density_below_what_every_layer_keeps_is_refused_and_the_advice_is_enough():
  """Soft movement keeps one head of each layer at least. Mutation: leave the check out."""
  config = PruneConfig('soft_movement', 0.2, structure='heads', control='density', scores_learning_rate=0.1)
  with pytest.raises(ConfigError, match=r'prune.density: 0.2 cannot be reached.* use at least 0\.5') as caught:
    controlled(config, 500)
  controlled(dataclasses.replace(config, density=float(str(caught.value).rsplit(' ', 1)[1])), 500)


def test_a_constant_learning_rate_is_one_for_every_step():
  """Mutation: take the one value of the schedule for all steps' values."""
  schedule = learning_rate_schedule(OptimizerConfig(learning_rate=1e-3, decay='constant'), 50)
  config = dataclasses.replace(SOFT, control='density', scores_learning_rate=0.1)
  masks = make_masks(ENCODER, config, 50, 0)
  np.testing.assert_allclose(make_controller(masks, schedule, 0).rates, [0.1] * 50 + [0.0])


def test_targets():
  """Where a score is pruned. Mutation: L0's gate divided by b."""
  assert target_of(SOFT) == pytest.approx(np.log(0.1 / 0.9))
  assert target_of(PruneConfig(method='soft_movement', threshold=-0.3, threshold_on='scores')) == -0.3
  assert target_of(GATES) == pytest.approx(np.log((1 / 12) / (11 / 12)))


def test_rates_that_do_not_get_there_are_refused_and_the_advice_is_enough():
  """Mutation: count the learning rate before pruning begins."""
  config = PruneConfig(method='soft_movement', control='density', scores_learning_rate=0.01)
  with pytest.raises(ConfigError, match='prune.scores_learning_rate') as caught:
    controlled(config, 150)
  least = float(str(caught.value).rsplit(' ', 1)[1])
  controlled(dataclasses.replace(config, scores_learning_rate=1.01 * least), 150)
  with pytest.raises(ConfigError, match='raise it'):
    controlled(dataclasses.replace(config, scores_learning_rate=0.0), 150)


def test_rpp_leaves_the_density_of_every_step():
  """The strength that is solved zeroes as many weights as the schedule asks for. Mutation: epsilon left out."""
  config = PruneConfig(method='rpp', density=0.1, control='density')
  masks = make_masks(ENCODER, config, 100, 10)
  before = {n: jax.random.normal(jax.random.key(i), s) for i, (n, s) in enumerate(masks.shapes.items())}
  after = {n: x + 0.1 * jax.random.normal(jax.random.key(7), x.shape) for n, x in before.items()}

  @jax.jit
  def run(step):
    strength = solved_strength(masks, after, before, step, lambda tree: tree)
    left = {n: prox_reweighted_l1(x, before[n], strength, config.rpp_epsilon) for n, x in after.items()}
    return strength, share(left)

  for step in (0, 40, 99):
    strength, left = run(step)
    assert float(left) == pytest.approx(masks.densities[step], abs=5e-4)
    assert (strength == 0) == (step == 0)
