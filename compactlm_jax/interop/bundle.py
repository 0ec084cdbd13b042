"""A model with all that it needs, from and to a Hugging Face folder."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import safetensors.numpy
from etils import epath

from compactlm_jax.compress.shrink import padded
from compactlm_jax.config import EncoderConfig
from compactlm_jax.errors import ConfigError
from compactlm_jax.interop import custom, hf_config, names
from compactlm_jax.interop.card import model_card
from compactlm_jax.interop.first_token import passes_first_token
from compactlm_jax.interop.folder import WEIGHTS, open_folder, read_tensors
from compactlm_jax.interop.hub import local_folder
from compactlm_jax.interop.sparse_file import SPARSE_KEY, read_sparse
from compactlm_jax.interop.tokenizer_files import TokenizerFiles, matched, read_tokenizer
from compactlm_jax.interop.writing import json_bytes, write_export
from compactlm_jax.tree import named_leaves
from compactlm_jax.types import Params

log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Bundle:
  """A model: what `encode` needs, and its tokenizer.

  Attributes:
    config: the encoder's configuration.
    params: the tree: 'encoder', and any of 'mlm_head', 'rtd_head', 'classifier', 'span'. A classifier reads the pooled
      vector if `config.pooler`, else the last hidden state of the first token; `drop_pooler` makes the second true. A
      classifier of one output predicts a number, in the unit of the labels.
    tokenizer: the tokenizer's files; None if the folder had none.
    labels: names of the classifier's classes in the order of its outputs; () if they have none.
  """

  config: EncoderConfig
  params: Params
  tokenizer: TokenizerFiles | None = None
  labels: tuple[str, ...] = ()


def from_pretrained(folder: epath.PathLike) -> Bundle:
  """Reads a BERT, ELECTRA or ConvBERT folder of Hugging Face, or one that `save_pretrained` or `save_sparse` wrote.

  Args:
    folder: a folder, or 'owner/name' of the Hugging Face hub where no such folder exists. Only safetensors, JSON and
      vocabularies are read; nothing in the folder is executed.

  Returns:
    The bundle, float32. An imported ConvBERT is in parity mode (`conv_sees_padding`).

  Raises:
    DataError: missing, damaged or unexpected files or tensors; pickles (the message says how to convert them).
    ConfigError: a model that the encoder cannot express, or config.json, weights and tokenizer that disagree.
  """
  source = open_folder(local_folder(folder))
  raw = source.read_json('config.json')
  config = hf_config.from_hf(raw)
  tensors = read_sparse(source, raw, config) if SPARSE_KEY in raw else read_tensors(source)
  if config.architecture == 'bert':
    config = dataclasses.replace(config, pooler=names.has_pooler(tensors) and not passes_first_token(tensors))
  tokenizer = read_tokenizer(source)
  config = matched(config, tokenizer)
  tensors = custom.without_empty(tensors) if config.ragged else tensors
  params = names.import_tensors(tensors, config)
  outputs = params['classifier']['bias'].shape[0] if 'classifier' in params else 0
  labels = hf_config.labels_of(raw) if outputs > 1 else ()
  if len(labels) not in (0, outputs):
    raise ConfigError(f'{folder}/config.json: id2label names {len(labels)} classes, the classifier has {outputs}')
  return Bundle(config, jax.tree.map(jnp.asarray, params), tokenizer, labels)


def save_pretrained(bundle: Bundle, folder: epath.PathLike, layout: str = 'auto') -> None:
  """Writes a folder that transformers and `from_pretrained` load; the same bundle always gives the same bytes.

  A pruned encoder whose layers differ in heads or neurons, or whose heads do not fill its hidden size, is beyond the
  classes of transformers. `modeling_compactlm.py` is then written beside the weights, and transformers loads the
  folder with trust_remote_code=True; this is logged.

  Args:
    bundle: the model. Heads that transformers has no class for are written beside the encoder and logged.
    folder: where to; an earlier export there is replaced, anything else is not touched. A kill leaves the earlier
      export or nothing, never half a folder.
    layout: 'auto', or 'padded' to fill pruned layers up with zeros to their stock sizes: a larger file of the same
      outputs, without the modelling file.

  Raises:
    ConfigError: transformers cannot express the model, the tree does not agree with the configuration, the tokenizer
      does not fit, `folder` is not an export, or an unknown layout.
    NumericsError: parameters that are not finite.
    StorageError: the disk is full or not writable.
  """
  write_export(export_files(bundle, folder, layout=layout), folder)


def export_files(
  bundle: Bundle,
  folder: epath.PathLike,
  *,
  generator: str = '',
  layout: str = 'auto',
  also: Mapping[str, Any] | None = None,
) -> dict[str, bytes]:
  """The files of an exported bundle.

  Args:
    bundle: the model.
    folder: where they will be written, for messages.
    generator: name of the folder beside them that holds the generator of this discriminator, for the model card.
    layout: see `save_pretrained`.
    also: further entries of config.json, which the model card knows too.

  Returns:
    File name -> content; the same bundle always gives the same bytes.

  Raises:
    ConfigError, NumericsError: see `save_pretrained`.
  """
  bundle = _laid_out(bundle, layout)
  config, heads = bundle.config, sorted(set(bundle.params) & set(names.HEADS))
  if names.is_joint(named_leaves(bundle.params)):
    heads[heads.index('span')] = 'joint span'  # no class of transformers reads it
  if bundle.tokenizer is None:
    log.warning('%s: exported without a tokenizer; whoever loads it must bring the right one', folder)
  config = matched(config, bundle.tokenizer)
  classes = bundle.params['classifier']['bias'].shape[-1] if 'classifier' in heads else 0
  code = layout == 'auto' and custom.needed(config)
  described = {**hf_config.to_hf(config, heads, classes, bundle.labels, code=code), **(also or {})}
  ours_alone = SPARSE_KEY in described  # transformers reads nothing of it
  if ours_alone:
    described.pop('auto_map', None)
  code = code and not ours_alone
  _warn(folder, [] if ours_alone else hf_config.unread_heads(config, heads, classes), code)
  tensors = names.export_tensors(bundle.params, config, stock_head=not ours_alone)
  tensors = custom.with_empty(tensors, config) if code else tensors
  return {
    WEIGHTS: safetensors.numpy.save(tensors, metadata={'format': 'pt'}),
    'config.json': json_bytes(described),
    'README.md': model_card(config, heads, names.count_parameters(bundle.params), described, generator).encode(),
    **({custom.FILE: custom.source()} if code else {}),
    **(bundle.tokenizer.files if bundle.tokenizer else {}),
  }


def _warn(folder: epath.PathLike, unread: list[str], code: bool) -> None:
  """Says what transformers does not read of a folder, and what it needs."""
  if unread:
    log.warning('%s: transformers will ignore %s; from_pretrained reads it back', folder, ', '.join(unread))
  if code:
    log.warning(
      '%s: transformers needs trust_remote_code=True to run %s, which is written there: its classes have no layers of '
      "these sizes (layout='padded' fills them up with zeros, for the stock classes)",
      folder,
      custom.FILE,
    )


def _laid_out(bundle: Bundle, layout: str) -> Bundle:
  if layout not in ('auto', 'padded'):
    raise ConfigError(f"layout {layout!r}: unknown; use 'auto' or 'padded'")
  if layout == 'auto' or not custom.needed(bundle.config):
    return bundle
  params, config = padded(bundle.params, bundle.config)
  return dataclasses.replace(bundle, params=params, config=config)


def drop_pooler(bundle: Bundle) -> Bundle:
  """The bundle without BERT's pooler: for a classifier that was trained on the raw first token, and for ELECTRA."""
  encoder = {name: leaf for name, leaf in bundle.params['encoder'].items() if name != 'pooler'}
  config = dataclasses.replace(bundle.config, pooler=False)
  return dataclasses.replace(bundle, config=config, params={**bundle.params, 'encoder': encoder})
