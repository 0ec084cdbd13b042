"""`compactlm plan`: resolve, compile (or take from the cache), estimate, report."""

from __future__ import annotations

import logging
import time
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from compactlm_jax.config import RunConfig, to_json
from compactlm_jax.parallel import make_mesh
from compactlm_jax.plan import cache
from compactlm_jax.plan.abstract import Plan, abstract_step, resolve
from compactlm_jax.plan.compile import FULL, QUICK, compile_program, tpu_devices
from compactlm_jax.plan.estimate import estimate, published_hours
from compactlm_jax.plan.program import Overflow, Program
from compactlm_jax.plan.report import Report, batch_words
from compactlm_jax.plan.sweep import largest_batch
from compactlm_jax.plan.topology import Topology, parse_topology
from compactlm_jax.types import Params

log = logging.getLogger(__name__)


def plan_run(config: RunConfig, name: str, topology: str, *, sweep: bool = False, thorough: bool = False) -> Report:
  """Plans a run on a TPU that is not here.

  Args:
    config: the run.
    name: of the configuration, 'configs/convbert.py:base'.
    topology: name of the slice, 'v3-8'.
    thorough: compile with the effort of a run, in about three times the time.
    sweep: also look for the largest batch that fits; a program that does not fit makes that happen anyway.

  Returns:
    What the compiler says. See `too_large` for a program that does not fit.

  Raises:
    ConfigError: unknown topology, no libtpu, or a configuration that does not fit the slice.
    DataError: a named model or dataset that cannot be read.
  """
  slice_, plan = parse_topology(topology), resolve(config)
  mesh = make_mesh(plan.config.mesh, tpu_devices(slice_))
  effort = FULL if thorough else QUICK
  state, frozen, _ = abstract_step(plan, mesh)[1]
  program = compile_plan(plan, mesh, slice_, effort)
  fits = isinstance(program, Program) and program.peak_bytes <= slice_.chip.usable_bytes
  fixed = _bytes_on_a_device((state, frozen))
  batches = _search(plan, mesh, slice_, effort, fixed, program) if sweep or not fits else None
  notes = plan.notes
  if not thorough:
    notes += ('compiled with least effort: step and memory come out a few per cent high; --thorough takes 3x as long',)
  if plan.config.optimizer.accumulate > 1:
    notes += ('costs are those of one micro-batch and an update, times optimizer.accumulate: slightly high',)
  return Report(
    name=name,
    config=plan.config,
    topology=slice_,
    program=program,
    estimate=estimate(plan.config, plan.teacher, slice_, program) if isinstance(program, Program) else None,
    thorough=thorough,
    published=published_hours(name),
    parameters=_placement(state.params, mesh),
    notes=notes,
    batches=batches,
  )


def too_large(report: Report) -> str:
  """What to say of a program that does not fit; '' for one that does."""
  if report.fits:
    return ''
  needed, usable = report.needed / 2**30, report.topology.chip.usable_bytes / 2**30
  return (
    f'config.batch_size: {report.config.batch_size} rows need {needed:.2f} GiB of HBM on each '
    f'{report.topology.device_word} of {report.topology.name}, {needed - usable:.2f} more than the {usable:.2f} that '
    f'there are; {batch_words(report)}. Other remedies: --config.encoder.remat=True, --config.optimizer.accumulate=N'
  )


def compile_plan(plan: Plan, mesh: Mesh, topology: Topology, effort: str) -> Program | Overflow:
  """The program of a plan's training step, from the cache if it was compiled before.

  Raises:
    ConfigError: sizes that do not divide over the mesh.
  """
  teacher = None if plan.teacher is None else to_json(plan.teacher)
  key = cache.cache_key(_deciding(plan.config), '{} {}'.format(*topology.request()), teacher=teacher, effort=effort)
  if (known := cache.load(key)) is not None:
    log.info('%s, %d rows: compiled before (%s)', topology.name, plan.config.batch_size, cache.cache_folder())
    return known
  log.info('compiling for %s, %d rows; this can take minutes ...', topology.name, plan.config.batch_size)
  started = time.monotonic()
  step, arguments = abstract_step(plan, mesh)
  result = compile_program(step, *arguments, effort=effort)
  log.info('compiled in %.0f s', time.monotonic() - started)
  cache.save(key, result)
  return result


def _deciding(config: RunConfig) -> dict[str, Any]:
  """The configuration without what no program depends on."""
  values = to_json(config)
  for name in ('checkpoint_every', 'keep', 'log_every', 'eval_every', 'model', 'teacher'):
    del values[name]
  return values


def _search(
  plan: Plan, mesh: Mesh, topology: Topology, effort: str, fixed: int, first: Program | Overflow
) -> tuple[int, int | None]:
  config, usable = plan.config, topology.chip.usable_bytes
  unit = mesh.shape['data'] * mesh.shape['fsdp'] * config.optimizer.accumulate

  def needs(batch_size: int) -> tuple[bool, float]:
    result = (
      first if batch_size == config.batch_size else compile_plan(plan.with_batch(batch_size), mesh, topology, effort)
    )
    needed = result.peak_bytes if isinstance(result, Program) else result.needed
    log.info('%d rows need %.2f of %.2f GiB', batch_size, needed / 2**30, usable / 2**30)
    return isinstance(result, Program) and needed <= usable, needed

  return largest_batch(needs, config.batch_size, unit, fixed, usable)


def _bytes_on_a_device(tree: Any) -> int:
  def size(leaf: Any) -> int:
    return int(np.prod(leaf.sharding.shard_shape(leaf.shape), dtype=np.int64)) * leaf.dtype.itemsize

  return sum(size(leaf) for leaf in jax.tree.leaves(tree))


def _placement(params: Params, mesh: Mesh) -> str:
  """How the parameters lie: replicated, or which share of their bytes is on each device."""
  leaves = jax.tree.leaves(params)
  here, whole = _bytes_on_a_device(params), sum(leaf.size * leaf.dtype.itemsize for leaf in leaves)
  axes = [f'{axis} {size}' for axis, size in mesh.shape.items() if axis != 'data' and size > 1]
  how = f'in slices over {", ".join(axes)}: {here / whole:.1%} on each device' if axes else 'replicated'
  return f'{sum(leaf.size for leaf in leaves) / 1e6:.1f} M, {how}'
