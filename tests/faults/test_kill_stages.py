"""A network made adaptive in stages, killed in two of them: it ends with the bits of an uninterrupted run.

What the run keeps beside its checkpoints is compared too: the best network, each cell at its best, and their record.
"""

import pytest
from faulted_runs import finish, kill, losses, outcome, resumed, saved, start, wait_for

STEPS = 12  # of each stage


@pytest.mark.slow
def test_killed_in_two_stages_it_ends_with_the_same_bits(tmp_path):
  """Before and after the first checkpoint. Mutation: start the second stage from the teacher after a kill."""
  cache, whole, killed = (tmp_path / name for name in ('cache', 'whole', 'killed'))
  finish(start(whole, 'adapt', cache))
  expected = outcome(whole)
  assert list(expected) == ['width', ''] and all(
    stage['kept'] and 'grid' in stage['results'] for stage in expected.values()
  )
  for lines, finished in ((4, False), (11, False), (STEPS + 11, True)):  # twice in the first stage, once in the second
    process = start(killed, 'adapt', cache)
    assert wait_for(process, killed, lines) and kill(process), process.text()[-3000:]
    assert losses(killed).items() <= losses(whole).items()
    assert (killed / 'stages' / 'width' / 'results.json').exists() == finished
    assert (killed / 'config.json').exists() == finished and not (killed / 'results.json').exists()
  at = saved(killed)  # the save of step 5 is over, since that of step 10 waits for it
  said = finish(start(killed, 'adapt', cache))
  assert 'stages/width is finished and kept' in said and resumed(said) == at >= 5
  assert outcome(killed) == expected
