"""How far pruning has come at each step (Zhu and Gupta 2017; Sanh et al. 2020, equation 4)."""

from __future__ import annotations

import math

import numpy as np

from compactlm_jax.config import PruneConfig
from compactlm_jax.errors import ConfigError


def cubic_schedule(initial: float, final: float, total_steps: int, warmup: int, config: PruneConfig) -> np.ndarray:
  """The value at every step, and the final one after the last.

  Constant at `initial` for initial_warmup * warmup steps, constant at `final` for the last final_warmup * warmup, cubic
  between: final + (initial - final) (1 - progress)^3. Source: huggingface/transformers
  `research_projects/movement-pruning/masked_run_glue.py: schedule_threshold`, in double precision as there.

  Args:
    initial: value at the start.
    final: value at the end.
    total_steps: optimiser steps of the run.
    warmup: warm-up steps of the learning rate.
    config: the multiples of the warm-up, and the number of the first step.

  Returns:
    float64 [total_steps + 1]; entry t is what step t (from 0) trains with, the last one is `final`.

  Raises:
    ConfigError: the run is too short for the schedule; the message says what to change.
  """
  first, last = config.initial_warmup * warmup, config.final_warmup * warmup
  if total_steps <= first + last:
    longest = (total_steps - 1) / (config.initial_warmup + config.final_warmup)
    raise ConfigError(
      f'config.prune: {config.initial_warmup:g} + {config.final_warmup:g} times the warm-up of {warmup} steps leave '
      f'nothing of {total_steps} steps to prune in; set --config.optimizer.warmup_steps to at most '
      f'{math.floor(longest)}, train for more than {math.floor(first + last)} steps, or lower prune.initial_warmup and '
      'prune.final_warmup'
    )
  step = np.arange(total_steps, dtype=np.float64) + config.first_step
  left = 1.0 - (step - first) / (total_steps - (first + last))
  values = np.where(
    step <= first, initial, np.where(step > total_steps - last, final, final + (initial - final) * left**3)
  )
  return np.append(values, final)


def kept(densities: np.ndarray, size: int) -> np.ndarray:
  """How many of `size` entries remain at each density: floor(density * size), as published, in double precision.

  Args:
    densities: fractions.
    size: entries of a matrix.

  Returns:
    int32 of the same shape.
  """
  return (densities * size).astype(np.int32)


def least_density(size: int) -> float:
  """A density of two digits that keeps one of `size` entries, the lowest such."""
  unit = 10.0 ** (math.floor(math.log10(1 / size)) - 1)
  digits = math.ceil(1 / size / unit - 1e-6)
  while int(float(f'{digits * unit:.2g}') * size) < 1:
    digits += 1
  return float(f'{digits * unit:.2g}')
