"""The form of every complaint about a field."""

from __future__ import annotations

import difflib
from collections.abc import Sequence

from compactlm_jax.errors import ConfigError


def require(ok: bool, field: str, message: str) -> None:
  """Raises ConfigError, naming `config.FIELD`, unless `ok`."""
  if not ok:
    raise ConfigError(f'config.{field}: {message}')


def one_of(field: str, value: str, allowed: Sequence[str]) -> None:
  """Raises ConfigError, naming `config.FIELD` and what is spelt alike or all there is, unless `value` is allowed."""
  if value in allowed:
    return
  close = difflib.get_close_matches(str(value), allowed, 1)
  hint = f'did you mean {close[0]}?' if close else f'use one of {", ".join(name or repr(name) for name in allowed)}'
  require(False, field, f'{value!r} is unknown; {hint}')
