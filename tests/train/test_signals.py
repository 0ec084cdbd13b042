"""Requests to stop, one inside another."""

import signal

import pytest

from compactlm_jax.train.signals import StopRequest


def test_a_request_is_known_inside_and_outside(tmp_path):
  """SIGTERM while data are loaded stops the run that starts next; one during a run stops the series after it.

  Mutations: inherit nothing on entry; hand nothing back on exit.
  """
  before = signal.getsignal(signal.SIGTERM)
  with StopRequest() as series:
    signal.raise_signal(signal.SIGTERM)
    with StopRequest() as run:
      assert run.requested()
  with StopRequest() as series:
    with StopRequest() as run:
      assert not run.requested()
      signal.raise_signal(signal.SIGTERM)
      assert run.requested() and not series.requested()
    assert series.requested()
    with StopRequest() as run:
      assert run.requested()
  assert signal.getsignal(signal.SIGTERM) == before
  with StopRequest() as fresh:
    assert not fresh.requested()


def test_only_a_second_ctrl_c_aborts():
  """Whatever else was asked before. Mutation: raise KeyboardInterrupt at any signal after the first."""
  with StopRequest() as run:
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGTERM):
      signal.raise_signal(number)
    with pytest.raises(KeyboardInterrupt):
      signal.raise_signal(signal.SIGINT)
    assert run.requested()
