"""Runs that need not run again."""

from __future__ import annotations

import logging
from typing import Any

import jax
from etils import epath

from compactlm_jax.config import RunConfig
from compactlm_jax.parse import parse_row
from compactlm_jax.train.rundir import read_run

log = logging.getLogger(__name__)


def finished_results(config: RunConfig, folder: str) -> dict[str, Any] | None:
  """What a run of just this configuration has left, without loading its data; None if it has to run.

  Args:
    config: of the run, as its config.json holds it.
    folder: its directory.
  """
  path = epath.Path(folder)
  if jax.process_count() > 1 or not (path / 'results.json').exists() or not (path / 'config.json').exists():
    return None
  try:
    results = parse_row((path / 'results.json').read_bytes())
    done = read_run(folder)[0] == config and config.steps in (0, results['steps']) and results['metrics'] is not None
  except (ValueError, KeyError, TypeError):
    return None  # the run itself says what is wrong, or evaluates again
  if done:
    log.info('%s is finished and kept', folder)
  return results if done else None
