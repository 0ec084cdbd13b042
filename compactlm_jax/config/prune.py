"""How a model is pruned while it is fine-tuned."""

from __future__ import annotations

import dataclasses
import math

from compactlm_jax.config.check import one_of, require

METHODS = ('hard_movement', 'soft_movement', 'magnitude', 'post_hoc_magnitude', 'l0', 'rpp', 'random')
STRUCTURES = ('none', 'heads', 'neurons', 'heads+neurons', 'block', 'block+neurons')
SCORED = ('hard_movement', 'soft_movement', 'l0')
"""Methods that train scores."""
PENALISED = ('soft_movement', 'l0', 'rpp')
"""Methods whose density follows from a penalty instead of being set."""


@dataclasses.dataclass(frozen=True)
class PruneConfig:
  """Movement pruning (Sanh et al. 2020) and what it is compared with.

  Attributes:
    method: 'hard_movement' keeps the entries with the highest scores (the original's topK), 'soft_movement' those above
      a threshold (sigmoied_threshold, threshold), 'magnitude' the largest weights (automated gradual pruning, Zhu and
      Gupta 2017), 'post_hoc_magnitude' prunes the trained model once, 'l0' trains hard concrete gates (Louizos et al.
      2018), 'rpp' is reweighted proximal pruning (Guo et al. 2019), 'random' keeps entries by chance.
    density: remaining fraction at the end, of the maskable weights of the encoder, or of its heads, neurons or blocks
      (of several kinds: of each, and with `control` 'density' of the weights of all together).
    initial_density: where the schedule starts.
    structure: what is kept or removed: 'none' single weights; 'heads', 'neurons' (of the feed-forward, shared by both
      matrices), 'heads+neurons'; 'block' rectangles of `block`; 'block+neurons' rectangles in the attention and neurons
      in the feed-forward (nn_pruning's hybrid).
    block: rows (inputs) and columns (outputs) of a rectangle.
    scope: 'local' keeps the same fraction of every layer and matrix, 'global' of all together.
    threshold_every: with 'global', steps between new thresholds (25 in the original); 1 is exact at every step.
    threshold: final tau of 'soft_movement'.
    initial_threshold: tau at the start.
    threshold_on: compare tau with 'sigmoid' of the scores, or with the 'scores' themselves.
    floor: 'soft_movement', and 'hard_movement' with a threshold that stays, never keep less than this fraction of a
      matrix.
    initial_warmup: multiple of the optimiser's warm-up during which the schedule stays at its first value; after it the
      schedule is cubic.
    final_warmup: multiple of the warm-up, at the end of the run, during which it stays at its last value.
    first_step: what the schedule calls the first step: 0 (the original's GLUE script) or 1 (its SQuAD script).
    regularization: final weight lambda of the penalty of 'soft_movement', 'l0' and 'rpp'; with `control` 'density'
      the scale to begin with, 0 for a usual one (of 'rpp' it follows from each step's weights).
    penalty: 'mean' of the means of all matrices (the original's code) or 'sum' over all entries (the paper).
    control: 'fixed' follows `regularization`; 'density' adjusts the weight so that the run ends at `density`.
    scores_learning_rate: of scores, which share the warm-up and decay of the weights and have no weight decay.
    scores_init: 'constant' at `scores_scale`, 'uniform' between -scores_scale and scores_scale, or 'kaiming' uniform.
    scores_scale: see `scores_init`; L0 was published with 2.197, the logit of .9.
    freeze_embeddings: leave the embeddings as they are, as published.
    rpp_epsilon: of the weights 1 / (|w| + epsilon) of the reweighted l1 penalty.
  """

  method: str = 'hard_movement'
  density: float = 0.1
  initial_density: float = 1.0
  structure: str = 'none'
  block: tuple[int, ...] = (32, 32)
  scope: str = 'local'
  threshold_every: int = 1
  threshold: float = 0.1
  initial_threshold: float = 0.0
  threshold_on: str = 'sigmoid'
  floor: float = 0.005
  initial_warmup: float = 1.0
  final_warmup: float = 2.0
  first_step: int = 0
  regularization: float = 0.0
  penalty: str = 'mean'
  control: str = 'fixed'
  scores_learning_rate: float = 1e-2
  scores_init: str = 'constant'
  scores_scale: float = 0.0
  freeze_embeddings: bool = True
  rpp_epsilon: float = 1e-3

  def __post_init__(self) -> None:
    f = 'prune.'
    for name, allowed in (
      ('method', METHODS),
      ('structure', STRUCTURES),
      ('scope', ('local', 'global')),
      ('threshold_on', ('sigmoid', 'scores')),
      ('penalty', ('mean', 'sum')),
      ('control', ('fixed', 'density')),
      ('scores_init', ('constant', 'uniform', 'kaiming')),
    ):
      one_of(f + name, getattr(self, name), allowed)
    for name in ('density', 'initial_density'):
      value = getattr(self, name)
      require(0 < value <= 1, f + name, f'{value} must be in (0, 1]: the fraction that remains (0.1 is 90 % sparsity)')
    require(
      self.initial_density >= self.density,
      f + 'initial_density',
      f'{self.initial_density} is below the final density {self.density}; nothing grows back on purpose',
    )
    require(
      len(self.block) == 2 and min(self.block, default=0) >= 1,
      f + 'block',
      f'{self.block} must be two positive sizes: rows, columns',
    )
    require(self.threshold_every >= 1, f + 'threshold_every', f'{self.threshold_every} must be at least 1')
    for name in ('threshold', 'initial_threshold', 'scores_scale'):
      require(abs(getattr(self, name)) < float('inf'), f + name, f'{getattr(self, name)} must be finite')
    require(0 <= self.floor < 1, f + 'floor', f'{self.floor} must be in [0, 1)')
    for name in ('initial_warmup', 'final_warmup', 'regularization'):
      require(0 <= getattr(self, name) < float('inf'), f + name, f'{getattr(self, name)} must not be negative')
    require(self.first_step in (0, 1), f + 'first_step', f'{self.first_step} must be 0 or 1')
    require(0 <= self.scores_learning_rate <= 10, f + 'scores_learning_rate', 'must be in [0, 10]')
    require(0 < self.rpp_epsilon < float('inf'), f + 'rpp_epsilon', f'{self.rpp_epsilon} must be positive')
    self._check_combination(f)

  def _check_combination(self, f: str) -> None:
    require(
      self.method != 'soft_movement' or self.threshold > 0 or self.threshold_on == 'scores',
      f + 'threshold',
      f'{self.threshold}: a final threshold of 0 prunes nothing, and the weight of the penalty is divided by it; use '
      'for example 0.1',
    )
    require(
      self.method != 'soft_movement' or self.threshold < 1 or self.threshold_on == 'scores',
      f + 'threshold',
      f'{self.threshold}: no sigmoid is above 1; use for example 0.1',
    )
    coupled = self.method == 'soft_movement' and self.control == 'fixed' and self.penalised
    require(
      not (self.threshold_on == 'scores' and self.threshold == 0 and coupled),
      f + 'threshold',
      'the weight of the penalty grows as threshold / final threshold; with a final threshold of 0 set '
      'prune.regularization=0',
    )
    require(
      self.threshold_every == 1
      or (self.scope == 'global' and self.method == 'hard_movement' and self.structure == 'none'),
      f + 'threshold_every',
      "is for prune.scope='global' of hard_movement without structure; set it to 1",
    )
    require(
      self.scope == 'local' or self.method not in PENALISED,
      f + 'scope',
      f"'global' is for methods that keep a fraction; {self.method} keeps what its penalty leaves: use 'local'",
    )
    require(
      self.regularization == 0 or self.method in PENALISED,
      f + 'regularization',
      f'{self.regularization} is for methods with a penalty ({", ".join(PENALISED)}); {self.method} has none: set '
      'it to 0',
    )
    require(
      self.control == 'fixed' or self.method in PENALISED,
      f + 'control',
      f"'density' is for methods whose density is not set directly ({', '.join(PENALISED)}); {self.method} ends at "
      "prune.density exactly: use 'fixed'",
    )
    require(
      self.control == 'fixed' or self.density < 1,
      f + 'density',
      "1.0: nothing is to be pruned, so there is no weight to find; lower it, or use prune.control='fixed'",
    )
    require(
      self.control == 'fixed' or self.method != 'soft_movement' or self.density > self.floor,
      f + 'density',
      f'{self.density} cannot be reached: every matrix keeps prune.floor={self.floor} of its entries; lower the floor',
    )
    require(
      self.method not in ('rpp',) or self.structure == 'none',
      f + 'structure',
      f"'{self.structure}': reweighted proximal pruning is defined for single weights; use 'none'",
    )

  @property
  def penalised(self) -> bool:
    """Whether a penalty is part of the loss or of the update."""
    return self.method in PENALISED and (self.regularization > 0 or self.control == 'density')

  def require_weight(self) -> None:
    """Raises ConfigError where a penalty without weight would prune nothing, or the first threshold everything.

    Not part of the checks of a configuration, whose fields are set one after another.
    """
    soft, sigmoid = self.method == 'soft_movement', self.threshold_on == 'sigmoid'
    thresholding = soft and not sigmoid
    require(
      self.method not in PENALISED or self.penalised or thresholding,
      'prune.density',
      f'is not reached by itself: {self.method} is pruned by a penalty, and prune.regularization is 0; set '
      "prune.control='density', or a weight (configs/prune.py)",
    )
    require(
      not (soft and sigmoid) or self.initial_threshold < 1,
      'prune.initial_threshold',
      f'{self.initial_threshold}: no sigmoid is above 1, so that nothing would remain; use for example 0',
    )
    begun, called = self.scores_scale, 'the scores'
    if sigmoid:
      begun = 1 / (1 + math.exp(min(-self.scores_scale, 700.0)))
      called = f'{begun:g}, the sigmoid of the scores'
    require(
      not (soft and self.scores_init == 'constant') or self.initial_threshold < begun,
      'prune.initial_threshold',
      f'{self.initial_threshold} is not below {called}, which all begin at prune.scores_scale={self.scores_scale}: '
      'nothing would remain from the first step on; lower it, or draw scores (prune.scores_init)',
    )
