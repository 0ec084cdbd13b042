"""Shrinking: the same function with fewer heads and neurons, and back to the stock sizes with zeros."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ragged import ENCODERS, assert_same, dense, masked, masks_of, outputs

from compactlm_jax.compress.density import densities
from compactlm_jax.compress.shrink import padded, shrink
from compactlm_jax.config import runs
from compactlm_jax.errors import ConfigError
from compactlm_jax.tree import named_leaves, nested

SIZES = {
  'a layer without anything, and one head left': ((2, 1, 0), (3, 1, 0)),
  'nothing in any layer': ((0, 0, 0), (0, 0, 0)),
  'narrower everywhere': ((1, 1, 1), (2, 2, 2)),
}
CASES = [(name, *SIZES[what]) for name in ENCODERS for what in SIZES if 'narrower' not in what]
CASES += [(name, *SIZES['narrower everywhere']) for name in ('bert', 'convbert grouped')]


def shapes(tree):
  return {name: leaf.shape for name, leaf in named_leaves(tree).items()}


@pytest.mark.parametrize(('name', 'heads', 'neurons'), CASES)
def test_masked_baked_shrunk_and_padded_are_one_function(name, heads, neurons):
  """Mutation: leave the rows of one branch in ConvBERT's output; forget the bias of a neuron or of the taps."""
  config, params = dense(name)
  masks = masks_of(config, heads, neurons)
  reference = outputs(masked(params, config, masks, baked=False), config)
  baked = masked(params, config, masks)
  assert_same(outputs(baked, config), reference)
  small, smaller = shrink(baked, config)
  groups = config.num_groups
  assert [run.num_heads for start, stop, run in runs(smaller) for _ in range(stop - start)] == list(heads)
  assert [run.intermediate_size for a, b, run in runs(smaller) for _ in range(b - a)] == [groups * n for n in neurons]
  assert smaller.ragged == (len(set(zip(heads, neurons))) > 1 or not all((*heads, *neurons)))
  assert_same(outputs(small, smaller), reference)
  wide, stock = padded(small, smaller)
  narrow = not smaller.ragged
  assert stock == (dataclasses.replace(config, intermediate_size=smaller.intermediate_size) if narrow else config)
  if not narrow:
    assert shapes(wide) == shapes(params)
  assert_same(outputs(wide, stock), reference)
  again, _ = shrink(wide, stock)
  assert jax.tree.all(jax.tree.map(np.array_equal, again, small))
  assert densities(small, smaller)['density'] <= densities(baked, config)['density'] + narrow


@pytest.mark.parametrize('name', ENCODERS)
def test_a_dense_model_stays_as_it_is(name):
  """Mutation: remove the neuron with the smallest row too."""
  config, params = dense(name)
  small, smaller = shrink(params, config)
  assert smaller == config and small is params
  assert padded(params, config)[0] is params


def change(params, **changes):
  """The tree with functions applied to (writable copies of) leaves; '__' stands for '/'."""
  leaves = {name: np.array(leaf) for name, leaf in named_leaves(params).items()}
  for name, edit in changes.items():
    edit(leaves['encoder/layers/' + name.replace('__', '/')])
  return jax.tree.map(jnp.asarray, nested(leaves))


def zero(*index):
  def edit(leaf):
    leaf[index] = 0

  return edit


def sizes(config):
  return [(run.num_heads, run.intermediate_size) for start, stop, run in runs(config) for _ in range(stop - start)]


def test_constants_join_the_biases():
  """A neuron of bias alone adds gelu(bias) * row; a head of value biases alone adds bias * rows.

  Mutation: drop the constant, or take the bias without gelu.
  """
  config, params = dense('bert')  # heads of 2 channels
  pruned = change(
    params,
    ffn_in__kernel=zero(1, slice(None), 4),
    ffn_out__kernel=zero(2, 3),
    attention__value__kernel=zero(0, slice(None), [0, 1]),
  )
  small, smaller = shrink(pruned, config)
  assert sizes(smaller) == [(3, 6), (4, 5), (4, 5)]
  assert_same(outputs(small, smaller), outputs(pruned, config))
  before, after = (tree['encoder'][stack] for tree, stack in ((pruned, 'layers'), (small, 'layers_0')))
  value, rows = before['attention']['value']['bias'][0, :2], before['attention']['output']['kernel'][0, :2]
  moved = after['attention']['output']['bias'][0] - before['attention']['output']['bias'][0]
  np.testing.assert_allclose(moved, np.asarray(value) @ np.asarray(rows), atol=1e-6)


def test_a_head_may_be_dead_channel_by_channel():
  """One channel without values, the other unread; half of that is not enough."""
  config, params = dense('bert')
  half = change(params, attention__value__kernel=zero(0, slice(None), 2))
  assert shrink(half, config)[1] == config
  both = change(half, attention__output__kernel=zero(0, 3))
  small, smaller = shrink(both, config)
  assert sizes(smaller) == [(3, 6), (4, 6), (4, 6)]
  assert_same(outputs(small, smaller), outputs(both, config))


# A head of ConvBERT (4 heads of 1 channel): rows h and 4 + h of the output, query h, taps row h.
_UNREAD = {'attention__output__kernel': zero(0, [1, 5])}
_NO_QUERY = {'attention__query__kernel': zero(0, slice(None), 1)}
_SILENT = {'attention__query__bias': zero(0, 1)}
_NO_SPAN = {'attention__conv__pointwise__kernel': zero(0, slice(None), 1)}
_UNUSED = {'attention__conv__taps__kernel': zero(0, 1)}
_NO_VALUE = {
  'attention__value__kernel': zero(0, slice(None), 1),
  'attention__conv__value__kernel': zero(0, slice(None), 1),
}


@pytest.mark.parametrize(
  ('changes', 'heads'),
  [
    (_UNREAD, 4),  # its query still makes the kernels of the others
    (_UNREAD | _UNUSED, 3),
    (_UNREAD | _NO_QUERY, 4),  # the query is its bias, times a span that varies
    (_UNREAD | _NO_QUERY | _SILENT, 3),
    (_UNREAD | _NO_QUERY | _NO_SPAN, 3),  # a constant, into the taps' bias
    ({'attention__output__kernel': zero(0, 1)} | _UNUSED, 4),  # in one branch only
    (_NO_VALUE | _UNUSED, 4),  # taps over the edge do not add up to one
    (_NO_VALUE | _UNUSED | {'attention__conv__value__bias': zero(0, 1)}, 3),
  ],
  ids=['query used', 'unused', 'no query', 'silent', 'constant', 'one branch', 'no value', 'no value and bias'],
)
def test_when_a_head_leaves_both_branches(changes, heads):
  """Mutation: ignore what `taps` reads; fold the bias of the convolution's values."""
  config, params = dense('convbert')
  pruned = change(params, **changes)
  small, smaller = shrink(pruned, config)
  assert sizes(smaller)[0] == (heads, 6)
  assert_same(outputs(small, smaller), outputs(pruned, config))


def test_a_head_that_stays_keeps_what_its_taps_read():
  """Head 1 is needed by head 0 alone, head 2 by head 1 alone: with head 0 both stay, without it both go.

  Mutation: one pass instead of repeating.
  """
  config, params = dense('convbert')

  def reads(leaf):  # [4 channels, 4 heads * 3 taps]
    leaf[0, 1, 3:] = 0
    leaf[0, 2, :3] = 0
    leaf[0, 2, 6:] = 0

  unread = [1, 5, 2, 6]
  some = change(params, attention__conv__taps__kernel=reads, attention__output__kernel=zero(0, unread))
  assert shrink(some, config)[1] == config
  more = change(
    some, attention__output__kernel=zero(0, [*unread, 0, 4]), attention__query__kernel=zero(0, slice(None), 0),
    attention__query__bias=zero(0, 0),
  )  # fmt: skip
  small, smaller = shrink(more, config)
  assert sizes(smaller)[0] == (1, 6)
  assert_same(outputs(small, smaller), outputs(more, config))


def test_groups_keep_equally_many_neurons():
  """Of 3 neurons a group, 2 die in the first and 1 in the second: each keeps 2."""
  config, params = dense('convbert grouped')

  def rows(leaf):  # [N, G, F / G, D / G]
    leaf[1, 0, [0, 2]] = 0
    leaf[1, 1, 1] = 0

  pruned = change(params, ffn_out__kernel=rows)
  small, smaller = shrink(pruned, config)
  assert smaller.neurons_per_layer == (6, 4, 6) and smaller.heads_per_layer == ()
  assert_same(outputs(small, smaller), outputs(pruned, config))


def test_more_can_be_removed_from_what_was_shrunk():
  config, params = dense('bert')
  once, smaller = shrink(masked(params, config, masks_of(config, (2, 2, 4), (6, 6, 3))), config)
  leaf = np.array(once['encoder']['layers_1']['ffn_out']['kernel'])
  leaf[0, 1] = 0
  once['encoder']['layers_1']['ffn_out']['kernel'] = leaf
  twice, smallest = shrink(once, smaller)
  assert smallest.neurons_per_layer == (6, 6, 2) and smallest.heads_per_layer == (2, 2, 4)
  assert_same(outputs(jax.tree.map(jnp.asarray, twice), smallest), outputs(jax.tree.map(jnp.asarray, once), smaller))


def test_arrays_stay_what_they_were():
  """NumPy trees (from files) stay NumPy trees; heads beside the encoder are passed on."""
  config, params = dense('electra')
  host = {**jax.tree.map(np.asarray, masked(params, config, masks_of(config, (2, 1, 1), (3, 3, 3)))), 'classifier': {}}
  small, smaller = shrink(host, config)
  assert all(isinstance(leaf, np.ndarray) and leaf.dtype == np.float32 for leaf in jax.tree.leaves(small))
  assert 'classifier' in padded(small, smaller)[0]


def test_what_does_not_fit_is_refused():
  config, params = dense('bert')
  with pytest.raises(ConfigError, match='scores: .*bake'):
    shrink({**params, 'scores': {}}, config)
  wrong = dataclasses.replace(config, num_heads=2, head_size=2)
  with pytest.raises(ConfigError, match=r'encoder/layers/attention/query/kernel: found shape \(3, 8, 8\)'):
    shrink(params, wrong)
  with pytest.raises(ConfigError, match=r'encoder/layers_0/attention/query/kernel: it is missing'):
    padded(params, dataclasses.replace(config, heads_per_layer=(1, 2, 3)))
