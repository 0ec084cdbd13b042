"""A plan as JSON and as a table."""

from __future__ import annotations

import dataclasses
from typing import Any

from compactlm_jax.config import RunConfig
from compactlm_jax.plan.cache import versions
from compactlm_jax.plan.estimate import Estimate
from compactlm_jax.plan.program import KINDS, Overflow, Program
from compactlm_jax.plan.topology import Topology

UNITS = {
  'peak_hbm_bytes, hbm_bytes, usable_hbm_bytes, memory, flops, bytes_accessed, collectives': 'one device',
  'model_flops, tokens_per_second': 'all devices',
  'step_seconds, hours, mfu': "the compiler's estimate, not a measurement",
  'exchange_seconds': 'the collectives on the links between chips, not in step_seconds',
  'published_hours': 'TPU v3-8, as the authors report',
}
"""What the fields of the JSON are counted for."""

_GIB = 2**30


@dataclasses.dataclass(frozen=True)
class Report:
  """What `compactlm plan` says.

  Attributes:
    name: 'configs/convbert.py:base'.
    config: the resolved run.
    topology: what it was compiled for.
    program: of one device, or why there is none.
    estimate: None where the program does not fit.
    published: hours that the authors report.
    parameters: how they lie on the devices.
    notes: what was assumed.
    thorough: compiled with the effort of a run.
    batches: (largest batch that fits, smallest that does not), if they were looked for.
  """

  name: str
  config: RunConfig
  topology: Topology
  program: Program | Overflow
  estimate: Estimate | None
  published: float | None
  parameters: str
  notes: tuple[str, ...] = ()
  thorough: bool = True
  batches: tuple[int, int | None] | None = None

  @property
  def needed(self) -> int:
    """Bytes of HBM on one device."""
    return self.program.peak_bytes if isinstance(self.program, Program) else self.program.needed

  @property
  def fits(self) -> bool:
    """Whether the program runs in the memory of the device."""
    return isinstance(self.program, Program) and self.needed <= self.topology.chip.usable_bytes


def as_json(report: Report) -> dict[str, Any]:
  """The report as plain values; what is not known is None."""
  cfg, top, est = report.config, report.topology, report.estimate
  program = report.program if isinstance(report.program, Program) else None
  batches = report.batches or (None, None)
  return {
    'config': report.name,
    'task': cfg.task,
    'topology': top.name,
    'devices': top.devices,
    'batch_size': cfg.batch_size,
    'seq_len': cfg.data.seq_len,
    'steps': cfg.steps or None,
    'measured': False,
    'fits': report.fits,
    'peak_hbm_bytes': report.needed,
    'hbm_bytes': int(top.chip.hbm_bytes),
    'usable_hbm_bytes': int(top.chip.usable_bytes),
    'memory': program.memory if program else None,
    'flops': est.flops if est else None,
    'model_flops': est.model_flops if est else None,
    'bytes_accessed': est.bytes_accessed if est else None,
    'step_seconds': est.step_seconds if est else None,
    'estimate_source': est.source if est else None,
    'thorough': report.thorough,
    'cycle_seconds': est.cycle_seconds if est and report.thorough else None,
    'exchange_seconds': est.exchange_seconds if est else None,
    'mfu': est.mfu if est else None,
    'collectives': collectives(program) if program else None,
    'tokens_per_second': est.tokens_per_second if est else None,
    'hours': est.hours if est else None,
    'published_hours': report.published,
    'largest_batch_that_fits': batches[0],
    'smallest_batch_that_does_not': batches[1],
    'parameters': report.parameters,
    'costly': [list(part) for part in program.costly[:30]] if program else None,
    'peak_flops': top.chip.peak_flops,
    'bandwidth': top.chip.bandwidth,
    'notes': list(report.notes),
    'units': UNITS,
    'versions': versions(),
  }


def collectives(program: Program) -> dict[str, dict[str, int]]:
  """Kind -> how many and how many bytes, on one device."""
  found = {}
  for kind in KINDS:
    if own := [each.bytes for each in program.collectives if each.kind == kind]:
      found[kind] = {'count': len(own), 'bytes': sum(own)}
  return found


def as_table(report: Report) -> str:
  """The report for a terminal."""
  cfg, top = report.config, report.topology
  word = top.device_word
  head = f"{report.name} on {top.name}: {top.devices} {word}s. The compiler's estimates; nothing here was measured."
  rows = [
    ('rows', f'{cfg.batch_size:,} x {cfg.data.seq_len} tokens per step, {_share(cfg, top)} rows per {word}'),
    ('parameters', report.parameters),
    *_memory_rows(report),
  ]
  if isinstance(report.program, Program) and report.estimate:
    rows += _time_rows(report, report.program, report.estimate)
  if report.batches:
    rows.append(('largest batch', batch_words(report)))
  rows += [('assumed', note) for note in report.notes]
  return '\n'.join([head, '', *(f'  {label:<16} {text}' for label, text in rows)])


def batch_words(report: Report) -> str:
  """The largest batch that fits, in words."""
  assert report.batches is not None
  fits, fails = report.batches
  if not fits:
    return f'not even {fails} rows fit; store parameters in slices (--config.mesh.data=1 --config.mesh.fsdp=-1)'
  return f'{fits:,} rows fit' + (f', {fails:,} do not' if fails else '; no batch was found that does not')


def _share(cfg: RunConfig, top: Topology) -> str:
  mesh = cfg.mesh
  ways = top.devices // mesh.model if mesh.model > 0 else mesh.data * mesh.fsdp
  return f'{cfg.batch_size / ways:g}'


def _memory_rows(report: Report) -> list[tuple[str, str]]:
  chip, word = report.topology.chip, report.topology.device_word
  usable, needed = chip.usable_bytes / _GIB, report.needed / _GIB
  of = f'of {usable:.2f} GiB per {word} ({chip.kind} has {chip.hbm_bytes / _GIB:.0f}, the runtime keeps the rest)'
  if not report.fits:
    return [('fits', f'no: {needed:.2f} {of}, {needed - usable:.2f} GiB too much')]
  assert isinstance(report.program, Program)
  memory = {name: size / _GIB for name, size in report.program.memory.items()}
  extra = memory['outputs'] - memory['aliased']
  parts = f'arguments {memory["arguments"]:.2f}, temporaries {memory["temporaries"]:.2f}, code {memory["code"]:.2f}'
  return [
    ('fits', f'yes: {needed:.2f} {of}'),
    ('peak HBM', parts + (f', outputs {extra:.2f}' if extra >= 0.005 else '') + ' GiB'),
  ]


def _time_rows(report: Report, program: Program, est: Estimate) -> list[tuple[str, str]]:
  top = report.topology
  word = top.device_word
  second = ''
  if est.cycle_seconds and report.thorough:
    second = f'; {est.cycle_seconds * 1e3:.2f} ms by the cycles of its instructions'
  exchanged = ', '.join(
    f'{kind} {own["count"]} ({own["bytes"] / 1e6:.1f} MB)' for kind, own in collectives(program).items()
  )
  hours = f'{est.hours:,.1f} for {report.config.steps:,} steps' if est.hours is not None else 'not known'
  published = f'; published {report.published:g} on a v3-8' if report.published else ''
  total = sum(part[2] for part in program.costly) or 1
  costly = [f'{name} {cycles / total:.0%}' for name, _, cycles in program.costly[:5]]
  return [
    ('step', f'{est.step_seconds * 1e3:.2f} ms by {est.source}{second}'),
    ('FLOPs', f'{est.flops / 1e9:,.1f} G per {word} and step'),
    ('bytes', f'{est.bytes_accessed / 1e9:,.2f} GB per {word} and step'),
    ('model FLOPs', f'{est.model_flops / 1e12:,.2f} T per step, over all {word}s'),
    ('MFU', f'{est.mfu:.1%} of {top.devices} x {top.chip.peak_flops / 1e12:g} TFLOP/s'),
    ('collectives', exchanged or 'none'),
    (
      'on the links',
      f'{est.exchange_seconds * 1e3:.2f} ms more if nothing hides it; the step counts memory traffic only',
    ),
    ('tokens/s', f'{est.tokens_per_second:,.0f}'),
    ('hours', hours + published),
    ('costly', '; '.join(costly)),
  ]
