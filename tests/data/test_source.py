import dataclasses
import itertools
import subprocess
import sys

import grain
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from stored_rows import T, V, example, write

from compactlm_jax.data.batches import Batches, eval_batches
from compactlm_jax.data.manifest import read_manifest
from compactlm_jax.data.prepare import prepare
from compactlm_jax.data.source import RowSource, array_source, hold_out, open_dataset
from compactlm_jax.errors import ConfigError, DataError


def numbered(rows: int) -> RowSource:
  """Row i holds i everywhere but at its padding."""
  input_ids = np.repeat(np.arange(rows, dtype=np.int32)[:, None], T, 1)
  length = (np.arange(rows) % (T - 1) + 2).astype(np.int32)
  arrays = {'input_ids': input_ids, 'token_type_ids': np.zeros_like(input_ids), 'length': length}
  return array_source(
    {**arrays, 'label': np.arange(rows, dtype=np.int32) % 3}, vocab_size=rows, fingerprint='f', name='n'
  )


def ids(batch):
  return batch.input_ids[:, 0].tolist()


sizes = st.tuples(st.integers(1, 40), st.sampled_from([4, 8, 12]), st.integers(0, 2**31 - 1))


@settings(deadline=None, max_examples=40)
@given(sizes, st.integers(0, 30), st.sampled_from([1, 2, 4]))
def test_batches_are_a_pure_function_defined_globally(sizes, step, hosts):
  """Mutation: `index_shuffle` with the seed plus the first of `host_rows` (each host would shuffle for itself)."""
  rows, batch_size, seed = sizes
  source = numbered(rows)
  whole = Batches(source, batch_size, seed).batch(step)
  assert whole.input_ids.shape == (batch_size, T)
  parts = [Batches(source, batch_size, seed, host_rows=mine) for mine in np.split(np.arange(batch_size), hosts)]
  for _ in range(2):  # in any order, again and again
    shares = [part.batch(s) for s in (step + 1, step) for part in reversed(parts)][hosts:][::-1]
    assert list(itertools.chain(*map(ids, shares))) == ids(whole)
    np.testing.assert_array_equal(np.concatenate([s.attention_mask for s in shares]), whole.attention_mask)


@settings(deadline=None, max_examples=40)
@given(sizes, st.sampled_from([1, 2, 4]), st.integers(1, 3))
def test_each_epoch_holds_each_row_once(sizes, hosts, epochs):
  rows, batch_size, seed = sizes
  source = numbered(rows)
  parts = [Batches(source, batch_size, seed, host_rows=mine) for mine in np.split(np.arange(batch_size), hosts)]
  steps = -(-rows * epochs // batch_size)
  seen = [i for step in range(steps) for part in parts for i in ids(part.batch(step))]
  for epoch in range(epochs):
    assert sorted(seen[epoch * rows : (epoch + 1) * rows]) == list(range(rows))


@pytest.mark.parametrize('rows', [1, 2, 5, 64, 1000, 1 << 16, (1 << 16) + 2, (1 << 17) + 1, 10**6])
@pytest.mark.parametrize('hosts', [1, 2])
def test_the_order_is_that_of_grain(rows, hosts):
  """The pipeline that defined it first. Mutation: add the epoch to the seed before it is hashed."""
  seed = int(np.random.SeedSequence(7).generate_state(1)[0])
  share = 8 // hosts
  every = grain.MapDataset.range(rows).shuffle(seed).repeat(10**8 // rows).batch(share, batch_fn=list)
  mine = every[hosts - 1 :: hosts]
  batches = Batches(RowSource(lambda i: {}, rows, 9, T, ''), 8, 7, host_rows=np.arange(8)[-share:])
  for step in (0, 1, rows // 8, rows // 4 + 3, 9999):
    assert batches.indices(step).tolist() == mine[step]


@pytest.mark.parametrize('rows', [(1 << 16) + 1, (1 << 17) + 1, (1 << 18) + 1])
def test_each_row_once_where_the_cipher_of_grain_is_too_short(rows):
  """Mutation: fixed = False."""
  batches = Batches(RowSource(lambda i: {}, rows, 9, T, ''), rows, 3)
  for epoch in range(2):
    assert (np.sort(batches.indices(epoch)) == np.arange(rows)).all()


def test_order_changes_with_seed_and_epoch():
  source = numbered(64)
  orders = [ids(Batches(source, 64, seed).batch(epoch)) for seed in range(3) for epoch in range(3)]
  assert len(set(map(tuple, orders))) == 9


@settings(deadline=None, max_examples=15)
@given(sizes, st.integers(0, 50), st.integers(1, 3), st.sampled_from([1, 2]))
def test_prefetch_starts_anywhere(sizes, start, threads, hosts):
  rows, batch_size, seed = sizes
  batches = Batches(numbered(rows), batch_size, seed, host_rows=np.split(np.arange(batch_size), hosts)[-1])
  for step, batch in itertools.islice(batches.prefetch(start, threads=threads, buffer=4), 5):
    assert ids(batch) == ids(batches.batch(step))
    assert step >= start
  assert step == start + 4


def test_batch_fields():
  batch = Batches(numbered(9), 4, 0).batch(0)
  lengths = [i % (T - 1) + 2 for i in ids(batch)]
  assert batch.attention_mask.sum(1).tolist() == lengths and batch.attention_mask[:, 0].all()
  assert batch.labels.tolist() == [i % 3 for i in ids(batch)] and batch.weights is None
  for name in ('input_ids', 'attention_mask', 'token_type_ids', 'labels'):
    assert isinstance(getattr(batch, name), np.ndarray) and getattr(batch, name).dtype == np.int32


@given(st.integers(1, 20), st.sampled_from([4, 8]), st.sampled_from([1, 2, 4]))
def test_eval_batches_hold_each_row_once(rows, batch_size, hosts):
  source = numbered(rows)
  parts = [list(eval_batches(source, batch_size, host_rows=rows)) for rows in np.split(np.arange(batch_size), hosts)]
  assert {len(p) for p in parts} == {-(-rows // batch_size)}
  batches = [b for group in zip(*parts, strict=True) for b in group]
  assert all(len(b.input_ids) == len(b.weights) == batch_size // hosts for b in batches)
  real = [i for b in batches for i, w in zip(ids(b), b.weights, strict=True) if w]
  assert real == list(range(rows)) and {w for b in batches for w in b.weights} <= {0.0, 1.0}


def test_bad_sizes():
  with pytest.raises(ConfigError, match='batch_size: -4 must be at least 1'):
    Batches(numbered(9), -4, 0)
  with pytest.raises(ConfigError, match='batch_size: 0 must be at least 1'):
    next(eval_batches(numbered(9), 0))
  with pytest.raises(ConfigError, match='eval_rows: 9 rows cannot be held out of the 9 rows'):
    hold_out(numbered(9), 9)
  with pytest.raises(IndexError):
    numbered(9)[9]


def test_hold_out():
  train, held = hold_out(numbered(9), 2)
  assert [int(r['input_ids'][0]) for r in (train[0], train[6], held[0], held[1])] == [0, 6, 7, 8]
  assert (len(train), len(held)) == (7, 2)
  with pytest.raises(IndexError):
    train[7]


@pytest.fixture
def dataset(tmp_path):
  return write(tmp_path / 'data', [example(i) for i in range(25)])


def test_rows_come_back(dataset):
  source = open_dataset(dataset, expect_fingerprint='abc', verify='full')
  assert (len(source), source.vocab_size, source.seq_len, source.fingerprint) == (25, V, T, 'abc')
  for i in range(25):
    row = source[i]
    assert row['input_ids'].tolist() == [i] * T and row['length'] == T
    assert {k: v.dtype for k, v in row.items()} == dict.fromkeys(row, np.dtype(np.int32))
  seen = [i for _, b in itertools.islice(Batches(source, 5, 0).prefetch(), 5) for i in ids(b)]
  assert sorted(seen) == list(range(25))


def test_file_faults(dataset):
  """Mutations: leave out the comparison of sizes, or of SHA-256, in `verify_files`."""
  manifest = read_manifest(dataset)
  file = dataset / manifest.splits['train'][1].file
  content = file.read_bytes()

  file.write_bytes(content[: len(content) // 2])
  with pytest.raises(DataError, match=rf'{file.name}: .* bytes, but .* were written'):
    open_dataset(dataset)
  # A truncated file that a manifest vouches for still does not get through.
  lying = [dataclasses.replace(s, bytes=(dataset / s.file).stat().st_size) for s in manifest.splits['train']]
  (dataset / 'manifest.json').write_text(dataclasses.replace(manifest, splits={'train': tuple(lying)}).dumps())
  with pytest.raises(DataError, match=file.name):
    [open_dataset(dataset)[i] for i in range(25)]
  (dataset / 'manifest.json').write_text(manifest.dumps())

  file.unlink()
  with pytest.raises(DataError, match=rf'{file.name}: a shard of the dataset is missing'):
    open_dataset(dataset)
  file.write_bytes(content)
  assert len(open_dataset(dataset)) == 25

  wrong = 0
  for offset in range(0, len(content), 997):
    file.write_bytes(content[:offset] + bytes([content[offset] ^ 4]) + content[offset + 1 :])
    with pytest.raises(DataError, match='SHA-256 differs'):
      open_dataset(dataset, verify='full')
    try:
      source = open_dataset(dataset)
      wrong += any(source[i]['input_ids'].tolist() != [i] * T for i in range(25))
    except DataError as e:
      assert file.name in str(e) or 'cannot be opened' in str(e)
  assert wrong == 0


def test_no_file_of_a_dataset_is_a_link_out_of_it(dataset, tmp_path):
  """The folder itself may be one, and files may link within it. Mutation: no `require_inside` in `verify_files`."""
  (tmp_path / 'link').symlink_to(dataset)
  shard = dataset / read_manifest(dataset).splits['train'][1].file
  shard.rename(dataset / 'stored')
  shard.symlink_to('stored')
  assert open_dataset(tmp_path / 'link', verify='full')[13]['length'] == T
  shard.unlink()
  (dataset / 'stored').rename(shard)
  for name in (shard.name, 'features.json', 'dataset_info.json'):
    (dataset / name).rename(tmp_path / name)
    (dataset / name).symlink_to(tmp_path / name)
    with pytest.raises(DataError, match=rf'{name}: a link that leads out of the folder, to .*copy the file itself'):
      open_dataset(tmp_path / 'link')
    (dataset / name).unlink()
    with pytest.raises(DataError, match=rf'{name}: a .* of the dataset is missing; copy the dataset again'):
      open_dataset(dataset)
    (tmp_path / name).rename(dataset / name)


@pytest.mark.parametrize(
  ('old', 'new', 'message'),
  [
    ('"8"', '"99999999999999"', r'input_ids is uint16\[99999999999999\] instead of uint16\[8\] or int32\[8\]; copy'),
    ('"8"', '"8", "8"', r'input_ids is uint16\[8, 8\] instead'),
    ('uint16', 'int16', r'input_ids is int16\[8\] instead'),
    ('"shape": {}', '"shape": {"dimensions": ["8"]}', r'length is int32\[8\] instead of int32\[\]'),
    ('token_type_ids', 'types', "rows have no field 'types'"),
    ('"bytes"', '"zlib"', 'damaged .a field of another kind'),
    ('tensorflow_datasets.core.features.tensor_feature', 'seen_by_tfds', 'damaged .a field of another kind'),
    ('{', '{"type": "seen_by_tfds.A", "content": {}, ', 'damaged .not a dictionary of features'),
    ('"featuresDict"', '"tensor"', "damaged .'featuresDict'"),
    ('}', '', 'damaged'),
  ],
)
def test_features_are_those_of_the_manifest(dataset, monkeypatch, old, new, message):
  """Mutation: leave it to TFDS, which imports the modules that are named there, and to whoever makes room for it."""
  (dataset / 'seen_by_tfds.py').write_text(f'open({str(dataset / "canary")!r}, "w")')
  monkeypatch.syspath_prepend(dataset)
  file = dataset / 'features.json'
  content = file.read_text()
  assert old in content
  file.write_text(content.replace(old, new, 1))
  with pytest.raises(DataError, match=f'features.json: {message}'):
    open_dataset(dataset)
  assert not (dataset / 'canary').exists()


@pytest.mark.parametrize(('old', 'new'), [('{SPLIT}', '{SPLIT'), ('{SPLIT}', '{X}'), ('array_record"', 'riegeli"')])
def test_a_dataset_that_tfds_cannot_read_is_damaged(dataset, old, new):
  """Mutation: let its errors through."""
  file = dataset / 'dataset_info.json'
  file.write_text(file.read_text().replace(old, new, 1))
  with pytest.raises(DataError, match='dataset_info.json: damaged .*; copy the|cannot be opened as a TFDS'):
    open_dataset(dataset)


def test_manifest_faults(dataset):
  text = (dataset / 'manifest.json').read_text()
  for damaged, message in (
    (text[:40], 'damaged'),
    (text.replace('"format": 2', '"format": 9'), 'another format'),
    (text.replace('"rows": 10', '"rows": 11'), 'rows per shard'),
  ):
    (dataset / 'manifest.json').write_text(damaged)
    with pytest.raises(DataError, match=message):
      open_dataset(dataset)
  (dataset / 'manifest.json').unlink()
  with pytest.raises(DataError, match=r'manifest.json: not there.*compactlm prepare'):
    open_dataset(dataset)
  with pytest.raises(DataError, match='not there'):
    open_dataset(dataset / 'nowhere')


def test_mismatches(dataset):
  with pytest.raises(ConfigError, match=r'another tokenizer .*abc.*xyz.*prepare the text again'):
    open_dataset(dataset, expect_fingerprint='xyz')
  with pytest.raises(ConfigError, match="no split 'validation', only train; prepare it with holdout_rows"):
    open_dataset(dataset, 'validation')
  with pytest.raises(ConfigError, match="verify 'no'"):
    open_dataset(dataset, verify='no')


def test_prepared_rows_train_without_tensorflow(corpus, vocabulary, tmp_path):
  prepare(str(corpus), str(vocabulary), tmp_path / 'out', 32, 'pairs', holdout_rows=5)
  code = (
    'import sys, warnings; warnings.simplefilter("error")\n'
    'warnings.filterwarnings("ignore", "label.. is deprecated", DeprecationWarning)\n'  # of protobuf 6, about TFDS
    'from compactlm_jax.data.batches import Batches\n'
    'from compactlm_jax.data.source import open_dataset\n'
    'b = Batches(open_dataset(sys.argv[1]), 4, 0)\n'
    'step, batch = next(b.prefetch(3)); assert step == 3 and (batch.input_ids == b.batch(3).input_ids).all()\n'
    'print(batch.input_ids.tolist())\n'
    'assert not {"tensorflow", "torch", "transformers"} & set(sys.modules)'
  )
  outputs = {
    subprocess.run([sys.executable, '-c', code, tmp_path / 'out'], check=True, capture_output=True, text=True).stdout
    for _ in range(2)
  }
  assert len(outputs) == 1
  assert len(open_dataset(tmp_path / 'out', 'validation')) == 5
