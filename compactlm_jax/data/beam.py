"""Parts of a dataset written by an Apache Beam pipeline. The only file that imports Beam (extra 'beam')."""

from __future__ import annotations

import contextlib
import json
import logging
import pathlib
import shlex
import tempfile
import threading
from collections.abc import Iterator
from typing import Any

import apache_beam as beam
from apache_beam.options.pipeline_options import PipelineOptions
from etils import epath

from compactlm_jax.data import parts, text
from compactlm_jax.data.parts import Part, Plan, Writer
from compactlm_jax.data.tokenizer import Tokenizer, load_tokenizer
from compactlm_jax.errors import CompactLMError, ConfigError, DataError, StorageError
from compactlm_jax.storage import causes, children, is_remote, own_error, write_whole

log = logging.getLogger(__name__)

_LOOK_SECONDS = 5.0


class WritePart(beam.DoFn):
  """Writes a part on a worker.

  Errors that no worker can help (bad text) are left in the folder, part-N.error: raised, they would be tried again, and
  come back as text only.

  Args:
    plan: with its folder, and its tokenizer as bytes, so that workers need to reach nothing else.
  """

  def __init__(self, plan: Plan) -> None:
    self._plan = plan
    self._tokenizer: Tokenizer | None = None

  def process(self, element: int) -> Iterator[int]:
    """Writes part number `element`."""
    part = self._plan.parts[element]
    try:
      parts.write_part(self._plan, part, self._load())
    except CompactLMError as e:
      if isinstance(e, StorageError):
        raise
      content = json.dumps({'exit_code': e.exit_code, 'message': str(e)})
      write_whole(epath.Path(self._plan.folder) / _error(part), content)
    yield element

  def _load(self) -> Tokenizer:
    if self._tokenizer is None:
      with tempfile.TemporaryDirectory() as folder:
        for name, content in self._plan.tokenizer.items():
          (pathlib.Path(folder) / name).write_bytes(content)
        self._tokenizer = load_tokenizer(folder)
    return self._tokenizer


def writer(runner: str, options: str) -> Writer:
  """What writes the parts of a plan.

  Args:
    runner: name of a Beam runner.
    options: of the pipeline, as a command line: '--project=... --temp_location=gs://...'.

  Raises:
    ConfigError: options that cannot be read. What is returned raises it too, if the runner is not installed.
  """
  try:
    flags = [f'--runner={runner}', *shlex.split(options)]
  except ValueError as e:
    raise ConfigError(f'--beam_options: {options!r} cannot be read as a command line ({e})') from e

  def write(plan: Plan, tokenizer: Tokenizer, workers: int) -> None:
    near = [path for path in (plan.folder, *plan.order) if not is_remote(path)]
    if runner == 'DataflowRunner' and near:
      raise ConfigError(f'--runner={runner}: its workers cannot reach {near[0]}; give input and output on gs://')
    folder = epath.Path(plan.folder)
    for child in children(folder):
      if child.name.endswith('.error'):
        child.unlink()
    try:
      with _progress(plan):
        _run(plan, PipelineOptions(flags))
    except Exception as e:  # each runner wraps what happened on a worker in its own way
      if any(isinstance(cause, ImportError) and 'apache_beam[gcp]' in str(cause) for cause in causes(e)):
        raise ConfigError(f"--runner={runner} needs Beam's extra gcp: pip install 'compactlm-jax[dataflow,gcs]'") from e
      if own := own_error(e):
        raise own from e
      reason = (str(e).strip().splitlines() or [type(e).__name__])[-1][:300]
      raise StorageError(
        f'--runner={runner}: the pipeline failed ({reason}); what is done stays, the same command does the rest'
      ) from e
    _raise_errors(plan)

  return write


def _run(plan: Plan, options: PipelineOptions) -> None:
  with beam.Pipeline(options=options) as pipeline:
    numbers = pipeline | 'parts' >> beam.Create([part.index for part in plan.parts])
    # Without it, a runner may fuse the steps and give all parts to one worker.
    _ = numbers | 'spread' >> beam.Reshuffle() | 'write' >> beam.ParDo(WritePart(plan))


def _raise_errors(plan: Plan) -> None:
  for part in plan.parts:
    file = epath.Path(plan.folder) / _error(part)
    if file.exists():
      error = json.loads(file.read_text())
      raise (DataError if error['exit_code'] == DataError.exit_code else ConfigError)(error['message'])


@contextlib.contextmanager
def _progress(plan: Plan) -> Iterator[None]:
  """Shows the bytes of parts that are done, by their marks in the folder: runners have no other way in common."""
  over = threading.Event()

  def look(on_bytes: text.OnBytes) -> None:
    seen: set[int] = set()
    while True:
      last = over.wait(_LOOK_SECONDS)
      with contextlib.suppress(Exception):  # a listing that failed is made again
        for part in parts.done(plan):
          if part.index not in seen:
            seen.add(part.index)
            on_bytes(part.size)
      if last:
        return

  with text.progress_of(sum(part.size for part in plan.parts), 'prepare') as on_bytes:
    thread: Any = threading.Thread(target=look, args=(on_bytes,), name='prepare-progress', daemon=True)
    thread.start()
    try:
      yield
    finally:
      over.set()
      thread.join()


def _error(part: Part) -> str:
  return f'part-{part.index:05d}.error'
