"""A line in the log about a step that does not come to its end."""

import logging

from compactlm_jax.train.watchdog import Watchdog


def test_a_step_that_hangs_is_logged_once(caplog):
  """Not the first ones, not evaluations, not tenfold milliseconds. Mutations: count what follows `done`; no minimum."""
  clock = [0.0]
  caplog.set_level(logging.WARNING, 'compactlm_jax')
  with Watchdog(lambda: clock[0], look=0) as dog:
    for step in dog.over(100, range(100, 130)):
      clock[0] += 100 if step == 100 else 2
      if step == 120:
        clock[0] += 17
        dog.check()
        assert not caplog.messages
        clock[0] += 2
        dog.check()
        dog.check()
      dog.done()
      clock[0] += 1000  # a save
      dog.check()
  assert caplog.messages == [
    'step 121 takes 21 s so far, the median is 2 s: another host, the device, the data or compiling (rows of a '
    'new length) keep it waiting'
  ]
  caplog.clear()
  with Watchdog(lambda: clock[0], look=0) as dog:
    for step in dog.over(0, range(20)):
      clock[0] += 9 if step == 19 else 0.01
      dog.check()
      dog.done()
  assert not caplog.messages


def test_waiting_for_data_belongs_to_a_step(caplog):
  """Mutation: begin the step when its batch is there."""
  clock, dog = [0.0], Watchdog(lambda: clock[0], look=0)

  def batches():
    for step in range(20):
      clock[0] += 30 if step == 15 else 1
      dog.check()
      yield step

  for _ in dog.over(0, batches()):
    dog.done()
  assert len(caplog.messages) == 1 and 'step 16 takes 30 s' in caplog.messages[0]
