"""Writes an export folder so that it appears whole or not at all."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence

from etils import epath

from compactlm_jax.errors import ConfigError, DataError, StorageError
from compactlm_jax.interop.folder import EXPORT_FORMAT, MANIFEST, as_listed
from compactlm_jax.storage import is_remote


def json_bytes(value: object) -> bytes:
  """Canonical JSON: the same value gives the same bytes."""
  return (json.dumps(value, indent=2, sort_keys=True, allow_nan=False) + '\n').encode()


def write_export(
  files: Mapping[str, bytes], folder: epath.PathLike, inside: Mapping[str, Mapping[str, bytes]] | None = None
) -> None:
  """Writes the files and a manifest with their SHA-256 into a temporary folder beside `folder`, then renames it.

  An earlier export is replaced, with the exports that its manifest says were written inside it. A bucket has no
  renames: there manifests come first, so that readers refuse the folder until all that they list is there.

  Args:
    files: name -> content.
    folder: where to.
    inside: name of a folder in `folder` -> files of an export of its own there; all appear together.

  Raises:
    ConfigError: `folder` holds something that is not an export.
    StorageError: the disk is full or not writable.
  """
  target, inside = epath.Path(folder), inside or {}
  content: dict[str, bytes] = {}
  for name, own in inside.items():
    content |= {f'{name}/{file}': data for file, data in _with_manifest(own).items()}
  content |= _with_manifest(files, tuple(inside))
  try:
    (_overwrite if is_remote(target) else _swap)(content, target)
  except OSError as e:
    left = 'what is there is not whole, export again' if is_remote(target) else 'nothing was left there'
    raise StorageError(f'{target}: the export could not be written ({e.strerror or e}); {left}') from e


def _with_manifest(files: Mapping[str, bytes], folders: Sequence[str] = ()) -> dict[str, bytes]:
  listed = {n: {'bytes': len(d), 'sha256': hashlib.sha256(d).hexdigest()} for n, d in sorted(files.items())}
  manifest = {'format': EXPORT_FORMAT, 'version': 1, 'files': listed}
  return {**files, MANIFEST: json_bytes(manifest | ({'folders': sorted(folders)} if folders else {}))}


def _swap(content: Mapping[str, bytes], target: epath.Path) -> None:
  """Fixed names beside the target, so that the next export removes what a killed one left."""
  new, old = (target.parent / f'.{target.name}.{suffix}' for suffix in ('new', 'old'))
  if old.exists() and not target.exists():
    old.rename(target)  # killed between the two renames below
  _earlier_files(target)  # or an error
  for leftover in (new, old):
    if leftover.exists():
      leftover.rmtree()
  try:
    _write(content, new)
  except OSError:
    new.rmtree(missing_ok=True)
    raise
  if target.exists():
    target.rename(old)
  new.rename(target)
  if old.exists():
    old.rmtree()


def _overwrite(content: Mapping[str, bytes], target: epath.Path) -> None:
  """A killed one leaves files that are missing or have other digests than a manifest lists; the next replaces them."""
  for name in _earlier_files(target) - set(content):
    (target / name).unlink(missing_ok=True)
  manifests = sorted((name for name in content if name.endswith(MANIFEST)), key=len)  # the one of all folders first
  _write({**{name: content[name] for name in manifests}, **content}, target)


def _write(content: Mapping[str, bytes], folder: epath.Path) -> None:
  folder.mkdir(parents=True, exist_ok=True)
  for name, data in content.items():
    if '/' in name:
      (folder / name).parent.mkdir(exist_ok=True)
    (folder / name).write_bytes(data)


def _earlier_files(target: epath.Path) -> set[str]:
  """Paths of the files that the manifests of the export there list, with those in its folders; none of an empty folder.

  Raises:
    ConfigError: it is no folder, or holds something that no export wrote.
  """
  if not target.exists():
    return set()
  if not target.is_dir():
    raise ConfigError(f'{target}: is a file; name a folder to export to')
  names = {p.name for p in target.iterdir()}
  inside: set[str] = set()
  try:
    listed = as_listed(target)
    ours = {*(listed.digests or ()), MANIFEST}
    inside = names & set(listed.folders)
  except DataError:
    ours = {MANIFEST}  # a damaged export: its files cannot be told from others
  own = {f'{folder}/{name}' for folder in sorted(inside) for name in _earlier_files(target / folder)}
  if names - ours - inside:
    raise ConfigError(
      f'{target}: holds {min(names - ours - inside)!r}, which no export wrote; choose another folder or empty it'
    )
  return ours | own
