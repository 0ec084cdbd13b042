"""The mesh: the same losses on any number of devices, where each parameter lives, what travels between devices."""

import dataclasses
import importlib.util
import math
import pathlib
import re

import jax
import numpy as np
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P
from tiny import ENCODER, moved, place_job, run_steps, tiny_config

from compactlm_jax.config import DataConfig, ElectraConfig, EncoderConfig, MeshConfig, RunConfig, from_config_dict
from compactlm_jax.errors import ConfigError
from compactlm_jax.nn.encoder import encoder_shapes
from compactlm_jax.parallel import (
  PARAM_RULES,
  batch_sharding,
  check_batch_size,
  make_mesh,
  param_shardings,
  state_shardings,
  to_global,
)
from compactlm_jax.tree import match_one, named_leaves
from compactlm_jax.types import TrainState

ROOT = pathlib.Path(__file__).parents[1]
MESHES = {'data 8': (8, 1, 1), 'fsdp 8': (1, 8, 1), 'data 2 x fsdp 4': (2, 4, 1), 'model 2': (1, 1, 2)}
ROWS, LENGTH = 24, 12  # unlike every size of the encoder, so that they are seen in a compiled program
CONFIG = tiny_config('distill', batch_size=ROWS, data=DataConfig(seq_len=LENGTH, eval_rows=24))


def shape(*leaf):
  return jax.ShapeDtypeStruct(leaf, np.float32)


@pytest.fixture(scope='module')
def one_device():
  return run_steps(CONFIG, devices=jax.devices()[:1])[0]


@pytest.mark.parametrize(
  'sizes',
  [
    pytest.param(sizes, id=name, marks=() if name == 'data 2 x fsdp 4' else pytest.mark.slow)
    for name, sizes in MESHES.items()
  ],
)
def test_losses_do_not_depend_on_the_mesh_and_no_rows_travel(sizes, one_device):
  """Ten steps with dropout. Mutation: compile without `in_shardings`; or P('data') for rows."""
  mesh = MeshConfig(*sizes)
  config = dataclasses.replace(CONFIG, mesh=mesh)
  losses, state, _, program = run_steps(config, devices=jax.devices()[: math.prod(sizes)])
  np.testing.assert_allclose(losses, one_device, rtol=1e-5)
  assert len(set(losses)) == 10
  kernel = state.params['encoder']['layers']['attention']['query']['kernel']
  assert kernel.sharding.spec == P(None, 'fsdp', 'model')
  assert kernel.addressable_shards[0].data.size == kernel.size // (mesh.fsdp * mesh.model)
  assert ' all-reduce(' in program
  if mesh.fsdp == 1 == mesh.model:
    assert not moved(program)  # gradients are summed, nothing else
  if mesh.fsdp > 1:
    assert moved(program)  # parameters
  if mesh.model == 1:  # where rows are split, no device ever sees all of them
    whole = [shape for shape in moved(program) if ROWS * LENGTH in shape or {ROWS, LENGTH} <= set(shape)]
    assert not whole, whole


@pytest.mark.parametrize('sizes', [pytest.param((8, 1, 1), marks=pytest.mark.slow), (2, 4, 1)], ids=str)
def test_hidden_tokens_and_samples_do_not_depend_on_the_mesh(sizes):
  """Generator and discriminator with dropout: same losses, same replacements, only sums travel.

  Mutation: a key that depends on the device, or a scatter whose rows must be gathered.
  """
  encoder = dataclasses.replace(ENCODER, architecture='electra')
  config = dataclasses.replace(
    CONFIG, task='electra', encoder=encoder, electra=ElectraConfig(generator_size=0.5, generator_heads=2)
  )
  expected, _, measured, _ = run_steps(config, 4, devices=jax.devices()[:1])
  config = dataclasses.replace(config, mesh=MeshConfig(*sizes))
  losses, _, metrics, program = run_steps(config, 4)
  np.testing.assert_allclose(losses, expected, rtol=1e-5)
  assert float(metrics['replaced_fraction']) == float(measured['replaced_fraction']) > 0
  if sizes[1] == 1:
    assert not moved(program)
  assert not [shape for shape in moved(program) if ROWS * LENGTH in shape or {ROWS, LENGTH} <= set(shape)]


def test_moments_lie_as_their_parameters():
  """Mutation: replicate what is not a parameter."""
  _, _, state, _, _ = place_job(tiny_config('distill', mesh=MeshConfig(1, 4, 2)))
  params, moments = named_leaves(state.params), named_leaves(state.opt_state)
  owned = 0
  for name, leaf in moments.items():
    owner = next((p for p in params if re.search(f'/(mu|nu)/{re.escape(p)}$', name)), None)
    owned += owner is not None
    assert leaf.sharding.spec == (params[owner].sharding.spec if owner else P()), name
    assert leaf.ndim == 0 or owner
  trained = [p for p in params if '/pooler/' not in p]
  assert owned == 2 * len(trained)
  assert state.step.sharding.spec == P()


def test_moments_of_nested_copies_lie_as_their_own_parameter():
  """'generator/classifier/kernel' ends like 'classifier/kernel'. Mutation: take the first owner that fits."""
  params = {
    'classifier': {'kernel': shape(8, 2)},
    'albert': {'classifier': {'kernel': shape(3, 2)}},
  }
  rules = (('classifier/kernel', P('fsdp')), ('albert/.*', P()))
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr('compactlm_jax.parallel.PARAM_RULES', rules)
    placed = state_shardings(make_mesh(MeshConfig(1, 8, 1)), TrainState(shape(), params, {'mu': params}))
  assert placed.opt_state['mu']['classifier']['kernel'].spec == P('fsdp')
  assert placed.opt_state['mu']['albert']['classifier']['kernel'].spec == P()


def published():
  """Encoders of all published runs, and of the architectures that they leave out."""
  path = ROOT / 'configs' / 'minilm.py'
  spec = importlib.util.spec_from_file_location('published_minilm', path)
  minilm = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(minilm)
  found = {name: from_config_dict(RunConfig, minilm.get_config(name)).encoder for name in minilm.VARIANTS}
  small = {'hidden_size': 256, 'embedding_size': 128, 'intermediate_size': 1024}
  return found | {
    'bert-base': EncoderConfig(pooler=True),
    'electra-small': EncoderConfig(architecture='electra', num_heads=4, **small),
    'convbert-small': EncoderConfig.mixed(heads=4, head_ratio=2, **small),
    'convbert-medium-small': EncoderConfig.mixed(
      heads=8, head_ratio=2, num_groups=2, hidden_size=384, embedding_size=128, intermediate_size=1536
    ),
    'convbert-base': EncoderConfig.mixed(heads=12, head_ratio=2, hidden_size=768, pooler=True),
  }


def test_every_parameter_of_every_published_encoder_matches_one_rule():
  """On 8 devices, three ways. Mutation: drop a row of PARAM_RULES, or let two rows overlap."""
  heads = {
    'mlm_head': {'dense': {'kernel': shape(256, 128), 'bias': shape(128)}, 'norm': {'scale': shape(128)},
                 'output_bias': shape(30522)},
    'rtd_head': {'dense': {'kernel': shape(256, 256), 'bias': shape(256)},
                 'output': {'kernel': shape(256, 1), 'bias': shape(1)}},
    'classifier': {'kernel': shape(256, 2), 'bias': shape(2)},
  }  # fmt: skip
  for encoder, name in {encoder: name for name, encoder in published().items()}.items():
    params = {**encoder_shapes(encoder), **heads}
    for leaf in named_leaves(params):
      match_one(PARAM_RULES, leaf, name)
    for sizes in ((1, 8, 1), (1, 4, 2), (2, 2, 2)):
      placed = named_leaves(param_shardings(make_mesh(MeshConfig(*sizes)), params))
      for leaf, struct in named_leaves(params).items():
        assert len(placed[leaf].spec) <= len(struct.shape), f'{name}: {leaf}'
        big = math.prod(struct.shape) > 100_000 and not leaf.endswith('bias')
        assert not big or 'fsdp' in placed[leaf].spec, f'{name}: {leaf} is not sharded'


def test_grouped_kernels_shard_their_matrices():
  """Mutation: no shift for the group axis."""
  grouped = dataclasses.replace(ENCODER, num_groups=2)
  layers = param_shardings(make_mesh(MeshConfig(1, 4, 2)), encoder_shapes(grouped))['encoder']['layers']
  assert layers['ffn_in']['kernel'].spec == P(None, None, 'fsdp', 'model')
  assert layers['ffn_out']['kernel'].spec == P(None, None, 'model', 'fsdp')


def test_an_unknown_parameter_is_refused():
  with pytest.raises(ConfigError, match='parameter encoder/oddity/kernel: no sharding rule matches it'):
    param_shardings(make_mesh(MeshConfig()), {'encoder': {'oddity': {'kernel': shape(2, 2)}}})


@pytest.mark.parametrize(
  ('sizes', 'params', 'message'),
  [
    ((1, 8, 1), {'pooler': {'kernel': shape(12, 12)}}, 'parameter pooler/kernel: .* 12 .* config.mesh.fsdp=8'),
    ((4, 1, 2), {'pooler': {'kernel': shape(6, 5)}}, 'parameter pooler/kernel: .* 5 .* config.mesh.model=2'),
  ],
)
def test_indivisible_sizes_name_parameter_and_axis(sizes, params, message):
  """Mutation: leave the check to jax.device_put."""
  with pytest.raises(ConfigError, match=message):
    param_shardings(make_mesh(MeshConfig(*sizes)), params)


@pytest.mark.parametrize(
  ('sizes', 'expected'),
  [((-1, 1, 1), (8, 1, 1)), ((2, -1, 1), (2, 4, 1)), ((2, 2, 2), (2, 2, 2)), ((1, 1, -1), (1, 1, 8))],
)
def test_mesh_takes_what_is_left(sizes, expected):
  mesh = make_mesh(MeshConfig(*sizes))
  assert tuple(mesh.shape.values()) == expected and tuple(mesh.shape) == ('data', 'fsdp', 'model')


@pytest.mark.parametrize('sizes', [(3, 1, 1), (-1, 3, 1), (16, -1, 1), (2, 2, 1), (4, 4, 1)])
def test_mesh_that_does_not_fit_the_devices_is_refused(sizes):
  """Mutation: round down, and leave devices idle."""
  with pytest.raises(ConfigError, match='config.mesh: .*8 devices') as refused:
    make_mesh(MeshConfig(*sizes))
  assert f'data={sizes[0]}, fsdp={sizes[1]}' in str(refused.value)


def test_axes_are_auto():
  """Linen modules fail under explicit axes, the default of jax.make_mesh. Mutation: drop axis_types."""
  assert make_mesh(MeshConfig()).axis_types == (AxisType.Auto,) * 3


@pytest.mark.parametrize(
  ('batch', 'accumulate', 'sizes', 'message'),
  [
    (12, 1, (8, 1, 1), 'config.batch_size: 12 rows do not divide over 8 devices .*multiple of 8'),
    (12, 1, (2, 4, 1), 'config.batch_size: 12 rows do not divide over 8 devices'),
    (8, 2, (8, 1, 1), 'optimizer.accumulate=2; use a multiple of 16'),
  ],
)
def test_indivisible_batch_is_refused(batch, accumulate, sizes, message):
  """Mutation: look at 'data' only, or forget micro-batches."""
  mesh = make_mesh(MeshConfig(*sizes))
  with pytest.raises(ConfigError, match=message):
    check_batch_size(mesh, batch, accumulate)
  check_batch_size(mesh, 16, accumulate)
  check_batch_size(make_mesh(MeshConfig(1, 1, 8)), 3)  # 'model' does not split rows


def test_rows_are_split_over_data_and_fsdp():
  """Mutation: P('data')."""
  mesh = make_mesh(MeshConfig(2, 2, 2))
  rows = to_global(mesh, {'x': np.arange(16).reshape(8, 2)})['x']
  assert rows.sharding == batch_sharding(mesh) and np.array_equal(rows, np.arange(16).reshape(8, 2))
  assert {s.data.shape for s in rows.addressable_shards} == {(2, 2)}
