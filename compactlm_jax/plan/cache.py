"""Programs that were compiled before: a compilation takes minutes, reading its result milliseconds."""

from __future__ import annotations

import dataclasses
import gzip
import hashlib
import importlib.metadata
import json
import logging
import os
import pathlib
from collections.abc import Mapping
from typing import Any

from compactlm_jax import storage
from compactlm_jax.parse import json_digest
from compactlm_jax.plan.program import Collective, Overflow, Program

log = logging.getLogger(__name__)

_LIBRARIES = ('jax', 'jaxlib', 'libtpu', 'flax', 'optax')
_ENVIRONMENT = ('XLA_FLAGS', 'LIBTPU_INIT_ARGS', 'JAX_DEFAULT_MATMUL_PRECISION')


def cache_folder() -> pathlib.Path:
  """Where results are kept; see `storage.cache_folder`."""
  return pathlib.Path(storage.cache_folder('plan'))


def versions() -> dict[str, str]:
  """Library -> version, of those that decide the program."""
  found = {}
  for name in _LIBRARIES:
    try:
      found[name] = importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
      found[name] = 'absent'
  return found


def cache_key(config: Mapping[str, Any], topology: str, **more: Any) -> str:
  """SHA-256 (hex) of everything that decides a program.

  Args:
    config: the resolved configuration as plain values.
    topology: name of the slice as libtpu knows it.
    more: further plain values (the teacher, the effort of the compiler).
  """
  package = pathlib.Path(__file__).parents[1]
  sources = hashlib.sha256()
  for file in sorted(package.rglob('*.py')):
    sources.update(file.relative_to(package).as_posix().encode() + b'\0' + file.read_bytes() + b'\0')
  content = {
    'config': config,
    'topology': topology,
    'versions': versions(),
    'environment': {name: os.environ.get(name, '') for name in _ENVIRONMENT},
    'sources': sources.hexdigest(),
    **more,
  }
  return json_digest(content)


def load(key: str) -> Program | Overflow | None:
  """What was kept under a key; None if there is nothing, or nothing readable."""
  path = cache_folder() / key
  try:
    raw = json.loads(path.with_suffix('.json').read_text())
    if 'needed' in raw:
      return Overflow(**raw)
    raw['collectives'] = tuple(
      Collective(kind, tuple((dtype, tuple(dims)) for dtype, dims in shapes)) for kind, shapes in raw['collectives']
    )
    raw['costly'] = tuple(tuple(part) for part in raw['costly'])
    return Program(**raw, hlo=gzip.decompress(path.with_suffix('.hlo.gz').read_bytes()).decode())
  except FileNotFoundError:
    return None
  except (OSError, ValueError, TypeError, KeyError, EOFError) as e:
    log.warning('%s: ignored, it cannot be read (%s)', path.with_suffix('.json'), e)
    return None


def save(key: str, result: Program | Overflow) -> None:
  """Keeps a result; a disk that cannot take it is only a pity."""
  path = cache_folder() / key
  raw = dataclasses.asdict(result)
  hlo = raw.pop('hlo', None)
  if isinstance(result, Program):
    raw['collectives'] = [(each.kind, each.shapes) for each in result.collectives]
  try:
    path.parent.mkdir(parents=True, exist_ok=True)
    if hlo is not None:
      _replace(path.with_suffix('.hlo.gz'), gzip.compress(hlo.encode(), 5, mtime=0))
    _replace(path.with_suffix('.json'), json.dumps(raw).encode())
  except OSError as e:
    log.warning('%s: the result is not kept (%s)', path.parent, e.strerror or e)


def _replace(path: pathlib.Path, content: bytes) -> None:
  with storage.whole_file(path, shared=True) as draft:
    draft.write_bytes(content)
