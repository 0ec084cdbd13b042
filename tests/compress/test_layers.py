"""A student made of teacher layers: which layers, which weights, and what is refused."""

import dataclasses

import jax
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from compactlm_jax.compress.layers import encoder_from_layers, spread_layers, take_layers
from compactlm_jax.config import EncoderConfig
from compactlm_jax.errors import ConfigError
from compactlm_jax.nn.encoder import encode, encoder_shapes, init_encoder

TEACHER = EncoderConfig(vocab_size=20, hidden_size=8, num_layers=6, num_heads=2, max_positions=8, pooler=True)


@pytest.fixture(scope='module')
def teacher_params():
  return init_encoder(TEACHER, jax.random.key(0))


def test_spread_layers_of_the_published_pairs():
  assert spread_layers(3, 6) == (2, 4, 6)
  assert spread_layers(6, 12) == (2, 4, 6, 8, 10, 12)
  assert spread_layers(4, 6) == (2, 3, 5, 6)
  assert spread_layers(5, 5) == (1, 2, 3, 4, 5)


@given(st.integers(1, 30), st.integers(0, 30))
def test_spread_layers_rise_and_end_with_the_last(student, more):
  layers = spread_layers(student, student + more)
  assert len(layers) == student and layers[0] >= 1 and layers[-1] == student + more
  assert all(a < b for a, b in zip(layers, layers[1:]))
  with pytest.raises(ConfigError, match='encoder.num_layers'):
    spread_layers(student + more + 1, student + more)


def test_student_of_the_first_layers_computes_what_the_teacher_computes_there(teacher_params):
  student = dataclasses.replace(TEACHER, num_layers=3)
  params = {'encoder': encoder_from_layers(student, TEACHER, teacher_params['encoder'], (1, 2, 3))}
  ids = np.arange(12).reshape(2, 6)
  full = encode(teacher_params, TEACHER, ids, all_hidden=True)
  part = encode(params, student, ids, all_hidden=True)
  np.testing.assert_allclose(part.hidden_NBTD, full.hidden_NBTD[:4], atol=1e-6)


def test_layers_are_taken_in_the_given_order(teacher_params):
  taken = take_layers(teacher_params['encoder'], (4, 1))
  kernel = teacher_params['encoder']['layers']['ffn_in']['kernel']
  np.testing.assert_array_equal(taken['layers']['ffn_in']['kernel'], np.stack([kernel[3], kernel[0]]))


@pytest.mark.parametrize('pooler', [True, False])
def test_tree_is_the_students_tree(teacher_params, pooler):
  student = dataclasses.replace(TEACHER, num_layers=2, pooler=pooler)
  params = {'encoder': encoder_from_layers(student, TEACHER, teacher_params['encoder'])}
  shapes = jax.tree.map(lambda leaf: leaf.shape, params)
  assert shapes == jax.tree.map(lambda leaf: leaf.shape, encoder_shapes(student))


@pytest.mark.parametrize(
  ('changes', 'layers', 'message'),
  [
    ({'hidden_size': 4, 'head_size': 0, 'intermediate_size': 0, 'embedding_size': 0}, (), 'hidden_size=8'),
    ({'num_layers': 7}, (), 'num_layers'),
    ({'num_layers': 2}, (1, 2, 3), 'init_layers'),
    ({'num_layers': 2}, (0, 3), 'init_layers'),
    ({'num_layers': 2}, (3, 7), 'init_layers'),
    ({'vocab_size': 21}, (), 'vocab_size=20'),
    ({'conv_kernel_size': 3}, (), 'conv_kernel_size=0'),
    ({'heads_per_layer': (2, 2, 2, 2, 2, 1)}, (), 'heads_per_layer'),
  ],
)
def test_what_does_not_fit_is_refused(teacher_params, changes, layers, message):
  student = dataclasses.replace(TEACHER, **changes)
  with pytest.raises(ConfigError, match=message):
    encoder_from_layers(student, TEACHER, teacher_params['encoder'], layers)


def test_layers_outside_the_stack_are_refused(teacher_params):
  for layers in ((0,), (7,), ()):
    with pytest.raises(ConfigError, match='from 1 to 6'):
      take_layers(teacher_params['encoder'], layers)


def test_layers_of_different_sizes_are_refused():
  params = init_encoder(dataclasses.replace(TEACHER, heads_per_layer=(1, 1, 2, 2, 2, 2)), jax.random.key(0))
  with pytest.raises(ConfigError, match='different sizes'):
    take_layers(params['encoder'], (1, 2))
