"""Exact cuts by counting, against a stable sort."""

import functools

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from compactlm_jax.ops.threshold import Cut, global_cut, keep_mask, local_cuts, passes
from compactlm_jax.plan.program import read_collectives

SHAPES = {'a/kernel': (2, 3, 4), 'b': (2, 7), 'heads': (3,)}
SIZES = {name: int(np.prod(shape)) for name, shape in SHAPES.items()}
TOTAL = sum(SIZES.values())


def highest(values, keep):
  """True for the `keep` highest of a vector, ties to lower indices."""
  out = np.zeros(len(values), bool)
  out[np.argsort(-values.astype(np.float64), kind='stable')[:keep]] = True
  return out


def highest_of_layers(values, keeps):
  return np.stack([highest(layer.ravel(), keep).reshape(layer.shape) for layer, keep in zip(values, keeps)])


@jax.jit
def local(leaves, keeps):
  cuts = local_cuts(leaves, keeps)
  return {name: keep_mask(leaf, cuts[name]) for name, leaf in leaves.items()}, passes(leaves, keeps)


@jax.jit
def together(leaves, keep):
  cuts = global_cut(leaves, keep)
  return {name: keep_mask(leaf, cuts[name]) for name, leaf in leaves.items()}, passes(leaves, keep)


ELEMENTS = st.one_of(
  st.sampled_from([0.0, -0.0, 1.0, -1.0]),
  st.floats(width=32, allow_nan=False, allow_infinity=False, allow_subnormal=False),
)


@st.composite
def trees(draw):
  few = draw(st.booleans())
  elements = st.sampled_from([0.0, -0.0, 2.0]) if few else ELEMENTS
  values = np.array(draw(st.lists(elements, min_size=TOTAL, max_size=TOTAL)), np.float32)
  parts = np.split(values, np.cumsum(list(SIZES.values()))[:-1])
  return {name: part.reshape(SHAPES[name]) for name, part in zip(SHAPES, parts)}


@settings(max_examples=60, deadline=None)
@given(trees(), st.data())
def test_local_cuts_keep_what_a_stable_sort_keeps(leaves, data):
  """Count exact, ties to lower indices, 0 and all included. Mutation: the column after the last tie."""
  keeps = {
    name: np.array(data.draw(st.lists(st.integers(0, leaf[0].size), min_size=len(leaf), max_size=len(leaf))), np.int32)
    for name, leaf in leaves.items()
  }
  masks, _ = local(leaves, keeps)
  for name, leaf in leaves.items():
    np.testing.assert_array_equal(masks[name], highest_of_layers(leaf, keeps[name]), err_msg=name)


@settings(max_examples=60, deadline=None)
@given(trees(), st.integers(0, TOTAL))
def test_a_global_cut_keeps_what_a_stable_sort_of_everything_keeps(leaves, keep):
  """Mutation: give each layer the whole share of the ties."""
  masks, _ = together(leaves, np.int32(keep))
  flat = np.concatenate([leaves[name].ravel() for name in sorted(leaves)])
  got = np.concatenate([np.asarray(masks[name]).ravel() for name in sorted(leaves)])
  np.testing.assert_array_equal(got, highest(flat, keep))


LARGE = {'in': (2, 128, 160), 'out': (2, 160, 128)}


def drawn(kind, seed=0):
  rng = np.random.default_rng(seed)
  make = {
    'normal': lambda shape: rng.normal(size=shape),
    'heavy': lambda shape: rng.standard_cauchy(shape) ** 5,
    'equal': lambda shape: np.full(shape, 0.25),
    'two': lambda shape: rng.integers(0, 2, shape) - 0.5,
    'coarse': lambda shape: np.round(rng.normal(size=shape), 1),
    'rows': lambda shape: rng.normal(size=shape) + 30 * rng.normal(size=(*shape[:-1], 1)),
    'scales': lambda shape: np.exp(rng.uniform(-80, 80, shape)) * rng.choice([-1, 1], shape),
    # The sample is a grid that sees one value only.
    'hidden': lambda shape: np.where(np.arange(shape[1])[:, None] % 16 == 0, 1e30, rng.normal(size=shape)),
  }[kind]
  return {name: make(shape).astype(np.float32) for name, shape in LARGE.items()}


@pytest.mark.parametrize('kind', ['normal', 'heavy', 'equal', 'two', 'coarse', 'rows', 'scales', 'hidden'])
def test_few_passes_find_the_cut_of_large_layers(kind):
  """Larger than the sample. Mutation: interpolate without a sample."""
  leaves = drawn(kind)
  for density in (0.0, 0.001, 0.1, 0.5, 0.97, 1.0):
    keeps = {name: np.full(2, int(density * leaf[0].size), np.int32) for name, leaf in leaves.items()}
    masks, number = local(leaves, keeps)
    for name, leaf in leaves.items():
      np.testing.assert_array_equal(masks[name], highest_of_layers(leaf, keeps[name]), err_msg=f'{name} {density}')
    usual = 5 if kind in ('normal', 'equal', 'two') else 22
    assert number <= (0 if density in (0.0, 1.0) else usual), (density, number)


def small(values):
  """A tree of `SHAPES` with the given layers in one of its leaves."""
  return {name: np.zeros(shape, np.float32) for name, shape in SHAPES.items()} | {'b': np.array(values, np.float32)}


def kept_of(values, keeps):
  masks, number = local(small(values), {name: np.zeros(s[0], np.int32) for name, s in SHAPES.items()} | {'b': keeps})
  return np.asarray(masks['b']), number


def test_values_that_are_equal_to_the_device():
  """Zeros of both signs, denormals; NaN is never kept. Mutation: let NaN pass (`~(values <= threshold)`)."""
  values = np.array([[-0.0, 0.0, 1e-42, -1e-42, np.nan, -1.0, 1.0]] * 2, np.float32)
  flushed = np.where(np.isnan(values), -np.inf, np.where(np.abs(values) < 1e-38, 0, values))
  for keep in range(6):
    keeps = np.array([keep, keep + 1], np.int32)
    np.testing.assert_array_equal(kept_of(values, keeps)[0], highest_of_layers(flushed, keeps), err_msg=str(keep))


def test_nothing_and_everything():
  """No pass is made; counts beyond the size are clipped. Mutation: leave the clip out."""
  values = np.arange(14).reshape(2, 7) % 3
  for keeps in ([0, 7], [-5, 9]):
    mask, number = kept_of(values, np.array(keeps, np.int32))
    assert not mask[0].any() and mask[1].all() and number == 0
  kept = keep_mask(np.array([[1.0, -3.0], [0.0, 0.0]], np.float32), Cut(np.zeros(2, np.float32), np.array([-1, 0])))
  np.testing.assert_array_equal(kept, [[True, False], [True, False]])


@functools.cache
def mesh():
  return jax.make_mesh((8,), ('data',), axis_types=(AxisType.Auto,))


@pytest.mark.parametrize('search', ['local', 'global'])
def test_slices_are_counted_where_they_lie(search):
  """The same masks, and only counts and the sample travel. Mutation: take all scores for the sample."""
  rng = np.random.default_rng(0)
  leaves = {
    name: np.round(rng.normal(size=shape), 2).astype(np.float32)
    for name, shape in {'in': (2, 256, 384), 'out': (2, 384, 256)}.items()
  }
  rows = NamedSharding(mesh(), P(None, 'data'))

  def masks(leaves, keeps):
    slices = jax.lax.with_sharding_constraint(leaves, rows)
    cuts = (local_cuts if search == 'local' else global_cut)(slices, keeps)
    return {name: keep_mask(leaf, cuts[name]) for name, leaf in leaves.items()}

  keeps = np.int32(5003) if search == 'global' else {name: np.array([3000, 7], np.int32) for name in leaves}
  compiled = jax.jit(masks).lower(leaves, keeps).compile()
  got = compiled(leaves, keeps)
  if search == 'local':
    want = {name: highest_of_layers(leaf, keeps[name]) for name, leaf in leaves.items()}
  else:
    flat = highest(np.concatenate([leaf.ravel() for leaf in leaves.values()]), keeps)
    want = {name: part.reshape(2, *leaves[name].shape[1:]) for name, part in zip(leaves, np.split(flat, 2))}
  for name in leaves:
    np.testing.assert_array_equal(got[name], want[name])
  exchanged = [each.bytes for each in read_collectives(compiled.as_text())]
  assert exchanged and max(exchanged) < leaves['in'].nbytes / 8
