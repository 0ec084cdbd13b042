"""From one machine to a pod: which configuration fits which TPU slice, its step, hours and scaling, before renting one.

Every step is compiled for the slice, as `compactlm plan` does (libtpu's compiler, no TPU needed); nothing is measured.
Published batches are kept, so that a larger slice has fewer rows per core ("strong scaling"); with --weak the batch
grows with the slice. The time of a step is the compiler's estimate plus that of its collectives on the links between
chips, if nothing hides them. Efficiency is tokens/s per peak FLOP/s, relative to the first slice of the list.

Usage: python benchmarks/scaling.py [--configs=configs/convbert.py:base,...] [--topologies=v3-8,v3-32,...]
  [--layouts=data,fsdp,model2] [--set=encoder.remat=True ...] [--weak]
Layouts: 'data' replicates parameters, 'fsdp' shards them over all devices, 'modelN' shards hidden sizes over N devices
and parameters over the others. What was compiled before is taken from the cache of `compactlm plan`.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib.util
import os
import pathlib
import sys

os.environ['JAX_PLATFORMS'] = 'cpu'

from compactlm_jax.config import MeshConfig, RunConfig, from_config_dict
from compactlm_jax.errors import ConfigError
from compactlm_jax.plan.main import plan_run
from compactlm_jax.plan.report import Report, collectives
from compactlm_jax.plan.topology import parse_topology

ROOT = pathlib.Path(__file__).parents[1]
CONFIGS = 'configs/convbert.py:base,configs/electra.py:base,configs/electra.py:large,configs/minilm.py:l6-h384'
TOPOLOGIES = 'v3-8,v3-32,v4-32,v5e-64,v5p-64'
COLUMNS = ('configuration', 'slice', 'parameters', 'rows per core', 'HBM per core, GiB', 'step, ms', 'of it links')
COLUMNS += ('MFU', 'hours', 'efficiency', 'moved')


def load(name: str, overrides: list[str]) -> RunConfig:
  """The run of 'FILE:VARIANT' with fields replaced, in bfloat16."""
  file, _, variant = name.partition(':')
  spec = importlib.util.spec_from_file_location('scaled', ROOT / file)
  assert spec is not None and spec.loader is not None
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  values = module.get_config(variant)
  for each in ['encoder.dtype=bfloat16', *overrides]:
    field, _, text = each.partition('=')
    old = values
    for part in field.split('.'):
      old = old[part]
    with values.unlocked():
      values.update_from_flattened_dict({field: text == 'True' if isinstance(old, bool) else type(old)(text)})
  return from_config_dict(RunConfig, values)


def placed(layout: str) -> MeshConfig:
  """The mesh of a layout."""
  if layout == 'data':
    return MeshConfig(data=-1, fsdp=1, model=1)
  return MeshConfig(data=1, fsdp=-1, model=int(layout.removeprefix('model')) if layout != 'fsdp' else 1)


def row(report: Report, layout: str, first: float | None) -> tuple[str, float | None]:
  """A line of the table, and tokens/s per peak FLOP/s."""
  config, top, est = report.config, report.topology, report.estimate
  ways = top.devices // max(1, config.mesh.model)
  known = [report.name.removeprefix('configs/'), top.name, layout, f'{config.batch_size / ways:g}']
  needed = f'{report.needed / 2**30:.2f} of {top.chip.usable_bytes / 2**30:.1f}'
  if est is None or not report.fits:
    return f'| {" | ".join([*known, f"**{needed}**", *[""] * 6])} |', None
  seconds = est.step_seconds + est.exchange_seconds
  rate = config.batch_size * config.data.seq_len / seconds / (top.devices * top.chip.peak_flops)
  hours = f'{est.hours * seconds / est.step_seconds:.1f}' if est.hours else ''
  share = est.mfu * est.step_seconds / seconds
  moved = ', '.join(f'{kind} {each["bytes"] / 2**20:.0f} MiB' for kind, each in collectives(report.program).items())  # type: ignore[arg-type]
  times = [f'{1e3 * seconds:.1f}', f'{1e3 * est.exchange_seconds:.1f}', f'{share:.0%}', hours]
  return f'| {" | ".join([*known, needed, *times, f"{rate / (first or rate):.2f}", moved])} |', rate


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument('--configs', default=CONFIGS)
  parser.add_argument('--topologies', default=TOPOLOGIES)
  parser.add_argument('--layouts', default='data')
  parser.add_argument('--set', action='append', default=[], help='FIELD=VALUE of every configuration')
  parser.add_argument('--weak', action='store_true', help='the batch grows with the slice')
  args = parser.parse_args()
  print(f'| {" | ".join(COLUMNS)} |\n|---|---|---|{"---:|" * 7}---|', flush=True)
  for name in args.configs.split(','):
    base = load(name, args.set)
    for layout in args.layouts.split(','):
      first: float | None = None
      for topology in args.topologies.split(','):
        grown = parse_topology(topology).devices // parse_topology(args.topologies.split(',')[0]).devices
        config = dataclasses.replace(
          base, mesh=placed(layout), batch_size=base.batch_size * (grown if args.weak else 1)
        )
        try:
          line, rate = row(plan_run(config, name, topology), layout, first)
        except ConfigError as e:
          print(f'{name} on {topology}: {e}', file=sys.stderr, flush=True)
          continue
        first = first or rate
        print(line, flush=True)


if __name__ == '__main__':
  main()
