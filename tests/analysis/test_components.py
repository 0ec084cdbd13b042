"""Costs of the parts: they add up to the model, and together compute what it computes."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from compactlm_jax.analysis.components import components, part_calls
from compactlm_jax.analysis.statistics import analysed
from compactlm_jax.config import EncoderConfig
from compactlm_jax.nn.attention import MixedAttention
from compactlm_jax.nn.encoder import encoder_shapes
from compactlm_jax.nn.flops import encoder_flops, mlm_head_flops
from compactlm_jax.nn.heads import MlmHead, RtdHead
from compactlm_jax.tree import map_named

D, V, ROWS, LENGTH = 48, 60, 4, 24
MIXED = EncoderConfig.mixed(
  heads=4, head_ratio=2, hidden_size=D, num_layers=2, vocab_size=V, max_positions=32, embedding_size=24, num_groups=2
)
PLAIN = EncoderConfig(hidden_size=D, num_layers=1, num_heads=4, vocab_size=V, max_positions=32, pooler=True)


def random_like(shapes):
  rng = np.random.default_rng(0)
  return map_named(lambda _, leaf: jnp.asarray(0.1 * rng.normal(size=leaf.shape), jnp.float32), shapes)


def with_heads(config):
  params = random_like(encoder_shapes(config))
  x, words = jnp.zeros((1, 2, config.hidden_size)), params['encoder']['embeddings']['word']['embedding']
  params['mlm_head'] = MlmHead(config).init(jax.random.key(0), x, words)['params']
  params['rtd_head'] = RtdHead(config).init(jax.random.key(0), x)['params']
  params['classifier'] = {'kernel': jnp.ones((config.hidden_size, 3)), 'bias': jnp.ones(3)}
  params['span'] = {'kernel': jnp.ones((config.hidden_size, 2)), 'bias': jnp.ones(2)}
  return analysed(params, config)


def test_parts_of_a_convbert_add_up():
  """Parameters to all leaves, FLOPs to the encoder's; XLA counts every layer and little more than products.

  Mutations: XLA's count of one layer only; the output's kernel with attention alone.
  """
  model = with_heads(MIXED)
  parts = {part.name: part for part in components(model, ROWS, LENGTH, repeats=2)}
  assert list(parts) == ['embeddings', 'attention', 'convolution', 'feed_forward', 'norms', 'heads', 'encoder']
  inside = [part for name, part in parts.items() if name not in ('encoder', 'heads')]
  encoder = sum(leaf.size for leaf in jax.tree.leaves(model.params['encoder']))
  assert sum(part.parameters for part in inside) == parts['encoder'].parameters == encoder
  assert parts['heads'].parameters == sum(leaf.size for leaf in jax.tree.leaves(model.params)) - encoder
  assert parts['attention'].parameters == 2 * (3 * (D * D // 2 + D // 2) + D * D // 2 + D)
  total = ROWS * LENGTH * encoder_flops(MIXED, LENGTH)
  assert sum(part.flops for part in inside) == pytest.approx(total) == parts['encoder'].flops
  for name in ('attention', 'convolution', 'feed_forward', 'heads', 'encoder'):
    assert 1 <= parts[name].xla_flops / parts[name].flops < 2, name  # GELU and softmax weigh more in a narrow model
  assert all(part.milliseconds > 0 for part in parts.values())


def test_heads_are_counted_where_they_are_applied():
  """Pooler and classifier on a row's first token, the others on all. Mutation: classify every token."""
  parts = {part.name: part for part in components(with_heads(PLAIN), ROWS, LENGTH, repeats=1)}
  every = mlm_head_flops(PLAIN) + 2 * D * (D + 1) + 2 * D * 2
  assert parts['heads'].flops == ROWS * (2 * D * D + 2 * D * 3 + LENGTH * every)
  assert 'convolution' not in parts
  bare = analysed(random_like(encoder_shapes(dataclasses.replace(PLAIN, pooler=False))), PLAIN)
  bare = dataclasses.replace(bare, config=dataclasses.replace(bare.config, pooler=False))
  assert 'heads' not in part_calls(bare, ROWS, LENGTH)


def test_attention_and_convolution_together_are_mixed_attention():
  """On the convolution's own queries. Mutation: give both parts the same rows of the output's kernel."""
  model = with_heads(MIXED)
  calls = part_calls(model, ROWS, LENGTH)
  layer = jax.tree.map(lambda leaf: leaf[0], model.params['encoder']['layers']['attention'])
  attend, attention, x, mask = calls['attention']
  convolve, conv, rest, x, q, mask = calls['convolution']
  q = (x @ layer['query']['kernel'] + layer['query']['bias'][None, None]).reshape(q.shape)
  whole = MixedAttention(model.config).apply({'params': layer}, x, mask, None, 0)[0]
  both = attend(attention, x, mask) + convolve(conv, rest, x, q, mask) - layer['output']['bias'][None, None]
  np.testing.assert_allclose(both, whole, atol=1e-4)
