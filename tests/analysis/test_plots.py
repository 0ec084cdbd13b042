"""Pictures: what can be read back from their pixels, odd tokens, and life without matplotlib."""

import io
import subprocess
import sys

import numpy as np
import pytest

from compactlm_jax.analysis import plots
from compactlm_jax.analysis.components import Component
from compactlm_jax.errors import ConfigError

pytest.importorskip('matplotlib')

TOKENS = ['[CLS]', '$5', '$_{$', '日本', '\\alpha', 'a' * 30, '[SEP]']


def pixels(png):
  from matplotlib.image import imread

  return imread(io.BytesIO(png))[..., :3]


def places(png, color):
  """(row, column) of pixels of a color, as shares of the picture."""
  image = pixels(png)
  return np.argwhere(np.abs(image - color).max(-1) < 0.02) / np.array(image.shape[:2])


def test_queries_are_rows_and_keys_are_columns():
  """The first query looks at the last key: dark at the upper right. Mutation: transpose the map."""
  map_TT = np.zeros((1, 7, 7))
  map_TT[:, :, 0] = 0.5
  map_TT[0, 0] = np.eye(7)[6]
  dark = np.array([0.03137, 0.18824, 0.41961])  # the last colour of 'Blues'
  found = places(plots.attention_picture(map_TT, ['t'] * 7, 'x'), dark)
  found = found[found[:, 1] < 0.8]  # left of the colour bar
  assert len(found) > 50 and found[:, 0].max() < 0.3 and found[:, 1].min() > 0.5


def test_a_cut_layer_shows_all_heads_and_those_that_are_left():
  """Each head adds as many dark pixels, those that are left lie lower; common attention is bright where it is whole.

  Mutations: draw the first heads twice; leave out the last head; leave out the map of common attention.
  """
  dark = np.array([0.03137, 0.18824, 0.41961])  # the last colour of 'Blues'

  def drawn(shown, common):
    maps = np.zeros((7, 7, 7))
    maps[list(shown), 0, 6] = 1.0
    return plots.cut_picture(maps[:5], maps[5:], common, TOKENS, 'x')

  nothing, common = np.zeros((2, 5)), np.eye(2, 5)
  frame = {tuple(place) for place in places(drawn((), nothing), dark)}  # of the colour bars
  cells = [[p for p in places(drawn([head], nothing), dark) if tuple(p) not in frame] for head in (0, 4, 5, 6)]
  assert min(map(len, cells)) > 50
  tops = [min(row for row, _ in cell) for cell in cells]
  assert tops[0] < tops[1] < tops[2] == pytest.approx(tops[3], abs=0.01)
  yellow = np.array([0.99325, 0.90616, 0.14394])  # the last colour of 'viridis'
  before, after = (len(places(drawn((), found), yellow)) for found in (nothing, common))
  assert after - before > 500


def test_taps_beyond_the_sentence_are_grey():
  """Mutation: draw them as 0."""
  taps_HTW = np.full((2, 7, 9), 1 / 9)
  before = {tuple(place) for place in places(plots.kernel_picture(taps_HTW, TOKENS, 'x'), 0.75)}  # rims of letters
  taps_HTW[0, 0, 0] = taps_HTW[0, 6, 8] = np.nan
  grey = np.array([p for p in places(plots.kernel_picture(taps_HTW, TOKENS, 'x'), 0.75) if tuple(p) not in before])
  upper = grey[:, 0] < 0.5
  assert upper.sum() > 50 and (~upper).sum() > 50 and grey[upper, 1].max() < grey[~upper, 1].min() < 0.5


def test_tokens_are_not_formulas_and_may_lack_a_glyph():
  """Warnings are errors here. Mutations: parse_math left on; no filter of warnings about glyphs."""
  odd = plots.attention_picture(np.full((2, 7, 7), 1 / 7), TOKENS, '$_{$')
  assert pixels(odd).shape[0] > 200 and pixels(odd).shape[1] > 400
  plots.relation_picture(np.full((5, 7, 7), 1 / 7), TOKENS, 'x')


def test_long_sentences_are_cut_and_it_is_said():
  """Mutation: draw all tokens."""
  shown = pixels(plots.attention_picture(np.zeros((1, 100, 100)), ['token'] * 100, 'x'))
  limit = pixels(plots.attention_picture(np.zeros((1, 32, 32)), ['token'] * 32, 'x'))
  assert shown.shape == limit.shape and (shown != limit).any()
  assert plots._with_count('x', ['token'] * 100) == 'x (the first 32 of 100 tokens)'


def test_numbers_without_bounds_are_drawn():
  """Attention that is near only has C = infinity; CKA of a constant layer is NaN. Mutation: drop the case."""
  near, far = np.array([[1.0, 2.0], [3.0, 1.0]]), np.array([[1.0, 0.0], [1e-7, 9.0]])
  plots.concentration_picture(near, far, 4, 'x')
  plots.pair_picture(np.array([[np.nan, 1.0]]), (['1'], ['1', '2']), ('a', 'b'), 'x', 'nats')
  assert [plots._short(x) for x in (np.inf, np.nan, 0.123, 12.34, 123.4, 4321, 3e7)] == [
    '∞', '–', '0.12', '12.3', '123', '4k', '3e+07',
  ]  # fmt: skip


def test_costs_of_models_with_other_parts():
  parts = [Component('attention', 10, 1e9, None, 2.0), Component('encoder', 30, 2e9, 3e9, 4.0)]
  other = [*parts, Component('convolution', 5, 1e8, 1e8, 1.0)]
  one, two = (plots.cost_picture(models, 'x') for models in ({'a': parts}, {'a': parts, 'b': other}))
  orange = np.array([0xE0, 0x89, 0x2F]) / 255
  assert not len(places(one, orange)) and len(places(two, orange)) > 100


def test_without_matplotlib_the_message_says_what_to_install(monkeypatch):
  for name in [n for n in sys.modules if n.split('.')[0] == 'matplotlib'] + ['matplotlib']:
    monkeypatch.setitem(sys.modules, name, None)
  with pytest.raises(ConfigError, match=r"pip install 'compactlm-jax\[plots\]'"):
    plots.concentration_picture(np.ones((1, 1)), np.ones((1, 1)), 4, 'x')


def test_drawing_touches_no_global_state():
  """Importing loads no matplotlib, drawing loads no pyplot. Mutation: draw with pyplot."""
  code = """
import sys, numpy as np
from compactlm_jax.analysis import plots
assert 'matplotlib' not in sys.modules
plots.concentration_picture(np.ones((2, 2)), np.ones((2, 2)), 4, 'x')
assert 'matplotlib.pyplot' not in sys.modules
"""
  subprocess.run([sys.executable, '-c', code], check=True)
