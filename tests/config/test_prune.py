"""PruneConfig refuses what cannot work, and says what to change."""

import pytest

from compactlm_jax.config import PruneConfig
from compactlm_jax.errors import ConfigError

SOFT = {'method': 'soft_movement'}
REFUSED = {
  'a method that is near another': ({'method': 'hard_movment'}, r'prune.method.*did you mean hard_movement\?'),
  'an unknown structure': ({'structure': 'rows and columns'}, 'prune.structure.*use one of none, heads'),
  'nothing left': ({'density': 0.0}, 'prune.density.*the fraction that remains'),
  'more than all': ({'density': 1.2, 'initial_density': 1.2}, 'prune.density'),
  'percents': ({'density': 10}, 'prune.density.*0.1 is 90 % sparsity'),
  'growing back': ({'density': 0.5, 'initial_density': 0.4}, 'prune.initial_density'),
  'three sizes of a block': ({'block': (4, 4, 4)}, 'prune.block'),
  'an empty block': ({'block': (4, 0)}, 'prune.block'),
  'a final threshold of 0': ({**SOFT, 'threshold': 0.0}, 'prune.threshold.*prunes nothing'),
  'a sigmoid above 1': ({**SOFT, 'threshold': 1.0}, 'prune.threshold.*no sigmoid'),
  'lambda divided by 0': ({**SOFT, 'threshold': 0.0, 'threshold_on': 'scores', 'regularization': 1.0}, 'n=0'),
  'a threshold that stays, local': ({'threshold_every': 25}, "prune.threshold_every.*prune.scope='global'"),
  'a threshold that stays, magnitude': (
    {'threshold_every': 25, 'scope': 'global', 'method': 'magnitude'},
    'prune.threshold_every',
  ),
  'a scope without effect': ({**SOFT, 'scope': 'global'}, "prune.scope.*soft_movement keeps .* use 'local'"),
  'a penalty of no method': ({'regularization': 3.0}, 'prune.regularization.*hard_movement has none: set it to 0'),
  'a density that is exact anyway': ({'control': 'density'}, 'prune.control.*ends at prune.density exactly'),
  'nothing to find': ({**SOFT, 'control': 'density', 'density': 1.0}, 'prune.density.*nothing is to be pruned'),
  'below the floor': ({**SOFT, 'control': 'density', 'density': 0.004}, 'prune.density.*lower the floor'),
  'rpp of heads': ({'method': 'rpp', 'structure': 'heads'}, 'prune.structure'),
  'a scale that is not finite': ({'scores_scale': float('nan')}, 'prune.scores_scale'),
  'a rate below 0': ({'scores_learning_rate': -1.0}, 'prune.scores_learning_rate'),
  'a third first step': ({'first_step': 2}, 'prune.first_step'),
}  # fmt: skip


@pytest.mark.parametrize(('fields', 'message'), REFUSED.values(), ids=REFUSED)
def test_what_cannot_work_is_refused(fields, message):
  """Mutation: leave any of the checks out."""
  with pytest.raises(ConfigError, match=message):
    PruneConfig(**fields)


@pytest.mark.parametrize(
  ('fields', 'message'),
  [
    ({'initial_threshold': 2.0}, 'prune.initial_threshold: 2.0: no sigmoid is above 1'),
    ({'initial_threshold': 1.0, 'scores_init': 'uniform'}, 'no sigmoid is above 1'),
    ({'initial_threshold': 0.5}, 'prune.initial_threshold: 0.5 is not below 0.5, the sigmoid of the scores'),
    ({'initial_threshold': 0.95, 'scores_scale': 2.197}, 'is not below 0.899.*prune.scores_scale=2.197'),
    ({'initial_threshold': 0.1, 'threshold_on': 'scores'}, 'is not below the scores'),
  ],
)
def test_first_thresholds_above_all_scores_are_refused(fields, message):
  """Nothing would remain from the first step on. Mutation: look at prune.threshold_on='scores' alone."""
  config = PruneConfig(**{**SOFT, 'regularization': 3.0, **fields})
  with pytest.raises(ConfigError, match=message):
    config.require_weight()


def test_first_thresholds_below_scores_are_accepted():
  """Mutations: compare a sigmoid with the scores; refuse drawn scores. Methods without a threshold have none."""
  for fields in ({'initial_threshold': 0.49}, {'initial_threshold': 0.6, 'scores_init': 'kaiming'}):
    PruneConfig(**{**SOFT, 'regularization': 3.0, **fields}).require_weight()
  PruneConfig(**{**SOFT, 'threshold_on': 'scores', 'initial_threshold': 2.0, 'scores_scale': 3.0}).require_weight()
  PruneConfig(initial_threshold=2.0).require_weight()


def test_what_has_a_penalty():
  """Soft movement with lambda 0 is plain thresholding. Mutation: leave the controller out."""
  assert not PruneConfig().penalised and not PruneConfig(method='soft_movement').penalised
  assert PruneConfig(method='soft_movement', regularization=3.0).penalised
  for method in ('soft_movement', 'l0', 'rpp'):
    assert PruneConfig(method=method, control='density').penalised
  # No weight is divided by the threshold where a controller finds it.
  PruneConfig(method='soft_movement', threshold=0.0, threshold_on='scores', control='density')
