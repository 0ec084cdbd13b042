"""Tiny training steps of every task, compiled by libtpu for slices that are not here."""

import dataclasses
import functools
import json
import math
import pathlib
import re

import jax
import jax.numpy as jnp
import pytest
from tiny import ENCODER, tiny_config

from compactlm_jax import cli
from compactlm_jax.config import AdaptConfig, DataConfig, DistillConfig, MeshConfig, PruneConfig
from compactlm_jax.parallel import make_mesh
from compactlm_jax.plan.abstract import abstract_step, resolve
from compactlm_jax.plan.compile import QUICK, compile_program, tpu_devices
from compactlm_jax.plan.program import Overflow
from compactlm_jax.plan.topology import parse_topology
from compactlm_jax.tree import named_leaves

pytest.importorskip('libtpu')
pytestmark = pytest.mark.tpu_compile

WHOLE = MeshConfig()
ROWS, LENGTH = 24, 12  # on 8 devices 3 rows; neither is a size of the encoder
CONVBERT = dataclasses.replace(
  ENCODER, architecture='convbert', num_heads=1, head_size=8, conv_kernel_size=3, embedding_size=8, num_layers=1
)
BERT = dataclasses.replace(ENCODER, num_layers=1)
CHANGES = {
  'electra': {'encoder': CONVBERT},
  'mlm': {'encoder': dataclasses.replace(CONVBERT, num_groups=2)},
  'lm': {'encoder': dataclasses.replace(CONVBERT, causal=True)},
  'distill': {'encoder': BERT, 'distill': DistillConfig(relations=('qq', 'vv'), relation_heads=4)},
  'finetune': {'encoder': BERT},
}
ADAPT = {
  'encoder': dataclasses.replace(BERT, num_layers=2),
  'adapt': AdaptConfig(widths=(0.5, 1.0), depths=(0.5, 1.0)),
}
PRUNE = {
  'hard': PruneConfig(initial_density=0.5),
  'l0': PruneConfig(method='l0', regularization=1.0, scores_scale=2.197),
  'soft': PruneConfig(method='soft_movement', regularization=1.0),
  'magnitude': PruneConfig(method='magnitude', initial_density=0.5),
  'controlled': PruneConfig(
    method='soft_movement', control='density', density=0.3, threshold=0.45, scores_learning_rate=0.2, initial_warmup=0
  ),
}


def plan_for(task, rows=ROWS, **changes):
  given = {**CHANGES, 'adapt': ADAPT}[task]
  return resolve(tiny_config(task, batch_size=rows, data=DataConfig(seq_len=LENGTH), **given, **changes))


@functools.cache
def lowered(task, topology='v3-8', rows=ROWS, mesh=WHOLE):
  plan = plan_for(task, rows, mesh=mesh)
  step, arguments = abstract_step(plan, make_mesh(mesh, tpu_devices(parse_topology(topology))))
  return step, arguments


@functools.cache
def program(*args, **kwargs):
  step, arguments = lowered(*args, **kwargs)
  return compile_program(step, *arguments, effort=QUICK)


def entry_parameters(hlo):
  """Shapes of the entry computation's arguments."""
  header = re.search(r'entry_computation_layout=\{\((.*?)\)->', hlo, re.DOTALL)
  return re.findall(r'([a-z]+\d*\[[\d,]*\])', header[1])


@pytest.mark.parametrize(
  'task', [pytest.param(t, marks=() if t in ('electra', 'finetune') else pytest.mark.slow) for t in CHANGES]
)
def test_every_task_compiles_and_reduces_its_gradients_once(task):
  """Rows are split, parameters whole, and nothing but sums travels. Mutation: compile without `in_shardings`."""
  state, frozen, _ = lowered(task)[1]
  found = program(task)
  assert {each.kind for each in found.collectives} == {'all-reduce'}
  trained = named_leaves(state.opt_state.inner_states['train'].inner_state[1].mu)
  count = sum(leaf.size for leaf in trained.values())
  # The compiler sums the gradient of a table that two places read (two towers, look-up and logits) for each of them.
  shared = sum(leaf.size for name, leaf in trained.items() if name.startswith('encoder/embeddings'))
  summed = sum(math.prod(dims) for each in found.collectives for _, dims in each.shapes if dims)
  # The rows are shorter than the position table, and distillation trains one projection of its last layer less.
  assert 0.6 * count <= summed <= count + (shared if task in ('electra', 'mlm', 'lm') else 0)
  given = entry_parameters(found.hlo)
  assert given.count(f's32[{ROWS // 8},{LENGTH}]') >= 2
  for leaf in jax.tree.leaves((state.params, frozen)):
    assert f'f32[{",".join(map(str, leaf.shape))}]' in given
  assert found.peak_bytes < 2**30 and found.flops > 0 and found.costly


@pytest.mark.parametrize(
  'method', [pytest.param(m, marks=() if m in ('hard', 'controlled') else pytest.mark.slow) for m in PRUNE]
)
def test_pruning_sums_the_gradient_of_its_masked_weights_and_no_more(method):
  """Scores get theirs from it on each core; beside it only counts and samples travel, which are integers.

  Mutations: count on slices of |W| instead of on |slices of W|: the compiler cuts |W| and gathers its other use; count
  what lies above the cuts of soft movement on slices once more; control it after the update (both: three layers).
  """
  encoder = dataclasses.replace(BERT, num_layers=3) if 'soft' in PRUNE[method].method else BERT
  plan = resolve(
    tiny_config('prune', batch_size=ROWS, data=DataConfig(seq_len=LENGTH), encoder=encoder, prune=PRUNE[method])
  )
  step, arguments = abstract_step(plan, make_mesh(WHOLE, tpu_devices(parse_topology('v3-8'))))
  found = compile_program(step, *arguments, effort=QUICK)
  leaves = named_leaves(arguments[0].params)
  weights = sum(leaf.size for name, leaf in leaves.items() if not name.startswith(('scores', 'encoder/embeddings')))
  floats = [(each.kind, math.prod(dims)) for each in found.collectives for kind, dims in each.shapes if kind != 's32']
  assert {kind for kind, _ in floats} == {'all-reduce'}
  assert 0.9 * weights <= sum(size for _, size in floats) <= weights + 100


def test_slices_of_parameters_are_gathered_and_rows_are_not():
  """fsdp 8. Mutation: drop `gathered` from the step: rows travel."""
  found, (state, _, _) = (part('finetune', mesh=MeshConfig(data=1, fsdp=8)) for part in (program, abstract_arguments))
  given = entry_parameters(found.hlo)
  word = state.params['encoder']['embeddings']['word']['embedding'].shape
  assert f'f32[{word[0]},{word[1] // 8}]' in given and f'f32[{word[0]},{word[1]}]' not in given
  assert f's32[{ROWS // 8},{LENGTH}]' in given
  gathered = [dims for each in found.collectives if each.kind == 'all-gather' for _, dims in each.shapes]
  assert gathered and not any(LENGTH in dims or ROWS in dims for dims in gathered)


def test_memory_per_core_falls_with_fsdp():
  """To an eighth, if so small arrays were not padded to tiles. Mutations: whole parameters; whole Adam moments."""
  whole, sliced = program('finetune'), program('finetune', mesh=MeshConfig(data=1, fsdp=8))
  assert sliced.memory['arguments'] < 0.4 * whole.memory['arguments']
  assert sliced.memory['aliased'] < 0.4 * whole.memory['aliased']  # what the step updates in place


@pytest.mark.parametrize(
  ('topology', 'task', 'mesh'),
  [
    ('v5p-64', 'finetune', MeshConfig(data=4, fsdp=4, model=2)),
    pytest.param('v3-32', 'distill', MeshConfig(data=4, fsdp=4, model=2), marks=pytest.mark.slow),
    pytest.param('v4-32', 'electra', MeshConfig(data=2, fsdp=4, model=2), marks=pytest.mark.slow),
    pytest.param('v5e-64', 'adapt', MeshConfig(data=8, fsdp=4, model=2), marks=pytest.mark.slow),
  ],
  ids=lambda value: value if isinstance(value, str) else '',
)
def test_slices_and_models_on_larger_topologies(topology, task, mesh):
  """Memory falls, parameters are gathered, their gradients and the sums of `model` reduced; rows stay where they are.

  Mutations: the mesh of one host; gather batches; parameters whole on each core.
  """
  whole, found = (program(task, topology=topology, rows=128, mesh=each) for each in (WHOLE, mesh))
  assert {each.kind for each in whole.collectives} == {'all-reduce'}
  assert found.memory['arguments'] < 0.6 * whole.memory['arguments']
  assert found.memory['aliased'] < 0.6 * whole.memory['aliased']
  kinds = {each.kind for each in found.collectives}
  assert {'all-gather', 'all-reduce'} <= kinds <= {'all-gather', 'all-reduce', 'all-to-all', 'collective-permute'}
  moved = [dims for each in found.collectives for _, dims in each.shapes]
  assert not any(128 in dims for dims in moved)
  assert f's32[{128 // (mesh.data * mesh.fsdp)},{LENGTH}]' in entry_parameters(found.hlo)


@pytest.mark.slow
def test_remat_frees_what_the_forward_pass_keeps():
  """Of unrolled layers too. Mutation: `prevent_cse=False` for those: XLA keeps what it would compute again."""
  sizes = {'hidden_size': 128, 'head_size': 64, 'intermediate_size': 512, 'embedding_size': 128, 'num_layers': 3}

  def temporaries(remat):
    encoder = dataclasses.replace(ENCODER, **sizes, max_positions=128, remat=remat)
    plan = resolve(tiny_config('finetune', batch_size=256, data=DataConfig(seq_len=128), encoder=encoder))
    step, arguments = abstract_step(plan, make_mesh(WHOLE, tpu_devices(parse_topology('v3-8'))))
    return compile_program(step, *arguments, effort=QUICK).memory['temporaries']

  assert temporaries(True) < 0.75 * temporaries(False)


def abstract_arguments(*args, **kwargs):
  return lowered(*args, **kwargs)[1]


def test_a_pod_has_the_same_program_on_each_core():
  """Four times the cores and rows. Mutation: split rows over 'data' of one host only."""
  one, pod = program('finetune'), program('finetune', topology='v3-32', rows=4 * ROWS)
  assert (one.flops, one.memory['arguments']) == (pod.flops, pod.memory['arguments'])
  assert [each.shapes for each in one.collectives] == [each.shapes for each in pod.collectives]
  assert entry_parameters(one.hlo) == entry_parameters(pod.hlo)


def test_the_step_takes_the_path_of_a_tpu():
  """`materialize` is for CPUs. Mutation: lower with lowering_platforms=('cpu',)."""
  step, arguments = lowered('electra')
  assert 'optimization_barrier' not in step.lower(*arguments).as_text()


@pytest.mark.parametrize('name', ['v2-8', 'v3-128', 'v4-8', 'v5e-1', 'v5e-8', 'v5p-8', 'v6e-8', 'v3:4x8'])
def test_libtpu_knows_the_slices(name):
  """Mutation: ask for cores of a v4 instead of chips."""
  topology = parse_topology(name)
  devices = tpu_devices(topology)
  assert len(devices) == topology.devices
  make_mesh(MeshConfig(), devices)


def test_usable_memory_is_what_the_compiler_says():
  """One array larger than it. Mutation: take the chip's memory for the core's."""
  topology = parse_topology('v3-8')
  place = jax.sharding.SingleDeviceSharding(tpu_devices(topology)[0])
  x = jax.ShapeDtypeStruct((17 * 2**18, 1024), jnp.float32, sharding=place)
  found = compile_program(jax.jit(lambda x: x + 1, donate_argnums=0), x)
  assert isinstance(found, Overflow)
  assert found.available == pytest.approx(topology.chip.usable_bytes) and found.needed == pytest.approx(17 * 2**30)


def test_command(tmp_path, monkeypatch, capsys):
  """Table, JSON and program; the second call compiles nothing. Mutation: leave `steps` out of the hours."""
  monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path))
  config = pathlib.Path(__file__).parents[2] / 'configs' / 'tiny.py'
  argv = [
    'plan',
    f'--config={config}:finetune',
    '--topology=v3-8',
    '--config.data.seq_len=16',
    '--config.batch_size=16',
  ]
  argv += ['--config.encoder.num_layers=1', f'--output={tmp_path}/plan.json', f'--hlo={tmp_path}/plan.hlo']
  assert cli.main(argv) == 0
  said = capsys.readouterr()
  found = json.loads((tmp_path / 'plan.json').read_text())
  assert 'compiling for v3-8' in said.err and 'fits             yes' in said.out
  assert found['fits'] and found['batch_size'] == 16 and found['hours'] == pytest.approx(found['step_seconds'] / 60)
  assert (tmp_path / 'plan.hlo').read_text().startswith('HloModule jit_train_step')
  assert cli.main([*argv, '--config.log_every=7']) == 0
  assert 'compiled before' in capsys.readouterr().err
  assert json.loads((tmp_path / 'plan.json').read_text()) == found
