"""Training states of base and large sizes, as shapes on 8 virtual devices: what each of them has to hold."""

import dataclasses
import math

import jax
import pytest
from tiny import tiny_config

from compactlm_jax.config import DataConfig, DistillConfig, EncoderConfig, MeshConfig, PruneConfig
from compactlm_jax.parallel import make_mesh
from compactlm_jax.plan.abstract import abstract_step, resolve
from compactlm_jax.tree import named_leaves

SIZES = {
  'base': EncoderConfig(),
  'large': EncoderConfig(hidden_size=1024, num_layers=24, num_heads=16, intermediate_size=4096),
}
PAIRS = {'architecture': 'electra', 'embedding_size': 768}
TASKS = {
  'electra': PAIRS,
  'mlm': PAIRS,
  'lm': {**PAIRS, 'causal': True},
  'distill': {},
  'finetune': {'pooler': True},
  'prune': {},
  'adapt': {},
}
FIELDS = {
  'distill': {'distill': DistillConfig(relations=('qq', 'kk', 'vv'), relation_heads=16)},
  'prune': {'prune': PruneConfig(initial_density=0.5)},
}


def held(tree):
  """Name -> (bytes of a leaf, bytes of it on one device)."""
  return {
    name: tuple(math.prod(s) * leaf.dtype.itemsize for s in (leaf.shape, leaf.sharding.shard_shape(leaf.shape)))
    for name, leaf in named_leaves(tree).items()
    if not jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key)
  }


@pytest.mark.parametrize('size', SIZES)
@pytest.mark.parametrize('task', TASKS)
def test_a_device_holds_its_share_of_a_training_state(task, size):
  """Parameters, moments, scores, teachers. Mutations: moments by their own names; a rule without an axis."""
  encoder = dataclasses.replace(SIZES[size], **TASKS[task])
  plan = resolve(
    tiny_config(task, encoder=encoder, batch_size=16, data=DataConfig(seq_len=128), **FIELDS.get(task, {}))
  )
  for data, fsdp, model in ((8, 1, 1), (1, 8, 1), (2, 4, 1), (2, 2, 2), (1, 4, 2)):
    mesh = MeshConfig(data=data, fsdp=fsdp, model=model)
    changed = dataclasses.replace(plan, config=dataclasses.replace(plan.config, mesh=mesh))
    state, frozen, _ = abstract_step(changed, make_mesh(mesh))[1]
    leaves = held({'state': state, 'frozen': frozen} if frozen is not None else {'state': state})
    whole, mine = (sum(sizes) for sizes in zip(*leaves.values()))
    # Biases and scales, a thousandth of it all, are everywhere.
    assert mine < whole * (1 / fsdp + 0.005)
    stacked = [sizes for name, sizes in leaves.items() if 'layers' in name and name.endswith('kernel')]
    assert sum(part for _, part in stacked) == sum(all_of for all_of, _ in stacked) / (fsdp * model) > 0
