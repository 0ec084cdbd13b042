"""Datasets in a bucket, copied to the disk once: rows are read in random order, and each would be a request of its own.

A row takes 2.5 us to read from a disk and some 20 ms from a bucket, so that a step of 256 rows would wait for seconds.
"""

from __future__ import annotations

import hashlib
import logging
from typing import Any

from etils import epath

from compactlm_jax.data import text
from compactlm_jax.data.manifest import FILE, Manifest
from compactlm_jax.errors import DataError
from compactlm_jax.storage import SPARE_BYTES, cache_folder, require_space, whole_file

log = logging.getLogger(__name__)

_BLOCK = 1 << 22


def local_copy(path: Any, manifest: Manifest) -> epath.Path:
  """A dataset on this machine's disk, each file compared with its digest; later calls, and other processes, reuse it.

  Args:
    path: of the dataset, in a bucket.
    manifest: its manifest.

  Returns:
    The folder of the copy.

  Raises:
    DataError: a file is missing, or another one than was written.
    StorageError: the disk is too small.
  """
  remote = epath.Path(path)
  folder = cache_folder('data') / hashlib.sha256(manifest.dumps().encode()).hexdigest()[:32]
  shards = [shard for found in manifest.splits.values() for shard in found]
  wanted = [s for s in shards if not ((folder / s.file).exists() and (folder / s.file).stat().length == s.bytes)]
  folder.mkdir(parents=True, exist_ok=True)
  needed = sum(s.bytes for s in wanted)
  if wanted:
    what = f'{path}: rows are read from a copy on the disk, in {folder}'
    require_space(folder, needed + SPARE_BYTES, what, 'set XDG_CACHE_HOME to a folder on another disk')
    log.info('%s: copying %d files, %.0f MB, to %s', path, len(wanted), needed / 1e6, folder)
  with text.progress_of(needed, 'copy') as on_bytes:
    for shard in wanted:
      if _copy(remote / shard.file, folder / shard.file, on_bytes) != shard.sha256:
        (folder / shard.file).unlink(missing_ok=True)
        raise DataError(f'{remote / shard.file}: its content is not what was written; copy the dataset there again')
  for name in ('features.json', 'dataset_info.json', FILE):  # the last says that the folder is whole
    if not (folder / name).exists():
      _copy(remote / name, folder / name, lambda _: None)
  return folder


def _copy(source: epath.Path, target: epath.Path, on_bytes: text.OnBytes) -> str:
  """Copies a file; SHA-256 of its content."""
  digest = hashlib.sha256()
  try:
    with whole_file(target, shared=True) as local, source.open('rb') as read, local.open('wb') as write:
      while block := read.read(_BLOCK):
        digest.update(block)
        write.write(block)
        on_bytes(len(block))
  except FileNotFoundError as e:
    raise DataError(f'{source}: a file of the dataset is missing; copy the dataset there again') from e
  return digest.hexdigest()
