"""What all processes of a run must have in common: code, libraries, configuration, data, the run directory."""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import pathlib
import platform
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from etils import epath

from compactlm_jax.config import RunConfig, to_json
from compactlm_jax.distributed import check_same, group
from compactlm_jax.errors import CompactLMError, ConfigError, DataError, LockedError, StorageError

_LIBRARIES = ('jax', 'jaxlib', 'libtpu', 'flax', 'optax', 'orbax-checkpoint', 'grain', 'tokenizers', 'numpy')


def agree_on_start(config: RunConfig, flags: Mapping[str, Any]) -> None:
  """Before data are loaded and anything is compiled: the same code, libraries, configuration and flags everywhere.

  Raises:
    ConfigError: on every process; names what differs, and on which processes.
  """
  tree = {**versions(), 'config': to_json(config), 'flag': dict(flags)}
  check_same('code and configuration', dict(flat(tree)))


def agree_on_run(identity: Mapping[str, str]) -> None:
  """Before anything is compiled: the same data, tokenizer and weights everywhere, and equally many devices.

  Raises:
    ConfigError: see `agree_on_start`.
  """
  import jax

  # The number of local devices, because JAX's own exchange between hosts needs equally many.
  if group() is not None:
    check_same('data and devices', {**dict(flat({'identity': identity})), 'devices': jax.local_device_count()})


def share_directory(workdir: epath.Path, token: str) -> None:
  """Checks that every process sees the directory that process 0 has locked.

  Args:
    workdir: the run directory.
    token: what process 0 wrote to its lock.

  Raises:
    ConfigError: on every process, if one of them sees another directory.
  """
  if (all_processes := group()) is None:
    return
  wanted = all_processes.gather('lock', token)[0]
  try:
    seen = json.loads((workdir / 'lock').read_text())['token'] == wanted
  except (OSError, ValueError, KeyError, TypeError):
    seen = False
  blind = [i for i, text in enumerate(all_processes.gather('directory', str(seen))) if text != 'True']
  if blind:
    raise ConfigError(
      f'--workdir: process {", ".join(map(str, blind))} of {all_processes.count} does not see the directory {workdir} '
      'of process 0; name one that all hosts share (a bucket gs://..., or a network disk)'
    )


def on_first_process(action: Callable[[], Any]) -> None:
  """Runs `action` on process 0; if it raises one of our errors, all processes raise."""
  all_processes, failed = group(), None
  if all_processes is None:
    action()
    return
  if all_processes.index == 0:
    try:
      action()
    except CompactLMError as e:
      failed = e
  code, why = json.loads(all_processes.gather('first', json.dumps([failed.exit_code if failed else 0, str(failed)]))[0])
  if failed:
    raise failed
  if code:
    kinds = {c.exit_code: c for c in (ConfigError, DataError, LockedError, StorageError)}
    raise kinds.get(code, CompactLMError)(f'process 0: {why}')


def versions() -> dict[str, Any]:
  """Versions of this package (with a digest of its sources) and of the libraries that make a curve."""
  libraries = {}
  for name in _LIBRARIES:
    try:
      libraries[name] = importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
      continue
  package = pathlib.Path(__file__).parents[1]
  digest = hashlib.sha256()
  for source in sorted(package.rglob('*.py')):
    digest.update(source.relative_to(package).as_posix().encode() + b'\0' + source.read_bytes())
  try:
    version = importlib.metadata.version('compactlm-jax')
  except importlib.metadata.PackageNotFoundError:
    version = 'not installed'
  return {
    'code': {'version': version, 'sources': digest.hexdigest()[:16]},
    'libraries': {'python': platform.python_version(), **libraries},
  }


def flat(tree: Mapping[str, Any], prefix: str = '') -> Iterator[tuple[str, Any]]:
  """('optimizer.learning_rate', value) for every leaf of nested dicts."""
  for name, value in tree.items():
    if isinstance(value, Mapping):
      yield from flat(value, f'{prefix}{name}.')
    else:
      yield prefix + name, value
