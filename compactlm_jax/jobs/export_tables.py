"""What an export was worth, for people and for programs: zeros, bytes and milliseconds, kept apart."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from typing import Any

from compactlm_jax.config import runs
from compactlm_jax.errors import StorageError
from compactlm_jax.jobs.export import Export
from compactlm_jax.jobs.latency import Latencies
from compactlm_jax.report.aligned import aligned
from compactlm_jax.storage import write_whole


def as_text(export: Export) -> str:
  """What `compactlm export` prints: one line on the model, and for a pruned one a table for each number.

  Args:
    export: what was written.
  """
  cfg = export.bundle.config
  parts = [f'{export.output}: {cfg.architecture}, {cfg.num_layers} layers, {cfg.hidden_size} wide']
  if export.zeros is not None:
    parts += [_zeros(export.zeros), *_sizes(export), _bytes(export)]
  if export.latency is not None:
    parts.append(_latency(export.latency))
  return '\n\n'.join(parts)


def as_dict(export: Export) -> dict[str, Any]:
  """The same as JSON-able numbers; 'zeros', 'bytes' and 'latency' are null for a model without zeros.

  Args:
    export: what was written.
  """
  cfg = export.bundle.config
  pruned = export.zeros is not None
  own = {name: getattr(export, name) for name in ('bytes', 'dense_bytes', 'layers', 'dense_layers')}
  return {
    'output': export.output,
    'format': export.format,
    'architecture': cfg.architecture,
    'heads_per_layer': [heads for heads, _ in _per_layer(export)],
    'neurons_per_layer': [neurons for _, neurons in _per_layer(export)],
    'zeros': dict(export.zeros) if export.zeros is not None else None,
    'bytes': own if pruned else None,
    'latency': dataclasses.asdict(export.latency) if export.latency is not None else None,
  }


def write_report(export: Export, path: str, also: Mapping[str, Any] | None = None) -> None:
  """Writes `as_dict` to a file; '' writes nothing.

  Args:
    export: what was written.
    path: of the file.
    also: further entries.

  Raises:
    StorageError: the file cannot be written.
  """
  if not path:
    return
  try:
    write_whole(path, json.dumps({**as_dict(export), **(also or {})}, indent=2, allow_nan=False) + '\n')
  except OSError as e:
    raise StorageError(f'{path}: cannot be written ({e.strerror}); free space or fix permissions') from e


def _zeros(zeros: Any) -> str:
  matrices, layers = zeros['by_matrix'], len(zeros['by_layer'])
  short = [name.removeprefix('attention/') for name in matrices]
  gone = zeros['weights'] - zeros['nonzero']
  rows = [
    (str(i + 1), *(_percent(1 - matrices[name][i]) for name in matrices), _percent(1 - zeros['by_layer'][i]))
    for i in range(layers)
  ]
  means = (_percent(1 - sum(matrices[name]) / layers) for name in matrices)
  rows.append(('all', *means, _percent(1 - zeros['density'])))
  said = (
    f"Zeros: {gone:,} of {zeros['weights']:,} weights in the encoder's matrices ({_percent(1 - zeros['density'])} %; "
    f'{zeros["nonzero"]:,} remain), in % of each:'
  )
  return said + '\n\n' + aligned([('layer', *short, 'all'), *rows], left=1)


def _sizes(export: Export) -> list[str]:
  """What is left of each layer, if anything was removed."""
  dense = export.dense_config
  if dense is None or dense == export.bundle.config:
    return []
  rows = [(str(i + 1), str(heads), str(neurons)) for i, (heads, neurons) in enumerate(_per_layer(export))]
  head = f'Heads (of {dense.num_heads}) and neurons (of {dense.intermediate_size}) that are left:'
  return [head + '\n\n' + aligned([('layer', 'heads', 'neurons'), *rows], left=1)]


def _bytes(export: Export) -> str:
  rows = [
    ('file of weights', export.bytes, export.dense_bytes),
    ("encoder's layers", export.layers, export.dense_layers),
  ]
  cells = [(what, f'{own:,}', f'{whole:,}', f'{100 * own / whole:.1f} %') for what, own, whole in rows]
  return 'Bytes on disk\n\n' + aligned([('', 'exported', 'dense', 'of dense'), *cells], left=1)


def _latency(found: Latencies) -> str:
  engines = list(dict.fromkeys(row.engine for row in found.rows))
  cells = {(row.batch, row.name, row.engine): row for row in found.rows}
  rows = []
  for batch, name in dict.fromkeys((row.batch, row.name) for row in found.rows):
    line = [name, str(batch)]
    for engine in engines:
      row = cells.get((batch, name, engine))
      line.append('-' if row is None else f'{row.milliseconds:.2f}')
      line.append('-' if row is None or not row.ratio else f'{1 / row.ratio:.2f}')
    rows.append(line)
  head = ('model', 'batch', *(f'{engine}{what}' for engine in engines for what in (', ms', ', times as fast')))
  said = [f'Latency on this device ({found.device}), {found.seq_len} tokens a row, medians of calls made in turns']
  notes = list(found.notes)
  if len({row.name for row in found.rows}) == 1:
    notes.append('The exported model has the shapes of the dense one: its zeros are multiplied, and save no time here.')
  return '\n\n'.join([*said, aligned([head, *rows], left=1), *notes])


def _per_layer(export: Export) -> list[tuple[int, int]]:
  """(heads, neurons) of each layer."""
  return [
    (run.num_heads, run.intermediate_size)
    for start, stop, run in runs(export.bundle.config)
    for _ in range(start, stop)
  ]


def _percent(share: float) -> str:
  return f'{100 * share:.2f}'
