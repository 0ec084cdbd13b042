"""Models by path: Hugging Face folders, exports and runs."""

from __future__ import annotations

import dataclasses
import hashlib
import logging
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath

from compactlm_jax.checkpoint import load_params
from compactlm_jax.compress.layers import take_layers
from compactlm_jax.config import ElectraConfig, EncoderConfig, FinetuneConfig, PruneConfig, from_config_dict
from compactlm_jax.data.tokenizer import Tokenizer, load_tokenizer
from compactlm_jax.errors import ConfigError
from compactlm_jax.interop.bundle import Bundle, drop_pooler, from_pretrained
from compactlm_jax.interop.folder import open_folder
from compactlm_jax.interop.hub import local_folder
from compactlm_jax.interop.pretrained import GENERATOR
from compactlm_jax.interop.tokenizer_files import TokenizerFiles, read_tokenizer
from compactlm_jax.storage import children
from compactlm_jax.tasks.electra import generator_params
from compactlm_jax.tasks.prune import bake
from compactlm_jax.tree import named_leaves
from compactlm_jax.types import Params

log = logging.getLogger(__name__)


def load_model(path: epath.PathLike) -> Bundle:
  """A model from a Hugging Face folder, from an export, or from the newest intact checkpoint of a run.

  Args:
    path: the folder or run directory.

  Raises:
    ConfigError, DataError, StorageError: the folder cannot be used; the message says why.
  """
  if is_run(path):
    return load_run(path)[0]
  inside = children(path) if epath.Path(path).is_dir() else []
  seeds = sorted(child.name for child in inside if child.name.startswith('seed-') and is_run(child))
  if seeds:
    raise ConfigError(f'{path}: holds the runs of {len(seeds)} seeds; name one of them, for example {path}/{seeds[0]}')
  return from_pretrained(path)


def load_generator(path: epath.PathLike) -> Bundle | None:
  """The generator of a replaced-token run or of its export; a model folder itself is taken as a generator.

  Args:
    path: run directory, export with a `generator` folder inside, or the generator's own folder.

  Returns:
    The generator with the embeddings that it shares; None for a run that has none.

  Raises:
    ConfigError, DataError, StorageError: see `load_model`.
  """
  if is_run(path):
    return load_run(path)[1]
  inside = epath.Path(path) / GENERATOR
  return from_pretrained(inside if inside.exists() else path)


def load_run(run: epath.PathLike) -> tuple[Bundle, Bundle | None, dict[str, Any]]:
  """(model, generator or None, metadata) of a run's newest intact checkpoint, which is read once; masks are baked in.

  Raises:
    ConfigError, DataError, StorageError: see `load_model`.
  """
  leaves, metadata = load_run_params(run)
  folder = epath.Path(run) / 'tokenizer'
  tokenizer = read_tokenizer(open_folder(folder)) if folder.exists() else None
  return *towers_of(jax.tree.map(jnp.asarray, leaves), metadata['model'], tokenizer), metadata


def load_run_params(run: epath.PathLike) -> tuple[Params, dict[str, Any]]:
  """`checkpoint.load_params` of a run, which says so if the run is not over."""
  leaves, metadata = load_params(run)
  folder = epath.Path(run)
  if (folder / 'config.json').exists() and not (folder / 'results.json').exists():
    log.warning('%s: step %d of a run that is not over; the same train command continues it', run, metadata['step'])
  return leaves, metadata


def towers_of(
  params: Params, model: Mapping[str, Any], tokenizer: TokenizerFiles | None
) -> tuple[Bundle, Bundle | None]:
  """(model, generator or None) of the parameters of a run; masks are baked in.

  Args:
    params: as a checkpoint holds them.
    model: `types.Task.model` of the run.
    tokenizer: its files.
  """
  encoder = from_config_dict(EncoderConfig, model['encoder'], 'encoder.')
  if kept := from_config_dict(FinetuneConfig, model.get('finetune', {}), 'finetune.').keep_layers:
    params = {**params, 'encoder': take_layers(params['encoder'], kept)}
    encoder = dataclasses.replace(encoder, num_layers=len(kept))
  if 'prune' in model:
    pruning = from_config_dict(PruneConfig, model['prune'], 'prune.')
    params = jax.jit(lambda tree: bake(tree, encoder, pruning))(params)
  trained = {name: tree for name, tree in params.items() if name != GENERATOR}
  bundle = _in_units_of_labels(Bundle(encoder, trained, tokenizer, tuple(model.get('classes', ()))), model)
  # In a bundle a classifier reads the pooler if there is one; this run's reads the first token itself, and answers
  # are found in all tokens.
  if encoder.pooler and ('span' in params or ('classifier' in params and not model['finetune']['pooled'])):
    bundle = drop_pooler(bundle)
  if GENERATOR not in params:
    return bundle, None
  config = from_config_dict(ElectraConfig, model['electra'], 'electra.')
  return bundle, Bundle(config.generator_encoder(encoder), generator_params(params, config), tokenizer)


def _in_units_of_labels(bundle: Bundle, model: Mapping[str, Any]) -> Bundle:
  """The bundle with `finetune.score_scale`, by which scores were divided for training, in its last layer."""
  scale = model.get('finetune', {}).get('score_scale', 1.0)
  if bundle.labels or 'classifier' not in bundle.params or scale == 1.0:
    return bundle
  head = jax.tree.map(lambda leaf: scale * leaf, bundle.params['classifier'])
  return dataclasses.replace(bundle, params={**bundle.params, 'classifier': head})


def is_run(path: epath.PathLike) -> bool:
  """Whether `path` is a run directory (a model folder otherwise)."""
  return (epath.Path(path) / 'checkpoints').exists()


def tokenizer_folder(path: epath.PathLike) -> epath.Path:
  """Where the tokenizer of a model (a folder, or a name of the hub), a run or a prepared dataset lies.

  Raises:
    DataError: see `local_folder`.
  """
  inside = epath.Path(path) / 'tokenizer'
  return inside if inside.exists() else local_folder(path)


def tokenizer_of(path: epath.PathLike) -> Tokenizer:
  """The tokenizer of a model folder, a run or a prepared dataset."""
  return load_tokenizer(tokenizer_folder(path))


def params_digest(params: Params) -> str:
  """SHA-256 (hex) over names, dtypes, shapes and bytes of a parameter tree."""
  digest = hashlib.sha256()
  for name, leaf in sorted(named_leaves(params).items()):
    array = np.ascontiguousarray(leaf)
    digest.update(f'{name} {array.dtype} {array.shape};'.encode())
    digest.update(array.data)
  return digest.hexdigest()
