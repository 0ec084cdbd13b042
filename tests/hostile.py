"""Model folders that were made to harm: what is done to a good one, and what is said when it is read.

Used by tests/faults/test_hostile.py and benchmarks/fault_damage.py.
"""

import json
import os
import pathlib
import pickle
import struct

import numpy as np
import safetensors.numpy
from foreign_readers import exported, model, sharded

LAST = 'bert.encoder.layer.1.output.dense.weight'


class Bomb:
  """Creates a file when it is unpickled."""

  def __init__(self, canary):
    self.canary = canary

  def __reduce__(self):
    return (pathlib.Path.touch, (self.canary,))


def _header(entries, payload=b'\0' * 16, length=None):
  header = json.dumps(entries).encode()
  return struct.pack('<Q', len(header) if length is None else length) + header + payload


def _entry(shape, start, stop):
  return {'dtype': 'F32', 'shape': shape, 'data_offsets': [start, stop]}


def _weights(data):
  return lambda folder, canary: (folder / 'model.safetensors').write_bytes(data)


def _tensors(change):
  def attack(folder, canary):
    file = folder / 'model.safetensors'
    tensors = safetensors.numpy.load(file.read_bytes())
    change(tensors)
    file.write_bytes(safetensors.numpy.save(tensors))

  return attack


def _pickled(name):
  def attack(folder, canary):
    (folder / 'model.safetensors').unlink()
    (folder / name).write_bytes(pickle.dumps(Bomb(canary)))

  return attack


def _npy(folder, canary):
  (folder / 'model.safetensors').unlink()
  np.save(folder / 'weights.npy', np.array([Bomb(canary)], object), allow_pickle=True)


def _disguised(folder, canary):
  (folder / 'model.safetensors').write_bytes(pickle.dumps(Bomb(canary)))


def _index(target):
  def attack(folder, canary):
    for name, data in sharded().items():
      (folder / name).write_bytes(data)
    (folder / 'model.safetensors').rename(folder.parent / 'model.safetensors')  # a real one where '..' leads
    index = json.loads((folder / 'model.safetensors.index.json').read_text())
    index['weight_map'][LAST] = target
    (folder / 'model.safetensors.index.json').write_text(json.dumps(index))

  return attack


def _link(name):
  def attack(folder, canary):
    (folder / name).rename(folder.parent / f'outside-{name}')
    (folder / name).symlink_to(folder.parent / f'outside-{name}')

  return attack


def _flip(folder, canary):
  for name, data in exported().items():
    (folder / name).write_bytes(data)
  data = bytearray((folder / 'model.safetensors').read_bytes())
  data[-2] ^= 1
  (folder / 'model.safetensors').write_bytes(bytes(data))


def _config(**entries):
  def attack(folder, canary):
    config = json.loads((folder / 'config.json').read_text())
    (folder / 'config.json').write_text(json.dumps(config | entries))

  return attack


def _pipe(name):
  def attack(folder, canary):
    (folder / name).unlink()
    os.mkfifo(folder / name)

  return attack


def _circle(folder, canary):
  (folder / 'config.json').unlink()
  (folder / 'config.json').symlink_to('config.json')


DAMAGED, CONVERT = r'model\.safetensors: damaged or truncated .*copy', r'never opened .*Convert it .*save_pretrained'
SHAPE = r'a has an impossible shape .*copy'
CASES = {
  'pickle .bin': (_pickled('pytorch_model.bin'), r'pytorch_model\.bin, which is ' + CONVERT),
  'pickle .pt': (_pickled('model.pt'), r'model\.pt, which is ' + CONVERT),
  'pickle .npy': (_npy, r'weights\.npy, which is ' + CONVERT),
  'pickle named .safetensors': (_disguised, DAMAGED),
  'index to ..': (_index('../model.safetensors'), r'index\.json: .*said to be in .*download the index'),
  'index to /': (_index('/etc/model.safetensors'), r'index\.json: .*said to be in .*download the index'),
  'index to a folder': (_index('sub/a.safetensors'), r'index\.json: .*said to be in .*download the index'),
  'index to a pickle': (_index('a.bin'), r'index\.json: .*said to be in .*download the index'),
  'index to nothing': (_index(''), r'index\.json: .*said to be in .*download the index'),
  'index to a number': (_index(3), r'index\.json: .*said to be in .*download the index'),
  'index with a zero byte': (_index('a\0.safetensors'), r'index\.json: .*said to be in .*download the index'),
  'linked weights': (_link('model.safetensors'), r'model\.safetensors: a link that leads out .*copy the file itself'),
  'linked config': (_link('config.json'), r'config\.json: a link that leads out .*copy the file itself'),
  'linked tokenizer': (_link('vocab.txt'), r'vocab\.txt: a link that leads out .*copy the file itself'),
  'overlapping tensors': (_weights(_header({'a': _entry([4], 0, 16), 'b': _entry([2], 8, 16)})), DAMAGED),
  'huge header length': (_weights(struct.pack('<Q', 1 << 60) + b'{}'), DAMAGED),
  'header bomb': (_weights(_header({'a' * (17 << 20): _entry([4], 0, 16)})), DAMAGED),
  'deep header': (_weights(struct.pack('<Q', 1 << 20) + b'[' * (1 << 20)), DAMAGED),
  'absurd shape': (_weights(_header({'a': _entry([1 << 40, 1 << 40], 0, 16)})), DAMAGED),
  'shape of 2^63 - 1 and 0': (_weights(_header({'a': _entry([0, 2**63 - 1], 0, 0)}, b'')), SHAPE),
  'shape of 65 dimensions': (_weights(_header({'a': _entry([1] * 65, 0, 4)}, b'\0' * 4)), SHAPE),
  'config that is a pipe': (_pipe('config.json'), r'config\.json: is no ordinary file; put one there'),
  'weights that are a pipe': (_pipe('model.safetensors'), r'model\.safetensors: is no ordinary file; put one there'),
  'links in a circle': (_circle, r'config\.json: cannot be followed .*copy the file itself'),
  'trailing bytes': (_weights(_header({'a': _entry([4], 0, 16)}, b'\0' * 99)), DAMAGED),
  'no JSON': (_weights(struct.pack('<Q', 8) + b'not json'), DAMAGED),
  'extra tensor': (_tensors(lambda t: t.update(extra=np.zeros(3, 'f4'))), r'extra: unexpected .*check config\.json'),
  'wrong shape': (_tensors(lambda t: t.update({LAST: t[LAST].T.copy()})), rf'{LAST}: found shape .*take both files'),
  'flipped bit': (_flip, r'model\.safetensors: its SHA-256 is not the one in manifest\.json; .*copy'),
  'layers without end': (_config(num_hidden_layers=2**31 - 1), r'num_layers: 2147483647 is not between'),
  'code from outside': (_config(auto_map={'AutoModel': 'a/b--x.Y'}), r'config\.json: auto_map .*never run; save'),
}  # fmt: skip
"""Name -> (what is done to a folder, given a file that no attack may create; what is said of it)."""


def make(name, folder, canary):
  """Writes a good model into an existing folder and attacks it."""
  for file, data in model().items():
    (folder / file).write_bytes(data)
  CASES[name][0](folder, canary)
