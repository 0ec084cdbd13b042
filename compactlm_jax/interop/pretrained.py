"""Where pre-training starts from and what it leaves: discriminator and generator, in from bundles and out to folders.

The tree of replaced-token detection is {'encoder', 'rtd_head', 'generator': {'encoder', 'mlm_head'}}. What the two
towers share stands under 'encoder' alone: with sharing 'embeddings' the tables and their LayerNorm, with 'all' the
whole encoder.
"""

from __future__ import annotations

import itertools
import logging
from collections.abc import Collection, Mapping
from typing import Any

import numpy as np
from etils import epath

from compactlm_jax.config import LAYER_FIELDS, SHARED_EMBEDDINGS, TABLE_FIELDS, EncoderConfig
from compactlm_jax.errors import ConfigError
from compactlm_jax.interop.bundle import Bundle, export_files
from compactlm_jax.interop.names import leaf_shapes
from compactlm_jax.interop.writing import write_export
from compactlm_jax.tree import named_leaves, nested
from compactlm_jax.types import Params

log = logging.getLogger(__name__)

GENERATOR = 'generator'
"""Folder of the generator in an exported discriminator, and its part of the parameter tree."""

_SHARED = {
  'none': (),
  'embeddings': tuple(f'encoder/embeddings/{name}/' for name in SHARED_EMBEDDINGS),
  'all': ('encoder/',),
}
"""What of a generator stands under 'encoder', by `electra.sharing`: beginnings of names."""

_SIZES = (*TABLE_FIELDS, 'num_layers', *LAYER_FIELDS)
"""Fields that decide the shapes of a tree; the first that differs is named."""

_MODES = ('layer_norm_epsilon', 'conv_sees_padding', 'causal')
"""Fields that change what the same weights compute."""


def electra_start(
  discriminator: Bundle | None,
  generator: Bundle | None,
  encoder: EncoderConfig,
  generator_encoder: EncoderConfig,
  sharing: str,
) -> tuple[Params, tuple[str, ...]]:
  """The part of replaced-token detection's parameters that released weights give.

  Args:
    discriminator: an encoder, perhaps with 'rtd_head'; None starts it fresh.
    generator: an encoder, perhaps with 'mlm_head'; None starts it fresh. Without a discriminator, what both share is
      the generator's; with one, it is the discriminator's, and a difference is logged.
    encoder: configuration of the discriminator to train.
    generator_encoder: configuration of the generator to train.
    sharing: `electra.sharing`.

  Returns:
    (a tree with the leaves that are given, beginnings of the names of those that are not: 'rtd_head', ...).

  Raises:
    ConfigError: a size that does not fit, with the field and what to set.
  """
  expected = leaf_shapes(encoder, ('encoder', 'rtd_head'))
  for name, shape in leaf_shapes(generator_encoder, ('encoder', 'mlm_head')).items():
    if not name.startswith(_SHARED[sharing]):
      expected[f'{GENERATOR}/{name}'] = shape
  given: dict[str, Any] = {}
  if generator is not None:
    _check_sizes(generator.config, generator_encoder, encoder, 'generator')
    leaves = named_leaves(generator.params)
    own = {n if n.startswith(_SHARED[sharing]) else f'{GENERATOR}/{n}': a for n, a in leaves.items()}
    given |= _taken(own, expected, 'generator')
  if discriminator is not None:
    _check_sizes(discriminator.config, encoder, encoder, 'discriminator')
    own = _taken(named_leaves(discriminator.params), expected, 'discriminator')
    differing = [name for name in given if name in own and not np.array_equal(given[name], own[name])]
    if differing:
      log.warning(
        "%s differs between generator and discriminator, which share it (electra.sharing='%s'); the discriminator's "
        "is used (sharing='none' keeps both)",
        differing[0] + (f' (and {len(differing) - 1} more)' if differing[1:] else ''),
        sharing,
      )
    given |= own
  return nested(given), _prefixes(expected, given)


def mlm_start(bundle: Bundle, encoder: EncoderConfig) -> tuple[Params, tuple[str, ...]]:
  """The part of a masked or causal language model's parameters that released weights give.

  Args:
    bundle: an encoder, perhaps with 'mlm_head'.
    encoder: configuration of the model to train.

  Returns:
    (a tree with the leaves that are given, beginnings of the names of those that are not).

  Raises:
    ConfigError: a size that does not fit, with the field and what to set.
  """
  expected = leaf_shapes(encoder, ('encoder', 'mlm_head'))
  _check_sizes(bundle.config, encoder, encoder, 'model')
  given = _taken(named_leaves(bundle.params), expected, 'model')
  return nested(given), _prefixes(expected, given)


def save_pretraining(discriminator: Bundle, generator: Bundle, folder: epath.PathLike) -> None:
  """Writes the discriminator to `folder` and its generator to `folder`/generator, both or neither.

  The one head of ConvBERT-small's generator is as wide as its hidden size (ConvBERT, `modeling.py: attention_layer`,
  fewer heads than the head ratio), where transformers makes a head of half that width: its folder has the modelling
  file of `custom`.

  Args:
    discriminator: with 'encoder' and 'rtd_head'.
    generator: with 'encoder' and 'mlm_head'.
    folder: where to; see `save_pretrained`.

  Raises:
    ConfigError, NumericsError, StorageError: see `save_pretrained`.
  """
  inside = export_files(generator, epath.Path(folder) / GENERATOR)
  write_export(export_files(discriminator, folder, generator=GENERATOR), folder, {GENERATOR: inside})


def _taken(own: Mapping[str, Any], expected: Mapping[str, tuple[int, ...]], what: str) -> dict[str, Any]:
  """The leaves that have a place; the others are logged."""
  taken = {name: leaf for name, leaf in own.items() if name in expected}
  for name, leaf in taken.items():
    if np.shape(leaf) != expected[name]:
      raise ConfigError(
        f'parameter {name}: the {what} given holds {np.shape(leaf)}, the configuration asks for {expected[name]}; '
        'its weights and its configuration are of two models'
      )
  if left := _prefixes(own, taken):
    log.info('the %s given also holds %s, which this run has no place for', what, ', '.join(left))
  return taken


def _prefixes(names: Collection[str], given: Collection[str]) -> tuple[str, ...]:
  """The shortest beginnings of names under which nothing is given, in the order of `names`."""
  some = {prefix for name in given for prefix in itertools.accumulate(name.split('/'), '{}/{}'.format)}
  out: dict[str, None] = {}
  for name in names:
    if name not in some:
      out[next(p for p in itertools.accumulate(name.split('/'), '{}/{}'.format) if p not in some)] = None
  return tuple(out)


def _check_sizes(theirs: EncoderConfig, ours: EncoderConfig, encoder: EncoderConfig, what: str) -> None:
  for field in _SIZES:
    given, asked = getattr(theirs, field), getattr(ours, field)
    if given != asked:
      name, remedy = _remedy(field, theirs, encoder) if what == 'generator' else _plain_remedy(field, given)
      raise ConfigError(
        f'config.{name}: the {what} given has {field} {given}, the configuration asks for {asked}; {remedy}'
      )
  for field in _MODES:
    given, asked = getattr(theirs, field), getattr(ours, field)
    if given != asked:
      log.warning('the %s given has %s %s and continues with %s', what, field, given, asked)


def _plain_remedy(field: str, given: Any) -> tuple[str, str]:
  if given == ():
    return f'encoder.{field}', f'leave encoder.{field} empty'
  value = ','.join(map(str, given)) if isinstance(given, tuple) else given
  return f'encoder.{field}', f'set encoder.{field}={value}'


def _remedy(field: str, theirs: EncoderConfig, encoder: EncoderConfig) -> tuple[str, str]:
  """(field of the configuration, what to set) for a generator that differs in `field`."""
  given, scaled = getattr(theirs, field), {'hidden_size': 'generator_size', 'num_layers': 'generator_layers'}
  if field in scaled:
    factor = given / getattr(encoder, field)
    if factor > 1:
      return f'electra.{scaled[field]}', 'a generator larger than its discriminator is not possible; take another one'
    return f'electra.{scaled[field]}', f'set electra.{scaled[field]}={factor:.6g}'
  if field in ('num_heads', 'head_size'):
    return 'electra.generator_heads', f'set electra.generator_heads={theirs.hidden_size // theirs.head_size}'
  if field == 'intermediate_size':
    return 'electra.generator', 'it follows electra.generator_size; take another generator, or none to start it fresh'
  _, remedy = _plain_remedy(field, given)
  return 'electra.generator', f"it is the discriminator's too; take its own generator, or {remedy}"
