"""What stands in the cells of written tables."""

import pytest

from compactlm_jax.jobs.output import tsv_cell


@pytest.mark.parametrize(
  ('value', 'short', 'exact'),
  [
    (None, '', ''),
    ('two  blanks ', 'two blanks', 'two  blanks '),
    ('a\tb\r\n c', 'a b c', 'a b c'),
    (0.123456789, '0.123457', '0.123456789'),
    (3, '3', '3'),
    (True, 'True', 'True'),
    (['ä', 1], "['ä', 1]", '["ä", 1]'),
  ],
)
def test_cells_need_no_quoting(value, short, exact):
  """Mutations: keep a tab; tidy blanks of what is copied; round its numbers; write JSON's `true`, which is
  another label than the True that tables read from it."""
  assert tsv_cell(value) == short and tsv_cell(value, exact=True) == exact
