"""Latencies: the clock, the order of calls, medians, ratios, and what is said of a missing engine."""

import dataclasses
import importlib.util

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from compactlm_jax.config import EncoderConfig
from compactlm_jax.errors import ConfigError
from compactlm_jax.interop.bundle import Bundle
from compactlm_jax.jobs import latency
from compactlm_jax.jobs.latency import measure, timed
from compactlm_jax.nn.encoder import encoder_shapes

SMALL = EncoderConfig(
  vocab_size=32, hidden_size=8, num_layers=1, num_heads=2, intermediate_size=8, max_positions=16, scan_unroll=1
)


def _bundle(head=None, **fields):
  config = dataclasses.replace(SMALL, **fields)
  params = jax.tree.map(lambda s: jnp.full(s.shape, 0.1, s.dtype), encoder_shapes(config))
  if head:
    params[head] = {'kernel': jnp.ones((8, 2)), 'bias': jnp.zeros(2)}
  return Bundle(config, params)


class _Machine:
  """A clock that calls advance, by more and more."""

  def __init__(self):
    self.now, self.calls, self.slowdown = 0.0, [], 1.0

  def model(self, name, cost):
    def run():
      self.calls.append(name)
      self.now += cost * self.slowdown

    return run

  def clock(self):
    return self.now


def test_drift_hits_all_models_alike():
  """A machine that becomes ten times slower on the way: the ratio of the medians stays.

  Mutations: all rounds of one model, then all of the next; each round begins with the same model.
  """
  machine = _Machine()
  runs = {'dense': machine.model('dense', 3.0), 'small': machine.model('small', 1.0)}

  def slower():
    machine.slowdown *= 1.02
    return machine.clock()

  times = timed(runs, 41, 1e9, slower)
  assert len(times['dense']) == len(times['small']) == 41
  assert np.median(times['dense']) / np.median(times['small']) == pytest.approx(3, rel=0.05)
  assert machine.calls[:10] == ['dense', 'small', *['dense'] * 2, *['small'] * 4, *['dense'] * 2]


def test_the_second_call_is_timed_and_compilation_is_not():
  """Mutation: time the first call of a round."""
  machine = _Machine()
  costs = iter([100.0, 7.0, 2.0, 7.0, 2.0])

  def run():
    machine.now += next(costs)

  assert timed({'a': run}, 2, 1e9, machine.clock) == {'a': [2.0, 2.0]}


def test_rounds_end_with_the_time_but_not_before_three():
  """Mutation: no least number of rounds."""
  machine = _Machine()
  assert len(timed({'a': machine.model('a', 1.0)}, 20, 0.0, machine.clock)['a']) == 3
  assert len(timed({'a': machine.model('a', 1.0)}, 20, 9.0, machine.clock)['a']) == 5


def test_models_are_measured_through_both_engines():
  """Encoder, classifier and span head, a pruned one among them. No time is asserted.

  Mutation: ratio to the last model.
  """
  pytest.importorskip('onnxruntime')
  models = {
    'dense': _bundle('classifier'),
    'pruned': _bundle('span', heads_per_layer=(0,), neurons_per_layer=(4,)),
    'causal': _bundle(causal=True),
  }
  found = measure(models, batch_sizes=(1, 2), seq_len=5, rounds=3)
  assert [(row.batch, row.engine, row.name) for row in found.rows] == [
    (batch, engine, name)
    for batch in (1, 2)
    for engine in ('jax', 'onnxruntime')
    for name in models
    if (engine, name) != ('onnxruntime', 'causal')
  ]
  base = {(row.batch, row.engine): row.milliseconds for row in found.rows if row.name == 'dense'}
  for row in found.rows:
    assert row.milliseconds > 0 and row.rounds == 3
    assert row.ratio == pytest.approx(row.milliseconds / base[row.batch, row.engine])
  assert len(found.notes) == 1 and 'causal: not measured through onnxruntime' in found.notes[0]


def test_the_functions_that_are_timed_compute_the_same():
  """Mutation: feed the token types as the mask."""
  pytest.importorskip('onnxruntime')
  bundle = _bundle('classifier')
  bundle = dataclasses.replace(
    bundle, params=jax.tree.map(lambda x: jnp.sin(jnp.arange(x.size)).reshape(x.shape), bundle.params)
  )
  sessions, notes = latency._sessions({'a': bundle})
  batch = latency._batch(bundle.config, 2, 5)
  ours = latency._run_jax(bundle.config, latency._wanted(bundle.params), batch)
  np.testing.assert_allclose(sessions['a'].run(None, latency._feeds(batch))[0], ours, atol=1e-5)
  assert not notes


def test_without_onnxruntime_jax_alone_is_measured_and_that_is_said(monkeypatch):
  """Mutation: no note."""
  there = importlib.util.find_spec
  monkeypatch.setattr(importlib.util, 'find_spec', lambda name: None if name == 'onnxruntime' else there(name))
  found = measure({'a': _bundle()}, batch_sizes=(1,), seq_len=4, rounds=1)
  assert [row.engine for row in found.rows] == ['jax']
  assert "which needs onnxruntime: pip install 'compactlm-jax[onnx]'" in found.notes[0]


@pytest.mark.parametrize(
  ('models', 'options', 'message'),
  [
    ({}, {}, 'latency: 0 models'),
    ({'a': None}, {'batch_sizes': (0,)}, r'batch_sizes \(0,\)'),
    ({'a': None}, {'rounds': 0}, 'rounds 0'),
    ({'a': None}, {'seq_len': 17}, 'seq_len: 17; a reads 1 to 16 tokens'),
  ],
)
def test_bad_arguments(models, options, message):
  with pytest.raises(ConfigError, match=message):
    measure(dict.fromkeys(models, _bundle()), **options)


def test_engines_can_be_chosen(monkeypatch):
  """Mutations: prepare both all the same; time nothing in silence."""
  models = {'dense': _bundle('classifier'), 'small': _bundle('classifier', num_heads=1, head_size=4)}
  found = measure(models, batch_sizes=(1,), seq_len=4, rounds=1, engines=('jax',))
  assert {(row.name, row.engine) for row in found.rows} == {('dense', 'jax'), ('small', 'jax')} and not found.notes
  monkeypatch.setattr(importlib.util, 'find_spec', lambda name: None)
  with pytest.raises(ConfigError, match='latency: Not measured through onnxruntime'):
    measure(models, batch_sizes=(1,), seq_len=4, rounds=1, engines=('onnxruntime',))
