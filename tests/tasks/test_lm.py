"""The causal language model: what it predicts, what it counts, and that nothing reads the future."""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from compactlm_jax.config import EncoderConfig
from compactlm_jax.errors import ConfigError
from compactlm_jax.nn.encoder import encode, encoder_shapes
from compactlm_jax.tasks.lm import make_lm_task, token_losses
from compactlm_jax.tree import map_named, named_leaves
from compactlm_jax.types import Batch

PLAIN = EncoderConfig(vocab_size=40, hidden_size=16, num_layers=2, num_heads=2, max_positions=12, causal=True)
PLAIN = dataclasses.replace(PLAIN, scan_unroll=1)
MIXED = EncoderConfig.mixed(
  heads=4, head_ratio=2, hidden_size=16, num_layers=2, vocab_size=40, max_positions=12, conv_kernel_size=5, causal=True
)
MIXED = dataclasses.replace(MIXED, scan_unroll=1)
ENCODERS = {
  'transformer': PLAIN,
  'mixed': MIXED,
  'grouped-factorised': dataclasses.replace(MIXED, num_groups=2, embedding_size=8),
  'dynamic': dataclasses.replace(MIXED, conv_kind='dynamic'),
  'conv-only': dataclasses.replace(MIXED, self_attention=False),
}

# The programs run for milliseconds and compile for seconds: no optimisation.
fast_jit = functools.partial(jax.jit, compiler_options={'xla_backend_optimization_level': 0})


def random_params(encoder, seed=0, sigma=0.3):
  """Parameters with wide kernels: predictions then differ from position to position."""
  rng = np.random.default_rng(seed)

  def draw(name, leaf):
    if name.endswith('scale'):
      return jnp.ones(leaf.shape)
    return jnp.asarray(rng.normal(scale=sigma, size=leaf.shape), jnp.float32)

  width, size = encoder.hidden_size, encoder.embedding_size
  head = {'dense': {'kernel': (width, size), 'bias': (size,)}, 'norm': {'scale': (size,), 'bias': (size,)}}
  shapes = {**encoder_shapes(encoder), 'mlm_head': {**head, 'output_bias': (encoder.vocab_size,)}}
  is_shape = lambda x: isinstance(x, tuple)  # noqa: E731
  leaves = jax.tree.map(lambda s: jax.ShapeDtypeStruct(s, jnp.float32) if is_shape(s) else s, shapes, is_leaf=is_shape)
  return map_named(draw, leaves)


def still(encoder):
  return dataclasses.replace(encoder, hidden_dropout=0.0, attention_dropout=0.0)


@pytest.fixture(scope='module')
def batch():
  rng = np.random.default_rng(0)
  mask = (np.arange(10) < np.array([[10], [7], [2], [1]])).astype(np.int32)
  ids = rng.integers(5, 40, size=(4, 10)) * mask
  return Batch(jnp.asarray(ids, jnp.int32), jnp.asarray(mask), jnp.zeros((4, 10), jnp.int32))


def value_of(task, params, batch, key=0):
  value, metrics = fast_jit(task.loss)(params, None, batch, jax.random.key(key), jnp.int32(0))
  return float(value), {name: float(m) for name, m in metrics.items()}


def by_loops(params, encoder, batch):
  """(sum of nats, sum of hits, number of predicted tokens), position by position in NumPy."""
  run = fast_jit(lambda p, b: encode(p, encoder, b.input_ids, b.attention_mask, b.token_type_ids).last_BTD)
  hidden, batch, params = jax.device_get((run(params, batch), batch, params))
  head, words = params['mlm_head'], params['encoder']['embeddings']['word']['embedding']
  nats = hits = count = 0.0
  for row in range(batch.input_ids.shape[0]):
    for t in range(batch.input_ids.shape[1] - 1):
      if not batch.attention_mask[row, t + 1]:
        continue
      x = np.asarray(hidden[row, t], np.float64) @ np.asarray(head['dense']['kernel']) + np.asarray(
        head['dense']['bias']
      )
      x = np.array([v * 0.5 * (1 + math.erf(v / math.sqrt(2))) for v in x])
      x = (x - x.mean()) / math.sqrt(x.var() + encoder.layer_norm_epsilon)
      scores = words @ (x * head['norm']['scale'] + head['norm']['bias']) + head['output_bias']
      target = batch.input_ids[row, t + 1]
      nats += math.log(np.exp(scores - scores.max()).sum()) + scores.max() - scores[target]
      hits += scores.argmax() == target
      count += 1
  return nats, hits, count


def test_loss_and_accuracy_match_loops(batch):
  """Mutations: weigh by the mask of the position that predicts; score against the token itself."""
  encoder, params = still(MIXED), random_params(MIXED)
  nats, hits, count = by_loops(params, encoder, batch)
  task = make_lm_task(encoder)
  value, metrics = value_of(task, params, batch)
  np.testing.assert_allclose(value, nats / count, rtol=2e-5)
  assert count == metrics['weight'] == 9 + 6 + 1 and metrics['accuracy'] == pytest.approx(hits / count)
  held = fast_jit(task.evaluate)(params, None, batch)
  np.testing.assert_allclose([*held['loss'], *held['accuracy']], [nats, count, hits, count], rtol=2e-5)


@pytest.mark.parametrize('encoder', ENCODERS.values(), ids=ENCODERS)
def test_no_target_reads_what_comes_later(encoder, batch):
  """The nats of each target have gradients of exactly zero with respect to its own and all later embeddings.

  Embeddings are moved through the position table. Mutation: score hidden states against their own
  token in `token_losses`, or let the encoder be bidirectional.
  """
  encoder, params = still(encoder), random_params(encoder)
  row = jax.tree.map(lambda x: x[:1], batch)

  def nats(table):
    embeddings = {**params['encoder']['embeddings'], 'position': {'embedding': table}}
    return token_losses({**params, 'encoder': {**params['encoder'], 'embeddings': embeddings}}, encoder, row)[0][0]

  table = params['encoder']['embeddings']['position']['embedding']
  grads = np.abs(fast_jit(jax.jacrev(nats))(table)).sum(-1)
  assert grads.shape == (9, 12)
  reaches = 2 * (encoder.conv_kernel_size - 1) + 1 if not encoder.self_attention else 12
  for target, moved in enumerate(grads != 0, 1):
    assert moved[max(0, target - reaches) : target].all() and not moved[target:].any(), target
    assert not moved[: max(0, target - reaches)].any()


def test_padding_and_filling_rows_count_nothing(batch):
  task, params = make_lm_task(still(MIXED)), random_params(MIXED)
  grown = jax.tree.map(lambda x: jnp.pad(x, ((0, 1), (0, 2))), batch)
  grown = dataclasses.replace(
    grown, attention_mask=grown.attention_mask.at[4].set(1), weights=jnp.asarray([1.0, 1, 1, 1, 0])
  )
  (value, metrics), (long_value, long_metrics) = value_of(task, params, batch), value_of(task, params, grown)
  np.testing.assert_allclose(long_value, value, rtol=1e-5)
  assert metrics['weight'] == long_metrics['weight']
  assert float(fast_jit(task.evaluate)(params, None, grown)['loss'][1]) == metrics['weight']


def test_halves_of_a_batch_weigh_to_the_whole(batch):
  task, params = make_lm_task(still(PLAIN)), random_params(PLAIN)
  whole, metrics = value_of(task, params, batch)
  halves = [value_of(task, params, jax.tree.map(lambda x, i=i: x[i : i + 2], batch)) for i in (0, 2)]
  np.testing.assert_allclose(sum(v * m['weight'] for v, m in halves) / metrics['weight'], whole, rtol=1e-5)


def test_it_learns_and_every_parameter_gets_a_gradient(batch):
  encoder = dataclasses.replace(MIXED, num_groups=2, embedding_size=8)
  task, params, tx = make_lm_task(encoder), random_params(encoder, sigma=0.05), optax.adam(2e-2)
  opt_state = tx.init(params)

  @fast_jit
  def step(params, opt_state, key):
    (value, _), grads = jax.value_and_grad(task.loss, has_aux=True)(params, None, batch, key, jnp.int32(0))
    updates, opt_state = tx.update(grads, opt_state, params)
    return optax.apply_updates(params, updates), opt_state, value, grads

  before = fast_jit(task.evaluate)(params, None, batch)['loss'][0]
  for i in range(40):
    params, opt_state, value, grads = step(params, opt_state, jax.random.key(i))
  assert np.isfinite(value)
  assert all(np.asarray(grad).any() for name, grad in named_leaves(grads).items() if not name.endswith('key/bias'))
  assert fast_jit(task.evaluate)(params, None, batch)['loss'][0] < 0.7 * before


def test_perplexities():
  means = {'loss': 3.0, 'accuracy': 0.2}
  assert make_lm_task(PLAIN).summarize(means) == {'perplexity_token': math.exp(3)}
  # 1,000 predicted tokens make 600 words: exp(3 * 1000 / 600).
  got = make_lm_task(PLAIN, words_per_token=0.6).summarize(means)
  assert got == {'perplexity_token': math.exp(3), 'perplexity_word': pytest.approx(math.exp(5))}
  assert make_lm_task(PLAIN).summarize({'loss': 1e4}) == {'perplexity_token': math.inf}
  assert math.isnan(make_lm_task(PLAIN).summarize({'loss': math.nan})['perplexity_token'])


def test_start_goes_on_from_what_is_given():
  given = random_params(PLAIN)
  both = fast_jit(make_lm_task(PLAIN, start=given).init)(jax.random.key(0))
  jax.tree.map(np.testing.assert_array_equal, both, given)
  one = fast_jit(make_lm_task(PLAIN, start={'encoder': given['encoder']}).init)(jax.random.key(0))
  assert jax.tree.map(jnp.shape, one) == jax.tree.map(jnp.shape, given)
  np.testing.assert_array_equal(
    one['encoder']['embeddings']['word']['embedding'], both['encoder']['embeddings']['word']['embedding']
  )
  assert not np.array_equal(one['mlm_head']['dense']['kernel'], given['mlm_head']['dense']['kernel'])


def test_refusals(batch):
  with pytest.raises(ConfigError, match=r'encoder.causal: .* set it to True'):
    make_lm_task(dataclasses.replace(PLAIN, causal=False))
  task = make_lm_task(dataclasses.replace(PLAIN, max_positions=9))
  with pytest.raises(ConfigError, match='data.seq_len: rows have 10 tokens'):
    task.evaluate(random_params(PLAIN), None, batch)
