"""The distillation task: it learns, leaves the teacher alone, and refuses pairs that do not fit."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from compactlm_jax.config import DistillConfig, EncoderConfig, OptimizerConfig
from compactlm_jax.errors import ConfigError
from compactlm_jax.nn.encoder import encode, encoder_shapes
from compactlm_jax.tasks.distill import check_distill, layer_pairs, make_distill_task
from compactlm_jax.train.optimizer import make_optimizer
from compactlm_jax.tree import map_named, named_leaves
from compactlm_jax.types import Batch

TEACHER = EncoderConfig(
  vocab_size=40, hidden_size=24, num_layers=4, num_heads=4, max_positions=16, initializer_range=0.5, pooler=True
)
STUDENT = EncoderConfig(vocab_size=40, hidden_size=12, num_layers=2, num_heads=4, max_positions=16, pooler=True)
V2 = DistillConfig(relations=('qq', 'kk', 'vv'), relation_heads=6)
HALF = dataclasses.replace(TEACHER, num_layers=2)  # for 'teacher_layers' and 'mse'

# The programs run for milliseconds and compile for seconds: no optimisation.
fast_jit = functools.partial(jax.jit, compiler_options={'xla_backend_optimization_level': 0})


def random_params(config, seed=0, sigma=0.02):
  """Parameters drawn by NumPy: `init_encoder` compiles for seconds."""
  rng = np.random.default_rng(seed)

  def draw(name, leaf):
    if name.endswith('scale'):
      return np.ones(leaf.shape, np.float32)
    return rng.normal(scale=sigma, size=leaf.shape).astype(np.float32)

  return map_named(draw, encoder_shapes(config))


def held_out(task, params, batch):
  return {name: [float(x) for x in pair] for name, pair in fast_jit(task.evaluate)(params, task.frozen, batch).items()}


@pytest.fixture(scope='module')
def teacher_params():
  return random_params(TEACHER, 7, sigma=0.5)


@pytest.fixture(scope='module')
def batch():
  rng = np.random.default_rng(0)
  mask = (np.arange(10) < rng.integers(4, 11, size=(6, 1))).astype(np.int32)
  ids = rng.integers(1, 40, size=(6, 10)) * mask
  return Batch(jnp.asarray(ids, jnp.int32), jnp.asarray(mask), jnp.zeros((6, 10), jnp.int32))


def value_of(task, params, batch, key=0):
  value, metrics = fast_jit(task.loss)(params, task.frozen, batch, jax.random.key(key), jnp.int32(0))
  return float(value), {name: float(m) for name, m in metrics.items()}


def test_twenty_steps_lower_the_loss(teacher_params, batch):
  task = make_distill_task(STUDENT, TEACHER, teacher_params, DistillConfig())
  params, tx = random_params(STUDENT), optax.adam(1e-2)
  opt_state = tx.init(params)

  @fast_jit
  def step(params, opt_state, frozen, key):
    (value, _), grads = jax.value_and_grad(task.loss, has_aux=True)(params, frozen, batch, key, jnp.int32(0))
    updates, opt_state = tx.update(grads, opt_state, params)
    return optax.apply_updates(params, updates), opt_state, value

  before = held_out(task, params, batch)
  for i in range(20):
    params, opt_state, value = step(params, opt_state, task.frozen, jax.random.key(i))
  after = held_out(task, params, batch)
  assert np.isfinite(value)
  for name in ('loss', 'relation_qk', 'relation_vv'):
    assert after[name][0] < 0.8 * before[name][0]
    assert after[name][1] == batch.attention_mask.sum()


@pytest.mark.parametrize(
  ('student', 'config', 'parts'),
  [
    (STUDENT, V2, {'relation_qq', 'relation_kk', 'relation_vv'}),
    pytest.param(
      *(STUDENT, DistillConfig(layers='uniform', normalize='examples'), {'relation_qk', 'relation_vv'}),
      marks=pytest.mark.slow,
    ),
    (STUDENT, DistillConfig(relations=('qk',), normalize='padded', teacher_dtype='bfloat16'), {'relation_qk'}),
    (HALF, DistillConfig(value_loss='mse', student_init='teacher_layers'), {'relation_qk', 'value_mse'}),
    (
      dataclasses.replace(STUDENT, dtype='bfloat16', remat=True, embedding_size=6, architecture='electra'),
      dataclasses.replace(V2, relations=('qk', 'vv', 'qq', 'kk')),
      {'relation_qk', 'relation_vv', 'relation_qq', 'relation_kk'},
    ),
    (
      EncoderConfig.mixed(heads=4, head_ratio=2, hidden_size=24, num_layers=2, vocab_size=40, max_positions=16),
      V2,
      {'relation_qq', 'relation_kk', 'relation_vv'},
    ),
  ],
  ids=['v2', 'uniform', 'attention-padded', 'mse', 'electra-bf16', 'convbert'],
)
def test_every_option_is_finite_and_trains_the_student(teacher_params, batch, student, config, parts):
  task = make_distill_task(student, TEACHER, teacher_params, config)
  params = random_params(student)
  loss = fast_jit(jax.value_and_grad(task.loss, has_aux=True))
  (value, metrics), grads = loss(params, task.frozen, batch, jax.random.key(0), jnp.int32(0))
  assert set(metrics) == parts | {'weight'}
  assert all(np.isfinite(x).all() for x in jax.tree.leaves((value, metrics, grads)))
  np.testing.assert_allclose(value, sum(metrics[p] for p in parts), rtol=1e-6)
  names = {name for name, grad in named_leaves(grads).items() if np.asarray(grad).any()}
  assert {'encoder/embeddings/word/embedding', 'encoder/layers/attention/query/kernel'} <= names


def test_no_gradient_reaches_the_teacher(teacher_params, batch):
  task = make_distill_task(HALF, TEACHER, teacher_params, DistillConfig(value_loss='mse'))

  def value(frozen, params):
    return task.loss(params, frozen, batch, jax.random.key(0), jnp.int32(0))[0]

  grads = fast_jit(jax.grad(value))(task.frozen, random_params(HALF))
  assert all(not np.asarray(g).any() for g in jax.tree.leaves(grads))


def test_a_student_that_is_the_teacher_has_loss_zero(teacher_params, batch):
  task = make_distill_task(TEACHER, TEACHER, teacher_params, DistillConfig(student_init='teacher_layers'))
  total, count = held_out(task, teacher_params, batch)['loss']
  assert abs(total / count) < 1e-6
  assert value_of(task, teacher_params, batch)[0] > 1e-3  # dropout, on the student's side only


def test_dropout_follows_the_key_and_evaluation_has_none(teacher_params, batch):
  task = make_distill_task(STUDENT, TEACHER, teacher_params, V2)
  params = random_params(STUDENT)
  one, again, other = (value_of(task, params, batch, key)[0] for key in (1, 1, 2))
  assert one == again != other
  plain = dataclasses.replace(STUDENT, hidden_dropout=0.0, attention_dropout=0.0)
  still = make_distill_task(plain, TEACHER, teacher_params, V2)
  total, count = held_out(task, params, batch)['loss']
  np.testing.assert_allclose(value_of(still, params, batch)[0], total / count, rtol=1e-5)


def test_the_taught_layer_is_the_one_asked_for(teacher_params, batch):
  config = DistillConfig(teacher_layer=2)
  task = make_distill_task(STUDENT, TEACHER, teacher_params, config)
  assert task.frozen['encoder']['layers']['ffn_in']['kernel'].shape[0] == 2 and 'pooler' not in task.frozen['encoder']
  # A student whose last layer is the teacher's second has loss zero against it and not against the third.
  student = dataclasses.replace(TEACHER, num_layers=2)
  for layer, zero in ((2, True), (3, False)):
    config = DistillConfig(teacher_layer=layer, student_init='teacher_layers', init_layers=(1, 2))
    task = make_distill_task(student, TEACHER, teacher_params, config)
    total, _ = held_out(task, fast_jit(task.init)(jax.random.key(0)), batch)['loss']
    assert (abs(total) < 1e-4) == zero


def test_the_teachers_unused_top_is_not_computed(teacher_params, batch):
  def flops(layer):
    task = make_distill_task(STUDENT, TEACHER, teacher_params, DistillConfig(teacher_layer=layer))
    compiled = fast_jit(task.evaluate).lower(encoder_shapes(STUDENT), task.frozen, batch).compile()
    return compiled.cost_analysis()['flops']

  # Layer 1's queries, keys and values need three products; attention, output and feed-forward would be nine more.
  whole = dataclasses.replace(TEACHER, num_layers=1)
  full = fast_jit(lambda p: encode(p, whole, batch.input_ids, batch.attention_mask).last_BTD)
  one_layer = full.lower(encoder_shapes(whole)).compile().cost_analysis()['flops']
  assert 0.9 * one_layer < flops(2) - flops(1) < 1.6 * one_layer


def test_pad_tokens_and_fill_rows_do_not_change_the_loss(teacher_params, batch):
  still = dataclasses.replace(STUDENT, hidden_dropout=0.0, attention_dropout=0.0)
  task = make_distill_task(still, TEACHER, teacher_params, DistillConfig())
  params = random_params(STUDENT)
  grown = jax.tree.map(lambda x: jnp.pad(x, ((0, 2), (0, 6))), batch)
  grown = dataclasses.replace(
    grown,
    attention_mask=grown.attention_mask.at[6:].set(1),
    weights=jnp.asarray([1.0] * 6 + [0.0] * 2),
  )
  (value, metrics), (long_value, long_metrics) = value_of(task, params, batch), value_of(task, params, grown)
  np.testing.assert_allclose(long_value, value, rtol=1e-5)
  assert metrics['weight'] == long_metrics['weight'] == batch.attention_mask.sum()


def test_halves_of_a_batch_weigh_to_the_whole(teacher_params, batch):
  still = dataclasses.replace(STUDENT, hidden_dropout=0.0, attention_dropout=0.0)
  params = random_params(STUDENT)
  for normalize in ('tokens', 'examples'):
    task = make_distill_task(still, TEACHER, teacher_params, DistillConfig(normalize=normalize))
    whole, metrics = value_of(task, params, batch)
    halves = [value_of(task, params, jax.tree.map(lambda x, i=i: x[i : i + 3], batch)) for i in (0, 3)]
    assert metrics['weight'] == sum(m['weight'] for _, m in halves)
    np.testing.assert_allclose(sum(v * m['weight'] for v, m in halves) / metrics['weight'], whole, rtol=1e-5)


def test_start_from_given_parameters_and_from_teacher_layers(teacher_params):
  def word_and_kernel(config, student, start=None):
    task = make_distill_task(student, TEACHER, teacher_params, config, start=start)
    encoder = fast_jit(task.init)(jax.random.key(3))['encoder']
    shapes = jax.tree.map(lambda leaf: leaf.shape, {'encoder': encoder})
    assert shapes == jax.tree.map(lambda leaf: leaf.shape, encoder_shapes(student))
    return encoder['embeddings']['word']['embedding'], encoder['layers']['ffn_in']['kernel']

  word, kernel = (teacher_params['encoder'][part] for part in ('embeddings', 'layers'))
  word, kernel = word['word']['embedding'], kernel['ffn_in']['kernel']
  given = word_and_kernel(DistillConfig(), TEACHER, start=teacher_params)
  np.testing.assert_array_equal(given[0], word)
  chosen = word_and_kernel(DistillConfig(student_init='teacher_layers'), HALF)
  np.testing.assert_array_equal(chosen[0], word)
  np.testing.assert_array_equal(chosen[1], kernel[np.array([1, 3])])
  random = word_and_kernel(DistillConfig(), HALF)
  assert not (random[0] == word).any() and not (random[1] == kernel[:2]).any()


def test_every_parameter_has_one_rule_and_the_pooler_is_held(teacher_params):
  task = make_distill_task(STUDENT, TEACHER, teacher_params, DistillConfig())
  params = random_params(STUDENT)
  tx = make_optimizer(OptimizerConfig(), 10, task.trainable)
  updates = fast_jit(lambda p: tx.update(jax.tree.map(jnp.ones_like, p), tx.init(p), p)[0])(params)
  held = {name for name, update in named_leaves(updates).items() if not np.asarray(update).any()}
  assert held == {'encoder/pooler/kernel', 'encoder/pooler/bias'}


@pytest.mark.parametrize('layers', ['last', 'uniform'])
def test_projections_that_no_relation_names_are_held_in_the_last_layer(teacher_params, layers):
  """Weight decay alone would move them. Mutation: look at `config.layers`, or at no relation."""
  task = make_distill_task(STUDENT, TEACHER, teacher_params, DistillConfig(relations=('qk',), layers=layers))
  params = random_params(STUDENT)
  tx = make_optimizer(OptimizerConfig(weight_decay=0.1, learning_rate=0.1, decay='constant'), 10, task.trainable)
  new = fast_jit(lambda p: optax.apply_updates(p, tx.update(jax.tree.map(jnp.zeros_like, p), tx.init(p), p)[0]))(params)
  before, after = (tree['encoder']['layers']['attention'] for tree in (params, new))
  for name in ('query', 'key', 'value'):
    same = [np.array_equal(*pair) for pair in zip(before[name]['kernel'], after[name]['kernel'], strict=True)]
    assert same == [False, name == 'value']


def test_layer_pairs():
  assert layer_pairs(STUDENT, TEACHER, DistillConfig()) == ((4,), (2,))
  assert layer_pairs(STUDENT, TEACHER, DistillConfig(teacher_layer=3)) == ((3,), (2,))
  assert layer_pairs(STUDENT, TEACHER, DistillConfig(layers='uniform')) == ((2, 4), (1, 2))


@pytest.mark.parametrize(
  ('changes', 'config', 'message'),
  [
    (
      {'num_heads': 3, 'head_size': 4},
      DistillConfig(),
      r'relation_heads: 0 .* 4 and the student 3; set .* divisor of 12',
    ),
    ({}, DistillConfig(relation_heads=5), r'relation_heads: 5 .* use a divisor of 12'),
    ({}, DistillConfig(relation_heads=8), r"relation_heads: 8 does not divide the student's width 12"),
    ({}, DistillConfig(teacher_layer=5), r'teacher_layer: 5 .* use 1 to 4'),
    ({}, DistillConfig(value_loss='mse'), r"value_loss: 'mse' .* 24 .* 12; use 'relation'"),
    ({}, DistillConfig(value_loss='mse', relations=('qk',)), r'value_loss: .* add vv'),
    ({'vocab_size': 41}, DistillConfig(), r'encoder.vocab_size: .* set vocab_size=40'),
    ({}, DistillConfig(student_init='teacher_layers'), r'student_init: .* encoder.hidden_size=24'),
    ({}, DistillConfig(init_layers=(1, 2)), r'init_layers: .* student_init'),
    ({'conv_kernel_size': 3, 'self_attention': False}, DistillConfig(), r'encoder.self_attention: relations compare'),
    ({'num_layers': 5}, DistillConfig(layers='uniform'), r"layers: 'uniform'"),
    ({'causal': True}, DistillConfig(), r'config.encoder.causal: relations'),
  ],
)
def test_what_does_not_fit_is_refused_before_training(changes, config, message):
  with pytest.raises(ConfigError, match=message):
    check_distill(dataclasses.replace(STUDENT, **changes), TEACHER, config)


def test_other_refusals(teacher_params, batch):
  with pytest.raises(ConfigError, match="prepare the data with the teacher's tokenizer"):
    make_distill_task(
      STUDENT, TEACHER, teacher_params, DistillConfig(), student_tokenizer='aaaa', teacher_tokenizer='bbbb'
    )
  with pytest.raises(ConfigError, match='student_init'):
    make_distill_task(HALF, TEACHER, teacher_params, DistillConfig(student_init='teacher_layers'), start=teacher_params)
  with pytest.raises(ConfigError, match='config.teacher.causal: relations'):
    check_distill(STUDENT, dataclasses.replace(TEACHER, causal=True), DistillConfig())
  with pytest.raises(ConfigError, match='conv_kind'):
    mixed = dataclasses.replace(TEACHER, conv_kernel_size=3, num_heads=1)
    check_distill(dataclasses.replace(mixed, conv_kind='dynamic'), mixed, DistillConfig(student_init='teacher_layers'))
  with pytest.raises(ConfigError, match='config.teacher: its weights have 4 layers'):
    make_distill_task(STUDENT, dataclasses.replace(TEACHER, num_layers=3), teacher_params, DistillConfig())
  task = make_distill_task(STUDENT, TEACHER, teacher_params, DistillConfig())
  long = jax.tree.map(lambda x: jnp.pad(x, ((0, 0), (0, 9))), batch)
  with pytest.raises(ConfigError, match='data.seq_len: rows have 19 tokens'):
    task.evaluate(random_params(STUDENT), task.frozen, long)
