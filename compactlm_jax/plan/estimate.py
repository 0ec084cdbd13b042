"""From a compiled program to seconds, utilisation and hours. Estimates of the compiler, never measurements."""

from __future__ import annotations

import dataclasses
import math
import pathlib

from compactlm_jax.config import EncoderConfig, RunConfig
from compactlm_jax.plan.flops import model_flops
from compactlm_jax.plan.program import Program
from compactlm_jax.plan.topology import Topology

OPTIMAL = "cost_analysis()['optimal_seconds']"
ROOFLINE = 'max(FLOPs / peak, bytes / bandwidth)'

# Training time on a TPU v3-8 (authors' answers to reviewers, NeurIPS 2020).
PUBLISHED_HOURS = {
  ('electra', 'small'): 12.0,
  ('electra', 'base'): 192.0,
  ('convbert', 'small'): 12.0,
  ('convbert', 'medium-small'): 18.0,
  ('convbert', 'base'): 72.0,
}
"""(configuration file, variant) -> hours on a v3-8."""


@dataclasses.dataclass(frozen=True)
class Estimate:
  """What a run would cost if the compiler is right.

  Attributes:
    flops, bytes_accessed: of one device and step, by the compiler's count.
    step_seconds: of one step.
    source: `OPTIMAL` or `ROOFLINE`.
    cycle_seconds: sum of the estimated cycles of the program's instructions at the chip's clock, a second and usually
      higher opinion of the compiler; None where the clock is not published.
    exchange_seconds: of the collectives on the links between chips, if nothing hides them; not in `step_seconds`, for
      which the compiler counts the memory that they read and write only.
    model_flops: of one step over all devices, counted from the model (see `flops`).
    mfu: model_flops / (step_seconds * devices * peak).
    tokens_per_second: over all devices.
    hours: of the whole run; None where its steps are not known.
  """

  flops: float
  bytes_accessed: float
  step_seconds: float
  source: str
  cycle_seconds: float | None
  exchange_seconds: float
  model_flops: float
  mfu: float
  tokens_per_second: float
  hours: float | None


def estimate(config: RunConfig, teacher: EncoderConfig | None, topology: Topology, program: Program) -> Estimate:
  """Turns the compiler's counts into time.

  With `optimizer.accumulate` = k the program is a loop whose body is counted once, so costs are multiplied by k. That
  counts the update k times too and is slightly high.

  Args:
    config: the run, layers unrolled.
    teacher: of distillation.
    topology: what the program was compiled for.
    program: of one device.
  """
  times, chip = config.optimizer.accumulate, topology.chip
  seconds, source = step_seconds(program, chip.peak_flops, chip.bandwidth)
  seconds *= times
  needed = model_flops(config, teacher)
  return Estimate(
    flops=program.flops * times,
    bytes_accessed=program.bytes_accessed * times,
    step_seconds=seconds,
    source=source,
    cycle_seconds=program.cycles * times / chip.clock if chip.clock else None,
    exchange_seconds=exchange_seconds(program, topology) * times,
    model_flops=needed,
    mfu=needed / (seconds * topology.devices * chip.peak_flops),
    tokens_per_second=config.batch_size * config.data.seq_len / seconds,
    hours=seconds * config.steps / 3600 if config.steps else None,
  )


def step_seconds(program: Program, peak_flops: float, bandwidth: float) -> tuple[float, str]:
  """(seconds, where they come from).

  The compiler's own estimate comes out negative on some programs for v4 and later. One that is below FLOPs / peak is
  as wrong, only less visibly.
  """
  compute = program.flops / peak_flops
  own = program.optimal_seconds
  if math.isfinite(own) and own > 0 and own >= compute:
    return own, OPTIMAL
  return max(compute, program.bytes_accessed / bandwidth), ROOFLINE


def exchange_seconds(program: Program, topology: Topology) -> float:
  """Time of the collectives on a ring of chips whose two directions both carry data.

  Both cores of a chip are taken to add their values up before anything leaves it.
  """
  chips = math.prod(topology.shape)
  share = (chips - 1) / chips
  # Bytes that leave a chip, per byte that a device has afterwards.
  leaving = {'all-reduce': 2 * share, 'reduce-scatter': chips - 1, 'collective-permute': 1.0}
  sent = sum(each.bytes * leaving.get(each.kind, share) for each in program.collectives) if chips > 1 else 0.0
  return sent / (2 * topology.chip.link)


def published_hours(config_file: str) -> float | None:
  """Hours that the authors report for a v3-8; None where there are none.

  Args:
    config_file: 'configs/convbert.py:base'.
  """
  path, _, variant = config_file.rpartition(':')
  return PUBLISHED_HOURS.get((pathlib.PurePath(path).stem, variant))
