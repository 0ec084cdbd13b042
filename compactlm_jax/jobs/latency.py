"""How long models take on this device: through JAX as `predict` runs them, and through onnxruntime."""

from __future__ import annotations

import dataclasses
import functools
import importlib.util
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from compactlm_jax.config import EncoderConfig
from compactlm_jax.errors import ConfigError
from compactlm_jax.interop.bundle import Bundle
from compactlm_jax.interop.onnx_export import onnx_model
from compactlm_jax.nn.encoder import encode
from compactlm_jax.tasks.finetune import classify
from compactlm_jax.tasks.span import span_logits
from compactlm_jax.types import Batch, Params

JAX, ONNXRUNTIME = 'jax', 'onnxruntime'
SEQ_LEN = 128
"""Tokens of a row whose latency is measured where nothing else is asked, if the model has so many positions."""

_FEWEST = 3  # rounds, whatever they cost

log = logging.getLogger(__name__)

Run = Callable[[], Any]
"""One call of a model, from NumPy to NumPy."""


@dataclasses.dataclass(frozen=True)
class Timing:
  """One measured model.

  Attributes:
    name: of the model.
    batch: rows computed together.
    engine: 'jax' or 'onnxruntime'.
    milliseconds: median time of a call.
    ratio: of that time to the first model's, same batch and engine; None where that engine does not run it.
    rounds: how many calls the median is of.
  """

  name: str
  batch: int
  engine: str
  milliseconds: float
  ratio: float | None
  rounds: int


@dataclasses.dataclass(frozen=True)
class Latencies:
  """What was measured in one run.

  Attributes:
    rows: by batch size, then engine, then model in the order given.
    seq_len: tokens of each row, none of them padding.
    device: what JAX ran on.
    notes: what was left out, and why.
  """

  rows: tuple[Timing, ...]
  seq_len: int
  device: str
  notes: tuple[str, ...] = ()


def measure(
  models: Mapping[str, Bundle],
  batch_sizes: Sequence[int] = (1, 32),
  seq_len: int = 128,
  rounds: int = 20,
  seconds: float = 60.0,
  engines: Sequence[str] = (JAX, ONNXRUNTIME),
) -> Latencies:
  """Times models against the first of them, in one run.

  Every round calls each model through each engine twice and times the second call, the first having brought the
  weights back into the caches; rounds begin with another model each time. What slows the machine down for a while
  thus slows all of them, and the ratios of the medians stay what they are. Nothing else should run meanwhile.

  Args:
    models: name -> model; the first one is what the others are compared with. A classifier or span head is computed,
      without one the encoder's outputs.
    batch_sizes: rows computed together.
    seq_len: tokens in each row.
    rounds: most timed calls of each model.
    seconds: no further round begins after so many seconds at one batch size, but three are made in any case.
    engines: what runs them.

  Returns:
    The medians. Models run in their own dtype through JAX (compilation is not counted) on one device, in float32
    through onnxruntime on the CPU; without that package JAX alone is measured, which `notes` says.

  Raises:
    ConfigError: no models, a length or batch size that they cannot read, or no engine that runs any of them.
  """
  if not models or rounds < 1 or min(batch_sizes, default=0) < 1:
    raise ConfigError(f'latency: {len(models)} models, batch_sizes {tuple(batch_sizes)}, rounds {rounds}: at least 1')
  for name, bundle in models.items():
    if not 1 <= seq_len <= bundle.config.max_positions:
      raise ConfigError(f'seq_len: {seq_len}; {name} reads 1 to {bundle.config.max_positions} tokens')
  sessions, notes = _sessions(models) if ONNXRUNTIME in engines else ({}, ())
  through_jax = models if JAX in engines else {}
  placed = {name: jax.device_put(_wanted(bundle.params)) for name, bundle in through_jax.items()}
  found = []
  for size in batch_sizes:
    runs: dict[tuple[str, str], Run] = {}
    for name, bundle in models.items():
      batch = _batch(bundle.config, size, seq_len)
      if name in placed:
        runs[JAX, name] = functools.partial(_run_jax, bundle.config, placed[name], batch)
      if name in sessions:
        runs[ONNXRUNTIME, name] = functools.partial(sessions[name].run, None, _feeds(batch))
    if not runs:
      raise ConfigError('latency: ' + '; '.join(notes))
    times = timed(runs, rounds, seconds)
    medians = {key: 1e3 * float(np.median(values)) for key, values in times.items()}
    for engine, name in sorted(runs, key=lambda key: key[0]):
      took, base = medians[engine, name], medians.get((engine, next(iter(models))))
      found.append(Timing(name, size, engine, took, base and took / base, len(times[engine, name])))
  return Latencies(tuple(found), seq_len, jax.devices()[0].device_kind, notes)


def timed(
  runs: Mapping[Any, Run], rounds: int, seconds: float, clock: Callable[[], float] = time.perf_counter
) -> dict[Any, list[float]]:
  """Seconds of calls, interleaved; see `measure`."""
  for run in runs.values():
    run()  # compiles
  keys, start = list(runs), clock()
  out: dict[Any, list[float]] = {key: [] for key in keys}
  for turn in range(rounds):
    if turn >= _FEWEST and clock() - start > seconds:
      break
    first = turn % len(keys)
    for key in keys[first:] + keys[:first]:
      runs[key]()
      before = clock()
      runs[key]()
      out[key].append(clock() - before)
  return out


def _sessions(models: Mapping[str, Bundle]) -> tuple[dict[str, Any], tuple[str, ...]]:
  """(onnxruntime's session of each model that has an ONNX form, what was left out)."""
  missing = [name for name in ('onnx', 'onnxruntime') if importlib.util.find_spec(name) is None]
  if missing:
    note = f"Not measured through onnxruntime, which needs {' and '.join(missing)}: pip install 'compactlm-jax[onnx]'"
    log.warning(note)
    return {}, (note,)
  import onnxruntime

  options, notes = onnxruntime.SessionOptions(), []
  out: dict[str, Any] = {}
  # Its threads would go on spinning, and take cores from what is measured next.
  options.add_session_config_entry('session.force_spinning_stop', '1')
  for name, bundle in models.items():
    try:
      model = onnx_model(bundle).SerializeToString()
    except ConfigError as e:
      notes.append(f'{name}: not measured through onnxruntime: {e}')
      continue
    out[name] = onnxruntime.InferenceSession(model, options, providers=['CPUExecutionProvider'])
  return out, tuple(notes)


def _batch(config: EncoderConfig, size: int, length: int) -> Batch:
  """Random ids, no padding."""
  ids: Any = np.random.default_rng(0).integers(0, config.vocab_size, (size, length), dtype=np.int32)
  return Batch(ids, attention_mask=np.ones_like(ids), token_type_ids=np.zeros_like(ids))


def _feeds(batch: Batch) -> dict[str, np.ndarray]:
  names = ('input_ids', 'attention_mask', 'token_type_ids')
  return {name: np.asarray(getattr(batch, name), np.int64) for name in names}


def _wanted(params: Params) -> Params:
  return {name: tree for name, tree in params.items() if name in ('encoder', 'classifier', 'span')}


def _run_jax(config: EncoderConfig, params: Params, batch: Batch) -> Any:
  return jax.device_get(_forward(config, params, batch))  # waits for the result


@functools.partial(jax.jit, static_argnums=0)
def _forward(config: EncoderConfig, params: Params, batch: Batch) -> Any:
  """As `predict` computes it: parameters are arguments."""
  if 'classifier' in params:
    return classify(params, config, batch)
  if 'span' in params:
    return span_logits(params, config, batch)
  out = encode(params, config, batch.input_ids, batch.attention_mask, batch.token_type_ids)
  return out.last_BTD, out.pooled_BD
