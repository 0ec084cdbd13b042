"""Encoders whose layers differ in heads and neurons: configuration, parameters, the forward pass, FLOPs."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P
from ragged import ENCODERS, IDS, MASK, assert_same, dense, masked, masks_of, random_tree, run

from compactlm_jax.compress.shrink import padded, shrink
from compactlm_jax.config import EncoderConfig, MeshConfig, from_config_dict, runs, stack_names, to_json
from compactlm_jax.errors import ConfigError
from compactlm_jax.nn.encoder import encode, encoder_shapes
from compactlm_jax.nn.flops import encoder_flops
from compactlm_jax.parallel import make_mesh, param_shardings
from compactlm_jax.tree import named_leaves

BERT = ENCODERS['bert']
RAGGED = dataclasses.replace(BERT, heads_per_layer=(2, 2, 0), neurons_per_layer=(3, 3, 0), scan_unroll=0)


def test_runs_are_consecutive_layers_of_equal_sizes():
  config = dataclasses.replace(BERT, num_layers=5, heads_per_layer=(4, 4, 4, 0, 4), neurons_per_layer=(6, 6, 5, 5, 6))
  found = [(start, stop, run.num_layers, run.num_heads, run.intermediate_size) for start, stop, run in runs(config)]
  assert found == [(0, 2, 2, 4, 6), (2, 3, 1, 4, 5), (3, 4, 1, 0, 5), (4, 5, 1, 4, 6)]
  assert stack_names(config) == ('layers_0', 'layers_1', 'layers_2', 'layers_3')
  assert runs(config)[0][2] == dataclasses.replace(BERT, num_layers=2)
  assert runs(BERT) == ((0, 3, BERT),) and stack_names(BERT) == ('layers',) and not BERT.ragged
  for _, _, part in runs(config):  # a run's configuration can be changed and stays one run
    assert runs(dataclasses.replace(part, hidden_dropout=0.0))[0][2].num_heads == part.num_heads
    assert len(runs(part)) == 1


def test_one_list_is_enough():
  config = dataclasses.replace(BERT, neurons_per_layer=(1, 2, 2))
  sizes = [(run.num_heads, run.intermediate_size) for _, _, run in runs(config)]
  assert sizes == [(4, 1), (4, 2)]


def test_a_configuration_survives_json():
  assert from_config_dict(EncoderConfig, to_json(RAGGED)) == RAGGED
  assert from_config_dict(EncoderConfig, {**to_json(RAGGED), 'heads_per_layer': [2, 2, 0]}) == RAGGED


@pytest.mark.parametrize(
  ('changes', 'message'),
  [
    ({'heads_per_layer': (1, 2)}, r'heads_per_layer: \(1, 2\) has 2 entries; name one for each of the 3 layers'),
    ({'heads_per_layer': (1, 5, 2)}, 'heads_per_layer: 5 in layer 2 is not between 0 and 4'),
    ({'neurons_per_layer': (1, -1, 2)}, 'neurons_per_layer: -1 in layer 2 is not between 0 and 6'),
    ({'neurons_per_layer': (2, 3, 2), 'num_groups': 2}, 'neurons_per_layer: 3 in layer 2 .* num_groups 2'),
    ({'num_heads': 0}, 'num_heads: 0 must be at least 1'),
    ({'num_heads': 0, 'head_size': 0, 'heads_per_layer': (0, 0, 0)}, 'num_heads: 0 must be at least 1'),
  ],
)
def test_wrong_lists_are_refused_by_field(changes, message):
  with pytest.raises(ConfigError, match='config.encoder.' + message):
    dataclasses.replace(BERT, **changes)


def test_each_run_is_a_stack_and_what_was_lost_has_no_parameters():
  shapes = {name: leaf.shape for name, leaf in named_leaves(encoder_shapes(RAGGED)).items() if '/layers' in name}
  assert shapes['encoder/layers_0/attention/query/kernel'] == (2, 8, 4)
  assert shapes['encoder/layers_0/attention/output/kernel'] == (2, 4, 8)
  assert shapes['encoder/layers_0/ffn_out/kernel'] == (2, 3, 8)
  last = {name.removeprefix('encoder/layers_1/') for name in shapes if 'layers_1' in name}
  norms = {f'{norm}_norm/{leaf}' for norm in ('attention', 'ffn') for leaf in ('scale', 'bias')}
  assert last == norms | {'attention/output/bias', 'ffn_out/bias'}


@pytest.mark.parametrize('name', ['bert', 'convbert grouped'])
def test_cuts_of_a_ragged_stack_change_nothing(name):
  """Every hidden state and q, k, v with the stack cut inside and between runs.

  Mutation: cut a run by the numbers of its layers in the model.
  """
  config, params = dense(name)
  kept, size = config.num_heads // 2, config.head_size
  baked = masked(params, config, masks_of(config, (0, kept, kept), (2, 3, 3)))
  small, smaller = shrink(baked, config)
  out = run(small, smaller, IDS, MASK, all_hidden=True, qkv_layers=(3, 1))
  reference = run(baked, config, IDS, MASK, all_hidden=True, qkv_layers=(3, 1))
  assert_same([out.hidden_NBTD, out.last_BTD], [reference.hidden_NBTD, reference.last_BTD])
  assert out.qkv[1].k_BTHK.shape == (3, 7, 0, size)
  for part in ('q_BTHK', 'k_BTHK', 'v_BTHK'):
    np.testing.assert_allclose(getattr(out.qkv[0], part), getattr(reference.qkv[0], part)[:, :, :kept], atol=1e-5)
  if name == 'bert':
    below = run(small, smaller, IDS, MASK, qkv_layers=(2,), skip_above=True)
    np.testing.assert_allclose(below.last_BTD, reference.hidden_NBTD[2], atol=1e-5)


def test_dropout_of_hidden_states_is_that_of_the_padded_model():
  """The same places drop out whether zeros are there or not. Mutation: number the places by run."""
  config = dataclasses.replace(BERT, heads_per_layer=(2, 2, 0), neurons_per_layer=(3, 3, 0), attention_dropout=0.0)
  params = random_tree(config)
  wide, stock = padded(params, config)
  for seed in (3, 4):
    key = jax.random.key(seed)
    out, reference = (run(p, c, IDS, MASK, dropout_key=key).last_BTD for p, c in ((params, config), (wide, stock)))
    np.testing.assert_allclose(out, reference, atol=1e-5)
  assert np.abs(out - run(params, config, IDS, MASK, dropout_key=jax.random.key(3)).last_BTD).max() > 0.1


def test_a_ragged_encoder_trains_in_every_mode():
  """bfloat16, remat and causal attention run, and every parameter gets a gradient."""
  config = dataclasses.replace(RAGGED, dtype='bfloat16', remat=True, causal=True)
  params = random_tree(config)

  def loss(p):
    return jnp.square(encode(p, config, IDS, MASK, dropout_key=jax.random.key(0)).pooled_BD.astype(jnp.float32)).sum()

  grads = named_leaves(jax.jit(jax.grad(loss))(params))
  assert all(np.isfinite(g).all() for g in grads.values())
  still = [name for name, g in grads.items() if not np.abs(g).max() > 0]
  assert still in ([], ['encoder/layers_0/attention/key/bias'])  # a bias of all keys alike cancels in the softmax


def test_flops_follow_the_layers():
  """A zero layer costs nothing, and the sum is that of its runs. Mutation: multiply the stock layer by the depth."""
  stock = encoder_flops(BERT, 16)
  config = dataclasses.replace(BERT, heads_per_layer=(4, 0, 0), neurons_per_layer=(6, 0, 0))
  assert encoder_flops(config, 16) == pytest.approx(stock / 3)
  conv, _ = dense('convbert')
  none = dataclasses.replace(conv, heads_per_layer=(0, 0, 0), neurons_per_layer=(0, 0, 0))
  assert encoder_flops(none, 16) == 2 * conv.embedding_size * conv.hidden_size


def test_parameters_of_runs_scores_and_control_have_a_place_on_the_mesh():
  """Mutation: rules for 'layers/' alone."""
  mesh = make_mesh(MeshConfig(data=2, fsdp=2, model=2))
  config = dataclasses.replace(RAGGED, heads_per_layer=(2, 2, 2), neurons_per_layer=(4, 4, 2))
  tree = {
    **encoder_shapes(config),
    'scores': {
      'encoder': {'layers_0': {'neurons': jnp.zeros((2, 4)), 'attention': {'heads': jnp.zeros((2, 2))}}},
      'generator': {'layers': {'ffn_in': {'blocks': jnp.zeros((2, 4, 4)), 'kernel': jnp.zeros((2, 4, 4))}}},
    },
    'control': {'threshold': jnp.zeros(()), 'encoder': {'layers': {'ffn_in': {'kernel': jnp.zeros(3)}}}},
  }
  placed = {name: s.spec for name, s in named_leaves(param_shardings(mesh, tree)).items()}
  assert placed['encoder/layers_1/attention/query/kernel'] == P(None, 'fsdp', 'model')
  assert placed['encoder/layers_1/ffn_out/kernel'] == P(None, 'model', 'fsdp')
  assert placed['scores/generator/layers/ffn_in/kernel'] == P(None, 'fsdp', 'model')
  replicated = [name for name in placed if name.endswith(('heads', 'neurons', 'blocks')) or name.startswith('control')]
  assert len(replicated) == 5 and all(placed[name] == P() for name in replicated)
