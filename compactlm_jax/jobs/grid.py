"""Sub-networks of a trained network: which were trained, one as a model of its own, their latency on this device."""

from __future__ import annotations

import dataclasses
import io
import logging
from collections.abc import Mapping, Sequence
from typing import Any

import jax
from etils import epath

from compactlm_jax.compress.subnet import cut, subnet_config
from compactlm_jax.config import AdaptConfig, Cell, EncoderConfig, cells, from_config_dict
from compactlm_jax.errors import ConfigError
from compactlm_jax.interop.bundle import Bundle
from compactlm_jax.jobs.grid_rows import cell_bundle, size_of
from compactlm_jax.jobs.latency import JAX, SEQ_LEN, measure
from compactlm_jax.jobs.models import is_run, load_model, load_run
from compactlm_jax.parse import parse_json, parse_row
from compactlm_jax.report.grid import GridRow, as_csv, as_entries, as_tables, over_runs, read_rows
from compactlm_jax.report.grid_plot import draw_grid

log = logging.getLogger(__name__)

_CLOSE = 5e-3  # .667 names a depth of 2/3


@dataclasses.dataclass(frozen=True)
class Network:
  """A network that sub-networks are cut from.

  Attributes:
    bundle: the whole of it.
    path: where it was read.
    adapt: how its sub-networks were trained; None for a network that was not trained so, or does not say.
    cells: names of the trained ones.
    seq_len: tokens of its training rows; 0 if that is not known.
    step: of a run.
  """

  bundle: Bundle
  path: str
  adapt: AdaptConfig | None = None
  cells: tuple[str, ...] = ()
  seq_len: int = 0
  step: int | None = None

  @property
  def grid(self) -> tuple[Cell, ...]:
    """Its sub-networks, the full network first; the full network alone if it is not adaptive."""
    return cells(self.adapt, self.bundle.config) if self.adapt else (Cell(),)

  def length(self, seq_len: int = 0) -> int:
    """Tokens of a row that is timed and counted: as asked, else those of its training, else SEQ_LEN.

    Raises:
      ConfigError: more than it has positions.
    """
    most = self.bundle.config.max_positions
    if seq_len > most:
      raise ConfigError(f'--seq_len={seq_len}: {self.path} has {most} positions')
    return seq_len or min(self.seq_len or SEQ_LEN, most)


def load_network(path: str) -> Network:
  """A run, or a model folder, as a network that sub-networks are cut from.

  Raises:
    ConfigError, DataError, StorageError: see `load_model`.
  """
  if not is_run(path):
    return Network(load_model(path), str(path))
  bundle, generator, metadata = load_run(path)
  model = metadata['model']
  if generator is not None and 'adapt' in model:
    log.info('%s: sub-networks are discriminators; the generator is left out', path)
  adapt = from_config_dict(AdaptConfig, model['adapt'], 'adapt.') if 'adapt' in model else None
  return Network(bundle, str(path), adapt, tuple(model.get('cells', ())), seq_len_of(path), int(metadata['step']))


def asked_cell(network: Network, width: float | None, depth: float | None, hidden: int | None) -> Cell:
  """The sub-network that the flags --width, --depth and --hidden name; it is told if it was never trained.

  Args:
    network: what it is cut from.
    width: share of heads and neurons; None for all.
    depth: share of layers; None for all.
    hidden: width of the residual stream; None for all of it.

  Returns:
    The trained sub-network whose shares are nearest (.667 is 2/3), else the one asked for.

  Raises:
    ConfigError: shares that are not in (0, 1] or cannot be cut, or a width or hidden size that is not one of those
      trained.
  """
  for flag, share in (('width', width), ('depth', depth)):
    if share is not None and not 0 < share <= 1:
      raise ConfigError(f'--{flag}={share:g}: write a share of the full network, above 0 and at most 1')
  adapt, config = network.adapt, network.bundle.config
  if hidden:
    wanted = Cell(hidden / config.hidden_size if width is None else width, depth or 1.0, hidden)
  else:
    wanted = Cell(width or 1.0, depth or 1.0)
  if adapt is None:
    _check_cut(config, wanted)
    if wanted != Cell():
      log.warning('%s does not say which sub-networks were trained, %s is cut out as it is', network.path, wanted.name)
    return wanted
  return _trained(network, adapt, wanted, width, hidden)


def _trained(network: Network, adapt: AdaptConfig, wanted: Cell, width: float | None, hidden: int | None) -> Cell:
  """As `asked_cell`, of an adaptive network."""
  if adapt.hidden_sizes:
    sizes = (*adapt.hidden_sizes, network.bundle.config.hidden_size)
    if (width is not None and not hidden and width != 1) or (hidden and hidden not in sizes):
      named = f'--hidden={hidden}' if hidden else f'--width={width:g}'
      raise ConfigError(
        f'{named}: {network.path} was trained at the hidden sizes {_list(adapt.hidden_sizes)}; choose one of them by '
        '--hidden'
      )
    size = hidden or network.bundle.config.hidden_size
    if width is not None and abs(width * network.bundle.config.hidden_size - size) >= 1:
      raise ConfigError(f'--width={width:g}: heads and neurons follow --hidden={size}; leave it out')
    wanted = Cell(size / network.bundle.config.hidden_size, wanted.depth, size)
  elif hidden:
    raise ConfigError(
      f'--hidden={hidden}: {network.path} was trained at widths {_list(adapt.widths)} with the hidden size whole; '
      'choose one of them by --width'
    )
  elif not any(abs(wanted.width - w) < _CLOSE for w in adapt.widths):
    raise ConfigError(
      f'--width={wanted.width:g}: {network.path} was trained at widths {_list(adapt.widths)}; choose one of them, or '
      'train with config.adapt.widths'
    )
  near = [c for c in network.grid if abs(c.width - wanted.width) < _CLOSE and abs(c.depth - wanted.depth) < _CLOSE]
  cell = min(near, key=lambda c: abs(c.width - wanted.width) + abs(c.depth - wanted.depth)) if near else wanted
  _check_cut(network.bundle.config, cell)
  if not near:  # the same network by other shares
    config = network.bundle.config
    cell = next((c for c in network.grid if cut(config, c) == cut(config, wanted)), wanted)
  if cell.name not in network.cells:
    log.warning(
      '%s: the sub-network %s was never trained, those that were are %s; it is cut out as it is',
      network.path,
      cell.name,
      ', '.join(network.cells) or 'not known',
    )
  return cell


def _check_cut(config: EncoderConfig, cell: Cell) -> None:
  """Raises ConfigError, naming flags, for a sub-network that cannot be cut."""
  try:
    subnet_config(config, cell)
  except ConfigError as e:
    said = str(e)
    for field, flag in (('widths', 'width'), ('depths', 'depth'), ('hidden_sizes', 'hidden')):
      said = said.replace(f'config.adapt.{field}:', f'--{flag}:')
    raise ConfigError(said) from e


def scored_rows(path: str) -> tuple[GridRow, ...]:
  """The sub-networks of a finished run with their scores, from its results.json.

  Raises:
    ConfigError: it is unfinished, has no grid, or the file is damaged.
  """
  file = epath.Path(path) / 'results.json'
  try:
    results = parse_row(file.read_bytes())
  except (OSError, ValueError) as e:
    raise ConfigError(
      f'{file}: cannot be read ({type(e).__name__}); a budget chooses by the scores of a finished run of task adapt'
    ) from e
  if not isinstance(results, Mapping) or not results.get('grid'):
    raise ConfigError(f'{file}: has no grid of sub-networks; name a finished run of task adapt')
  return read_rows(results['grid'], str(file))


def sized(rows: Sequence[GridRow], network: Network, seq_len: int) -> tuple[GridRow, ...]:
  """Rows with the parameters of each sub-network, and its FLOPs for a row of `seq_len` tokens."""
  sizes = {row.cell: size_of(row.cell, network.bundle.config, network.bundle.params, seq_len) for row in rows}
  return tuple(dataclasses.replace(r, params=sizes[r.cell][0], flops=sizes[r.cell][1]) for r in rows)


@dataclasses.dataclass(frozen=True)
class Timed:
  """How latencies are measured.

  Attributes:
    batch: rows of text computed together.
    seq_len: tokens of each; 0 takes those of the training rows.
    engine: 'jax', or 'onnxruntime' on the CPU.
    seconds: no further round of calls begins after so many.
  """

  batch: int = 1
  seq_len: int = 0
  engine: str = JAX
  seconds: float = 120.0

  def __post_init__(self) -> None:
    if self.batch < 1:
      raise ConfigError('--batch: must be at least 1')

  def facts(self, seq_len: int) -> dict[str, Any]:
    """What a latency is of, for results.json."""
    device = jax.devices()[0].device_kind if self.engine == JAX else 'cpu'
    return {'batch': self.batch, 'seq_len': seq_len, 'engine': self.engine, 'device': device}

  def note(self, seq_len: int) -> str:
    """The same in a sentence."""
    return _note(self.facts(seq_len))


def timed_rows(rows: Sequence[GridRow], network: Network, timing: Timed) -> tuple[GridRow, ...]:
  """Rows with the latency of each sub-network on this device, all measured in turns in one run (`latency.measure`).

  Args:
    rows: of the sub-networks.
    network: what they are cut from.
    timing: how.

  Raises:
    ConfigError: the engine is not installed, or cannot run one of them.
  """
  models = {row.cell.name: cell_bundle(network.bundle, row.cell) for row in rows}
  length = network.length(timing.seq_len)
  log.info('timing %d sub-networks in turns, batch %d, %d tokens', len(models), timing.batch, length)
  found = measure(models, (timing.batch,), length, seconds=timing.seconds, engines=(timing.engine,))
  took = {row.name: row.milliseconds for row in found.rows}
  if set(models) - set(took):
    raise ConfigError(f'latency through {timing.engine}: ' + '; '.join(found.notes))
  return tuple(dataclasses.replace(row, latency_ms=took[row.cell.name]) for row in rows)


def with_grid(
  found: Mapping[str, Any], network: Network, timing: Timed | None
) -> tuple[dict[str, Any], dict[str, str | bytes]]:
  """What an evaluation says of sub-networks: entries of results.json, and files.

  Args:
    found: from the job's keeper: 'metrics' of the full network, 'grid' and 'seq_len'.
    network: what was evaluated.
    timing: measures latencies; None does not.

  Returns:
    ({'metrics', 'grid', 'seq_len', 'latency' if measured}, {'grid.csv', and 'grid.png' where matplotlib is installed}).
  """
  rows = read_rows(found['grid'], network.path)
  names = [row.cell.name for row in rows]
  if untrained := [name for name in names if network.cells and name not in network.cells]:
    log.warning(
      '%s: of the grid %s were never trained, they are scored as they are cut; those that were are %s: set '
      'config.adapt.widths, .depths and .hidden_sizes to theirs for these alone',
      network.path,
      ', '.join(untrained),
      ', '.join(network.cells),
    )
  entries: dict[str, Any] = {'metrics': found['metrics'], 'seq_len': found['seq_len']}
  network = dataclasses.replace(network, seq_len=found['seq_len'])
  if timing is not None:
    rows = timed_rows(rows, network, timing)
    entries['latency'] = timing.facts(network.length(timing.seq_len))
  grid = over_runs([rows])
  files: dict[str, str | bytes] = {'grid.csv': as_csv(grid)}
  try:
    picture = io.BytesIO()
    draw_grid({epath.Path(network.path).name: grid}).savefig(picture, format='png')
    files['grid.png'] = picture.getvalue()
  except ConfigError as e:  # the numbers are there all the same
    log.warning('grid.png is left out: %s', e)
  return {**entries, 'grid': as_entries(rows)}, files


def as_text(results: Mapping[str, Any]) -> str:
  """The tables of an evaluated adaptive network.

  Args:
    results: from `run_evaluate`, with 'grid'.
  """
  tables = as_tables(over_runs([read_rows(results['grid'], 'grid')]))
  facts = results.get('latency')
  return '\n\n'.join([tables, *([_note(facts)] if facts else [])]) + '\n'


def _note(facts: Mapping[str, Any]) -> str:
  return (
    f'Latency: median of calls made in turns, batch {facts["batch"]}, {facts["seq_len"]} tokens, {facts["engine"]} on '
    f'{facts["device"]}.'
  )


def seq_len_of(path: str) -> int:
  """Tokens of the rows of a run, as its results say or else `data.seq_len`; 0 if neither is known."""
  for file, keys in (('results.json', ('seq_len',)), ('config.json', ('config', 'data', 'seq_len'))):
    try:
      found: Any = parse_json((epath.Path(path) / file).read_bytes())
      for key in keys:
        found = found[key]
      return int(found)
    except (OSError, ValueError, KeyError, TypeError):
      continue
  return 0


def _list(values: Sequence[float]) -> str:
  return ', '.join(f'{value:g}' for value in values)
