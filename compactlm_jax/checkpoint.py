"""Checkpoints that are either proven intact or refused. The only file that imports Orbax.

DIRECTORY/STEP/ holds two items that Orbax commits as one: `state`, the arrays, and `manifest/manifest.json`, written
by us: shape, dtype and SHA-256 of every leaf, the caller's metadata, and a SHA-256 over the manifest itself. Orbax
commits atomically but restores flipped bits and casts dtypes without a word, and never falls back to an older step;
the manifest closes these holes.

With several processes, process 0 digests whole leaves (those spread over processes are gathered one at a time), and
every process reads and verifies the whole checkpoint, then takes its own shards. So digests do not depend on the mesh,
and a checkpoint restores onto any number of devices or processes; each host holds all bytes once, which is little here.
"""

from __future__ import annotations

import contextlib
import json
import logging
import threading
from collections.abc import Callable, Iterable, Mapping
from types import TracebackType
from typing import Any

import jax
import numpy as np
import orbax.checkpoint.experimental.v1 as ocp
from etils import epath

from compactlm_jax import stepdir, storage
from compactlm_jax.errors import ConfigError, NumericsError, StorageError, first_line
from compactlm_jax.parallel import all_processes, barrier, host_copies, place_leaf
from compactlm_jax.stepdir import DamagedError, StepDirectory
from compactlm_jax.tree import named_leaves, nested, not_finite
from compactlm_jax.types import Params, TrainState

log = logging.getLogger(__name__)
_Event = Callable[[str, int], None]


class _Manifest:
  """Item of a checkpoint (Orbax's `StatefulCheckpointable`): digests of host copies, computed while Orbax writes."""

  def __init__(self, step: int, metadata: Mapping[str, Any], host: Mapping[str, np.ndarray], event: _Event) -> None:
    self._step, self._metadata, self._host, self._event = step, dict(metadata), host, event
    self.content: dict[str, Any] = {}

  async def save(self, directory: ocp.path.PathAwaitingCreation) -> Any:
    """Returns what Orbax awaits in the background before it commits."""
    return self._write(directory)

  async def load(self, directory: ocp.path.Path) -> Any:
    """Part of Orbax's protocol; `stepdir.read_manifest` reads the file, before Orbax reads anything."""
    raise TypeError(f'{directory}: manifests are read by stepdir.read_manifest')

  async def _write(self, directory: ocp.path.PathAwaitingCreation) -> None:
    folder = await directory.await_creation()
    if jax.process_index() != 0:
      return
    self._event('digest', self._step)
    self.content = stepdir.build_manifest(self._step, self._metadata, self._host)
    self._host = {}
    (epath.Path(folder) / stepdir.MANIFEST.rpartition('/')[2]).write_text(json.dumps(self.content))
    self._event('manifest', self._step)


class Checkpoints:
  """The checkpoints of one run. Whoever opens it must hold the lock of the run directory.

  Args:
    directory: WORKDIR/checkpoints; created if absent. What killed runs left half written or half deleted is removed.
    keep: complete checkpoints kept; one is treated as two, because the newest may turn out damaged.
    commit_file: commit by writing a file last instead of renaming, as object stores (gs://) need; they get it anyway.
    retries: failed saves in a row that are tolerated; training goes on and the next interval tries again.
    on_event: called with ('start' | 'digest' | 'manifest' | 'committed' | 'verified' | 'deleting' | 'deleted', step),
      from a background thread; for tests and logs.

  Raises:
    StorageError: the directory cannot be created or read.
  """

  def __init__(
    self,
    directory: epath.PathLike,
    keep: int,
    *,
    commit_file: bool = False,
    retries: int = 3,
    on_event: _Event = lambda name, step: None,
  ) -> None:
    self._directory, self._keep = storage.absolute(directory), max(keep, 2)
    self._retries, self._event = retries, on_event
    self._context = ocp.Context()
    self._context.array.saving.use_compression = False  # float noise shrinks by 7 % and takes 5 times as long
    if commit_file:
      self._context.atomicity.mode = ocp.options.AtomicityMode.COMMIT_FILE
    self._steps = StepDirectory(self._directory, commit_file or storage.is_remote(directory))
    self._worker: threading.Thread | None = None
    self._error: BaseException | None = None
    self._last_good: int | None = None  # saved or restored, and verified, by this object
    self._failures, self._saving, self._agreed = 0, -1, True
    try:
      if jax.process_index() == 0:
        self._directory.mkdir(parents=True, exist_ok=True)
      self._adopt()
      if jax.process_index() == 0:
        self._steps.clean()
    except OSError as e:
      raise StorageError(f'{self._directory}: cannot be created or cleaned ({e}); check permissions and quota') from e
    barrier('checkpoints:open')

  def __enter__(self) -> Checkpoints:
    return self

  def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
    if error and jax.process_count() > 1:  # perhaps of this process alone: the others agree on nothing now
      if self._worker is not None:
        self._worker.join(60)
      return
    with contextlib.suppress(*([StorageError] if error else [])):  # an earlier error is the one to report
      self.wait()

  def all_steps(self) -> list[int]:
    """Steps of committed checkpoints, ascending. Damage is found when they are read."""
    return self._steps.steps()

  def latest_step(self) -> int | None:
    """The newest committed step, or None."""
    return max(self.all_steps(), default=None)

  def save(
    self,
    step: int,
    state: TrainState,
    metadata: Mapping[str, Any],
    *,
    wait: bool = False,
    before: Callable[[], None] = lambda: None,
  ) -> None:
    """Starts to save; digests, writing, verification by reading back, and retention run in the background.

    `state` may be donated as soon as this returns. A save that fails (a full disk) is logged and the next call tries
    again, up to `retries` times in a row (a process that fails alone, among several, raises). Saving a step that this
    run has saved already does nothing.

    Args:
      step: number of steps done.
      state: what to save.
      metadata: JSON-able, returned by `restore`.
      wait: return only when the checkpoint is committed and verified, and raise if it is not.
      before: writes what a checkpoint must not be ahead of; if it raises, the save has failed, on all processes.

    Raises:
      NumericsError: a parameter is not finite; nothing is written.
      StorageError: too many saves failed, or this one did and `wait` is set; names the last good step.
      ConfigError: the step exists, from an earlier run.
    """
    self.settle(final=False)
    if step != self._last_good:
      if step in self.all_steps():
        raise ConfigError(f'{self._directory / str(step)} exists already; move it away to save step {step} again')
      if bad := not_finite(state.params):
        raise NumericsError(
          f'step {step}: parameter {bad[0]} is not finite ({len(bad)} leaves in all); not saved, the last '
          'checkpoint stays. Lower config.optimizer.learning_rate and resume'
        )
      self._start(step, state, metadata, before)
    if wait or self._worker is None:  # without a worker it has failed already
      self.settle(final=wait)

  def wait(self) -> None:
    """Waits for the save that is running.

    Raises:
      StorageError: it failed.
    """
    self.settle(final=True)

  def restore(self, abstract_state: TrainState, step: int | None = None) -> tuple[TrainState, dict[str, Any]] | None:
    """The newest intact state, placed as `abstract_state` says.

    A damaged checkpoint is logged with path, leaf and reason. Once an older one has proved intact, the damaged ones
    are renamed to STEP.bad; if none is intact, nothing is touched.

    Args:
      abstract_state: jax.ShapeDtypeStructs with shardings of the current mesh; any number of devices.
      step: this step only, without fallback.

    Returns:
      (state, metadata with 'step'), or None if there is no checkpoint.

    Raises:
      ConfigError: leaves, shapes or dtypes differ; found before any array is read. Or there is no such step.
      StorageError: there are checkpoints but none is intact.
    """
    self.wait()
    steps = self.all_steps()[::-1] if step is None else [step]
    if step is not None and step not in self.all_steps():
      raise ConfigError(f'{self._directory} has no step {step}; it has {self.all_steps() or "none"}')
    if not steps and self._steps.bad():
      raise StorageError(
        f'{self._directory} holds damaged checkpoints only ({", ".join(self._steps.bad())}); move them away to restart'
      )
    damaged: list[int] = []
    for candidate in steps:
      path = self._directory / str(candidate)
      host = None
      with stepdir.reporting_damage(path):
        manifest = stepdir.read_manifest(path, candidate)
        stepdir.check_same_leaves(path, manifest['leaves'], named_leaves(abstract_state))
        host = _read(path, manifest['leaves'])
      if all_processes(host is not None):
        self._set_aside(damaged)
        self._last_good = candidate
        if step is None and jax.process_index() == 0:
          self._retire(candidate)  # a run that was killed after its last save saves no more
        leaves = [place_leaf(host[name], like) for name, like in named_leaves(abstract_state).items()]
        return jax.tree.unflatten(jax.tree.structure(abstract_state), leaves), stepdir.public_metadata(manifest)
      damaged.append(candidate)
    if damaged:
      raise stepdir.none_intact(self._directory, damaged)
    return None

  def _adopt(self) -> None:
    """Gives steps that lack only their commit file one, and removes those that do not prove intact."""
    found = self._steps.uncommitted()
    if not found:
      return
    barrier('checkpoints:uncommitted')
    if jax.process_index() == 0:
      for step in found:
        self._steps.commit(step)
    barrier('checkpoints:commit')
    proven = [_proven(self._directory / str(step)) for step in found]  # on all processes: see `_read`
    for step, intact in zip(found, proven, strict=True):
      log.warning('step %d had no commit file%s', step, ', but is intact and counts' if intact else ', and is removed')
      if jax.process_index() == 0 and not intact:
        self._steps.delete(step, self._event)

  def _start(self, step: int, state: TrainState, metadata: Mapping[str, Any], before: Callable[[], None]) -> None:
    self._saving, self._agreed = step, True
    try:
      before()
      free, wanted = storage.free_bytes(self._directory), 2 * sum(x.nbytes for x in jax.tree.leaves(state))
      if jax.process_index() == 0 and free is not None and free < wanted:
        raise OSError(f'{free} bytes free, {wanted} wanted before a save')
    except Exception as e:  # clients of buckets have errors of their own
      self._error = e
    if not all_processes(self._error is None):
      return  # on all processes
    self._agreed = jax.process_count() == 1
    self._event('start', step)
    manifest = _Manifest(step, metadata, host_copies(named_leaves(state)), self._event)
    try:
      with self._context:
        response = ocp.save_checkpointables_async(
          self._directory / str(step), {'state': nested(named_leaves(state)), 'manifest': manifest}
        )
    except Exception as e:  # a storage failure like any other: it is retried
      self._error = e
      return
    self._worker = threading.Thread(target=self._finish, args=(step, response, manifest), name=f'save-{step}')
    self._worker.start()

  def _finish(self, step: int, response: ocp.AsyncResponse[None], manifest: _Manifest) -> None:
    """Background: waits for the commit, reads the checkpoint back, and only then deletes older ones."""
    try:
      response.result()
      self._event('committed', step)
      path = self._directory / str(step)
      try:
        written = stepdir.read_manifest(path, step)
        if jax.process_index() == 0 and written != manifest.content:
          raise DamagedError('manifest differs from what was written')
        _read(path, written['leaves'])
      except DamagedError as e:
        self._set_aside([step], together=False)
        raise OSError(f'{path} read back differently: {e}') from e
      self._event('verified', step)
      if jax.process_index() == 0:
        self._retire(step)
    except BaseException as e:  # handed to the next call on the main thread
      self._error = e

  def _retire(self, step: int) -> None:
    """Deletes older steps than are kept; `step` is saved, whatever becomes of them."""
    try:
      others = [s for s in self.all_steps() if s != step]
      for old in others[: max(0, len(others) + 1 - self._keep)]:
        self._steps.delete(old, self._event)
    except OSError as e:
      log.warning('an old checkpoint could not be deleted (%s); the next save tries again', first_line(e))

  def settle(self, *, final: bool = False) -> None:
    """Waits for the save in the background; if it failed, that counts, and is final or left to the next interval."""
    if self._saving < 0:
      return
    if self._worker is not None:
      self._worker.join()
      self._worker = None
    step, self._saving = self._saving, -1
    error, self._error = self._error, None
    if error is not None and not self._agreed:  # the others wait for what this process did not write
      self._failed(step, error, final=True)
    if all_processes(error is None):
      self._failures, self._last_good = 0, step
    else:
      self._failed(step, error or OSError('another process failed'), final=final)

  def _failed(self, step: int, error: BaseException, *, final: bool) -> None:
    self._failures += 1
    if jax.process_index() == 0:
      with contextlib.suppress(OSError):
        self._steps.clean()
    reason = first_line(error)
    if final or self._failures > self._retries:
      last = self._last_good if self._last_good is not None else self.latest_step()
      good = 'there is no older one' if last is None else f'the last good step is {last}'
      raise StorageError(
        f'{self._directory}: step {step} could not be saved ({reason}); {good}. Free space or fix permissions, then '
        'run the same command again'
      ) from error
    log.warning('step %d could not be saved (%s); the next interval tries again', step, reason)

  def _set_aside(self, damaged: Iterable[int], *, together: bool = True) -> None:
    if jax.process_index() == 0:
      for step in damaged:
        self._steps.set_aside(step)
    if together:
      barrier('checkpoints:set_aside')


def load_params(directory: epath.PathLike, step: int | None = None) -> tuple[Params, dict[str, Any]]:
  """Weights and metadata without optimiser state, for export and fine-tuning; digests verified.

  Reads only: a damaged checkpoint is logged, left where it is, and the next older one is tried.

  Args:
    directory: a run directory or its `checkpoints` folder.
    step: this step only, without fallback.

  Returns:
    (nested dict of NumPy arrays, metadata with 'step').

  Raises:
    ConfigError: there is no checkpoint, or no such step.
    StorageError: none is intact.
  """
  folder = storage.absolute(directory)
  folder = folder / 'checkpoints' if (folder / 'checkpoints').exists() else folder
  known = StepDirectory(folder, storage.is_remote(folder)).steps()
  if not known or (step is not None and step not in known):
    raise ConfigError(f'{folder}: no {"checkpoint" if step is None else f"step {step}"}; steps here: {known or "none"}')
  steps = known[::-1] if step is None else [step]
  for candidate in steps:
    path = folder / str(candidate)
    with stepdir.reporting_damage(path):
      manifest = stepdir.read_manifest(path, candidate)
      wanted = {name: leaf for name, leaf in manifest['leaves'].items() if name.startswith('params/')}
      return nested(_read(path, wanted))['params'], stepdir.public_metadata(manifest)
  raise stepdir.none_intact(folder, steps)


def _proven(path: epath.Path) -> bool:
  """Whether all arrays of a step are those that its manifest tells of."""
  with stepdir.reporting_damage(path):
    _read(path, stepdir.read_manifest(path, int(path.name))['leaves'])
    return True
  return False


def _read(path: epath.Path, leaves: Mapping[str, Any]) -> dict[str, np.ndarray]:
  """Arrays of a checkpoint, each proven equal to what was saved."""
  like = {
    # NumPy targets make Orbax return NumPy; broadcasting makes them take no memory.
    name: np.broadcast_to(np.zeros((), np.dtype(leaf['dtype'])), tuple(leaf['shape']))
    for name, leaf in leaves.items()
  }
  context = ocp.Context()
  context.pytree.loading.partial_load = True
  if jax.process_count() > 1:
    # Each process reads by itself, without barriers. All must read equally often: Orbax counts operations per process
    # and uses the count in the barriers of the next save.
    context.multiprocessing.active_processes = {jax.process_index()}
    context.multiprocessing.primary_host = jax.process_index()
    context.multiprocessing.barrier_sync_key_prefix = f'read{jax.process_index()}'
  stepdir.hush_late_reads()
  try:
    with context:
      arrays = named_leaves(ocp.load_checkpointables(path, {'state': nested(like)})['state'])
  except (PermissionError, MemoryError) as e:
    raise StorageError(f'{path}: cannot be read ({e}); fix its permissions, or free memory') from e
  except Exception as e:  # Orbax reports damage by many types, often wrapped
    *_, first = storage.causes(e)
    raise DamagedError(f'state: {type(first).__name__}: {str(first)[:300]}') from e
  for name, leaf in leaves.items():
    x = arrays.get(name)
    if x is None or list(x.shape) != leaf['shape'] or x.dtype.name != leaf['dtype']:
      raise DamagedError(f'{name}: absent, or of another shape or dtype than its manifest says')
    if stepdir.sha256(x) != leaf['sha256']:
      raise DamagedError(f'{name}: digest differs')
  return arrays
