"""The form of every complaint about a field."""

from __future__ import annotations

from compactlm_jax.errors import ConfigError


def require(ok: bool, field: str, message: str) -> None:
  """Raises ConfigError, naming `config.FIELD`, unless `ok`."""
  if not ok:
    raise ConfigError(f'config.{field}: {message}')
