"""Runs that are killed at random moments, and runs of 2,000 steps: the sections `kills` and `long` of faults.py.

Every task in rotation, as `compactlm train` in processes of their own (tests/faulted_runs.py). A run is killed by
SIGKILL: one time in four while it starts, else some steps after its first one, at any moment of a step, a save or an
evaluation. The same command starts it again, and nothing else touches its directory. At the end losses, evaluations,
parameters and optimiser have to be those of a run that was left alone, and checkpoints never take more disk than its.
"""

from __future__ import annotations

import collections
import dataclasses
import os
import pathlib
import random
import statistics
import sys
import tempfile
import time

sys.path.insert(0, str(pathlib.Path(__file__).parents[1] / 'tests'))

import faulted_runs as runs

EVERY = 5
SHORT = {'steps': 60, 'checkpoint_every': EVERY, 'eval_every': 20}
LONG = {'steps': 2000, 'checkpoint_every': 100, 'eval_every': 500}
WARM = 200  # steps after which nothing new is compiled: the first evaluation has its time before 2 * WARM
KILLS_PER_RUN = 4
KEEP = runs.SMALL['keep']
DISK = KEEP + 1.1  # checkpoints: a new one is whole before the oldest goes; sizes differ by a few bytes
GROWTH = 5.0  # percent
Figures = list[tuple[str, str]]
Found = tuple[Figures, list[str]]
"""(what, figure) of a section, and its problems: what should not be."""


@dataclasses.dataclass
class Tally:
  """What was counted over all runs."""

  kills: int = 0
  starting: int = 0
  saving: int = 0
  redone: list[int] = dataclasses.field(default_factory=list)
  finished: int = 0
  equal: int = 0
  replayed: int = 0
  differing: int = 0
  repairs: int = 0
  disk: float = 0.0
  left: float = 0.0
  tasks: collections.Counter[str] = dataclasses.field(default_factory=collections.Counter)

  def problems(self) -> list[str]:
    """What should not be; nothing if every run went as it must."""
    found = {
      f'{self.finished - self.equal} of {self.finished} runs end with other bits': self.equal != self.finished,
      'no run came to its end': not self.finished,
      f'{self.differing} of {self.replayed} losses logged before a kill differ': self.differing,
      f'{self.repairs} runs needed repair by hand': self.repairs,
      f'checkpoints take the disk of {self.disk:.2f} of them after a restart': self.disk > DISK,
      f'checkpoints take the disk of {self.left:.2f} of them at the end': self.left > KEEP + 0.1,
    }
    return [problem for problem, there in found.items() if there]


@dataclasses.dataclass
class Alone:
  """A run that was left alone: outcome, losses, seconds to its first line and between two, bytes of a checkpoint."""

  outcome: dict
  losses: dict
  start: float
  pace: float
  sizes: dict[str, int]


@dataclasses.dataclass(frozen=True)
class Sample:
  """A look at a running process: steps logged, resident memory and disk in bytes, open files."""

  step: int
  memory: int
  files: int
  disk: int


def written(workdir: pathlib.Path) -> list[tuple[str, int]]:
  """What changes when a run of any stage writes a line."""
  return [(name, p.stat().st_mtime_ns) for name, run in runs.runs(workdir).items() for p in run.glob('metrics.jsonl')]


def left_alone(workdir: pathlib.Path, task: str, cache: pathlib.Path, **changes: object) -> Alone:
  """Runs a task to its end."""
  started = time.monotonic()
  process = runs.start(workdir, task, cache, **changes)
  while not written(workdir) and process.popen.poll() is None:
    time.sleep(0.01)
  first = time.monotonic()
  runs.finish(process)
  losses = runs.losses(workdir)
  pace = (time.monotonic() - first) / len(losses)
  return Alone(runs.outcome(workdir), losses, first - started, pace, sizes_of(workdir))


def sizes_of(workdir: pathlib.Path) -> dict[str, int]:
  """Stage -> bytes of its last checkpoint."""
  return {name: bytes_in(run / 'checkpoints' / str(runs.saved(run))) for name, run in runs.runs(workdir).items()}


def disk(workdir: pathlib.Path, alone: Alone) -> float:
  """How many checkpoints take as much disk as those of a run, in the stage that has the most.

  The lower of two looks: a save that is renamed during one is counted under both names.
  """
  folders = {name: run / 'checkpoints' for name, run in runs.runs(workdir).items()}
  return min(max(bytes_in(folder) / alone.sizes[name] for name, folder in folders.items()) for _ in range(2))


def go_on(process: runs.processes.Process, workdir: pathlib.Path, before: list[tuple[str, int]], steps: int) -> None:
  """Waits until a process has written its first lines, and so many more."""
  while written(workdir) == before and process.popen.poll() is None:
    time.sleep(0.002)
  wanted = len(runs.losses(workdir)) + steps
  while len(runs.losses(workdir)) < wanted and process.popen.poll() is None:
    time.sleep(0.002)


def survive(workdir: pathlib.Path, task: str, cache: pathlib.Path, alone: Alone, moments: random.Random, tally: Tally,
            kills: int, **changes: object) -> None:  # fmt: skip
  """Kills a run so many times, lets it end, and compares."""
  while True:
    before, process = written(workdir), runs.start(workdir, task, cache, **changes)
    starting = moments.random() < 0.25
    if kills:
      if not starting:
        go_on(process, workdir, before, 0)
        tally.disk = max(tally.disk, disk(workdir, alone))
        go_on(process, workdir, before, moments.randrange(len(alone.losses) // (kills + 1) + 1))
        tally.disk = max(tally.disk, disk(workdir, alone))
      time.sleep(moments.uniform(0, alone.start / 2 if starting else 10 * alone.pace))
      if runs.kill(process):
        kills -= 1
        note(workdir, task, tally, alone, written(workdir) == before)
        continue
    if process.popen.wait(runs.processes.PATIENCE):
      tally.repairs += 1  # it would need a person
      print(f'{workdir}: exit code {process.popen.returncode}\n{process.text()[-3000:]}', file=sys.stderr)
      return
    tally.finished += 1
    tally.left = max(tally.left, disk(workdir, alone))
    tally.equal += runs.outcome(workdir) == alone.outcome
    return


def note(workdir: pathlib.Path, task: str, tally: Tally, alone: Alone, starting: bool) -> None:
  """Counts a kill; `starting` if the process had written nothing."""
  _, _, redone = runs.lost(workdir)
  tally.kills += 1
  tally.tasks[task] += 1
  tally.starting += starting
  tally.saving += any('tmp' in p.name for run in runs.runs(workdir).values() for p in run.glob('checkpoints/*'))
  if not starting:
    tally.redone.append(redone)
  seen = runs.losses(workdir)
  tally.replayed += len(seen)
  tally.differing += sum(alone.losses.get(place) != loss for place, loss in seen.items())


def kill_figures(seed: int, kills: int = 50, tasks: tuple[str, ...] = runs.TASKS, folder: str = '') -> Found:
  """Section `kills`: at least so many over all tasks. What runs leave is kept in `folder`, if one is named."""
  moments, tally = random.Random(seed), Tally()
  with tempfile.TemporaryDirectory() as temporary:
    root, alone, number = pathlib.Path(folder or temporary), {}, 0
    while tally.kills < kills:
      task = tasks[number % len(tasks)]
      changes = {**SHORT, **({'steps': 30, 'eval_every': 10} if task == 'adapt' else {})}  # in each of two stages
      cache = root / f'cache-{task}'
      if task not in alone:
        alone[task] = left_alone(root / f'alone-{task}', task, cache, **changes)
      survive(root / f'run-{number}', task, cache, alone[task], moments, tally, KILLS_PER_RUN, **changes)
      number += 1
      print(f'{task}: {tally}', file=sys.stderr, flush=True)
  return summary(tally, EVERY), tally.problems()


def summary(tally: Tally, every: int) -> Figures:
  """The figures of killed runs."""
  tasks = ', '.join(f'{task} {count}' for task, count in sorted(tally.tasks.items()))
  return [
    (
      'SIGKILL at random moments',
      f'{tally.kills} kills ({tasks}; {tally.starting} while starting, {tally.saving} with a save under way)',
    ),
    (
      'killed runs that end with the bits of a run left alone: every loss and evaluation, parameters, optimiser',
      f'{tally.equal} of {tally.finished}',
    ),
    (
      'losses logged before a kill that differ from those of the run left alone',
      f'{tally.differing} of {tally.replayed}',
    ),
    (
      f'steps done again per kill, saving every {every}',
      f'median {statistics.median(tally.redone):g}, at most {max(tally.redone)}',
    ),
    disk_figure(tally),
    ('runs that needed repair by hand', str(tally.repairs)),
  ]


def disk_figure(tally: Tally) -> tuple[str, str]:
  """Of killed runs; those left alone have one of their own."""
  what = f'most disk that checkpoints of killed runs take after a restart, and at the end, keep = {KEEP}'
  return what, f'{tally.disk:.2f} and {tally.left:.2f} checkpoints'


def last_step(path: pathlib.Path) -> int:
  """The step of the last whole line of metrics.jsonl, without reading all of it."""
  try:
    with path.open('rb') as file:
      file.seek(max(0, path.stat().st_size - 4096))
      lines = file.read().split(b'\n')[:-1]
    return int(lines[-1].split(b'"step": ')[1].split(b',')[0])
  except (OSError, IndexError, ValueError):
    return 0


def bytes_in(folder: pathlib.Path) -> int:
  """Bytes of all files below a folder, which may change meanwhile."""
  total = 0
  for base, _, names in os.walk(folder):
    for name in names:
      try:
        total += os.lstat(os.path.join(base, name)).st_size
      except FileNotFoundError:
        continue
  return total


def look(process: runs.processes.Process, workdir: pathlib.Path) -> Sample | None:
  """A sample; None once the process is gone."""
  proc = pathlib.Path(f'/proc/{process.popen.pid}')
  try:
    memory = int((proc / 'statm').read_text().split()[1]) * os.sysconf('SC_PAGE_SIZE')
    files = len(os.listdir(proc / 'fd'))
  except (OSError, IndexError):
    return None
  return Sample(last_step(workdir / 'metrics.jsonl'), memory, files, bytes_in(workdir / 'checkpoints'))


def watched(workdir: pathlib.Path, task: str, cache: pathlib.Path, **changes: object) -> list[Sample]:
  """Samples of a run that is left alone, five a second."""
  process, samples = runs.start(workdir, task, cache, **changes), []
  while process.popen.poll() is None:
    if (sample := look(process, workdir)) is not None:
      samples.append(sample)
    time.sleep(0.2)
  runs.finish(process)
  return samples


def flatness(samples: list[Sample], steps: int, size: int) -> tuple[float, int, int, float]:
  """(growth of memory in percent, open files early and late, most disk in checkpoints) from WARM to the last steps."""
  # The first evaluation compiles; memory is compared from then on.
  first = LONG['eval_every'] if steps > 2 * LONG['eval_every'] else WARM
  early = [s for s in samples if first < s.step <= first + 300]
  late = [s for s in samples if steps - 300 <= s.step < steps]
  if not early or not late:
    raise SystemExit('too few samples: more steps are needed')
  memory = [statistics.median(s.memory for s in part) for part in (early, late)]
  files = [min(s.files for s in part) for part in (early, late)]  # between two saves, which open some
  return 100 * (memory[1] / memory[0] - 1), files[0], files[1], max(s.disk for s in samples) / size


def long_figures(seed: int, kills: int = 50, steps: int = 2000, tasks: tuple[str, ...] = runs.TASKS) -> Found:
  """Section `long`: of every task a run that is left alone and one under kills."""
  moments, tally, found = random.Random(seed), Tally(), {}
  with tempfile.TemporaryDirectory() as folder:
    root = pathlib.Path(folder)
    for task in tasks:
      changes = {**LONG, 'steps': steps, **({'adapt.stages': 'depth'} if task == 'adapt' else {})}
      workdir, cache, started = root / f'alone-{task}', root / f'cache-{task}', time.monotonic()
      samples = watched(workdir, task, cache, **changes)
      sizes = sizes_of(workdir)
      found[task] = flatness(samples, steps, sizes[''])
      print(f'{task}: {found[task]}, {time.monotonic() - started:.0f} s', file=sys.stderr, flush=True)
      losses, seconds = runs.losses(workdir), time.monotonic() - started
      alone = Alone(runs.outcome(workdir), losses, seconds / 8, seconds / len(losses), sizes)
      survive(root / f'run-{task}', task, cache, alone, moments, tally, -(-kills // len(tasks)), **changes)
      print(f'{task}: {tally}', file=sys.stderr, flush=True)
  growth = max(found, key=lambda task: found[task][0])
  problems = [
    f'{task}: {problem}'
    for task, values in found.items()
    for problem, there in {
      f'memory grows by {values[0]:.1f} %': values[0] >= GROWTH,
      f'open files grow from {values[1]} to {values[2]}': values[2] > values[1] + 1,
      f'checkpoints take the disk of {values[3]:.2f} of them': values[3] > DISK,
    }.items()
    if there
  ]
  figures = [
    (
      f'runs of {steps} steps under kills that end with the bits of one left alone',
      f'{tally.equal} of {tally.finished}',
    ),
    ('kills of these runs', str(tally.kills)),
    (
      f'growth of resident memory over {steps} steps, from the first evaluation on',
      ', '.join(f'{task} {values[0]:+.1f} %' for task, values in found.items()) + f' (most: {growth})',
    ),
    (
      'open files between saves, early and late',
      ', '.join(f'{task} {values[1]} and {values[2]}' for task, values in found.items()),
    ),
    (
      f'most disk that checkpoints take, keep = {KEEP}',
      f'{max(values[3] for values in found.values()):.2f} checkpoints',
    ),
    disk_figure(tally),
    ('long runs that needed repair by hand', str(tally.repairs)),
  ]
  return figures, [*problems, *tally.problems()]
