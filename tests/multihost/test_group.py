"""What processes say to each other, with threads in place of processes and a dictionary in place of JAX's service."""

import json
import threading
import time
import types

import pytest

from compactlm_jax import distributed
from compactlm_jax.distributed import Group
from compactlm_jax.errors import ConfigError


class Store:
  """The part of JAX's client of the coordination service that `Group` uses."""

  def __init__(self, count):
    self.values, self.changed, self.barrier = {}, threading.Condition(), threading.Barrier(count)

  def key_value_set(self, key, value, allow_overwrite=False):
    with self.changed:
      assert allow_overwrite or key not in self.values, key
      self.values[key] = value
      self.changed.notify_all()

  def key_value_dir_get(self, folder):
    with self.changed:
      return [(key, value) for key, value in self.values.items() if key.startswith(folder + '/')]

  def blocking_key_value_get(self, key, timeout_in_ms):
    with self.changed:
      if not self.changed.wait_for(lambda: key in self.values, timeout_in_ms / 1000):
        raise RuntimeError('DEADLINE_EXCEEDED: timed out')
      return self.values[key]

  def wait_at_barrier(self, name, timeout_in_ms):
    self.barrier.wait(timeout_in_ms / 1000)


def on_all(count, work, leave=None):
  """Results of work(group) in a thread for each process; an error is a result too."""
  store, found = Store(count), [None] * count

  def process(index):
    try:
      found[index] = work(Group(store, index, count, leave and leave(index)))
    except Exception as e:
      found[index] = e

  threads = [threading.Thread(target=process, args=(i,), daemon=True) for i in range(count)]
  for thread in threads:
    thread.start()
  for thread in threads:
    thread.join(120)
  return found


def test_texts_come_in_the_order_of_processes():
  """Mutation: do not count the calls; the second answer is then the first one again."""

  def work(group):
    time.sleep(0.02 * (group.count - group.index))
    return [group.gather('a', f'{round}:{group.index}') for round in range(2)]

  assert on_all(3, work) == [[['0:0', '0:1', '0:2'], ['1:0', '1:1', '1:2']]] * 3


@pytest.mark.parametrize('asked', [0, 2])
def test_all_stop_at_the_same_call(asked):
  """Processes may be one step apart, as collectives let them. Mutation: stop at the largest count, not after it."""
  steps = threading.Barrier(3)

  def work(group):
    for step in range(1, 1000):
      if step == 5 and group.index == asked:
        group.ask_stop()
      if group.stop_now():
        return step
      if group.index == 0:
        time.sleep(0.01)
      try:
        steps.wait(20)  # a collective: nobody gets through alone
      except threading.BrokenBarrierError:
        return f'waits in step {step} for those who stopped'
    return 'never'

  found = on_all(3, work)
  assert len(set(found)) == 1 and isinstance(found[0], int) and found[0] > 5


def test_what_differs_is_named_with_its_processes(monkeypatch):
  """Mutation: compare with process 0 only when this is process 0: the others would go on."""

  def work(group):
    monkeypatch.setattr(distributed, 'group', lambda: group_of[threading.get_ident()])
    group_of[threading.get_ident()] = group
    rate = 0.5 if group.index == 1 else 0.25
    distributed.check_same('configuration', {'config.rate': rate, 'config.seed': 3, 'flag.workdir': 'gs://a'})

  group_of = {}
  found = on_all(3, work)
  assert {type(e) for e in found} == {ConfigError} and len(set(map(str, found))) == 1
  assert 'config.rate: 0.25 on processes 0, 2, 0.5 on process 1.' in str(found[0]) and 'seed' not in str(found[0])


def test_a_failure_ends_those_who_wait_for_the_failed_one(monkeypatch, capsys):
  """One failed with 65, one is stuck, one is done: all end with 65. Mutation: return `code` from `end`."""
  monkeypatch.setattr(distributed, '_GRACE_SECONDS', 0.1)
  monkeypatch.setattr(distributed, '_LOOK_SECONDS', 0.02)
  monkeypatch.setattr('jax.distributed.shutdown', lambda: None)
  left, cleaned, stuck = [], [], threading.Event()

  def leave(index):
    def ended(code):
      left.append((index, code))
      stuck.set()

    return ended

  def work(group):
    if group.index == 0:
      return group.end(0)
    if group.index == 1:
      return group.end(65, 'row 7 is damaged')
    with group.cleanup(lambda: cleaned.append('lock')):
      stuck.wait(100)
    return 'stuck'

  assert on_all(3, work, leave) == [65, 65, 'stuck']
  assert left == [(2, 65)] and cleaned == ['lock']
  assert 'process 1 ended with 65: row 7 is damaged' in capsys.readouterr().err


def test_the_reason_is_that_of_the_one_who_knows_it(monkeypatch):
  """A process that only lost its peer says 75; the peer says why. Mutation: take the first code."""
  monkeypatch.setattr('jax.distributed.shutdown', lambda: None)
  assert on_all(2, lambda group: group.end([75, 78][group.index], 'why')) == [78, 78]
  assert on_all(2, lambda group: group.end(75, 'why')) == [75, 75]
  assert on_all(2, lambda group: group.end(0)) == [0, 0]


def test_what_tells_of_a_lost_process(monkeypatch):
  """Mutation: only RuntimeErrors tell; what goes wrong while a step is dispatched is a ValueError."""
  assert distributed.lost_peer(RuntimeError('Gloo all-reduce failed')) == ''  # a single process has none
  assert json.dumps(distributed.first_line(ValueError('a\nb'))) == '"a"'
  monkeypatch.setattr(distributed, '_group', types.SimpleNamespace(count=2))
  gloo = 'UNKNOWN: Gloo all-reduce failed: Read error [127.0.0.1]:29412: Connection reset by peer'
  assert distributed.lost_peer(ValueError(gloo)) == distributed.lost_peer(RuntimeError(gloo)) == gloo
  assert distributed.lost_peer(ValueError('peer is no relation')) == distributed.lost_peer(KeyError(gloo)) == ''
