"""The library's own errors, each with the process exit code that `compactlm` ends with.

A message names the field, file or tensor that is wrong and what to do about it.
"""

from __future__ import annotations


class CompactLMError(Exception):
  """Base of every error that this library raises on purpose."""

  exit_code = 70


class DataError(CompactLMError):
  """Input data that cannot be used: empty, not UTF-8, damaged, out of range. Exit code 65."""

  exit_code = 65


class NumericsError(CompactLMError):
  """Too many non-finite updates, or non-finite parameters. Exit code 70."""

  exit_code = 70


class StorageError(CompactLMError):
  """A disk that is full or not writable, or no intact checkpoint. Exit code 74."""

  exit_code = 74


class PreemptedError(CompactLMError):
  """A signal asked the run to stop; its state is saved and a restart continues. Exit code 75."""

  exit_code = 75


class PeerError(CompactLMError):
  """Another process of the job is gone or did not come; a restart continues from the last checkpoint. Exit code 75."""

  exit_code = 75


class LockedError(CompactLMError):
  """Another run holds the directory. Exit code 77."""

  exit_code = 77


class ConfigError(CompactLMError):
  """A configuration that is invalid, or does not match the data, tokenizer or weights. Exit code 78."""

  exit_code = 78


def first_line(error: BaseException) -> str:
  """The first line of what an error says, or its kind."""
  return (str(error).partition('\n')[0] or type(error).__name__)[:300]
