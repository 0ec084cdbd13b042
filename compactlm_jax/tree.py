"""Names of the leaves of parameter trees: 'encoder/layers/attention/query/kernel'."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import jax
import jax.numpy as jnp

from compactlm_jax.errors import ConfigError

_V = TypeVar('_V')


def leaf_name(path: Sequence[Any]) -> str:
  """The name of a key path: its keys, attributes and indices joined by '/'."""
  return jax.tree_util.keystr(tuple(path), simple=True, separator='/')


def named_leaves(tree: Any) -> dict[str, Any]:
  """Name -> leaf, in the order of the tree's leaves."""
  return {leaf_name(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}


def nested(leaves: Mapping[str, _V]) -> dict[str, Any]:
  """The nested dicts of named leaves: the inverse of `named_leaves` for trees of dicts.

  Of any other tree it is a form that does not depend on the classes of its nodes (an optimiser's).
  """
  out: dict[str, Any] = {}
  for name, leaf in leaves.items():
    *folders, last = name.split('/')
    node = out
    for folder in folders:
      node = node.setdefault(folder, {})
    node[last] = leaf
  return out


def overlaid(tree: dict[str, Any], given: Mapping[str, Any]) -> dict[str, Any]:
  """The nested dict `tree` with the leaves of `given`, a part of it, in place of its own."""
  return {
    name: overlaid(node, given.get(name, {})) if isinstance(node, dict) else given.get(name, node)
    for name, node in tree.items()
  }


def map_named(fn: Callable[[str, Any], _V], tree: Any) -> Any:
  """The tree with fn(name, leaf) in place of each leaf."""
  return jax.tree_util.tree_map_with_path(lambda path, leaf: fn(leaf_name(path), leaf), tree)


def not_finite(tree: Any) -> list[str]:
  """Names of the leaves that hold NaN or infinity."""
  floats = {n: x for n, x in named_leaves(tree).items() if jnp.issubdtype(x.dtype, jnp.inexact)}
  return [name for name, ok in jax.device_get(_finite(floats)).items() if not ok]


@jax.jit
def _finite(leaves: dict[str, jax.Array]) -> dict[str, jax.Array]:
  return {name: jnp.isfinite(x).all() for name, x in leaves.items()}


def match_one(rules: Sequence[tuple[str, _V]], name: str, what: str) -> _V:
  """The value of the one rule whose regex matches the whole name.

  Args:
    rules: (regex, value) pairs.
    name: name of a parameter.
    what: what the rules assign, for the message.

  Raises:
    ConfigError: no rule matches, or more than one.
  """
  hits = [(pattern, value) for pattern, value in rules if re.fullmatch(pattern, name)]
  if len(hits) == 1:
    return hits[0][1]
  if not hits:
    raise ConfigError(f'parameter {name}: no {what} rule matches it; add a row for it')
  patterns = ', '.join(pattern for pattern, _ in hits)
  raise ConfigError(
    f'parameter {name}: {len(hits)} {what} rules match it ({patterns}); make their patterns exclude each other'
  )
