"""Where a report goes: one file, or one of each kind."""

from __future__ import annotations

import pathlib

from compactlm_jax.errors import ConfigError, StorageError
from compactlm_jax.report.grid_plot import draw_grid
from compactlm_jax.report.plot import draw_curves, draw_scores, has_curves
from compactlm_jax.report.pruning_plot import draw_pruning, draw_schedules, has_pruned, has_schedules
from compactlm_jax.report.remaining_plot import draw_remaining, has_matrices
from compactlm_jax.report.runs import Report
from compactlm_jax.report.tables import as_csv, as_json, as_markdown
from compactlm_jax.storage import require_file_place

SUFFIXES = ('.md', '.csv', '.json', '.png')


def check_output(output: str) -> None:
  """Raises ConfigError unless `output` is '' or names a file or prefix that can be written."""
  path = pathlib.Path(output)
  example = f'a file, or a prefix as {output.rstrip("/")}/report'
  require_file_place('output', output, buckets=False, name=example)
  if path.suffix not in ('', *SUFFIXES):
    raise ConfigError(f'--output: {output} ends in {path.suffix}; use {", ".join(SUFFIXES)}, or no ending for all')


def write_report(report: Report, output: str, curves: bool = False) -> tuple[str, ...]:
  """Writes what the ending of `output` says.

  Args:
    report: what was collected.
    output: FILE.md, .csv, .json or .png; without an ending PREFIX.md, PREFIX.csv, PREFIX.json, PREFIX.png (scores),
      PREFIX-curves.png (where losses were logged), and of pruned runs PREFIX-pruning.png (scores over remaining
      weights), PREFIX-pruning-layers.png (what remains of each layer and matrix) and PREFIX-pruning-steps.png (schedule
      and sparsity over steps), of adaptive ones PREFIX-grid.png (sub-networks over depth and width); '' writes nothing.
    curves: FILE.png shows learning curves instead of scores.

  Returns:
    The files written.

  Raises:
    ConfigError: see `check_output`; matplotlib is not installed; no curves to draw.
    StorageError: a file cannot be written.
  """
  check_output(output)
  if curves and not output.endswith('.png'):
    raise ConfigError('--curves: name the picture, --output=FILE.png (a prefix gets its curves anyway)')
  if not output:
    return ()
  path = pathlib.Path(output)
  if path.suffix == '.png':
    figures = {output: draw_curves(report) if curves else draw_scores(report)}
  elif path.suffix:
    figures = {}
  else:
    figures = {f'{output}.png': draw_scores(report)}
    figures |= {f'{output}-curves.png': draw_curves(report)} if has_curves(report) else {}
    figures |= {f'{output}-pruning.png': draw_pruning(report)} if has_pruned(report) else {}
    figures |= {f'{output}-pruning-layers.png': draw_remaining(report)} if has_matrices(report) else {}
    figures |= {f'{output}-pruning-steps.png': draw_schedules(report)} if has_schedules(report) else {}
    grids = {group.name: group.grid for group in report.groups if group.grid}
    figures |= {f'{output}-grid.png': draw_grid(grids)} if grids else {}
  makers = {'.md': as_markdown, '.csv': as_csv, '.json': as_json}
  texts = {str(path.with_suffix(s)): make(report) for s, make in makers.items() if path.suffix in ('', s)}
  try:
    for file, text in texts.items():
      pathlib.Path(file).write_text(text, encoding='utf-8')
    for file, figure in figures.items():
      figure.savefig(file)
  except OSError as e:
    raise StorageError(
      f'{e.filename or output}: cannot be written ({e.strerror}); free space or fix permissions'
    ) from e
  return (*texts, *figures)
