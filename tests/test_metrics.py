"""metrics.jsonl: every line valid JSON, every step once, whatever killed the run before."""

import io
import json
import math
import os
import subprocess
import sys
import types

import numpy as np
import pytest
from damaging import FullDisk
from tiny import tiny_config

from compactlm_jax import metrics
from compactlm_jax.errors import ConfigError, StorageError
from compactlm_jax.metrics import MetricsWriter, read_metrics
from compactlm_jax.train.reporter import Reporter


def strict(line):
  def refuse(name):
    raise ValueError(name)

  return json.loads(line, parse_constant=refuse)


def test_every_line_is_strict_json_and_reads_back(tmp_path):
  """Mutation: write the float itself in `_number` (NaN is then no JSON, and dumps raises)."""
  values = {'loss': 0.1 + 0.2, 'bad': math.nan, 'up': math.inf, 'down': -math.inf, 'count': 3}
  with MetricsWriter(tmp_path, 10, bar=False) as writer:
    writer.write(1, values)
  (line,) = (tmp_path / 'metrics.jsonl').read_text().splitlines()
  assert strict(line) == {'step': 1, **values, 'bad': 'NaN', 'up': 'Infinity', 'down': '-Infinity'}
  (back,) = read_metrics(tmp_path)
  assert math.isnan(back.pop('bad')) and back == {'step': 1, **{k: v for k, v in values.items() if k != 'bad'}}


def test_resume_keeps_each_step_once(tmp_path):
  """Mutation: drop the call of `_keep_until` (steps 4 to 6 stand twice)."""
  with MetricsWriter(tmp_path, 9, bar=False) as writer:
    for step in range(1, 7):
      writer.step(step, {'loss': step / 7})
  with MetricsWriter(tmp_path, 9, start_step=3, bar=False) as writer:
    for step in range(4, 10):
      writer.step(step, {'loss': step / 7})
  assert [(m['step'], m['loss']) for m in read_metrics(tmp_path)] == [(s, s / 7) for s in range(1, 10)]


@pytest.mark.parametrize('cut', [1, 2, 7])
def test_a_torn_last_line_is_dropped(tmp_path, cut):
  """Mutation: `text.split('\\n')` without `[:-1]` (a line cut just before its newline would glue to the next)."""
  with MetricsWriter(tmp_path, 9, bar=False) as writer:
    for step in (1, 2, 3):
      writer.write(step, {'loss': 0.5})
  file = tmp_path / 'metrics.jsonl'
  file.write_bytes(file.read_bytes()[:-cut])
  assert [m['step'] for m in read_metrics(tmp_path)] == [1, 2]
  with MetricsWriter(tmp_path, 9, start_step=5, bar=False) as writer:
    writer.write(6, {'loss': 0.5})
  assert [strict(line)['step'] for line in file.read_text().splitlines()] == [1, 2, 6]


def test_lines_survive_a_kill(tmp_path):
  """Mutation: remove `flush` (the lines die with the process)."""
  code = (
    'import os, sys; from compactlm_jax.metrics import MetricsWriter\n'
    'w = MetricsWriter(sys.argv[1], 9, bar=False)\n'
    'w.write(1, {"loss": 1.0}); w.write(2, {"loss": 2.0}); os.kill(os.getpid(), 9)'
  )
  result = subprocess.run([sys.executable, '-c', code, str(tmp_path)], env={**os.environ, 'JAX_PLATFORMS': 'cpu'})
  assert result.returncode == -9
  assert [m['step'] for m in read_metrics(tmp_path)] == [1, 2]


def test_tokens_per_second_counts_unlogged_steps(tmp_path, monkeypatch):
  """Mutation: add tokens only on logged steps (the rate falls to 100 / 10)."""
  now = [0.0]
  monkeypatch.setattr(metrics.time, 'monotonic', lambda: now[0])
  with MetricsWriter(tmp_path, 20, bar=False) as writer:
    for step in range(1, 21):
      now[0] += 1.0
      writer.step(step, {'loss': 1.0}, tokens=100, logged=step % 10 == 0)
  assert [(m['step'], m['tokens_per_second']) for m in read_metrics(tmp_path)] == [(10, 100.0), (20, 100.0)]


def test_a_line_says_how_long_the_run_will_take_and_what_it_used(tmp_path, monkeypatch, caplog):
  """30 s of compiling count as used, not as pace. Mutation: divide by all steps since opening (12.5 s a step)."""
  now = [1000.0]
  monkeypatch.setattr(metrics.time, 'monotonic', lambda: now[0])
  monkeypatch.setattr(metrics.time, 'time', lambda: 86400.0 * 400)
  monkeypatch.setattr(metrics.jax, 'device_count', lambda: 360)
  with caplog.at_level('INFO'), MetricsWriter(tmp_path, 104, bar=False) as writer:
    now[0] += 30.0
    for step in range(1, 5):
      now[0] += 10.0
      writer.step(step, {'loss': 1.0}, tokens=64, logged=step in (1, 4))
  first, last = read_metrics(tmp_path)
  assert (first['seconds_left'], first['device_hours']) == (103 * 40.0, 4.0)
  assert (last['seconds_left'], last['device_hours']) == (1000.0, 7.0)
  assert '16:40 left (until 1971-' in caplog.text and '7 device-hours used' in caplog.text


def test_device_hours_add_up_over_resumes_with_the_steps_that_a_kill_lost(tmp_path, monkeypatch):
  """Mutation: read them after dropping the lines that are run again (the second run then starts at 1)."""
  now = [0.0]
  monkeypatch.setattr(metrics.time, 'monotonic', lambda: now[0])
  monkeypatch.setattr(metrics.jax, 'device_count', lambda: 2)
  for start in (0, 1):
    with MetricsWriter(tmp_path, 9, start_step=start, bar=False) as writer:
      for step in range(start + 1, start + 4):
        now[0] += 1800.0
        writer.step(step, {'loss': 1.0})
      writer.write(step, {'eval_loss': 1.0})
  assert [m['device_hours'] for m in read_metrics(tmp_path) if 'loss' in m] == [1.0, 4.0, 5.0, 6.0]


@pytest.mark.parametrize('steps', [0, 1, 3])
def test_device_hours_outlive_a_process_that_logs_nothing(tmp_path, monkeypatch, steps):
  """The lines that it drops told them. Mutations: write no file of hours; do not read it; leave it behind."""
  now = [0.0]
  monkeypatch.setattr(metrics.time, 'monotonic', lambda: now[0])
  monkeypatch.setattr(metrics.jax, 'device_count', lambda: 1)
  with MetricsWriter(tmp_path, 9, bar=False) as writer:
    for step in range(1, 5):
      now[0] += 3600.0
      writer.step(step, {'loss': 1.0 / step}, logged=step > 1)
  before = read_metrics(tmp_path)
  for _ in range(2):
    MetricsWriter(tmp_path, 9, start_step=steps, bar=False).close()
  with MetricsWriter(tmp_path, 9, start_step=steps, bar=False) as writer:
    now[0] += 3600.0
    writer.step(steps + 1, {'loss': 2.0})
  *kept, last = read_metrics(tmp_path)
  assert kept == [line for line in before if line['step'] <= steps] and last['device_hours'] == 5.0
  assert [path.name for path in tmp_path.iterdir() if path.is_file()] == ['metrics.jsonl']


class Step:
  """The metrics of a step of one second on a device with a clock of its own."""

  free = 0.0

  def __init__(self, now, waits):
    self.now, self.end = now, max(now[0], Step.free) + 1.0
    Step.free = self.end
    now[0] = self.end if waits else now[0]

  def is_ready(self):
    return self.now[0] >= self.end

  def __array__(self, *args, **kwargs):
    self.now[0] = max(self.now[0], self.end)
    return np.zeros(())


@pytest.mark.parametrize('waits', [True, False])
def test_rates_do_not_depend_on_when_a_step_is_reported(tmp_path, monkeypatch, waits):
  """A checkpoint after every third step, on devices whose calls wait for them or do not.

  Mutations: take the time where the line is written, or where the step is added.
  """
  now = [0.0]
  monkeypatch.setattr(Step, 'free', 0.0)
  monkeypatch.setattr(metrics.time, 'monotonic', lambda: now[0])
  batch = types.SimpleNamespace(attention_mask=np.ones((16, 4)), input_ids=np.ones((16, 4)))
  with MetricsWriter(tmp_path, 9, bar=False) as writer:
    reporter = Reporter(None, tiny_config(log_every=1), lambda step: 0.1, writer, tmp_path)
    for done in range(1, 10):
      step = Step(now, waits)
      reporter.add(done, {'loss': step, 'bad_step': step}, batch, None, None)
      if done % 3 == 0:
        reporter.flush()
  assert [(m['step'], m['tokens_per_second']) for m in read_metrics(tmp_path)] == [(i, 64.0) for i in range(1, 10)]


def test_bar_shows_position_loss_rate_and_time_left(tmp_path, capsys):
  """Mutation: drop `initial=start_step` (the bar then starts at 0 and shows 5/10 only after the resume)."""
  with MetricsWriter(tmp_path, 10, start_step=4, bar=True) as writer:
    assert '4/10' in capsys.readouterr().err
    writer.step(5, {'loss': 0.25, 'loss_mlm': 0.125, 'learning_rate': 1.0}, tokens=64)
    writer._bar.refresh()
  shown = capsys.readouterr().err
  assert '5/10' in shown and 'loss=0.25' in shown and 'loss_mlm=0.125' in shown and 'tokens/s=' in shown
  assert '<' in shown and 'learning_rate' not in shown  # tqdm writes elapsed<left


def test_plain_lines_in_a_log_without_a_terminal(tmp_path, capsys, caplog):
  """A pruning run tells its density. Mutations: open the bar always (carriage returns in the log); only losses."""
  with caplog.at_level('INFO'), MetricsWriter(tmp_path, 10) as writer:
    writer.step(5, {'loss': 0.25, 'density': 0.125, 'grad_norm': 1.0}, tokens=64)
  assert capsys.readouterr().err == '' and 'left' in caplog.text
  assert 'step 5/10, loss 0.25, density 0.125, tokens/s' in caplog.text


def test_bar_in_a_notebook_whose_output_is_no_terminal(tmp_path, monkeypatch):
  """Mutation: ask `isatty` alone (a cell that trains for minutes then shows nothing)."""
  output = type('OutStream', (io.StringIO,), {'__module__': 'ipykernel.iostream'})()
  monkeypatch.setattr(metrics.sys, 'stderr', output)
  with MetricsWriter(tmp_path, 10) as writer:
    writer.step(5, {'loss': 0.25}, tokens=64)
    writer._bar.refresh()
  assert '5/10' in output.getvalue() and 'loss=0.25' in output.getvalue()


def test_lines_wait_for_space(tmp_path, monkeypatch, caplog):
  """Mutations: drop `except` in `GrowingFile.write`; forget there what was not written, or write all of it again."""
  disk = FullDisk(monkeypatch, lines=True)
  with MetricsWriter(tmp_path, 10, bar=False) as writer:
    for step, disk.full in ((1, False), (2, True), (3, True), (4, True)):
      writer.write(step, {'loss': 1.0})
    assert [m['step'] for m in read_metrics(tmp_path)] == [1]
    assert caplog.text.count('metrics.jsonl: cannot be written (No space left on device); lines are kept') == 1
    with pytest.raises(OSError, match=r'No space left.*metrics\.jsonl'):
      writer.sync()
    disk.full = False
    writer.write(5, {'loss': 1.0})
    lines = (tmp_path / 'metrics.jsonl').read_text().splitlines()
    assert [strict(line)['step'] for line in lines] == [1, 2, 3, 4, 5]


def test_lines_that_never_find_space_are_an_error_unless_there_is_one(tmp_path, monkeypatch):
  """Mutations: leave the OSError of `close` as it is; drop `suppress` in `__exit__`."""
  disk = FullDisk(monkeypatch, lines=True)
  for error, message in ((None, r'metrics\.jsonl: cannot be written \(No space left.*same command'), (KeyError, 'own')):
    with pytest.raises(error or StorageError, match=message), MetricsWriter(tmp_path, 10, bar=False) as writer:
      for step in (1, 2):
        writer.write(step, {'loss': 1.0})
      if error:
        raise error('own')
  disk.full = False
  with MetricsWriter(tmp_path, 10, bar=False) as writer:
    writer.write(1, {'loss': 1.0})
  assert [m['step'] for m in read_metrics(tmp_path)] == [1]


def test_other_processes_write_nothing(tmp_path, monkeypatch):
  """Mutation: `_active = True` always."""
  monkeypatch.setattr(metrics.jax, 'process_index', lambda: 1)
  with MetricsWriter(tmp_path, 10, bar=True) as writer:
    writer.step(1, {'loss': 1.0})
    writer.write(1, {'loss': 1.0})
  assert list(tmp_path.iterdir()) == []


def test_tensorboard_is_optional_and_named_when_missing(tmp_path, monkeypatch):
  """Mutation: import tensorboardX at the top of the module."""
  monkeypatch.setitem(sys.modules, 'tensorboardX', None)
  with pytest.raises(ConfigError, match='tensorboard'):
    MetricsWriter(tmp_path, 10, bar=False, tensorboard=True)


def test_tensorboard_that_blocks_stops_no_run(tmp_path, monkeypatch, caplog):
  """As tensorboardX does on a full disk. Mutation: call `add_scalar` in `write`."""
  import threading

  free = threading.Event()
  board = types.SimpleNamespace(add_scalar=lambda *args: free.wait(5), close=lambda: None)
  monkeypatch.setitem(sys.modules, 'tensorboardX', types.SimpleNamespace(SummaryWriter=lambda folder: board))
  monkeypatch.setattr(metrics, '_BOARD_LINES', 3)
  monkeypatch.setattr(metrics, '_BOARD_SECONDS', 0.1)
  with MetricsWriter(tmp_path, 10, bar=False, tensorboard=True) as writer:
    for step in range(1, 10):
      writer.write(step, {'loss': 0.5})
  assert not free.is_set() and [m['step'] for m in read_metrics(tmp_path)] == list(range(1, 10))
  assert caplog.text.count('TensorBoard: ') == 2
  free.set()


def test_tensorboard_gets_the_same_numbers(tmp_path, monkeypatch):
  """Mutation: drop `add_scalar`."""
  seen = []

  class Board:
    def __init__(self, folder):
      seen.append(folder)

    def add_scalar(self, tag, value, step):
      seen.append((tag, value, step))

    def close(self):
      seen.append('closed')

  monkeypatch.setitem(sys.modules, 'tensorboardX', types.SimpleNamespace(SummaryWriter=Board))
  with MetricsWriter(tmp_path, 10, bar=False, tensorboard=True) as writer:
    writer.write(2, {'loss': 0.5})
  assert seen == [str(tmp_path / 'tensorboard'), ('loss', 0.5, 2), 'closed']
