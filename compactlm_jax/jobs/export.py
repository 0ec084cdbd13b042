"""`compactlm export`: a trained model as a folder for others, and what pruning it was worth."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Mapping
from typing import Any

import numpy as np
import safetensors.numpy
from etils import epath

from compactlm_jax.compress.density import densities
from compactlm_jax.compress.shrink import padded, shrink
from compactlm_jax.config import EncoderConfig
from compactlm_jax.errors import ConfigError
from compactlm_jax.interop import custom, names
from compactlm_jax.interop.bundle import Bundle, save_pretrained
from compactlm_jax.interop.folder import WEIGHTS
from compactlm_jax.interop.onnx_export import export_onnx
from compactlm_jax.interop.pretrained import save_pretraining
from compactlm_jax.interop.sparse import SizeReport, save_sparse
from compactlm_jax.interop.sparse_matrix import VALUES
from compactlm_jax.jobs.latency import SEQ_LEN, Latencies, measure
from compactlm_jax.jobs.models import is_run, load_model, load_run
from compactlm_jax.tree import named_leaves

log = logging.getLogger(__name__)

FORMATS = ('hf', 'sparse', 'onnx')
LAYOUTS = ('auto', 'shrunk', 'padded')
BATCH_SIZES = (1, 32)
_WORTH = 0.1
"""Share of the layers' parameters from which on 'auto' gives up the stock sizes."""

SECONDS = 30.0
"""For each batch size, after which no more is timed."""


@dataclasses.dataclass(frozen=True)
class Export:
  """What was written. The three numbers of a pruned model stand apart: zeros, bytes, milliseconds.

  Attributes:
    bundle: the model as it was written, smaller than trained if heads or neurons were removed.
    output: the folder.
    format: 'hf', 'sparse' or 'onnx'.
    dense_config: of a pruned model before anything was removed; None without zeros.
    zeros: of a pruned model `compress.density.densities`, before anything was removed; None without zeros.
    bytes: of the file of weights.
    dense_bytes: of the model.safetensors that the same weights take if nothing is removed or packed.
    layers: bytes of the encoder's layers therein, without embeddings and heads.
    dense_layers: the same in the dense file.
    latency: of the model 'dense' and, if heads or neurons were removed, of 'exported'; None if not measured.
  """

  bundle: Bundle
  output: str
  format: str
  dense_config: EncoderConfig | None = None
  zeros: Mapping[str, Any] | None = None
  bytes: int = 0
  dense_bytes: int = 0
  layers: int = 0
  dense_layers: int = 0
  latency: Latencies | None = None


def run_export(
  checkpoint: str,
  output: str,
  *,
  format: str = 'hf',
  layout: str = 'auto',
  values: str = 'float32',
  latency: bool = False,
) -> Export:
  """Writes the model of a run, or of a folder, whole or not at all; measures what is left of a pruned one.

  A replaced-token run gives the discriminator in `output` and, in the format 'hf', the generator in
  `output`/generator. Of a model without zeros nothing is measured, and its files are what they always were.

  Args:
    checkpoint: run directory or model folder.
    output: folder to write.
    format: 'hf' for transformers, without the heads and neurons that are all zero; 'sparse' for `from_pretrained`,
      zeros packed; 'onnx' for onnxruntime, smaller as with 'hf'.
    layout: of the format 'hf': 'shrunk' removes heads and neurons wherever that changes nothing, 'padded' keeps the
      stock sizes, zeros and all; 'auto' removes them if transformers has the model that is left, or if a tenth of the
      layers' parameters goes: a few dead neurons of a model that was pruned weight by weight are not worth a modelling
      file.
    values: how weights are stored in the format 'sparse': 'float32', 'bfloat16' or 'int8'.
    latency: measure a pruned model on this device, beside the dense one of the same weights.

  Returns:
    What was written.

  Raises:
    ConfigError: options that do not go together, a model without zeros in the format 'sparse' or with a layout of its
      own, or one that the format cannot hold; see also `save_pretrained`.
    DataError, NumericsError, StorageError: see `load_model` and `save_pretrained`.
  """
  check_options(format, layout, values)
  dense, generator = load_run(checkpoint)[:2] if is_run(checkpoint) else (load_model(checkpoint), None)
  options: dict[str, Any] = {'format': format, 'layout': layout, 'values': values, 'latency': latency}
  return export_model(dense, output, generator=generator, name=checkpoint, only_pruned=True, **options)


def export_model(
  dense: Bundle,
  output: str,
  *,
  format: str = 'hf',
  layout: str = 'auto',
  values: str = 'float32',
  latency: bool = False,
  generator: Bundle | None = None,
  name: str = 'the model',
  only_pruned: bool = False,
) -> Export:
  """As `run_export`, of a model that is loaded already.

  Args:
    dense: the model.
    output: folder to write.
    format: see `run_export`.
    layout: see `run_export`.
    values: see `run_export`.
    latency: see `run_export`.
    generator: of a discriminator, written beside it in the format 'hf'.
    name: of the model, for messages.
    only_pruned: refuse a layout for a model without zeros, where it would change nothing. Sub-networks have none, and
      are laid out.

  Raises:
    ConfigError, DataError, NumericsError, StorageError: see `run_export`.
  """
  check_options(format, layout, values)
  zeros = densities(dense.params, dense.config)
  pruned = zeros['nonzero'] < zeros['weights']
  if not pruned:
    _check_unpruned(dense, name, format, layout if only_pruned else 'auto')
  written, sizes = dense, None
  if pruned and format != 'sparse' and layout != 'padded':
    params, config = shrink(dense.params, dense.config)
    smaller = dataclasses.replace(dense, params=params, config=config)
    written = smaller if layout == 'shrunk' or format == 'onnx' or _is_worth_it(dense, smaller) else dense
  if format == 'sparse':
    sizes = save_sparse(written, output, values)
  elif format == 'onnx':
    export_onnx(written, output)
  elif generator is None:
    save_pretrained(written, output, 'padded' if layout == 'padded' else 'auto')
  else:
    save_pretraining(written, generator, output)
  done = Export(written, output, format)
  return _measured(done, _stock(dense), zeros, sizes, latency) if pruned else done


def _check_unpruned(dense: Bundle, name: str, format: str, layout: str) -> None:
  """Raises ConfigError for what a model without zeros cannot have; a folder of a sub-network can be filled up."""
  if format == 'sparse':
    flag, remedy = f'--format={format}', 'use --format=hf'
  elif layout != 'auto' and not (layout == 'padded' and custom.needed(dense.config)):
    flag, remedy = f'--layout={layout}', 'leave --layout out'
  else:
    return
  raise ConfigError(
    f'{flag}: {name} has no zeros in the matrices of its encoder, nothing of it was pruned; '
    f"prune it (task 'prune', configs/prune.py), or {remedy}"
  )


def _is_worth_it(dense: Bundle, smaller: Bundle) -> bool:
  return dense.config.ragged or not custom.needed(smaller.config) or _layers(smaller) <= (1 - _WORTH) * _layers(dense)


def check_options(format: str, layout: str, values: str) -> None:
  """Raises ConfigError for options that are unknown or do not go together."""
  for flag, value, allowed in (('format', format, FORMATS), ('layout', layout, LAYOUTS), ('values', values, VALUES)):
    if value not in allowed:
      raise ConfigError(f'--{flag}={value}: use one of {", ".join(allowed)}')
  if layout != 'auto' and format != 'hf':
    raise ConfigError(
      f'--layout={layout}: is for --format=hf; sparse folders keep the stock sizes and ONNX needs none: leave it out'
    )
  if values != 'float32' and format != 'sparse':
    raise ConfigError(f'--values={values}: is for --format=sparse; --format={format} holds float32: leave it out')


def _stock(bundle: Bundle) -> Bundle:
  """The model before anything was removed: of a folder with layers of their own sizes the padded one."""
  if not bundle.config.ragged:
    return bundle
  params, config = padded(bundle.params, bundle.config)
  return dataclasses.replace(bundle, params=params, config=config)


def _measured(done: Export, dense: Bundle, zeros: Mapping[str, Any], sizes: SizeReport | None, latency: bool) -> Export:
  timings = None
  if latency:
    log.info('measuring latency here; --nolatency leaves it out')
    smaller = done.bundle.config != dense.config  # zeros alone are multiplied like any other number
    models = {'dense': dense, **({'exported': done.bundle} if smaller else {})}
    timings = measure(models, BATCH_SIZES, min(SEQ_LEN, dense.config.max_positions), seconds=SECONDS)
  return dataclasses.replace(
    done,
    dense_config=dense.config,
    zeros=zeros,
    bytes=_weights_in(done.output) if sizes is None else sizes.bytes,
    dense_bytes=_dense_bytes(dense),
    layers=_layers(done.bundle) if sizes is None else sizes.layers.bytes,
    dense_layers=_layers(dense),
    latency=timings,
  )


def _weights_in(folder: str) -> int:
  """Bytes of the file of weights in a folder of the format 'hf' or 'onnx'."""
  return sum(p.stat().length for p in epath.Path(folder).iterdir() if p.name == WEIGHTS or p.suffix == '.onnx')


def _layers(bundle: Bundle) -> int:
  """Bytes of the parameters of all layers."""
  leaves = named_leaves(bundle.params['encoder'])
  return sum(int(leaf.nbytes) for name, leaf in leaves.items() if name.startswith('layers'))


def _dense_bytes(bundle: Bundle) -> int:
  """Length of the model.safetensors that the bundle takes as it is."""
  tensors = {name: np.asarray(leaf) for name, leaf in names.export_tensors(bundle.params, bundle.config).items()}
  return len(safetensors.numpy.save(tensors, metadata={'format': 'pt'}))
