"""Models by path: Hugging Face folders, exports and runs."""

from __future__ import annotations

import hashlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath

from compactlm_jax.checkpoint import load_params
from compactlm_jax.config import ElectraConfig, EncoderConfig, from_config_dict
from compactlm_jax.data.tokenizer import Tokenizer, load_tokenizer
from compactlm_jax.interop.bundle import Bundle, drop_pooler, from_pretrained
from compactlm_jax.interop.folder import open_folder
from compactlm_jax.interop.pretrained import GENERATOR, pretraining_bundles
from compactlm_jax.interop.tokenizer_files import TokenizerFiles, read_tokenizer
from compactlm_jax.tree import named_leaves
from compactlm_jax.types import Params


def load_model(path: epath.PathLike) -> Bundle:
  """A model from a Hugging Face folder, from an export, or from the newest intact checkpoint of a run.

  Args:
    path: the folder or run directory.

  Raises:
    ConfigError, DataError, StorageError: the folder cannot be used; the message says why.
  """
  if not is_run(path):
    return from_pretrained(path)
  params, model, tokenizer = _read_run(path)
  encoder = from_config_dict(EncoderConfig, model['encoder'], 'encoder.')
  own = {name: tree for name, tree in params.items() if name != GENERATOR}
  bundle = Bundle(encoder, own, tokenizer)
  # In a bundle a classifier reads the pooler if there is one; this run's reads the first token itself.
  raw = 'classifier' in params and encoder.pooler and not model['finetune']['pooled']
  return drop_pooler(bundle) if raw else bundle


def load_generator(path: epath.PathLike) -> Bundle | None:
  """The generator of a replaced-token run or of its export; a model folder itself is taken as a generator.

  Args:
    path: run directory, export with a `generator` folder inside, or the generator's own folder.

  Returns:
    The generator with the embeddings that it shares; None for a run that has none.

  Raises:
    ConfigError, DataError, StorageError: see `load_model`.
  """
  if not is_run(path):
    inside = epath.Path(path) / GENERATOR
    return from_pretrained(inside if inside.exists() else path)
  params, model, tokenizer = _read_run(path)
  if GENERATOR not in params:
    return None
  encoder = from_config_dict(EncoderConfig, model['encoder'], 'encoder.')
  config = from_config_dict(ElectraConfig, model['electra'], 'electra.')
  return pretraining_bundles(params, encoder, config.generator_encoder(encoder), config.sharing, tokenizer)[1]


def is_run(path: epath.PathLike) -> bool:
  """Whether `path` is a run directory (a model folder otherwise)."""
  return (epath.Path(path) / 'checkpoints').exists()


def _read_run(path: epath.PathLike) -> tuple[Params, dict[str, Any], TokenizerFiles | None]:
  """(parameters, description of the model, tokenizer) of the newest intact checkpoint."""
  run = epath.Path(path)
  params, metadata = load_params(run / 'checkpoints')
  tokenizer = read_tokenizer(open_folder(run / 'tokenizer')) if (run / 'tokenizer').exists() else None
  return jax.tree.map(jnp.asarray, params), metadata['model'], tokenizer


def tokenizer_of(path: epath.PathLike) -> Tokenizer:
  """The tokenizer of a model folder or a run."""
  inside = epath.Path(path) / 'tokenizer'
  return load_tokenizer(inside if inside.exists() else path)


def params_digest(params: Params) -> str:
  """SHA-256 (hex) over names, dtypes, shapes and bytes of a parameter tree."""
  digest = hashlib.sha256()
  for name, leaf in sorted(named_leaves(params).items()):
    array = np.ascontiguousarray(leaf)
    digest.update(f'{name} {array.dtype} {array.shape};'.encode())
    digest.update(array.data)
  return digest.hexdigest()
