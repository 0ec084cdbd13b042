"""Parsing, help, and the one place that maps errors to exit codes."""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import pathlib
import re
import sys
import textwrap
import traceback
from collections.abc import Iterator, Sequence
from typing import Any

from absl import flags

from compactlm_jax.cli.commands import COMMANDS
from compactlm_jax.cli.early import leaves_early
from compactlm_jax.cli.worker import is_worker, launch_of, refuse_pod, start_worker, watched
from compactlm_jax.distributed import Group, lost_peer
from compactlm_jax.errors import CompactLMError, ConfigError, StorageError, first_line
from compactlm_jax.storage import own_error

_SPACE = 'free space or fix permissions'
_MOUNT = 'the disk does not answer: look at its mount, then run the same command again'
_STORAGE = {
  **dict.fromkeys((errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EROFS, errno.EIO), _SPACE),
  **dict.fromkeys((errno.ESTALE, errno.ETIMEDOUT, errno.ENOTCONN), _MOUNT),
  **dict.fromkeys((errno.EMFILE, errno.ENFILE), 'raise the limit of open files (ulimit -n)'),
}
"""Kinds of OSError that are the storage's, and what to do about them."""

_IN_THE_WAY = (IsADirectoryError, NotADirectoryError, FileExistsError)
_MEMORY = re.compile(r'RESOURCE_EXHAUSTED.*(memory|allocat)', re.IGNORECASE | re.DOTALL)


def usage() -> str:
  """The text of `compactlm --help`."""
  lines = ['compactlm: train, distil and compress BERT-like encoders.', '']
  lines += ['usage: compactlm COMMAND [--flag=value ...]', '']
  lines += [f'  {name:<10} {command.summary}' for name, command in COMMANDS.items()]
  lines += ['', 'compactlm COMMAND --help tells the flags of a command.']
  codes = '0 done, 65 bad data, 70 numerics or a bug, 74 storage, 75 saved, please restart, 77 directory in use, '
  return '\n'.join([*lines, *textwrap.wrap('Exit codes: ' + codes + '78 configuration or mismatch.', 100)])


def command_help(name: str) -> str:
  """The text of `compactlm NAME --help`."""
  command = COMMANDS[name]
  values = command.flag_values()
  lines = [f'compactlm {name}: {command.summary}', '', f'  {command.example}', '', 'flags:']
  for flag in [values[key] for key in values]:
    note = 'required' if flag.name in command.required else f'default: {flag.default!r}' if flag.default else ''
    text = (flag.help or '') + (f' [{note}]' if note else '')
    shown = f'{flag.name.upper()} ...' if flag.name == command.arguments else f'--{flag.name}'
    lines += [f'  {shown}', *textwrap.wrap(text, 96, initial_indent='      ', subsequent_indent='      ')]
  if command.configured:
    lines += ['  --config.FIELD=VALUE', '      Overrides a field of the configuration, for example --config.steps=100.']
    lines += ['      Lists are comma-separated. The fields are documented in compactlm_jax/config/.']
  return '\n'.join(lines)


def _parse(name: str, argv: Sequence[str]) -> flags.FlagValues:
  command = COMMANDS[name]
  values, file = command.flag_values(argv), _config_file(argv) if command.configured else ''
  if file and not pathlib.Path(file).is_file():
    raise ConfigError(f'--config: there is no file {file}. For example: {command.example}')
  try:
    left = values([f'compactlm {name}', *argv])
  except CompactLMError:  # of the file's own get_config
    raise
  except Exception as e:  # the file is the user's code: whatever it raises is about the configuration
    problem = _parse_problem(e, argv, file).rstrip('.')
    raise ConfigError(f'{problem}{"" if problem.endswith("?") else "."} See: compactlm {name} --help') from e
  if command.arguments:
    given = values[command.arguments]
    given.value = [*(given.value or ()), *left[1:]]
    if not given.value:
      raise ConfigError(f'{command.arguments} are missing. For example: {command.example}')
  elif len(left) > 1:
    raise ConfigError(f'unexpected argument {left[1]!r}; flags are written --name=value. See: compactlm {name} --help')
  for flag in command.required:
    if flag == 'config' and file and values[flag].value is None:
      raise ConfigError(f'{file}: get_config() returns nothing')
    if values[flag].value in (None, ''):  # '' is what an unset variable of a shell leaves
      raise ConfigError(f'--{flag} is missing. For example: {command.example}')
  return values


def _config_file(argv: Sequence[str]) -> str:
  """The file in --config=FILE:VARIANT or --config FILE:VARIANT."""
  for argument, following in zip(argv, [*argv[1:], '']):
    flag, given, value = argument.partition('=')
    if flag in ('--config', '-config'):
      return (value if given else following).partition(':')[0]
  return ''


def _parse_problem(error: Exception, argv: Sequence[str], file: str) -> str:
  """One line, from the many forms in which absl, ml_collections and configuration files complain."""
  if isinstance(error, flags.UnrecognizedFlagError) and error.flagname.startswith('config.') and not file:
    return '--config=FILE.py:VARIANT is missing'
  if isinstance(error, (KeyError, AttributeError)):
    for argument in argv:  # ml_collections names only the part of a field that it did not find
      field = argument.lstrip('-').partition('=')[0].split('.')
      for i, part in enumerate(field):
        if i and field[0] == 'config' and re.search(rf"'{re.escape(part)}\\?'", str(error)):
          hint = re.search(r'Did you mean "([^"]+)"', str(error))
          return f'{".".join(field[: i + 1])}: unknown field' + (f'; did you mean {hint[1]}?' if hint else '')
  lines = [line for line in str(error).splitlines() if line.strip()] or ['']
  if isinstance(error, flags.IllegalFlagValueError) and 'parsing config file' not in lines[0]:
    return lines[0].removeprefix('flag ')
  if isinstance(error, flags.UnrecognizedFlagError) or (isinstance(error, flags.Error) and not file):
    return lines[0].replace(' ?', '?')
  own = [frame for frame in traceback.extract_tb(error.__traceback__) if frame.filename.endswith(file)]
  where = f', line {own[-1].lineno}' if own and file and not isinstance(error, flags.Error) else ''
  kind = '' if isinstance(error, flags.Error) else f'{type(error).__name__}: '
  return f'{file}{where}: {kind}{lines[-1]}' if file else f'{kind}{lines[-1]}'


@contextlib.contextmanager
def _log_to_stderr() -> Iterator[None]:
  """Plain lines: warnings of all libraries, and what this one has to say."""
  # Without a handler on the root, absl adds one of its own that complains about flags parsed by other means.
  handler, root, own = logging.StreamHandler(sys.stderr), logging.getLogger(), logging.getLogger('compactlm_jax')
  client = logging.getLogger('gcsfs')  # prints a traceback of what it raises anyway
  handler.setFormatter(logging.Formatter('%(message)s'))
  root.addHandler(handler)
  levels = {own: logging.INFO, client: logging.CRITICAL}
  before = {logger: logger.level for logger in levels}
  for logger, level in levels.items():
    logger.setLevel(level)
  try:
    yield
  finally:
    for logger, level in before.items():
      logger.setLevel(level)
    root.removeHandler(handler)


def main(argv: Sequence[str] | None = None) -> int:
  """Runs the command line.

  Args:
    argv: arguments without the program's name; None takes those of the process.

  Returns:
    The exit code.
  """
  arguments = list(sys.argv[1:] if argv is None else argv)
  if not arguments or arguments[0] in ('--help', '-h', 'help'):
    print(usage())
    return 0 if arguments else 78
  name, rest = arguments[0], arguments[1:]
  if name not in COMMANDS:
    print(f'compactlm: there is no command {name!r}\n\n{usage()}', file=sys.stderr)
    return 78
  if {'--help', '-h', '--helpfull', '--helpshort'} & set(rest):
    print(command_help(name))
    return 0
  again = sys.orig_argv[1:] if argv is None else ['-m', 'compactlm_jax', *arguments]
  with _log_to_stderr(), leaves_early(name) if name == 'train' else contextlib.nullcontext():
    return _guarded(name, rest, again)


def _guarded(name: str, arguments: Sequence[str], again: Sequence[str]) -> int:
  group: Group | None = None
  try:
    values = _parse(name, arguments)
    if COMMANDS[name].alone:
      refuse_pod(name)
    launch = launch_of(values) if 'coordinator' in values else None
    if launch is not None and not is_worker():
      return watched(name, again, launch)
    if launch is not None:
      group = start_worker(launch)
      logging.getLogger('compactlm_jax').setLevel(logging.WARNING if group.index else logging.INFO)
    said = COMMANDS[name].run(values)
    if group is None or not group.index:
      print(said, flush=group is not None)
    code, why = 0, ''
  except BaseException as e:
    if not isinstance(e, (Exception, KeyboardInterrupt)):
      raise
    code, why = _explain(name, e)
  return group.end(code, why) if group is not None else code


def _explain(name: str, error: BaseException) -> tuple[int, str]:
  """Says what went wrong; (exit code, the line that says it)."""
  if problem := _path_problem(error):
    code, why = 78, problem
  elif isinstance(error, CompactLMError):
    code, why = error.exit_code, str(error)
  elif isinstance(error, KeyboardInterrupt):
    code, why = 130, 'interrupted'
  elif isinstance(error, OSError) and error.errno in _STORAGE:
    where = f': {error.filename}' if error.filename else ''
    code, why = 74, f'{error.strerror}{where}; {_STORAGE[error.errno]}'
  elif _is_memory(error):
    code, why = 78, f'out of memory ({first_line(error)}); {_less_memory(name)}'
  elif own := own_error(error):
    code, why = own.exit_code, str(own)
  elif lost := lost_peer(error):
    code, why = 75, f'another process is gone ({lost}); a restart continues from the last checkpoint'
  else:
    traceback.print_exception(error)
    code, why = 70, 'this is a bug in compactlm-jax; the lines above say where'
  print(f'compactlm {name}: {why}', file=sys.stderr)
  return code, why


def _path_problem(error: BaseException) -> str:
  """What is wrong with a path that was named; '' for another error."""
  # What cannot be written is a StorageError, which is worth another try, unless something else stands in its place.
  wrapped, cause = isinstance(error, StorageError), error
  while isinstance(cause, StorageError) and cause.__cause__ is not None:
    cause = cause.__cause__
  if not isinstance(cause, _IN_THE_WAY if wrapped else (*_IN_THE_WAY, FileNotFoundError)):
    return ''
  named = cause.filename if isinstance(cause, FileNotFoundError) else cause.filename2 or cause.filename
  if not isinstance(named, (str, bytes)) or not named:
    return ''
  path = pathlib.Path(os.fsdecode(named))
  if isinstance(cause, IsADirectoryError):
    return f'{path}: is a folder; name a file'
  if isinstance(cause, FileNotFoundError):
    return f'{path}: no such file or folder; check the path'
  if file := next((place for place in (path, *path.parents) if place.is_file()), None):
    return f'{file}: is a file, and a folder is wanted there; name another path'
  return '' if wrapped else f'{path}: {cause.strerror}; name another path'


def _is_memory(error: BaseException) -> bool:
  """Whether the memory of this machine or of a device was too small."""
  # XLA's is a RuntimeError, or a ValueError while a step is dispatched; clients of buckets say quotas are exhausted.
  told = isinstance(error, (RuntimeError, ValueError)) and str(error)
  return isinstance(error, MemoryError) or bool(told and _MEMORY.search(told))


def _less_memory(name: str) -> str:
  command = COMMANDS[name]
  if command.configured:
    return (
      'lower config.batch_size, raise config.optimizer.accumulate or set config.encoder.remat=True (with scan_unroll=1)'
    )
  sizes = [flag for flag in ('batch_size', 'batch', 'workers') if flag in command.flag_values()]
  return f'lower --{sizes[0]}' if sizes else 'take a smaller input or a machine with more memory'


def entry() -> Any:
  """The console script: exits at once, without waiting for reading threads of the input pipeline."""
  code = main()
  with contextlib.suppress(BrokenPipeError):  # the reader of a pipe has seen enough
    sys.stdout.flush()
    sys.stderr.flush()
  os._exit(code)
