"""Word vectors of GloVe's text format."""

import gzip

import numpy as np
import pytest

from compactlm_jax.data.vectors import read_vectors
from compactlm_jax.errors import DataError

LINES = 'the 3 4\ntree 0 -2.5\n. . . 1 1\nzero 0 0\nthe 1 0\n<unk> 1 1\nCafé 1e1 0\n'
EXPECTED = {'the': [0.6, 0.8], 'tree': [0, -1], 'Café': [1, 0]}


@pytest.mark.parametrize('name', ['v.txt', 'v.txt.gz', 'counted.txt'])
def test_words_and_vectors_of_length_one(name, tmp_path):
  """Words with blanks, second lines and zeros are skipped. Mutation: keep the second vector of a word."""
  data = (('7 2\n' if name == 'counted.txt' else '') + LINES).encode()
  (tmp_path / name).write_bytes(gzip.compress(data) if name.endswith('.gz') else data)
  found = read_vectors(tmp_path / name)
  assert found.words == tuple(EXPECTED) and found.vectors_VE.dtype == np.float32
  np.testing.assert_allclose(found.vectors_VE, list(EXPECTED.values()), atol=1e-7)
  assert read_vectors(tmp_path / name, most_words=2).words == ('the', 'tree')


@pytest.mark.parametrize(
  ('content', 'message'),
  [
    ('a 1 2\nb 1 2\nc 1 2 3\n', r':3: 3 numbers, but the lines before have 2; vectors of one file are of one length'),
    ('a 1 2\nb 1\n', ':2: 1 numbers, but the lines before have 2'),
    ('a 1 2\nb 1 nan\n', ":2: the vector of 'b' holds something that is no finite number"),
    ('a 1 2\nb 1 two\n', ":2: the vector of 'b' holds something"),
    ('', 'no vectors; expected a word and its numbers'),
    ('house\n', ':1: expected a word and its numbers, separated by blanks'),
  ],
)
def test_bad_files_are_named_with_their_line(content, message, tmp_path):
  """Mutation: take the length of each line for itself."""
  (tmp_path / 'v.txt').write_text(content)
  with pytest.raises(DataError, match=message):
    read_vectors(tmp_path / 'v.txt')


def test_a_missing_file_is_named(tmp_path):
  with pytest.raises(DataError, match='no such file'):
    read_vectors(tmp_path / 'v.txt')
