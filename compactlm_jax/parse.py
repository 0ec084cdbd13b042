"""JSON that this library did not write, or that may be damaged since: one reader, so that all of it fails alike; and
the digest that proves it.
"""

from __future__ import annotations

import hashlib
import json
import math
from typing import Any

_DIGITS = 300
"""Longest whole number; more than a float holds."""
_DEPTH = 64
"""Deepest nesting; what is deeper would be the recursion of whoever walks through it."""


def parse_json(content: str | bytes) -> Any:
  """A JSON document that says one thing only.

  Args:
    content: text, or its bytes in UTF-8.

  Returns:
    Its value, in which every number is finite and every text can be written as UTF-8.

  Raises:
    ValueError: not JSON; nested too deeply, a name that stands twice in an object, NaN or an infinity, a number too
      large for a float, half of a surrogate pair.
  """
  return _parsed(content, parse_constant=_no_constant, parse_float=_finite)


def parse_row(content: str | bytes) -> Any:
  """As `parse_json`, but numbers may be NaN and infinities: rows of tables, records of runs."""
  return _parsed(content)


def json_digest(content: Any) -> str:
  """SHA-256 (hex) of a JSON-able value; the order of names in objects does not matter."""
  return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _parsed(content: str | bytes, **hooks: Any) -> Any:
  text = content if isinstance(content, str) else content.decode('utf-8')
  try:
    value = json.loads(text, object_pairs_hook=_object, parse_int=_whole, **hooks)
    if text.count('[') + text.count('{') > _DEPTH:
      _check_depth(value)
    if '\\ud' in text or '\\uD' in text:
      json.dumps(value, ensure_ascii=False).encode()
  except RecursionError as e:
    raise ValueError('nested too deeply') from e
  except UnicodeEncodeError as e:
    raise ValueError('half of a surrogate pair') from e
  return value


def _check_depth(value: Any) -> None:
  level = [value]
  for _ in range(_DEPTH + 1):
    inside = [each.values() if isinstance(each, dict) else each for each in level if isinstance(each, (dict, list))]
    level = [child for children in inside for child in children]
    if not level:
      return
  raise ValueError('nested too deeply')


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
  out = dict(pairs)
  if len(out) < len(pairs):
    names = [name for name, _ in pairs]
    raise ValueError(f'{next(n for n in names if names.count(n) > 1)!r} stands twice')
  return out


def _no_constant(name: str) -> Any:
  raise ValueError(f'{name} is no number of JSON')


def _finite(text: str) -> float:
  value = float(text)
  if math.isinf(value):
    raise ValueError(f'the number {text[:20]} is too large')
  return value


def _whole(text: str) -> int:
  if len(text) > _DIGITS:
    raise ValueError(f'a number of {len(text)} digits')
  return int(text)
