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
import pickle
import socket
import tracemalloc

import pytest
from foreign import Cases, Change, watched
from foreign_readers import READERS, TSV, model
from hostile import CASES, Bomb, make

from compactlm_jax.data import squad, text
from compactlm_jax.data.squad import read_squad
from compactlm_jax.data.table import read_table
from compactlm_jax.data.tokenizer import load_tokenizer
from compactlm_jax.errors import CompactLMError
from compactlm_jax.interop.bundle import from_pretrained


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
  folder, canary = tmp_path / 'm', tmp_path / 'canary'
  folder.mkdir()
  make(name, folder, canary)
  with watched(folder), pytest.raises(CompactLMError, match=f'(?s){CASES[name][1]}'):
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


def test_small_files_that_decompress_to_much_are_refused(tmp_path, monkeypatch, request):
  """Mutation: read lines, or the whole document, without a limit."""
  monkeypatch.setattr(text, 'MAX_LINE_BYTES', 1 << 16)
  monkeypatch.setattr(squad, 'MAX_BYTES', 1 << 16)
  bomb = gzip.compress(b' ' * (1 << 24))
  (tmp_path / 't.tsv.gz').write_bytes(gzip.compress(TSV) + bomb)
  (tmp_path / 's.json.gz').write_bytes(bomb)
  (tmp_path / 'a.txt.gz').write_bytes(bomb)
  request.addfinalizer(tracemalloc.stop)
  tracemalloc.start()
  with pytest.raises(CompactLMError, match=r't\.tsv\.gz:5: a line of more than 1048576 .*break it'):
    read_table(tmp_path / 't.tsv.gz')
  with pytest.raises(CompactLMError, match=r's\.json\.gz: holds more than .*JSON lines'):
    read_squad(tmp_path / 's.json.gz')
  (source,) = text.open_text(os.fspath(tmp_path / 'a.txt.gz'))
  with pytest.raises(CompactLMError, match=r'a\.txt\.gz:1: a line of more than'):
    list(source.lines(lambda _: None))
  assert tracemalloc.get_traced_memory()[1] < 1 << 23  # at most: never a whole bomb of 1 << 24
