"""States, restores and damage that the tests of checkpoints share."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from compactlm_jax.checkpoint import Checkpoints
from compactlm_jax.types import TrainState

METADATA = {'task': 'test', 'model': {'hidden_size': 8}, 'identity': {'tokenizer': 'aaaa'}}


def make_state(step, scale=1.0):
  """A state that is a function of the step: fp32, bf16, int32 leaves, with AdamW's moments.

  The kernel has more than 1 kB, so that Orbax stores it as it is and not in a compressed, checksummed index node.
  """
  params = {
    'encoder': {
      'kernel': jnp.arange(1024.0).reshape(32, 32) * scale + step,
      'half': jnp.full((4,), step, jnp.bfloat16),
    },
    'classifier': {'bias': jnp.full((3,), step / 7)},
  }
  state = optax.adamw(1e-3).init(params)
  return TrainState(jnp.int32(step), params, jax.tree.map(lambda x: x + step, state))


def mesh_of(n):
  return jax.make_mesh((n,), ('fsdp',), axis_types=(AxisType.Auto,), devices=jax.devices()[:n])


def place(state, n):
  """The state on n devices, matrices sharded."""
  mesh = mesh_of(n)
  return jax.tree.map(lambda x: jax.device_put(x, NamedSharding(mesh, P('fsdp') if x.ndim == 2 else P())), state)


def abstract(state):
  return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state)


def equal(a, b):
  """Same structure, dtypes and bits."""
  same = lambda x, y: x.dtype == y.dtype and np.asarray(x).tobytes() == np.asarray(y).tobytes()  # noqa: E731
  return jax.tree.structure(a) == jax.tree.structure(b) and all(jax.tree.leaves(jax.tree.map(same, a, b)))


def write(directory, steps, **kwargs):
  with Checkpoints(directory, 9, **kwargs) as checkpoints:
    for step in steps:
      checkpoints.save(step, make_state(step), METADATA)


def restore(directory, like=None, step=None, **kwargs):
  with Checkpoints(directory, 9, **kwargs) as checkpoints:
    return checkpoints.restore(abstract(like or make_state(0)), step)


def snapshot(directory):
  return {p.relative_to(directory): p.read_bytes() for p in directory.rglob('*') if p.is_file()}


def flip_weight(directory, step):
  """Flips one bit in the bytes of params/encoder/kernel, wherever Orbax keeps them."""
  wanted = np.asarray(make_state(step).params['encoder']['kernel']).tobytes()
  hits = 0
  for path in (directory / str(step)).rglob('*'):
    data = bytearray(path.read_bytes()) if path.is_file() else bytearray()
    at = data.find(wanted)
    if at >= 0:
      data[at + 101] ^= 64
      path.write_bytes(data)
      hits += 1
  assert hits, 'weights not found on disk'
