"""The first losses of each tiny run stay what they are: a refactoring changes no number."""

import importlib.util
import json
import pathlib

import numpy as np
import pytest

HERE = pathlib.Path(__file__).parent
_SPEC = importlib.util.spec_from_file_location('golden_regenerate', HERE / 'regenerate.py')
regenerate = importlib.util.module_from_spec(_SPEC)
_SPEC.loader.exec_module(regenerate)


@pytest.mark.parametrize('task', regenerate.TASKS)
def test_losses_are_those_on_record(task):
  """Within 1e-5 of the record on any CPU; how many are equal in hex is only printed: other CPUs sum in another order.

  Mutation: epsilon of LayerNorm, order of fold_in.
  """
  record = json.loads((HERE / f'{task}.json').read_text())
  expected, found = [float.fromhex(x) for x in record['losses']], regenerate.losses(task)
  same = sum(a.hex() == b.hex() for a, b in zip(found, expected, strict=True))
  print(f'{task}: {same} of {len(expected)} losses equal in hex (written with JAX {record["jax"]})')
  assert len(expected) == 50 and expected[-1] < expected[0]
  np.testing.assert_allclose(found, expected, rtol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize('task', regenerate.TASKS)
def test_losses_repeat_in_hex(task):
  """All 50, run twice by one process. Mutation: a seed that counts the calls of `make_train_step`."""
  first, second = ([x.hex() for x in regenerate.losses(task)] for _ in range(2))
  assert first == second and len(set(first)) > 40
