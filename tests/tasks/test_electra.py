"""Replaced-token detection: the loss against PyTorch's models, what gets a gradient, labels, sharing, bad input."""

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from compactlm_jax.config import ElectraConfig, EncoderConfig, MaskConfig
from compactlm_jax.errors import ConfigError
from compactlm_jax.ops.corruption import mask_tokens, sample_tokens, write_tokens
from compactlm_jax.tasks.electra import generator_params, make_electra_task
from compactlm_jax.tasks.mlm import make_mlm_task, mlm_logits
from compactlm_jax.tree import map_named, named_leaves
from compactlm_jax.types import Batch, SpecialTokens

V = 40
SPECIAL = SpecialTokens(pad=0, cls=2, sep=3, mask=4)
ENCODER = EncoderConfig(
  architecture='electra', vocab_size=V, hidden_size=16, num_layers=1, num_heads=4, embedding_size=12, max_positions=20,
  scan_unroll=1,
)  # fmt: skip
STILL = dataclasses.replace(ENCODER, hidden_dropout=0.0, attention_dropout=0.0)
MIXED = EncoderConfig.mixed(
  heads=4, head_ratio=2, vocab_size=V, hidden_size=16, num_layers=1, embedding_size=8, max_positions=20, num_groups=2,
  conv_kernel_size=3, hidden_dropout=0.0, attention_dropout=0.0, scan_unroll=1,
)  # fmt: skip
HALF = ElectraConfig(generator_size=0.5)
MASK = MaskConfig(probability=0.3)
fast_jit = functools.partial(jax.jit, compiler_options={'xla_backend_optimization_level': 0})


def random_params(task, seed=0, sigma=0.3):
  rng = np.random.default_rng(seed)

  def draw(name, leaf):
    scale = 1.0 if name.endswith('scale') else 0.0
    return jnp.asarray(scale + rng.normal(scale=sigma, size=leaf.shape), jnp.float32)

  return map_named(draw, jax.eval_shape(task.init, jax.random.key(0)))


@pytest.fixture(scope='module')
def batch():
  rng = np.random.default_rng(0)
  lengths = np.array([20, 13, 7, 16, 20, 9])
  mask = (np.arange(20) < lengths[:, None]).astype(np.int32)
  ids = rng.integers(5, V, (6, 20))
  ids[:, 0], ids[np.arange(6), lengths - 1] = SPECIAL.cls, SPECIAL.sep
  types = (np.arange(20) > 5) * mask
  return Batch(jnp.asarray(ids * mask, jnp.int32), jnp.asarray(mask), jnp.asarray(types, jnp.int32))


def loss_and_gradients(task, params, batch, key=0):
  grad = fast_jit(jax.value_and_grad(lambda p, k: task.loss(p, None, batch, k, 0), has_aux=True))
  (value, metrics), grads = grad(params, jax.random.key(key))
  return float(value), {name: float(x) for name, x in metrics.items()}, named_leaves(grads)


@pytest.mark.parametrize('encoder', [STILL, MIXED], ids=['electra', 'convbert'])
@pytest.mark.parametrize('sharing', ['embeddings', 'none'])
def test_the_loss_is_that_of_its_parts(encoder, sharing, batch):
  """Both towers run by hand, the loss in float64 NumPy.

  Mutations: lambda of 1, RTD over hidden positions only, label every sample as replaced, labels of [MASK] input.
  """
  config = ElectraConfig(generator_size=0.5, sharing=sharing)
  task = make_electra_task(encoder, config, MASK, SPECIAL)
  params = random_params(task)
  params['rtd_head']['output']['bias'] = jnp.zeros(1)
  value, metrics = (
    jax.tree.map(float, x) for x in fast_jit(lambda p, k: task.loss(p, None, batch, k, 0))(params, jax.random.key(3))
  )

  keys = jax.random.split(jax.random.key(3), 4)
  masked = mask_tokens(keys[0], batch.input_ids, batch.attention_mask, MASK, SPECIAL, V)
  small = config.generator_encoder(encoder)
  logits = fast_jit(lambda p: mlm_logits(generator_params(p, config), small, masked, batch, None))(params)
  fake, _ = write_tokens(batch.input_ids, masked.positions_BP, sample_tokens(keys[1], logits), masked.weights_BP > 0)
  fake, ids, real = (np.asarray(x) for x in (fake, batch.input_ids, batch.attention_mask))
  logits, weights = np.asarray(logits, np.float64), np.asarray(masked.weights_BP)
  log_probs = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
  nll = -np.take_along_axis(log_probs, np.asarray(masked.ids_BP)[..., None], -1)[..., 0]
  mlm = (nll * weights).sum() / weights.sum()

  from compactlm_jax.nn.encoder import encode
  from compactlm_jax.nn.heads import RtdHead

  out = fast_jit(lambda p: encode(p, encoder, fake, batch.attention_mask, batch.token_type_ids).last_BTD)(params)
  x = np.asarray(RtdHead(encoder).apply({'params': params['rtd_head']}, out), np.float64)
  replaced = fake != ids
  rtd = (np.log1p(np.exp(-np.abs(x))) + np.maximum(x, 0) - x * replaced)[real == 1].sum() / real.sum()

  assert replaced.any() and not replaced[real == 0].any() and not replaced[:, 0].any()
  np.testing.assert_allclose(value, mlm + 50 * rtd, rtol=2e-5)
  guessed = (x > 0) & (real == 1)
  expected = {
    'mlm_loss': mlm,
    'rtd_loss': rtd,
    'mlm_accuracy': ((logits.argmax(-1) == np.asarray(masked.ids_BP)) * weights).sum() / weights.sum(),
    'replaced_fraction': replaced.sum() / real.sum(),
    'precision_replaced': (guessed & replaced).sum() / guessed.sum(),
    'recall_replaced': (guessed & replaced).sum() / replaced.sum(),
    'precision_original': (~guessed & ~replaced & (real == 1)).sum() / (~guessed & (real == 1)).sum(),
    'recall_original': (~guessed & ~replaced & (real == 1)).sum() / (~replaced & (real == 1)).sum(),
    'weight': real.sum(),
  }
  for name, number in expected.items():
    np.testing.assert_allclose(metrics[name], number, rtol=2e-5, err_msg=name)


def test_nothing_flows_back_through_the_samples(batch):
  """With each loss alone, the other tower's own parameters get exactly nothing. Mutation: straight-through samples."""
  task = make_electra_task(ENCODER, ElectraConfig(generator_size=0.5, generator_weight=0.0), MASK, SPECIAL)
  params = random_params(task)
  grads = loss_and_gradients(task, params, batch)[2]
  assert all(not np.asarray(g).any() for name, g in grads.items() if name.startswith('generator/'))
  assert np.asarray(grads['rtd_head/output/kernel']).any()
  task = make_electra_task(ENCODER, ElectraConfig(generator_size=0.5, discriminator_weight=0.0), MASK, SPECIAL)
  grads = loss_and_gradients(task, params, batch)[2]
  for name, g in grads.items():
    shared = re.match(r'encoder/embeddings/(word|position|token_type|norm)/', name)
    assert np.asarray(g).any() == bool(shared or name.startswith('generator/')), name


def test_a_sample_that_is_the_original_counts_as_original(batch):
  """A generator that knows the answer replaces nothing. Mutation: label every hidden position."""
  task = make_electra_task(STILL, HALF, MASK, SPECIAL)
  params = random_params(task)
  same = dataclasses.replace(batch, input_ids=jnp.where(batch.input_ids > 4, 9, batch.input_ids))
  params['generator']['mlm_head']['output_bias'] = jnp.zeros(V).at[9].set(1e4)
  metrics = loss_and_gradients(task, params, same)[1]
  assert metrics['replaced_fraction'] == 0 and metrics['mlm_accuracy'] == 1 and metrics['recall_replaced'] == 0
  never = make_electra_task(STILL, dataclasses.replace(HALF, disallow_correct=True), MASK, SPECIAL)
  slots = 6 + 4 + 2 + 5 + 6 + 3  # 0.3 of each length, to even
  fraction = loss_and_gradients(never, params, same)[1]['replaced_fraction']
  np.testing.assert_allclose(fraction, slots / float(same.attention_mask.sum()), rtol=1e-6)


def test_logits_exist_at_the_slots_only(batch):
  """No array of [B, T, V], forward or backward. Mutation: run the head on every position."""
  task = make_electra_task(ENCODER, HALF, MASK, SPECIAL)
  shapes = jax.eval_shape(task.init, jax.random.key(0))
  text = str(jax.make_jaxpr(jax.grad(lambda p: task.loss(p, None, batch, jax.random.key(0), 0)[0]))(shapes))
  assert f'[6,{MASK.slots(20)},{V}]' in text and f'[6,20,{V}]' not in text


def test_what_the_towers_share():
  """Mutation: keep a table of the generator's own."""
  names = {}
  for sharing in ('embeddings', 'none', 'all'):
    size = 1.0 if sharing == 'all' else 0.5
    config = ElectraConfig(generator_size=size, sharing=sharing)
    task = make_electra_task(ENCODER, config, MASK, SPECIAL)
    params = random_params(task)
    names[sharing] = {n for n in named_leaves(params) if n.startswith('generator/')}
    whole = generator_params(params, config)
    expected = jax.eval_shape(make_mlm_task(config.generator_encoder(ENCODER), MASK, SPECIAL).init, jax.random.key(0))
    assert jax.tree.map(jnp.shape, whole) == jax.tree.map(lambda x: x.shape, expected)
    own = whole['encoder']['embeddings']['word']['embedding'] is params['encoder']['embeddings']['word']['embedding']
    assert own == (sharing != 'none')
  assert {n.split('/')[1] for n in names['all']} == {'mlm_head'}
  assert {n for n in names['embeddings'] if 'embeddings' in n} == {
    f'generator/encoder/embeddings/projection/{leaf}' for leaf in ('kernel', 'bias')
  }
  assert 'generator/encoder/embeddings/word/embedding' in names['none']


def test_evaluation_hides_the_same_tokens_and_ignores_filling_rows(batch):
  """Mutations: a key of the clock; weights left out."""
  task = make_electra_task(ENCODER, HALF, MASK, SPECIAL)
  params = random_params(task)
  batch = dataclasses.replace(batch, weights=jnp.ones(6))
  evaluate = fast_jit(task.evaluate)
  found = evaluate(params, None, batch)
  again = evaluate(params, None, batch)
  assert all(found[name] == again[name] for name in found)
  weights = jnp.array([1.0, 1, 1, 1, 0, 0])
  part = evaluate(params, None, dataclasses.replace(batch, weights=weights))
  assert part['rtd_loss'][1] == batch.attention_mask[:4].sum() and part['mlm_loss'][1] == 6 + 4 + 2 + 5
  means = {name: float(total / count) for name, (total, count) in found.items()}
  np.testing.assert_allclose(task.summarize(means)['loss'], means['mlm_loss'] + 50 * means['rtd_loss'])


def test_it_learns(batch):
  """Plain gradient descent on one batch lowers both losses. Mutation: a stop-gradient in either tower."""
  task = make_electra_task(STILL, HALF, MASK, SPECIAL)
  params = task.init(jax.random.key(0))
  step = fast_jit(
    lambda p, k: (lambda out: (jax.tree.map(lambda x, g: x - 0.02 * g, p, out[1]), out[0][1]))(
      jax.value_and_grad(lambda p: task.loss(p, None, batch, k, 0), has_aux=True)(p)
    )
  )
  losses = []
  for i in range(150):
    params, metrics = step(params, jax.random.key(i % 5))
    losses.append((float(metrics['rtd_loss']), float(metrics['mlm_loss'])))
  first, last = np.mean(losses[:5], 0), np.mean(losses[-5:], 0)
  assert last[0] < 0.85 * first[0] and last[1] < 0.95 * first[1], (first, last)


def test_mlm_is_the_generators_loss(batch):
  """Task mlm on the generator's own tree has the MLM loss of ELECTRA. Mutation: BERT's rates in one of them."""
  config = ElectraConfig(generator_size=0.5, sharing='none')
  task = make_electra_task(STILL, config, MASK, SPECIAL)
  params = random_params(task)
  mlm = make_mlm_task(config.generator_encoder(STILL), MASK, SPECIAL)
  found = fast_jit(lambda p: mlm.evaluate(p, None, batch))(generator_params(params, config))
  masked = mask_tokens(
    jax.random.split(jax.random.fold_in(jax.random.key(0), batch.input_ids.sum()))[0],
    batch.input_ids, batch.attention_mask, MASK, SPECIAL, V,
  )  # fmt: skip
  small = config.generator_encoder(STILL)
  logits = fast_jit(lambda p: mlm_logits(generator_params(p, config), small, masked, batch, None))(params)
  nll = -np.take_along_axis(np.asarray(jax.nn.log_softmax(logits)), np.asarray(masked.ids_BP)[..., None], -1)[..., 0]
  np.testing.assert_allclose(found['loss'][0], (nll * np.asarray(masked.weights_BP)).sum(), rtol=1e-5)
  assert found['loss'][1] == masked.weights_BP.sum()


def test_a_pooler_is_kept_and_not_trained(batch):
  """Mutation: train it (it would decay). The generator has none."""
  encoder = dataclasses.replace(STILL, architecture='bert', embedding_size=16, pooler=True)
  task = make_electra_task(encoder, HALF, MASK, SPECIAL)
  params = random_params(task)
  assert 'pooler' in params['encoder'] and 'pooler' not in params['generator']['encoder']
  assert dict(task.trainable)['encoder/pooler/.*'] is False
  assert np.isfinite(loss_and_gradients(task, params, batch)[0])


@pytest.mark.parametrize(
  ('encoder', 'config', 'message'),
  [
    (ENCODER, {'generator_size': 0.3}, 'config.electra.generator_size: 0.3 of hidden_size 16 is 4.80'),
    (ENCODER, {'generator_size': 0.5, 'generator_heads': 3}, 'config.electra.generator_size: gives a width of 8, not'),
    (ENCODER, {'generator_layers': 0.3}, 'config.electra.generator_layers: 0.3 of num_layers 1 is 0.30'),
    (dataclasses.replace(ENCODER, vocab_size=4), {}, 'config.encoder.vocab_size: 4, but [MASK] of the data has id 4'),
    (dataclasses.replace(ENCODER, causal=True), {}, 'config.encoder.causal: a masked model reads both directions'),
  ],
)
def test_bad_input_is_refused(encoder, config, message):
  with pytest.raises(ConfigError) as refused:
    make_electra_task(encoder, ElectraConfig(**config), MASK, SPECIAL)
  assert str(refused.value).startswith(message)


@pytest.mark.parametrize('heads', [(4, 256, 1, 64), (8, 384, 1, 48), (12, 768, 2, 64)])
def test_published_generators(heads):
  """Heads per branch and head size of ConvBERT's generators (small, medium-small, base)."""
  configured, width, per_branch, size = heads
  encoder = EncoderConfig.mixed(heads=configured, head_ratio=2, hidden_size=width)
  small = ElectraConfig(generator_size=1 / 3 if width == 768 else 0.25).generator_encoder(encoder)
  assert (small.num_heads, small.head_size, small.intermediate_size) == (per_branch, size, 4 * small.hidden_size)
  assert small.conv_kernel_size == 9 and small.embedding_size == encoder.embedding_size
