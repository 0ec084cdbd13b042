"""What a sub-command is, and the kinds of flags that it takes."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

from absl import flags
from ml_collections import config_flags


@dataclasses.dataclass(frozen=True)
class Command:
  """One sub-command.

  Attributes:
    summary: one line.
    example: a complete call.
    define: adds its flags.
    required: flags that must be given.
    run: does the work; returns what is printed at the end.
    configured: takes --config and --config.FIELD.
    alone: computes in one process, which the workers of a TPU pod cannot.
    arguments: the flag of `several` values that arguments without a name fill; at least one must be given.
  """

  summary: str
  example: str
  define: Callable[[flags.FlagValues], Any]
  required: tuple[str, ...]
  run: Callable[[flags.FlagValues], str]
  configured: bool = False
  alone: bool = False
  arguments: str = ''

  def flag_values(self, arguments: Sequence[str] = ()) -> flags.FlagValues:
    """Its flags, not parsed yet; `arguments` say which fields of the configuration become flags."""
    values = flags.FlagValues()
    if self.configured:
      config_flags.DEFINE_config_file(
        'config',
        None,
        'FILE.py:VARIANT, from configs/ or your own.',
        lock_config=True,
        flag_values=values,
        sys_argv=['compactlm', *arguments],
      )
    self.define(values)
    values.set_gnu_getopt(bool(self.arguments))  # flags may follow arguments
    return values


def text(name: str, default: str | None, meaning: str) -> Callable[[flags.FlagValues], Any]:
  """A flag that takes text; None has no default."""
  return lambda values: flags.DEFINE_string(name, default, meaning, flag_values=values)


def several(name: str, meaning: str) -> Callable[[flags.FlagValues], Any]:
  """A flag that takes text and may be repeated."""

  def define(values: flags.FlagValues) -> None:
    flags.DEFINE_multi_string(name, [], meaning, flag_values=values)
    values[name].help = meaning  # absl adds a sentence

  return define


def number(name: str, default: int | None, meaning: str) -> Callable[[flags.FlagValues], Any]:
  """A flag that takes a whole number that is not negative."""
  return lambda values: flags.DEFINE_integer(name, default, meaning, lower_bound=0, flag_values=values)


def fraction(name: str, meaning: str) -> Callable[[flags.FlagValues], Any]:
  """A flag that takes a number, without a default."""
  return lambda values: flags.DEFINE_float(name, None, meaning, flag_values=values)


def switch(name: str, meaning: str) -> Callable[[flags.FlagValues], Any]:
  """A flag that is off unless given."""
  return lambda values: flags.DEFINE_bool(name, False, meaning, flag_values=values)


def choice(name: str, options: list[str], meaning: str) -> Callable[[flags.FlagValues], Any]:
  """A flag that takes one of `options`; the first is the default."""
  return lambda values: flags.DEFINE_enum(name, options[0], options, meaning, flag_values=values)


def all_of(*parts: Callable[[flags.FlagValues], Any]) -> Callable[[flags.FlagValues], Any]:
  """Several flags."""

  def define(values: flags.FlagValues) -> None:
    for part in parts:
      part(values)

  return define


def comma_list(given: str) -> tuple[str, ...]:
  """The parts of a comma-separated value, without the blanks around them; empty ones count for nothing."""
  return tuple(part.strip() for part in given.split(',') if part.strip())
