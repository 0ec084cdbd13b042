"""One configuration with several seeds: a run directory for each, one after another."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Sequence
from typing import Any

import jax
from etils import epath

from compactlm_jax.config import RunConfig
from compactlm_jax.errors import CompactLMError, ConfigError, LockedError, NumericsError, PreemptedError
from compactlm_jax.jobs.commands import run_train
from compactlm_jax.jobs.finished import finished_results
from compactlm_jax.report import Report, collect
from compactlm_jax.train.rundir import FREE_FIELDS, read_run
from compactlm_jax.train.signals import StopRequest

log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Series:
  """What became of a series of runs.

  Attributes:
    results: seed -> what its results.json holds, of this shard.
    failures: seed -> why it has none.
    report: all seeds that are finished in the directory, those of other shards too; None if there are none.
  """

  results: dict[int, dict[str, Any]]
  failures: dict[int, Exception]
  report: Report | None


def run_seeds(config: RunConfig, workdir: str, seeds: Sequence[int], shard: str = '', **options: Any) -> Series:
  """Runs a configuration with several seeds: WORKDIR/seed-0, ..., each an ordinary run directory.

  Finished runs are kept and an interrupted one resumes, so the same call continues after a kill. A run that fails
  does not stop the others, unless its configuration or data are at fault before any other succeeded.

  Args:
    config: of every run, seed aside.
    workdir: their parent.
    seeds: of the whole series.
    shard: 'I/N' runs every N-th seed from the I-th on, counted from 0; '' runs all.
    options: see `train.loop.train`.

  Raises:
    PreemptedError: a signal asked to stop; what was done is saved.
    CompactLMError: of a run, where the others would meet it too.
  """
  if (epath.Path(workdir) / 'config.json').exists():
    raise ConfigError(f'{workdir} holds a single run; name another --workdir for a series of seeds')
  if config.seed:
    raise ConfigError(f'config.seed: {config.seed} and --seeds are both given; set the seeds by --seeds')
  results: dict[int, dict[str, Any]] = {}
  failures: dict[int, Exception] = {}
  with StopRequest() as stop:
    mine = shard_of(seeds, shard)
    for number, seed in enumerate(mine, 1):
      if stop.requested():
        raise PreemptedError(f'asked to stop before seed {seed}; the same command continues in {workdir}')
      folder, run = f'{workdir}/seed-{seed}', dataclasses.replace(config, seed=seed)
      log.info('seed %d (%d of %d): %s', seed, number, len(mine), folder)
      try:
        results[seed] = finished_results(run, folder) or run_train(run, folder, **options)
      except PreemptedError:
        raise
      except Exception as e:
        own = isinstance(e, (NumericsError, LockedError))
        # Of several processes, others may not have failed: they would not follow to the next seed.
        if not own and (not results or jax.process_count() > 1):
          raise
        failures[seed] = e
        log.error('seed %d failed: %s', seed, e, exc_info=None if isinstance(e, CompactLMError) else e)
  return Series(results, failures, _report(workdir, seeds))


def raise_first(series: Series) -> None:
  """Raises the first failure of a series, with its seed and those of the other failures in the message."""
  if not series.failures:
    return
  seed, error = next(iter(series.failures.items()))
  others = [str(s) for s in series.failures if s != seed]
  also = f'; seed {", ".join(others)} failed too' if others else ''
  if isinstance(error, CompactLMError):
    raise type(error)(f'seed {seed}: {error}{also}') from error
  error.add_note(f'in the run of seed {seed}{also}')
  raise error


def parse_seeds(text: str) -> tuple[int, ...]:
  """'9' is 0, 1, ..., 8; '0,3,7' is what it says; '5,' is 5 alone.

  Raises:
    ConfigError: not a number or list of numbers in [0, 2^31), none, or one twice.
  """
  try:
    seeds = tuple(int(part) for part in text.split(',') if part.strip()) if ',' in text else tuple(range(int(text)))
  except ValueError as e:
    raise ConfigError(f'--seeds={text}: write how many (9) or which (0,3,7)') from e
  if not seeds or min(seeds) < 0 or max(seeds) >= 2**31 or len(set(seeds)) < len(seeds):
    raise ConfigError(f'--seeds={text}: seeds must be different numbers in [0, 2^31), at least one')
  return seeds


def shard_of(seeds: Sequence[int], shard: str) -> tuple[int, ...]:
  """Every N-th seed from the I-th on for a `shard` of 'I/N'; all for ''.

  Raises:
    ConfigError: not of this form, or I is not in 0 ... N-1.
  """
  if not shard:
    return tuple(seeds)
  first, _, step = shard.partition('/')
  if not (first.isdecimal() and step.isdecimal() and int(first) < int(step)):
    raise ConfigError(f'--seed_shard={shard}: write I/N with I from 0 to N-1, for example 0/2 and 1/2 on two machines')
  return tuple(seeds[int(first) :: int(step)])


def _report(workdir: str, seeds: Sequence[int]) -> Report | None:
  folders = [f'{workdir}/seed-{seed}' for seed in seeds]
  there = [folder for folder in folders if (epath.Path(folder) / 'config.json').exists()]
  done = [folder for folder in there if (epath.Path(folder) / 'results.json').exists()]
  try:
    return collect(there, read_run, FREE_FIELDS) if done else None
  except ConfigError as e:  # the runs are done all the same
    log.warning('no table of the seeds: %s', e)
    return None
