"""Row 18 of the fault matrix: exported logits, and the same bytes again. (Kills: interop/test_bundle.py.)"""

import pytest
from exporting import KINDS, deviation

from compactlm_jax.interop.bundle import from_pretrained, save_pretrained


@pytest.mark.torch
@pytest.mark.parametrize('kind', KINDS)
def test_a_hundred_inputs_give_the_logits_of_torch(kind, tmp_path):
  """With padding. Mutation: another epsilon, GELU by tanh, or no mask in attention."""
  pytest.importorskip('torch')
  found, largest = deviation(kind, tmp_path / 'a')
  assert found < 1e-4 and largest > 0.5
  save_pretrained(from_pretrained(tmp_path / 'a'), tmp_path / 'b')
  files = [{p.name: p.read_bytes() for p in (tmp_path / name).iterdir()} for name in 'ab']
  assert files[0] == files[1]
