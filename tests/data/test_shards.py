import numpy as np
import pytest
import tensorflow_datasets as tfds
from hypothesis import given, settings
from hypothesis import strategies as st
from tensorflow_datasets.core import example_serializer

from compactlm_jax.data.shards import find_layout, row_features


@settings(deadline=None, max_examples=30)
@given(st.integers(1, 300), st.sampled_from([200, 1 << 16, (1 << 16) + 1]), st.integers(0, 2**32 - 1))
def test_records_are_those_of_tfds(seq_len, vocab_size, seed):
  """Mutation: write the token types before the ids."""
  rng = np.random.default_rng(seed)
  features = row_features(seq_len, vocab_size)
  row = {
    'input_ids': rng.integers(0, vocab_size, seq_len, dtype=np.int32),
    'token_type_ids': rng.integers(0, 2, seq_len, dtype=np.uint8),
    'length': np.int32(rng.integers(0, seq_len + 1)),
  }
  layout = find_layout(features)
  record = layout.encode(row)
  typed = {**row, 'input_ids': row['input_ids'].astype(features['input_ids'].np_dtype)}
  message = example_serializer.ExampleSerializer(features.get_serialized_info()).get_tf_example(
    features.encode_example(typed)
  )
  assert record == message.SerializeToString(deterministic=True)
  for name, value in features.deserialize_example_np(record).items():
    np.testing.assert_array_equal(value, row[name])
  view = np.frombuffer(record * 2, layout.dtype)
  assert all((view[name] == row[name]).all() for name in row)
  # Every byte belongs to a field or is fixed.
  assert len(record) == sum(layout.dtype[n].itemsize for n in row) + sum(s.stop - s.start for s in layout.fixed)


def test_ids_take_two_bytes_where_they_can():
  kinds = {v: row_features(8, v)['input_ids'].np_dtype for v in (30522, 1 << 16, (1 << 16) + 1)}
  assert [np.dtype(k).itemsize for k in kinds.values()] == [2, 2, 4]


@pytest.mark.parametrize(
  'field, value',
  [
    ('input_ids', np.array([1, 2, 1 << 16])),
    ('input_ids', np.array([1, -2, 3])),
    ('input_ids', np.array([1, 2])),
    ('input_ids', np.array([1])),
    ('token_type_ids', np.array([0, 0, 256])),
    ('length', np.int64(1 << 32)),
  ],
)
def test_what_does_not_fit_is_refused(field, value):
  """Mutation: let NumPy wrap it."""
  layout = find_layout(row_features(3, 1000))
  row = {'input_ids': np.arange(3), 'token_type_ids': np.zeros(3, int), 'length': np.int32(3)}
  layout.encode(row)
  with pytest.raises(ValueError, match=field if value.ndim == 0 or len(value) != 2 else 'broadcast'):
    layout.encode({**row, field: value})


def test_numbers_of_variable_length_have_no_layout():
  features = {'a': tfds.features.Tensor(shape=(3,), dtype=np.int32), 'b': tfds.features.Scalar(np.int32)}
  assert find_layout(tfds.features.FeaturesDict(features)) is None
