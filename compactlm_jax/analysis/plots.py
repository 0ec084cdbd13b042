"""Pictures, as the bytes of PNG files. matplotlib is imported when the first one is drawn (extra `plots`).

Figures are drawn on a canvas of their own: no window system, no global state, nothing to close.
"""

from __future__ import annotations

import contextlib
import io
import math
import textwrap
import warnings
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from compactlm_jax.analysis.components import PARTS, Component
from compactlm_jax.errors import ConfigError

if TYPE_CHECKING:
  from matplotlib.axes import Axes
  from matplotlib.figure import Figure

MAX_TOKENS = 32
"""Tokens of a sentence that are drawn; more labels could not be read."""

_DPI = 110
_COLUMNS = 4
_COLORS = ('#3b6fb6', '#e0892f')
_TITLES = {'feed_forward': 'feed-forward', 'convolution': 'convolution branch'}


def require_matplotlib() -> None:
  """Raises ConfigError if matplotlib is not installed: better before the work than after it."""
  try:
    import matplotlib.backends.backend_agg
    import matplotlib.figure  # noqa: F401
  except ImportError as e:
    raise ConfigError("pictures need matplotlib; install it with: pip install 'compactlm-jax[plots]'") from e


def attention_picture(attention_HTT: np.ndarray, tokens: Sequence[str], title: str) -> bytes:
  """Attention of all heads of one layer on one sentence, a panel each.

  Args:
    attention_HTT: probabilities, query (row) by key (column).
    tokens: of the sentence.
    title: of the picture.
  """
  panels = [(f'head {head}', map_TT) for head, map_TT in enumerate(attention_HTT, 1)]
  return _token_maps(panels, tokens, title, 'attention probability', vmax=1.0)


def cut_picture(
  before_HTT: np.ndarray, after_gTT: np.ndarray, overlap_gH: np.ndarray, tokens: Sequence[str], title: str
) -> bytes:
  """A layer before and after heads were cut: all of its heads, then those that are left, then how alike they are.

  Args:
    before_HTT: attention of the larger network's heads.
    after_gTT: of the heads that are left.
    overlap_gH: attention that they have in common, a row for each head that is left.
    tokens: of the sentence.
    title: of the picture.
  """
  shown, columns = min(len(tokens), MAX_TOKENS), max(_COLUMNS, math.ceil(len(before_HTT) / 3))
  side, labels = max(1.7, 0.2 + 0.105 * shown), _labels(tokens)
  rows = [math.ceil(len(maps) / columns) for maps in (before_HTT, after_gTT)]
  tall = 0.7 + 0.24 * len(after_gTT) + 0.5
  with _canvas((columns * side + 1.2, sum(rows) * (side + 0.25) + tall + 2.2), _with_count(title, tokens)) as made:
    figure, done = made
    heights = [rows[0] * side + 0.9, rows[1] * side + 0.9, tall]
    bands: Any = figure.subfigures(3, 1, height_ratios=heights)
    upper, middle, lower = bands
    parts = ((upper, before_HTT, rows[0], 'before: head'), (middle, after_gTT, rows[1], 'after: head'))
    for part, maps, count, name in parts:
      axes = list(part.subplots(count, columns, squeeze=False).flat)
      for number, (axis, map_TT) in enumerate(zip(axes, maps)):
        image = axis.imshow(map_TT[:shown, :shown], cmap='Blues', vmin=0, vmax=1)
        most = f', most like {overlap_gH[number].argmax() + 1}' if maps is after_gTT else ''
        axis.set_title(f'{name} {number + 1}{most}', fontsize=8)
        left, bottom = number % columns == 0, number + columns >= len(maps)
        axis.set_xticks(range(shown), labels if bottom else [], rotation=90, fontsize=6, parse_math=False)
        axis.set_yticks(range(shown), labels if left else [], fontsize=6, parse_math=False)
        axis.tick_params(length=1.2, pad=1.2)
      for axis in axes[len(maps) :]:
        axis.remove()
      _bar(part, image, axes[: len(maps)], 'attention probability')
    _overlap(lower, overlap_gH)
  return done.getvalue()


def _overlap(figure: Any, overlap_gH: np.ndarray) -> None:
  """A heat map of heads that are left (rows) and heads that were there (columns)."""
  axis = figure.subplots()
  image = axis.imshow(overlap_gH, cmap='viridis', vmin=0, vmax=1, aspect='auto')
  for (row, column), number in np.ndenumerate(overlap_gH):
    axis.text(column, row, f'{number:.2f}', ha='center', va='center', fontsize=6.5, color='wk'[int(number > 0.6)])
  axis.set_xticks(range(overlap_gH.shape[1]), range(1, overlap_gH.shape[1] + 1), fontsize=7)
  axis.set_yticks(range(overlap_gH.shape[0]), range(1, overlap_gH.shape[0] + 1), fontsize=7)
  axis.set_xlabel('head before', fontsize=8)
  axis.set_ylabel('head after', fontsize=8)
  _bar(figure, image, [axis], 'attention in common')


def relation_picture(values_NTT: np.ndarray, tokens: Sequence[str], title: str) -> bytes:
  """Value relations of all layers on one sentence, heads averaged, a panel each; one scale for all.

  Args:
    values_NTT: relations, row by row a distribution.
    tokens: of the sentence.
    title: of the picture.
  """
  panels = [(f'layer {layer}', map_TT) for layer, map_TT in enumerate(values_NTT, 1)]
  return _token_maps(panels, tokens, title, 'value relation', vmax=float(values_NTT.max()))


def kernel_picture(taps_HTW: np.ndarray, tokens: Sequence[str], title: str, *, causal: bool = False) -> bytes:
  """Convolution kernels of all heads of one layer at each position of one sentence, a panel each.

  Args:
    taps_HTW: kernels; NaN where a tap reads beyond the sentence (drawn grey).
    tokens: of the sentence.
    title: of the picture.
    causal: the last tap, not the middle one, stands on its own position.
  """
  shown, taps = min(len(tokens), MAX_TOKENS), taps_HTW.shape[-1]
  offsets = np.arange(taps) - (taps - 1 if causal else taps // 2)
  size = (0.8 + 0.24 * taps, 0.8 + 0.16 * shown)
  with _figure(len(taps_HTW), size, _with_count(title, tokens)) as (figure, axes, done):
    for head, (axis, map_TW) in enumerate(zip(axes, taps_HTW[:, :shown]), 1):
      image = axis.imshow(map_TW, cmap=_grey_where_missing('Blues'), vmin=0, vmax=1, aspect='auto')
      axis.set_title(f'head {head}', fontsize=9)
      axis.set_xticks(range(taps), [f'{offset:+d}' if offset else '0' for offset in offsets], fontsize=7)
      axis.set_yticks(range(shown), _labels(tokens), fontsize=7, parse_math=False)
    figure.supxlabel('position that is read, relative to the token', fontsize=9)
    _bar(figure, image, axes, 'weight of the tap (grey: beyond the sentence)')
  return done.getvalue()


def concentration_picture(near_NH: np.ndarray, far_NH: np.ndarray, radius: int, title: str) -> bytes:
  """Diagonal concentration C of each head: its number in the cell, the share of attention that is near as colour.

  Args:
    near_NH: attention within `radius` positions.
    far_NH: attention beyond it.
    radius: largest distance that counts as near.
    title: of the picture.
  """
  with np.errstate(divide='ignore'):
    ratio_NH = near_NH / far_NH
  bar = f'share within {radius} positions, C / (1 + C)'
  layers, heads = ([str(i + 1) for i in range(n)] for n in near_NH.shape)
  return _cells(near_NH / (near_NH + far_NH), ratio_NH, layers, heads, ('layer', 'head'), title, bar, (0.0, 1.0))


def pair_picture(
  values_MN: np.ndarray,
  layers: tuple[Sequence[str], Sequence[str]],
  models: tuple[str, str],
  title: str,
  bar: str,
  limits: tuple[float, float] | None = None,
) -> bytes:
  """A number for every pair of layers.

  Args:
    values_MN: one row per layer of the second model, one column per layer of the first.
    layers: names of (rows, columns).
    models: names of the models of (rows, columns).
    title: of the picture.
    bar: what the numbers are, with their unit.
    limits: of the colours; None takes 0 to the largest.
  """
  limits = limits or (0.0, max(float(np.nanmax(values_MN)), 1e-6))
  axes = (f'layer of {models[0]}', f'layer of {models[1]}')
  return _cells(values_MN, values_MN, *layers, axes, title, bar, limits)


def cost_picture(models: Mapping[str, Sequence[Component]], title: str) -> bytes:
  """Parameters, FLOPs and latency of the components of one or two models, a panel of bars each.

  Args:
    models: name -> components.
    title: of the picture.
  """
  names = [part for part in PARTS if any(part == c.name for parts in models.values() for c in parts)]
  panels = [
    ('parameters (millions)', lambda c: c.parameters / 1e6),
    ('GFLOPs of a batch, counted', lambda c: c.flops / 1e9),
    ('GFLOPs of a batch, by XLA', lambda c: (c.xla_flops or 0) / 1e9),
    ('milliseconds of a batch, median', lambda c: c.milliseconds),
  ]
  with _figure(len(panels), (4.2, 1.0 + 0.36 * len(names)), title, columns=2) as (figure, axes, done):
    height = 0.8 / len(models)
    for axis, (what, measure) in zip(axes, panels):
      for i, (model, parts) in enumerate(models.items()):
        values = {c.name: measure(c) for c in parts}
        places = np.arange(len(names)) + (i - (len(models) - 1) / 2) * height
        bars = axis.barh(places, [values.get(n, 0.0) for n in names], height * 0.92, color=_COLORS[i], label=model)
        axis.bar_label(bars, [f'{values[n]:.3g}' if n in values else '' for n in names], fontsize=7, padding=2)
      axis.set_yticks(range(len(names)), [_TITLES.get(n, n) for n in names], fontsize=8)
      axis.invert_yaxis()
      axis.margins(x=0.16)
      axis.set_title(what, fontsize=9)
      axis.tick_params(axis='x', labelsize=7)
      axis.spines[['top', 'right']].set_visible(False)
    if len(models) > 1:
      handles, labels = axes[0].get_legend_handles_labels()
      figure.legend(handles, labels, loc='outside lower center', ncols=2, fontsize=8, frameon=False)
  return done.getvalue()


def remaining_picture(share_NM: np.ndarray, matrices: Sequence[str], title: str) -> bytes:
  """What remains of each matrix, in per cent.

  Args:
    share_NM: remaining fraction, a row for each layer, a column for each kind of matrix.
    matrices: kinds, 'attention/query' and so on.
    title: of the picture.
  """
  percent = 100 * share_NM
  layers, names = [str(i + 1) for i in range(len(share_NM))], [name.removeprefix('attention/') for name in matrices]
  limits = (0.0, max(float(percent.max()), 1e-3))
  return _cells(percent, percent, layers, names, ('layer', 'matrix'), title, 'remaining weights (%)', limits, wide=0.85)


def survivors_picture(edges: np.ndarray, counts: Mapping[str, np.ndarray], title: str) -> bytes:
  """Values of the weights that are not zero, counts on a log scale.

  Args:
    edges: of the bins.
    counts: name -> weights in each bin.
    title: of the picture.
  """
  with _figure(1, (7.0, 4.0), title) as (figure, (axis, *_), done):
    for (name, values), color in zip(counts.items(), _COLORS):
      axis.stairs(np.where(values > 0, values, np.nan), edges, color=color, linewidth=1.4, label=_plain(name))
      axis.stairs(np.maximum(values, 0.5), edges, baseline=0.5, fill=True, color=color, alpha=0.25)
    axis.set_yscale('log')
    axis.set_ylim(0.5, None)
    axis.set_xlabel('weight', fontsize=9)
    axis.set_ylabel('weights in the bin', fontsize=9)
    axis.tick_params(labelsize=8)
    axis.grid(color='0.9', linewidth=0.6)
    axis.set_axisbelow(True)
    axis.spines[['top', 'right']].set_visible(False)
    figure.legend(loc='outside lower center', ncols=2, fontsize=8, frameon=False)
  return done.getvalue()


def _token_maps(
  panels: Sequence[tuple[str, np.ndarray]], tokens: Sequence[str], title: str, bar: str, vmax: float
) -> bytes:
  shown = min(len(tokens), MAX_TOKENS)
  side = max(2.0, 0.3 + 0.125 * shown)
  with _figure(len(panels), (side + 0.2, side + 0.4), _with_count(title, tokens)) as (figure, axes, done):
    for axis, (name, map_TT) in zip(axes, panels):
      image = axis.imshow(map_TT[:shown, :shown], cmap='Blues', vmin=0, vmax=vmax)
      axis.set_title(name, fontsize=9)
      axis.set_xticks(range(shown), _labels(tokens), rotation=90, fontsize=7, parse_math=False)
      axis.set_yticks(range(shown), _labels(tokens), fontsize=7, parse_math=False)
      axis.tick_params(length=1.5, pad=1.5)
    figure.supylabel('query', fontsize=9)
    figure.supxlabel('key', fontsize=9)
    _bar(figure, image, axes, bar)
  return done.getvalue()


def _cells(
  colors: np.ndarray,
  numbers: np.ndarray,
  rows: Sequence[str],
  columns: Sequence[str],
  names: tuple[str, str],
  title: str,
  bar: str,
  limits: tuple[float, float],
  wide: float = 0.55,
) -> bytes:
  """A heat map with a number in each cell."""
  size = (max(4.6, 1.9 + wide * len(columns)), max(2.4, 1.5 + 0.4 * len(rows)))
  with _figure(1, size, title) as (figure, (axis, *_), done):
    image = axis.imshow(colors, cmap=_grey_where_missing('viridis'), vmin=limits[0], vmax=limits[1], aspect='auto')
    axis.set_xticks(range(len(columns)), columns, fontsize=8)
    axis.set_yticks(range(len(rows)), rows, fontsize=8)
    axis.set_ylabel(names[0], fontsize=9, parse_math=False)
    axis.set_xlabel(names[1], fontsize=9, parse_math=False)
    middle = (limits[0] + limits[1]) / 2
    for (row, column), number in np.ndenumerate(numbers):
      color = 'white' if not colors[row, column] > middle else 'black'
      axis.text(column, row, _short(number), ha='center', va='center', fontsize=7.5, color=color)
    _bar(figure, image, [axis], bar)
  return done.getvalue()


@contextlib.contextmanager
def _figure(
  panels: int, size: tuple[float, float], title: str, columns: int = _COLUMNS
) -> Iterator[tuple[Figure, list[Axes], io.BytesIO]]:
  """(figure, one pair of axes per panel, where the PNG is written at the end); `size` of a panel is in inches."""
  columns = min(columns, panels)
  rows = math.ceil(panels / columns)
  with _canvas((columns * size[0] + 0.8, rows * size[1] + 0.5), title) as (figure, done):
    axes = list(figure.subplots(rows, columns, squeeze=False).flat)
    for unused in axes[panels:]:
      unused.remove()
    yield figure, axes[:panels], done


@contextlib.contextmanager
def _canvas(size: tuple[float, float], title: str) -> Iterator[tuple[Figure, io.BytesIO]]:
  """(an empty figure of so many inches, where the PNG is written at the end)."""
  require_matplotlib()
  from matplotlib.backends.backend_agg import FigureCanvasAgg
  from matplotlib.figure import Figure
  from matplotlib.layout_engine import ConstrainedLayoutEngine

  figure = Figure(size, _DPI, layout=ConstrainedLayoutEngine(h_pad=0.08))
  canvas, done = FigureCanvasAgg(figure), io.BytesIO()
  font = 10 if size[0] < 10 else 12
  figure.suptitle(textwrap.fill(title, int(size[0] * 120 / font)), fontsize=font, parse_math=False)
  yield figure, done
  with warnings.catch_warnings():  # tokens of scripts that the font lacks are drawn as boxes
    warnings.filterwarnings('ignore', 'Glyph', UserWarning)
    canvas.print_png(done)


def _bar(figure: Figure, image: Any, axes: Sequence[Axes], label: str) -> None:
  bar = figure.colorbar(image, ax=list(axes), shrink=0.8, aspect=30, pad=0.015)
  bar.set_label(label, fontsize=8)
  bar.ax.tick_params(labelsize=7)


def _grey_where_missing(name: str) -> Any:
  import matplotlib

  return matplotlib.colormaps[name].with_extremes(bad='0.75')


def _plain(label: str) -> str:
  """A label without formulas, which matplotlib would set."""
  return label.replace('$', r'\$')


def _labels(tokens: Sequence[str]) -> list[str]:
  return [token if len(token) <= 12 else token[:11] + '…' for token in tokens[:MAX_TOKENS]]


def _with_count(title: str, tokens: Sequence[str]) -> str:
  return title if len(tokens) <= MAX_TOKENS else f'{title} (the first {MAX_TOKENS} of {len(tokens)} tokens)'


def _short(number: float) -> str:
  if not math.isfinite(number):
    return '∞' if number > 0 else '–'
  if number >= 1000:
    return f'{number / 1000:.0f}k' if number < 1e6 else f'{number:.0e}'
  return f'{number:.0f}' if number >= 100 else f'{number:.1f}' if number >= 10 else f'{number:.2f}'
