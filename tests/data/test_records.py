import dataclasses
import itertools
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import tensorflow_datasets as tfds
from stored_rows import T, V, example, write, write_format_1

from compactlm_jax.data import shards
from compactlm_jax.data.batches import Batches
from compactlm_jax.data.manifest import read_manifest
from compactlm_jax.data.source import open_dataset
from compactlm_jax.errors import DataError

NAMES = ('input_ids', 'token_type_ids', 'length')


def varied(rows):
  """Rows that differ in everything."""
  rng = np.random.default_rng(0)
  fields = (
    {
      'input_ids': rng.integers(0, V, T, dtype=np.int32),
      'token_type_ids': rng.integers(0, 2, T, dtype=np.uint8),
      'length': np.int32(rng.integers(1, T + 1)),
    }
    for _ in range(rows)
  )
  return list(fields)


@pytest.mark.parametrize('kind', ['uint16', 'int32', 'format 1'])
def test_bulk_reads_equal_those_of_tfds(kind, tmp_path, monkeypatch):
  """Mutation: swap types and ids of the layout; forget that shards have offsets."""
  rows = varied(45)
  if kind == 'format 1':
    folder = write_format_1(tmp_path / 'data', rows)
  else:
    folder = write(tmp_path / 'data', rows, stored_vocab=V if kind == 'uint16' else 1 << 17)
  expected = list(tfds.builder_from_directory(str(folder)).as_data_source('train'))
  assert expected[0]['input_ids'].dtype == ('uint16' if kind == 'uint16' else 'int32')
  source = open_dataset(folder, verify='full')
  reader = source.fetch.__self__
  assert (reader.layout is None) == (kind == 'format 1')
  if reader.layout:  # intact rows need no second reading
    monkeypatch.setattr(reader, 'row', None)
  indices = np.random.default_rng(1).permutation(np.tile(np.arange(45), 2))
  for part in (indices, indices[:1], indices[:7]):
    got = source.fetch(part)
    assert sorted(got) == sorted(NAMES)
    for name in NAMES:
      assert got[name].dtype == np.int32 and got[name].flags.c_contiguous
      assert got[name].tolist() == [np.asarray(expected[i][name]).tolist() for i in part]


def test_threads_share_the_files(tmp_path):
  rows = varied(45)
  source = open_dataset(write(tmp_path / 'data', rows))
  orders = [np.random.default_rng(seed).permutation(45) for seed in range(24)]
  with ThreadPoolExecutor(8) as pool:
    for order, got in zip(orders, pool.map(source.fetch, orders), strict=True):
      assert got['input_ids'].tolist() == [rows[i]['input_ids'].tolist() for i in order]


@pytest.mark.parametrize('old', [False, True])
@pytest.mark.parametrize(
  'fields, message',
  [
    ({'input_ids': np.array([1, 2, V, 4, 5, 6, 7, 8], np.int32)}, 'token id 50 is outside the vocabulary of 50'),
    ({'input_ids': np.array([1, 2, -1, 4, 5, 6, 7, 8], np.int32)}, 'token id -1 is outside'),
    ({'length': np.int32(T + 1)}, 'length 9 is outside 1 to 8'),
    ({'length': np.int32(0)}, 'length 0 is outside'),
    ({'token_type_ids': np.full(T, 2, np.uint8)}, 'token type 2 is neither'),
  ],
)
def test_damaged_records_are_named(fields, message, old, tmp_path):
  """Mutation: leave any one of the comparisons in `_bulk` out."""
  examples = [example(i, **(fields if i == 13 else {})) for i in range(25)]
  negative = np.min(fields.get('input_ids', 0)) < 0
  if old:
    folder = write_format_1(tmp_path / 'data', examples)
  else:
    folder = write(tmp_path / 'data', examples, stored_vocab=1 << 17 if negative else V)
  source = open_dataset(folder)
  assert source[12]['length'] == T
  with pytest.raises(DataError, match=rf'array_record-00001: record 3 \(row 13\): {message}'):
    source[13]
  with pytest.raises(DataError, match='record 3'):
    list(itertools.islice(Batches(source, 5, 0).prefetch(), 5))


def reversed_fields(record):
  """The same tf.Example with its (short) fields in the other order."""
  fields, start = [], 2
  while start < len(record):
    stop = start + 2 + record[start + 1]
    fields.append(record[start:stop])
    start = stop
  return record[:2] + b''.join(reversed(fields))


@pytest.mark.parametrize(
  'change, message',
  [
    (reversed_fields, None),
    (lambda record: record[:-1], 'cannot be read'),
    (lambda record: b'', 'field input_ids is missing'),
    (lambda record: record.replace(b'length', b'lengxx'), 'field length is missing'),
  ],
)
def test_records_of_another_form_are_left_to_tfds(change, message, tmp_path, monkeypatch):
  """Mutation: do not compare the fixed bytes."""
  encode = shards.Layout.encode
  with monkeypatch.context() as patch:
    patch.setattr(
      shards.Layout, 'encode', lambda self, e: (change if e['input_ids'][0] == 4 else bytes)(encode(self, e))
    )
    folder = write(tmp_path / 'data', [example(i) for i in range(25)])
  source = open_dataset(folder)
  assert source.fetch.__self__.files(np.array([4])) != [encode(source.fetch.__self__.layout, example(4))]
  if message:
    with pytest.raises(DataError, match=rf'record 4 \(row 4\): {message}'):
      source.fetch(np.arange(10))
  else:
    assert source.fetch(np.arange(10))['input_ids'].tolist() == [[i] * T for i in range(10)]


def test_wrong_row_length_in_the_features(tmp_path):
  folder = write(tmp_path / 'data', [example(i) for i in range(25)])
  manifest = read_manifest(folder)
  changed = dataclasses.replace(manifest, settings={**manifest.settings, 'seq_len': T + 1})
  (folder / 'manifest.json').write_text(changed.dumps())
  with pytest.raises(DataError, match=r'input_ids is uint16\[8\] instead of uint16\[9\] or int32\[9\]'):
    open_dataset(folder)


def test_budget_replaces_by_a_neighbour_and_stops_beyond(tmp_path):
  bad = {4: {'length': np.int32(0)}, 5: {'length': np.int32(0)}, 24: {'length': np.int32(0)}}
  folder = write(tmp_path / 'data', [example(i, **bad.get(i, {})) for i in range(25)])
  first = open_dataset(folder, bad_record_budget=0.12)
  order = [4, 24, 5, 6]
  assert [int(first[i]['input_ids'][0]) for i in order] == [6, 0, 6, 6] and first.damaged == {4, 5, 24}
  again = open_dataset(folder, bad_record_budget=0.12)
  assert again.fetch(np.array(order[::-1]))['input_ids'][:, 0].tolist() == [6, 6, 0, 6]
  scarce = open_dataset(folder, bad_record_budget=0.08)
  assert scarce[4]['input_ids'][0] == 6
  with pytest.raises(DataError, match=r'3 damaged rows are more than .* allows \(2\).*record 4 \(row 24\)'):
    scarce[24]


def test_flipped_bits_hurt_their_rows_only(tmp_path):
  """All over a file: no crash, no wrong row, no intact row lost. Mutation: keep damaged rows."""
  folder = write(tmp_path / 'data', varied(20), shard_rows=10)
  intact = open_dataset(folder).fetch(np.arange(20))
  file = folder / read_manifest(folder).splits['train'][1].file
  content = file.read_bytes()
  used = len(content.rstrip(b'\0'))
  lost = []
  for offset in [*range(0, used, 61), *range(len(content) - 200, len(content), 61)]:
    file.write_bytes(content[:offset] + bytes([content[offset] ^ 16]) + content[offset + 1 :])
    try:
      source = open_dataset(folder, bad_record_budget=0.5)
      rows = source.fetch(np.arange(20))
    except DataError as e:
      assert file.name in str(e)
      continue
    good = [i for i in range(20) if i not in source.damaged]
    assert all((rows[name][good] == intact[name][good]).all() for name in NAMES)
    assert min(source.damaged, default=10) >= 10
    lost.append(len(source.damaged))
  assert 1 in lost and 0 in lost
