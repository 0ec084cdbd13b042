"""Tiny encoders with pieces to remove, for tests of masks, shrinking and layers of different sizes."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from compactlm_jax.compress.structure import acting_masks
from compactlm_jax.config import EncoderConfig
from compactlm_jax.nn.encoder import encode, encoder_shapes
from compactlm_jax.tree import named_leaves, nested

SMALL = dict(
  vocab_size=20, hidden_size=8, num_layers=3, intermediate_size=6, max_positions=8, initializer_range=0.5, scan_unroll=1
)
ENCODERS = {
  'bert': EncoderConfig('bert', num_heads=4, pooler=True, **SMALL),
  'bert without pooler': EncoderConfig('bert', num_heads=2, **SMALL),
  'electra': EncoderConfig('electra', num_heads=4, embedding_size=6, **SMALL),
  'convbert': EncoderConfig('convbert', num_heads=4, head_size=1, conv_kernel_size=3, embedding_size=6, **SMALL),
  'convbert grouped': EncoderConfig('convbert', num_heads=2, head_size=2, conv_kernel_size=3, num_groups=2, **SMALL),
  'dynamic': EncoderConfig('convbert', num_heads=2, head_size=2, conv_kernel_size=3, conv_kind='dynamic', **SMALL),
  'convolution only': EncoderConfig('convbert', num_heads=4, conv_kernel_size=3, self_attention=False, **SMALL),
}
IDS = np.random.default_rng(0).integers(0, 20, (3, 7))
MASK = (np.arange(7) < np.array([[7], [4], [0]])).astype(np.int32)  # the last row is all padding

run = jax.jit(encode, static_argnames=('config', 'all_hidden', 'qkv_layers', 'skip_above'))


def random_tree(config, seed=0):
  """Dense parameters {'encoder': ...}, biases included."""
  rng = np.random.default_rng(seed)
  shapes = encoder_shapes(config)
  return jax.tree.map(lambda s: jnp.asarray(rng.standard_normal(s.shape).astype(np.float32) * 0.7), shapes)


def masked(params, config, masks, *, baked=True):
  """The tree with masks {name of scores: array} on it."""
  leaves = named_leaves(params)
  for name, mask in masks.items():
    for covered, array in acting_masks(config, name, jnp.asarray(mask, jnp.float32), baked=baked).items():
      leaves[covered] = leaves[covered] * array
  return nested(leaves)


def masks_of(config, heads, neurons):
  """Masks that keep the first `heads` heads and `neurons` neurons (of each group) of each layer."""
  groups = config.num_groups
  per_group = np.arange(config.intermediate_size // groups)
  return {
    'encoder/layers/attention/heads': np.arange(config.num_heads) < np.array(heads)[:, None],
    'encoder/layers/neurons': np.tile(per_group < np.array(neurons)[:, None], (1, groups)),
  }


@functools.cache
def dense(name):
  """(configuration, parameters) of one of `ENCODERS`."""
  return ENCODERS[name], random_tree(ENCODERS[name])


def outputs(params, config):
  """Hidden states of every layer, and the pooled vector if there is one."""
  out = run(params, config, IDS, MASK, all_hidden=True)
  return [np.asarray(out.hidden_NBTD)] + ([] if out.pooled_BD is None else [np.asarray(out.pooled_BD)])


def assert_same(found, expected, atol=1e-5):
  for a, b in zip(found, expected, strict=True):
    np.testing.assert_allclose(a, b, rtol=0, atol=atol)
