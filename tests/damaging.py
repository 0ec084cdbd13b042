"""What breaks: files of checkpoints, records of prepared rows, a disk that is full. Shared by tests and benchmarks."""

import dataclasses
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from stored_rows import T, V, example, write

from compactlm_jax import checkpoint, storage
from compactlm_jax.data import shards
from compactlm_jax.data.manifest import read_manifest
from compactlm_jax.data.source import open_dataset
from compactlm_jax.errors import DataError
from compactlm_jax.tree import named_leaves, nested

# --- checkpoints ----------------------------------------------------------------------------------------------------


def damages(directory, step, offsets=lambda size: {0, size // 2, size - 1}):
  """Every file of a step x {truncate, delete, flip one bit at `offsets` of its size}."""
  for path in sorted(p for p in (directory / str(step)).rglob('*') if p.is_file()):
    size, name = path.stat().st_size, path.relative_to(directory)
    yield name, 'delete', 0
    if size:
      yield name, 'truncate', size // 2
      yield from ((name, 'flip', offset) for offset in sorted(offsets(size)))


def inflict(directory, name, how, offset):
  """Damages one file of a directory of checkpoints."""
  path = directory / name
  data = bytearray(path.read_bytes())
  if how == 'delete':
    path.unlink()
  elif how == 'truncate':
    path.write_bytes(data[:offset])
  else:
    data[offset] ^= 1
    path.write_bytes(data)


class FullDisk:
  """A disk without space for checkpoints while `full`.

  Orbax answers at once with ENOSPC, or `late`, when the files are being written. With `lines` growing files have no
  space either: of the next line half is written, and then nothing.
  """

  def __init__(self, monkeypatch, late=False, lines=False):
    real, self.full = checkpoint.ocp.save_checkpointables_async, True

    def save(path, items):
      if not self.full:
        return real(path, items)
      if not late:
        raise OSError(28, 'No space left on device')
      pathlib.Path(f'{path}.orbax-checkpoint-tmp').mkdir()

      class Response:
        def result(self):
          raise ValueError('RESOURCE_EXHAUSTED: No space left on device')

      return Response()

    monkeypatch.setattr(checkpoint.ocp, 'save_checkpointables_async', save)
    if lines:
      monkeypatch.setattr(storage, 'open', lambda *args, **kwargs: _File(self, open(*args, **kwargs)), raising=False)


class _File:
  """A file of a `FullDisk`."""

  def __init__(self, disk, file):
    self._disk, self._file, self._torn = disk, file, False

  def write(self, data):
    if self._disk.full and self._torn:
      raise OSError(28, 'No space left on device')
    self._torn = self._disk.full
    return self._file.write(data[: len(data) // 2] if self._torn else data)

  def close(self):
    self._file.close()


class Watched:
  """Rows that tell which step is next."""

  def __init__(self, batches, tell):
    self._batches, self._tell = batches, tell

  def prefetch(self, start_step):
    """See `train.loop.BatchSource`."""
    for step, batch in self._batches.prefetch(start_step):
      self._tell(step)
      yield step, batch


def misfits(state):
  """What a run may wrongly ask of a checkpoint: name -> (shapes of a state, the leaf that must be named)."""
  like = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), state)
  leaves = named_leaves(like.params)
  name = next(n for n, x in leaves.items() if n.startswith('encoder/') and x.ndim > 1)
  leaf, struct = leaves[name], jax.ShapeDtypeStruct
  rest = {n: x for n, x in leaves.items() if n != name}
  changed = {
    'bfloat16 for float32': {**leaves, name: struct(leaf.shape, jnp.bfloat16)},
    'int32 for float32': {**leaves, name: struct(leaf.shape, jnp.int32)},
    'another shape': {**leaves, name: struct((*leaf.shape[:-1], leaf.shape[-1] + 1), leaf.dtype)},
    'a leaf too many': {**leaves, 'encoder/more/kernel': leaf},
    'a leaf too few': rest,
    'a leaf renamed': {**rest, f'{name}_new': leaf},
  }
  named = {'a leaf too many': 'encoder/more/kernel', 'a leaf renamed': f'{name}_new'}
  return {
    case: (dataclasses.replace(like, params=nested(params)), named.get(case, name)) for case, params in changed.items()
  }


# --- records --------------------------------------------------------------------------------------------------------

BAD_ROW = 13  # record 3 of the second shard


def _dataset(folder, **fields):
  """25 rows in shards of 10; fields of the bad row."""
  stored = 1 << 17 if np.min(fields.get('input_ids', 0)) < 0 else V  # two bytes hold no negative id
  return write(folder, [example(i, **(fields if i == BAD_ROW else {})) for i in range(25)], stored_vocab=stored)


def _encoded(change):
  """A dataset of which the bad row's record is stored as change(record)."""

  def make(folder):
    encode = shards.Layout.encode

    def changed(self, e):
      record = encode(self, e)
      return change(record) if e['input_ids'][0] == BAD_ROW else record

    with pytest.MonkeyPatch.context() as patch:
      patch.setattr(shards.Layout, 'encode', changed)
      return _dataset(folder)

  return make


def _shard(folder):
  return _dataset(folder) / read_manifest(folder).splits['train'][1].file


def _readable(folder, row):
  try:
    return bool(len(open_dataset(folder)[row]))
  except DataError:
    return False


def _flipped(folder):
  """One bit, at the first place where it hurts the bad row alone (records are compressed)."""
  file = _shard(folder)
  content = file.read_bytes()
  for offset in range(len(content)):
    file.write_bytes(content[:offset] + bytes([content[offset] ^ 4]) + content[offset + 1 :])
    if not _readable(folder, BAD_ROW) and all(_readable(folder, row) for row in (BAD_ROW - 1, BAD_ROW + 1)):
      return
  raise AssertionError('no bit of the file belongs to one record')


def _truncated(folder):
  file = _shard(folder)
  file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def _vouched(folder):
  """Truncated, and the manifest agrees with its size."""
  _truncated(folder)
  manifest = read_manifest(folder)
  sizes = [dataclasses.replace(s, bytes=(folder / s.file).stat().st_size) for s in manifest.splits['train']]
  (folder / 'manifest.json').write_text(dataclasses.replace(manifest, splits={'train': tuple(sizes)}).dumps())


def _ids(value):
  return np.array([1, 2, value, *range(4, T + 1)], np.int32)


RECORD = rf'array_record-00001: record 3 \(row {BAD_ROW}\): '
RECORDS = {
  'flipped bit': (_flipped, RECORD + 'cannot be read'),
  'truncated shard': (_truncated, r'array_record-00001: .* bytes, but .* were written'),
  'truncated shard, manifest agrees': (_vouched, 'array_record-00001'),
  'missing shard': (lambda f: _shard(f).unlink(), 'array_record-00001: a shard of the dataset is missing'),
  'empty record': (_encoded(lambda record: b''), RECORD + 'field input_ids is missing'),
  'short record': (_encoded(lambda record: record[:-1]), RECORD + 'cannot be read'),
  'id = vocabulary': (lambda f: _dataset(f, input_ids=_ids(V)), RECORD + f'token id {V} is outside'),
  'id = -1': (lambda f: _dataset(f, input_ids=_ids(-1)), RECORD + 'token id -1 is outside'),
  'length 0': (lambda f: _dataset(f, length=np.int32(0)), RECORD + 'length 0 is outside'),
  'length T + 1': (lambda f: _dataset(f, length=np.int32(T + 1)), RECORD + f'length {T + 1} is outside'),
}
"""Name -> (makes a damaged dataset in a folder that does not exist, what is said of it)."""
IN_ONE_RECORD = [name for name, (_, message) in RECORDS.items() if message.startswith(RECORD)]
