"""The device mesh, and where each array lives on it.

Axes: 'data' (rows; parameters replicated), 'fsdp' (rows; parameters and moments stored in slices and gathered for each
step), 'model' (hidden dimensions).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from compactlm_jax.config import MeshConfig
from compactlm_jax.errors import ConfigError
from compactlm_jax.tree import map_named, match_one, named_leaves
from compactlm_jax.types import Batch

AXES = ('data', 'fsdp', 'model')

# Matrices that read the residual stream shard their outputs over 'model', those that write to it their inputs.
_READS = r'attention/(query|key|value|conv/pointwise|conv/value)|ffn_in'
_WRITES = r'attention/output|ffn_out'

_STACK = r'(?!control/).*layers(_\d+)?'  # one stack for all layers, or one for each run of layers of equal sizes

PARAM_RULES: tuple[tuple[str, P], ...] = (
  (r'.*embeddings/(word|position|token_type)/embedding', P(None, 'fsdp')),
  (r'.*embeddings/projection/kernel', P('fsdp', 'model')),
  (rf'{_STACK}/({_READS})/kernel', P(None, 'fsdp', 'model')),
  (rf'{_STACK}/({_WRITES})/kernel', P(None, 'model', 'fsdp')),
  (rf'{_STACK}/attention/conv/depthwise/kernel', P(None, None, 'fsdp')),
  (rf'{_STACK}/attention/conv/taps/kernel', P(None, 'fsdp', None)),
  (r'.*(pooler|(mlm|rtd)_head/dense)/kernel', P('fsdp', 'model')),
  (r'(.*/)?(classifier|rtd_head/output)/kernel', P('fsdp', None)),
  (r'(.*/)?span/(end|answerable)_hidden/kernel', P('fsdp', 'model')),
  (r'(.*/)?span/((start|(end|answerable)_output)/)?kernel', P('fsdp', None)),
  (r'(?!control/).*/(bias|scale|output_bias)', P()),
  (r'scores/.*/(heads|neurons|blocks)', P()),
  (r'control/.*', P()),
)
"""(regex over parameter names, placement). A name that matches no row, or two, is an error."""


def make_mesh(config: MeshConfig, devices: list[jax.Device] | None = None) -> Mesh:
  """A mesh over all devices.

  Args:
    config: devices along each axis; -1 takes what is left.
    devices: defaults to all devices of all processes.

  Raises:
    ConfigError: the product of the axes is not the number of devices.
  """
  devices = jax.devices() if devices is None else devices
  sizes = [config.data, config.fsdp, config.model]
  if -1 in sizes:
    fixed = -math.prod(sizes)
    sizes[sizes.index(-1)] = len(devices) // fixed
  if math.prod(sizes) != len(devices):
    raise ConfigError(
      f'config.mesh: data={config.data}, fsdp={config.fsdp}, model={config.model} do not multiply to the '
      f'{len(devices)} devices that are here; set one of them to -1'
    )
  # Linen modules know nothing of mesh axes: the compiler propagates the placement (Auto), jax.make_mesh's default
  # of explicit axes would reject them.
  return jax.make_mesh(tuple(sizes), AXES, axis_types=(AxisType.Auto,) * len(AXES), devices=devices)


def param_shardings(mesh: Mesh, params: Any) -> Any:
  """The placement of each parameter, by `PARAM_RULES`.

  Args:
    mesh: from `make_mesh`.
    params: arrays or ShapeDtypeStructs.

  Raises:
    ConfigError: a dimension does not divide by its mesh axis; the message names both.
  """

  def place(name: str, leaf: Any) -> NamedSharding:
    spec = match_one(PARAM_RULES, name, 'sharding')
    if len(leaf.shape) == 4:  # grouped kernels carry one more axis before the matrix
      spec = P(None, *spec)
    for size, axis in zip(leaf.shape, spec):
      if axis is not None and size % mesh.shape[axis]:
        raise ConfigError(
          f'parameter {name}: a dimension of {size} does not divide over config.mesh.{axis}={mesh.shape[axis]}; '
          f'choose a mesh whose {axis} axis divides it'
        )
    return NamedSharding(mesh, spec)

  return map_named(place, params)


def gathered(mesh: Mesh, params: Any) -> Any:
  """`params` (traced) in one piece over 'fsdp' while a step reads them.

  Left to itself, the compiler also brings rows to slices of parameters (seen with XLA's CPU and embedding tables, and
  with the products inside a scan over layers): for encoders activations are far larger than parameters.
  """
  if mesh.shape['fsdp'] == 1:
    return params

  def whole(placed: NamedSharding) -> NamedSharding:
    return NamedSharding(mesh, P(*(None if axis == 'fsdp' else axis for axis in placed.spec)))

  return jax.lax.with_sharding_constraint(params, jax.tree.map(whole, param_shardings(mesh, params)))


def spread_out(mesh: Mesh, params: Any) -> Any:
  """`params` (traced) in equal slices over all devices, as far as sizes divide.

  Cutting what every device holds takes no traffic.

  Args:
    mesh: from `make_mesh`.
    params: a tree whose names `PARAM_RULES` knows.
  """

  def slices(leaf: Any, placed: NamedSharding) -> NamedSharding:
    spec = [*placed.spec, *(None,) * (leaf.ndim - len(placed.spec))]
    free = [axis for axis in ('fsdp', 'data') if axis not in spec and mesh.shape[axis] > 1]
    for axis in free:
      for dim, size in enumerate(leaf.shape):
        taken = () if spec[dim] is None else spec[dim] if isinstance(spec[dim], tuple) else (spec[dim],)
        if leaf.ndim > 1 and dim > 0 and size % math.prod(mesh.shape[each] for each in (*taken, axis)) == 0:
          spec[dim] = (*taken, axis)
          break
    return NamedSharding(mesh, P(*spec))

  return jax.lax.with_sharding_constraint(params, jax.tree.map(slices, params, param_shardings(mesh, params)))


def state_shardings(mesh: Mesh, state: Any) -> Any:
  """The placement of a whole TrainState: moments lie as the parameters that they belong to, scalars everywhere."""
  placed = named_leaves(param_shardings(mesh, state.params))

  def place(name: str, leaf: Any) -> NamedSharding:
    # The longest: 'generator/encoder/...' ends as 'encoder/...' does.
    owner = max((p for p in placed if name.endswith('/' + p)), key=len, default='') if leaf.shape else ''
    return placed[owner] if owner else NamedSharding(mesh, P())

  return map_named(place, state)


def host_copies(leaves: Mapping[str, jax.Array]) -> dict[str, np.ndarray]:
  """Whole leaves, on process 0 only. On CPU these are views; JAX does not reuse a buffer that a view holds."""
  for x in leaves.values():
    if x.is_fully_addressable and jax.process_index() == 0:
      x.copy_to_host_async()
  out = {}
  for name, x in leaves.items():
    if not (x.is_fully_addressable or x.is_fully_replicated):
      x = jax.jit(lambda a: a, out_shardings=NamedSharding(x.sharding.mesh, P()))(x)  # type: ignore[attr-defined]
    if jax.process_index() == 0:
      out[name] = np.asarray(x if x.is_fully_addressable else x.addressable_data(0))
  return out


def place_leaf(host: np.ndarray, like: Any) -> jax.Array:
  """A whole leaf, placed as `like` (a jax.ShapeDtypeStruct) says; without a sharding on the default device."""
  if getattr(like, 'sharding', None) is None:
    return jnp.asarray(host)
  return jax.make_array_from_callback(host.shape, like.sharding, lambda index: host[index])


def replicated(mesh: Mesh) -> NamedSharding:
  """The same value on every device."""
  return NamedSharding(mesh, P())


def batch_sharding(mesh: Mesh) -> NamedSharding:
  """Rows split over 'data' and 'fsdp'."""
  return NamedSharding(mesh, P(('data', 'fsdp')))


def check_batch_size(mesh: Mesh, batch_size: int, accumulate: int = 1) -> None:
  """Raises ConfigError unless each micro-batch divides over the devices that split rows."""
  ways = mesh.shape['data'] * mesh.shape['fsdp']
  if batch_size % (ways * accumulate):
    raise ConfigError(
      f'config.batch_size: {batch_size} rows do not divide over {ways} devices (mesh data x fsdp)'
      + (f' and optimizer.accumulate={accumulate}' if accumulate > 1 else '')
      + f'; use a multiple of {ways * accumulate}'
    )


def host_rows(mesh: Mesh, batch_size: int) -> np.ndarray:
  """Which rows of a global batch this host's devices hold, ascending, int64.

  Hosts share rows if their devices differ along 'model' alone, and those of one host need not be neighbours: JAX
  orders the devices of a mesh by how they are wired.

  Args:
    mesh: from `make_mesh`.
    batch_size: rows over all hosts.
  """
  check_batch_size(mesh, batch_size)
  blocks = _blocks(mesh)
  share = batch_size // (mesh.shape['data'] * mesh.shape['fsdp'])
  return (blocks[:, None] * share + np.arange(share)).reshape(-1)


def _blocks(mesh: Mesh) -> np.ndarray:
  """The blocks of rows, of one for each device along 'data' and 'fsdp', that this host's devices hold."""
  mine = np.vectorize(lambda device: device.process_index == jax.process_index(), otypes=[bool])(mesh.devices)
  return np.flatnonzero(mine.reshape(-1, mesh.shape['model']).any(axis=1))


def to_global(mesh: Mesh, batch: Batch) -> Batch:
  """This host's rows of the global batch as arrays that all hosts share.

  Args:
    mesh: from `make_mesh`.
    batch: NumPy arrays with this host's rows, those of `host_rows`.
  """
  sharding, blocks = batch_sharding(mesh), _blocks(mesh)
  ways = mesh.shape['data'] * mesh.shape['fsdp']

  def place(rows: Any) -> jax.Array:
    rows = np.asarray(rows)
    if len(blocks) == ways:
      return jax.make_array_from_process_local_data(sharding, rows)
    share = len(rows) // len(blocks)

    def block(index: Any) -> np.ndarray:
      first = int(np.searchsorted(blocks, (index[0].start or 0) // share)) * share
      return rows[first : first + share]

    return jax.make_array_from_callback((share * ways, *rows.shape[1:]), sharding, block)

  return jax.tree.map(place, batch)


def all_processes(flag: bool) -> bool:
  """True if `flag` is true on every process; all must ask."""
  return flag if jax.process_count() == 1 else bool(multihost_utils.process_allgather(np.asarray(flag)).all())


def barrier(name: str) -> None:
  """Waits until all processes have come here."""
  if jax.process_count() > 1:
    multihost_utils.sync_global_devices(name)
