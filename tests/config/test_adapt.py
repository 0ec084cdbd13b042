"""Grids of sub-networks, and what their configuration refuses."""

import dataclasses

import pytest

from compactlm_jax.config import AdaptConfig, Cell, EncoderConfig, cells
from compactlm_jax.errors import ConfigError

ENCODER = EncoderConfig(vocab_size=64, hidden_size=64, num_layers=4, num_heads=4)


def test_cells_go_from_the_full_network_to_the_smallest():
  """Mutation: iterate over widths first, or in ascending order."""
  found = cells(AdaptConfig(widths=(0.5, 1.0), depths=(0.25, 0.5, 1.0)), ENCODER)
  assert [(c.width, c.depth) for c in found] == [(1, 1), (0.5, 1), (1, 0.5), (0.5, 0.5), (1, 0.25), (0.5, 0.25)]
  assert len(cells(AdaptConfig(), ENCODER)) == 12
  assert [c.width for c in cells(AdaptConfig(), ENCODER, full_depth=True)] == [1.0, 0.75, 0.5, 0.25]


def test_heads_and_neurons_shrink_with_the_hidden_size():
  """Mutation: leave the width of such a cell at 1."""
  found = cells(AdaptConfig(widths=(1.0,), depths=(0.5, 1.0), hidden_sizes=(16, 64)), ENCODER)
  assert found == (Cell(1, 1, 64), Cell(0.25, 1, 16), Cell(1, 0.5, 64), Cell(0.25, 0.5, 16))
  assert [cell.name for cell in found] == ['1x1-h64', '0.25x1-h16', '1x0.5-h64', '0.25x0.5-h16']


@pytest.mark.parametrize(
  ('fields', 'message'),
  [
    ({'widths': ()}, 'config.adapt.widths'),
    ({'widths': (0.5,)}, 'end with 1'),
    ({'widths': (1.0, 0.5)}, 'config.adapt.widths'),
    ({'depths': (0.0, 1.0)}, 'config.adapt.depths'),
    ({'hidden_sizes': (32, 64)}, 'config.adapt.hidden_sizes'),
    ({'stages': ('depth', 'width')}, 'config.adapt.stages'),
    ({'stages': ()}, 'config.adapt.stages'),
    ({'sampling': 'sandwhich'}, "'sandwhich' is unknown; did you mean sandwich\\?"),
    ({'sampling': 'some'}, "config.adapt.sampling: 'some' is unknown; use one of all, sandwich$"),
    ({'hidden_weight': -1.0}, 'config.adapt.hidden_weight'),
    ({'balance_batches': 0}, 'config.adapt.balance_batches'),
  ],
)
def test_what_cannot_be_trained_is_refused(fields, message):
  """Mutation: drop any of the checks."""
  with pytest.raises(ConfigError, match=message):
    AdaptConfig(**fields)


def test_no_stages_are_needed_for_pre_training():
  assert dataclasses.replace(AdaptConfig(), base='mlm', stages=()).stages == ()
