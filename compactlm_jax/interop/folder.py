"""Reads a model folder without trusting it: safetensors and JSON only, inside the folder, capped, hashed if listed."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Mapping
from typing import Any

import ml_dtypes
import numpy as np
import safetensors
from etils import epath

from compactlm_jax.errors import DataError
from compactlm_jax.filenames import is_plain
from compactlm_jax.parse import parse_json
from compactlm_jax.storage import require_inside

WEIGHTS, INDEX, MANIFEST = 'model.safetensors', 'model.safetensors.index.json', 'manifest.json'
SPARSE_WEIGHTS, ONNX = 'model.sparse.safetensors', 'model.onnx'
EXPORT_FORMAT = 'compactlm-jax export'
"""Value of 'format' in our manifest.json."""

MAX_JSON_BYTES = 64 << 20
MAX_HEADER_BYTES = 16 << 20
MAX_TOTAL_BYTES = 16 << 30
"""Far above any encoder of this library (BERT-large is 1.4 GB); a file that claims more is refused unread."""

_FOREIGN = ('.bin', '.pt', '.pth', '.pkl', '.pickle', '.ckpt', '.h5', '.msgpack', '.npy', '.npz')
_DTYPES = {
  'F64': np.float64,
  'F32': np.float32,
  'F16': np.float16,
  'BF16': ml_dtypes.bfloat16,
  'I64': np.int64,
  'I32': np.int32,
  'I16': np.int16,
  'I8': np.int8,
  'U8': np.uint8,
  'U16': np.uint16,
  'U32': np.uint32,
  'BOOL': np.bool_,
}


@dataclasses.dataclass(frozen=True)
class Folder:
  """A folder that is being read.

  Attributes:
    path: the folder.
    digests: file name -> SHA-256 from our manifest.json; None where the folder has none.
    folders: names of folders in it that were exported together with it (a discriminator's generator).
  """

  path: epath.Path
  digests: Mapping[str, str] | None = None
  folders: tuple[str, ...] = ()

  def has(self, name: str) -> bool:
    """Whether the folder has this file."""
    return (self.path / name).exists()

  def read(self, name: str, cap: int = MAX_JSON_BYTES) -> bytes:
    """The bytes of one file.

    Raises:
      DataError: it is missing, leads outside the folder, is larger than `cap`, or is not what the manifest lists.
    """
    file = self.path / name
    require_inside(file, self.path)
    try:
      if (size := file.stat().length) > cap:
        raise DataError(f'{file}: {size} bytes, more than the {cap} that are read of such a file')
      data = file.read_bytes()
    except OSError as e:
      raise DataError(f'{file}: cannot be read ({e.strerror or e}); the folder is incomplete') from e
    if self.digests is not None:
      if name not in self.digests:
        raise DataError(f'{file}: not listed in {MANIFEST}; delete {MANIFEST} if you changed the folder on purpose')
      if hashlib.sha256(data).hexdigest() != self.digests[name]:
        raise DataError(
          f'{file}: its SHA-256 is not the one in {MANIFEST}; it is damaged or was changed, copy it again'
        )
    return data

  def read_json(self, name: str) -> dict[str, Any]:
    """One JSON object.

    Raises:
      DataError: as `read`; or not UTF-8, not JSON, not an object.
    """
    try:
      value = parse_json(self.read(name))
    except ValueError as e:
      raise DataError(f'{self.path / name}: not valid JSON ({e})') from e
    if not isinstance(value, dict):
      raise DataError(f'{self.path / name}: expected a JSON object, found {type(value).__name__}')
    return value


def open_folder(path: epath.PathLike) -> Folder:
  """Opens a folder and reads our manifest, if it has one (another program's manifest.json is left alone).

  Raises:
    DataError: no such folder, a damaged manifest of ours, or a file that it lists is missing.
  """
  folder = as_listed(path)
  for name in folder.digests or ():
    if not folder.has(name):
      raise DataError(f'{folder.path / name}: listed in {MANIFEST} but missing; the folder is incomplete')
  return folder


def as_listed(path: epath.PathLike) -> Folder:
  """As `open_folder`, of which files may be missing.

  Raises:
    DataError: no such folder, or a damaged manifest of ours.
  """
  folder = Folder(epath.Path(path))
  if not folder.path.is_dir():
    raise DataError(f'{path}: no such folder')
  if not folder.has(MANIFEST):
    return folder
  manifest = folder.read_json(MANIFEST)
  if manifest.get('format') != EXPORT_FORMAT:
    return folder
  files = manifest.get('files')
  if not isinstance(files, dict):
    raise DataError(f'{folder.path / MANIFEST}: damaged; it lists no files')
  for name, entry in files.items():
    if not isinstance(entry, dict) or not isinstance(entry.get('sha256'), str):
      raise DataError(f'{folder.path / MANIFEST}: damaged; {name!r} has no sha256')
    if not is_plain(name):
      raise DataError(f'{folder.path / MANIFEST}: {name!r} is not a plain file name')
  folders = manifest.get('folders', [])
  if not isinstance(folders, list) or not all(is_plain(name) for name in folders):
    raise DataError(f'{folder.path / MANIFEST}: damaged; folders {folders!r} is not a list of plain names')
  return Folder(folder.path, {name: entry['sha256'] for name, entry in files.items()}, tuple(folders))


def read_tensors(folder: Folder) -> dict[str, np.ndarray]:
  """Every tensor of `model.safetensors`, or of the shards that `model.safetensors.index.json` names.

  Returns:
    Name -> array in its stored dtype.

  Raises:
    DataError: no safetensors, a damaged file, an index that leaves the folder or does not match its shards.
  """
  if folder.has(WEIGHTS):
    return read_tensor_file(folder, WEIGHTS)
  if not folder.has(INDEX):
    raise DataError(_no_weights(folder))
  where = f'{folder.path / INDEX}'
  shard_of = folder.read_json(INDEX).get('weight_map')
  if not isinstance(shard_of, dict) or not shard_of:
    raise DataError(f'{where}: weight_map is missing or empty')
  for name, shard in shard_of.items():
    if not isinstance(shard, str) or not is_plain(shard) or not shard.endswith('.safetensors'):
      raise DataError(
        f'{where}: tensor {name} is said to be in {shard!r}; expected a .safetensors file of this folder; '
        'download the index and its shards again'
      )
  out: dict[str, np.ndarray] = {}
  left = MAX_TOTAL_BYTES
  for shard in sorted(set(shard_of.values())):
    data = folder.read(shard, left)
    left -= len(data)
    for name, array in _parse(data, str(folder.path / shard)).items():
      if shard_of.get(name) != shard:
        raise DataError(f'{folder.path / shard}: holds tensor {name}, which {INDEX} places in {shard_of.get(name)}')
      out[name] = array
  missing = sorted(set(shard_of) - set(out))
  if missing:
    raise DataError(f'{where}: tensor {missing[0]} is not in {shard_of[missing[0]]}; download the shards again')
  return out


def read_tensor_file(folder: Folder, name: str) -> dict[str, np.ndarray]:
  """Every tensor of one safetensors file, in its stored dtype.

  Raises:
    DataError: as `Folder.read`; or a damaged file.
  """
  return _parse(folder.read(name, MAX_TOTAL_BYTES), str(folder.path / name))


def _parse(data: bytes, where: str) -> dict[str, np.ndarray]:
  """Arrays of one safetensors file; offsets, overlaps and sizes are checked by the safetensors library."""
  header = int.from_bytes(data[:8], 'little')
  if len(data) < 8 or header > min(MAX_HEADER_BYTES, len(data) - 8):
    raise DataError(f'{where}: damaged or truncated (header of {header} bytes in a file of {len(data)}); copy it again')
  try:
    tensors = safetensors.deserialize(data)
  except safetensors.SafetensorError as e:
    raise DataError(f'{where}: damaged or truncated ({e}); copy or download it again') from e
  out = {}
  for name, spec in tensors:
    if spec['dtype'] not in _DTYPES:
      raise DataError(f'{where}: tensor {name} has dtype {spec["dtype"]}, expected float32, float16 or bfloat16')
    try:
      out[name] = np.frombuffer(spec['data'], dtype=_DTYPES[spec['dtype']]).reshape(spec['shape'])
    except ValueError as e:  # dimensions that no array has, beside one of 0
      raise DataError(f'{where}: tensor {name} has an impossible shape ({e}); copy or download it again') from e
  return out


def _no_weights(folder: Folder) -> str:
  if folder.has(SPARSE_WEIGHTS):
    return f'{folder.path / SPARSE_WEIGHTS}: config.json does not describe it; it is not the one of this folder'
  if folder.has(ONNX):
    return f'{folder.path / ONNX}: a graph for onnxruntime, not read here; export the run again with --format=hf'
  foreign = sorted(p.name for p in folder.path.iterdir() if p.suffix in _FOREIGN)
  if not foreign:
    return f'{folder.path / WEIGHTS}: missing; the folder holds no weights'
  return (
    f'{folder.path}: weights only as {foreign[0]}, which is never opened because such files can run code. Convert it '
    f"in an environment that you trust, with PyTorch: transformers' {_class_named(folder)}.from_pretrained(folder)"
    '.save_pretrained(new_folder)'
  )


def _class_named(folder: Folder) -> str:
  """The class that config.json names, which reads every head; AutoModel would read the encoder alone."""
  try:
    (name, *_) = folder.read_json('config.json')['architectures']
  except (DataError, LookupError, TypeError, ValueError):
    return 'AutoModel'
  return name if isinstance(name, str) and name.isidentifier() else 'AutoModel'
