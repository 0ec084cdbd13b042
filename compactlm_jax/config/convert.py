"""ConfigDicts and JSON to frozen dataclasses, and back."""

from __future__ import annotations

import dataclasses
import functools
import typing
from typing import Any, TypeVar

import ml_collections

from compactlm_jax.errors import ConfigError

_C = TypeVar('_C')


def to_config_dict(config: Any) -> ml_collections.ConfigDict:
  """The ConfigDict of a dataclass: nested, with tuples as comma-separated strings."""
  out = ml_collections.ConfigDict()
  for field in dataclasses.fields(config):
    value = getattr(config, field.name)
    if dataclasses.is_dataclass(value):
      value = to_config_dict(value)
    elif isinstance(value, tuple):
      value = ','.join(str(v) for v in value)
    out[field.name] = value
  return out.lock()


def _coerce(kind: Any, value: Any, path: str) -> Any:
  origin = typing.get_origin(kind)
  if dataclasses.is_dataclass(kind):
    return from_config_dict(typing.cast(type, kind), value, path + '.')
  if origin is tuple:
    (item, *_) = typing.get_args(kind)
    problem = f'config.{path}: {value!r:.80} is not a comma-separated list of {item.__name__}'
    try:
      if isinstance(value, str):
        return tuple(item(p.strip()) for p in value.split(',') if p.strip())
    except ValueError as e:
      raise ConfigError(problem) from e
    if not isinstance(value, (list, tuple)):
      raise ConfigError(problem)
    parts = tuple(_coerce(item, part, f'{path}[{i}]') for i, part in enumerate(value))
    if any(isinstance(part, str) and (',' in part or part != part.strip() or not part) for part in parts):
      raise ConfigError(f'{problem}: its parts can have no commas, no blanks around them, and must not be empty')
    return parts
  if kind is float and isinstance(value, int) and not isinstance(value, bool):
    try:
      return float(value)
    except OverflowError as e:
      raise ConfigError(f'config.{path}: a number of {value.bit_length()} bits is too large') from e
  if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
    raise ConfigError(f'config.{path}: {value!r} is not of type {kind.__name__}')
  return value


@functools.cache
def _kinds(cls: Any) -> dict[str, Any]:
  return typing.get_type_hints(cls)


def from_config_dict(cls: type[_C], config: Any, prefix: str = '') -> _C:
  """The frozen dataclass `cls` of a ConfigDict, a dict or JSON.

  Raises:
    ConfigError: an unknown or missing field, a wrong type or an invalid value, named by its full path.
  """
  if not isinstance(config, (dict, ml_collections.ConfigDict)):
    raise ConfigError(f'{".".join(["config", prefix])[:-1]}: expected a section, got {config!r}')
  kinds = _kinds(typing.cast(Any, cls))
  unknown = sorted(set(config.keys()) - set(kinds))
  if unknown:
    raise ConfigError(f'config.{prefix}{unknown[0]}: unknown field; known fields are {", ".join(sorted(kinds))}')
  for field in dataclasses.fields(typing.cast(Any, cls)):
    if field.default is dataclasses.MISSING and field.name not in config:
      raise ConfigError(f'config.{prefix}{field.name}: is missing')
  return cls(**{name: _coerce(kinds[name], config[name], prefix + name) for name in config.keys()})


def to_json(config: Any) -> dict[str, Any]:
  """A dataclass as plain JSON values."""
  return to_config_dict(config).to_dict()
