"""Hostile folders are refused with the file and the remedy; nothing runs, nobody is called, nothing else is read.

Row 12 of the fault matrix, and where else it is tested:

  pickles (.bin, .pt, .npy), links, paths in an index, headers, tensors, flipped bits     here
  every damaged header, index, config.json and manifest, byte by byte                     test_fuzz.py
  shards that contradict their index, wrong tensors by name, caps on all shards together  interop/test_hf_folder.py
  sparse files that claim a huge model or contradict themselves                           interop/test_sparse*.py
  damaged records and shards of prepared rows                                             data/test_source.py
  code that config.json asks for                                                          interop/test_hf_config.py
"""

import gzip
import json
import os
import pathlib
import pickle
import socket
import struct

import numpy as np
import pytest
import safetensors.numpy
from foreign import Cases, Change, watched
from foreign_readers import READERS, TSV, exported, model, sharded

from compactlm_jax.data import squad, text
from compactlm_jax.data.squad import read_squad
from compactlm_jax.data.table import read_table
from compactlm_jax.data.tokenizer import load_tokenizer
from compactlm_jax.errors import CompactLMError
from compactlm_jax.interop.bundle import from_pretrained

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


DAMAGED, CONVERT = r'model\.safetensors: damaged or truncated .*copy', r'never opened .*Convert it .*save_pretrained'
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
  'trailing bytes': (_weights(_header({'a': _entry([4], 0, 16)}, b'\0' * 99)), DAMAGED),
  'no JSON': (_weights(struct.pack('<Q', 8) + b'not json'), DAMAGED),
  'extra tensor': (_tensors(lambda t: t.update(extra=np.zeros(3, 'f4'))), r'extra: unexpected .*check config\.json'),
  'wrong shape': (_tensors(lambda t: t.update({LAST: t[LAST].T.copy()})), rf'{LAST}: found shape .*take both files'),
  'flipped bit': (_flip, r'model\.safetensors: its SHA-256 is not the one in manifest\.json; .*copy'),
  'layers without end': (_config(num_hidden_layers=2**31 - 1), r'num_layers: 2147483647 is not between'),
  'code from outside': (_config(auto_map={'AutoModel': 'a/b--x.Y'}), r'config\.json: auto_map .*never run; save'),
}  # fmt: skip


@pytest.fixture
def offline(monkeypatch):
  """Any call to a network fails the test."""

  def refuse(*args, **kwargs):
    raise AssertionError(f'network call: {args}')

  monkeypatch.setattr(socket.socket, 'connect', refuse)
  monkeypatch.setattr(socket, 'getaddrinfo', refuse)


@pytest.mark.parametrize('name', CASES)
def test_hostile_folders_are_refused(name, tmp_path, offline):
  """Mutations: pickle.loads of what is no safetensors creates the canary; no check of links, of names in the index."""
  attack, message = CASES[name]
  folder, canary = tmp_path / 'm', tmp_path / 'canary'
  folder.mkdir()
  for file, data in model().items():
    (folder / file).write_bytes(data)
  attack(folder, canary)
  with watched(folder), pytest.raises(CompactLMError, match=f'(?s){message}'):
    from_pretrained(folder)
  assert not canary.exists()


def test_the_bomb_is_live_and_the_folder_is_good(tmp_path):
  """Without this the tests above could pass for nothing."""
  pickle.loads(pickle.dumps(Bomb(tmp_path / 'canary')))  # noqa: S301
  assert (tmp_path / 'canary').exists()
  for file, data in model().items():
    (tmp_path / file).write_bytes(data)
  assert from_pretrained(tmp_path).config.num_layers == 2


@pytest.mark.parametrize('name', ['vocab.txt', 'merges.txt', 'tokenizer_config.json'])
def test_a_tokenizer_takes_no_file_from_outside(name, tmp_path):
  """`Tokenizer.save` would carry it on into runs and exports. Mutation: no check in `load_tokenizer`."""
  folder = tmp_path / 'm'
  folder.mkdir()
  (folder / 'vocab.txt').write_bytes(model()['vocab.txt'])
  load_tokenizer(folder)
  (tmp_path / 'secret').write_bytes((folder / name).read_bytes() if (folder / name).exists() else b'{}')
  (folder / name).unlink(missing_ok=True)
  (folder / name).symlink_to(tmp_path / 'secret')
  with pytest.raises(CompactLMError, match=rf'{name}: a link that leads out .*copy the file itself'):
    load_tokenizer(folder)


def test_a_prepared_dataset_names_no_file_outside(tmp_path):
  """Mutation: no check of names in `read_manifest`: the shard beside the folder has the right size and digest."""
  (reader,) = (r for r in READERS if r.name == 'manifest of prepare')
  (tmp_path / 'm').mkdir()
  cases = Cases(reader, tmp_path / 'm')
  (tmp_path / 'rows-0').write_bytes(cases.valid['rows-0'])
  for outside in ('../rows-0', str(tmp_path / 'rows-0')):
    content = cases.valid['manifest.json'].replace(b'"rows-0"', json.dumps(outside).encode())
    assert cases.run(Change('manifest.json', content)) == 'DataError'


def test_small_files_that_decompress_to_much_are_refused(tmp_path, monkeypatch):
  """Mutation: read lines, or the whole document, without a limit."""
  monkeypatch.setattr(text, 'MAX_LINE_BYTES', 1 << 16)
  monkeypatch.setattr(squad, 'MAX_BYTES', 1 << 16)
  bomb = gzip.compress(b' ' * (1 << 24))
  (tmp_path / 't.tsv.gz').write_bytes(gzip.compress(TSV) + bomb)
  (tmp_path / 's.json.gz').write_bytes(bomb)
  (tmp_path / 'a.txt.gz').write_bytes(bomb)
  with pytest.raises(CompactLMError, match=r't\.tsv\.gz: a line of more than .*break it'):
    read_table(tmp_path / 't.tsv.gz')
  with pytest.raises(CompactLMError, match=r's\.json\.gz: holds more than .*JSON lines'):
    read_squad(tmp_path / 's.json.gz')
  (source,) = text.open_text(os.fspath(tmp_path / 'a.txt.gz'))
  with pytest.raises(CompactLMError, match=r'a\.txt\.gz: a line of more than'):
    list(source.lines(lambda _: None))
