"""The `compactlm` command. The one place that maps errors to exit codes."""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import json
import logging
import os
import pathlib
import re
import sys
import textwrap
import traceback
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from absl import flags
from ml_collections import config_flags

from compactlm_jax.errors import CompactLMError, ConfigError


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
  """

  summary: str
  example: str
  define: Callable[[flags.FlagValues], Any]
  required: tuple[str, ...]
  run: Callable[[flags.FlagValues], str]
  configured: bool = False

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
    return values


def _text(name: str, default: str | None, text: str) -> Callable[[flags.FlagValues], Any]:
  return lambda values: flags.DEFINE_string(name, default, text, flag_values=values)


def _number(name: str, default: int | None, text: str) -> Callable[[flags.FlagValues], Any]:
  return lambda values: flags.DEFINE_integer(name, default, text, lower_bound=0, flag_values=values)


def _switch(name: str, text: str) -> Callable[[flags.FlagValues], Any]:
  return lambda values: flags.DEFINE_bool(name, False, text, flag_values=values)


def _choice(name: str, options: list[str], text: str) -> Callable[[flags.FlagValues], Any]:
  return lambda values: flags.DEFINE_enum(name, options[0], options, text, flag_values=values)


def _all(*parts: Callable[[flags.FlagValues], Any]) -> Callable[[flags.FlagValues], Any]:
  def define(values: flags.FlagValues) -> None:
    for part in parts:
      part(values)

  return define


def _demo(values: flags.FlagValues) -> str:
  from compactlm_jax.cpu import keep_memory
  from compactlm_jax.demo.main import run_demo

  keep_memory()
  return run_demo(values.workdir)


def _prepare(values: flags.FlagValues) -> str:
  from compactlm_jax.data.prepare import prepare

  manifest = prepare(
    values.input,
    values.tokenizer,
    values.output,
    values.seq_len,
    values.mode,
    workers=values.workers,
    seed=values.seed,
    pair_rule=values.pair_rule,
    holdout_rows=values.holdout_rows,
    split=values.split,
    text_key=values.text_key,
    overwrite=values.overwrite,
  )
  counts = ', '.join(f'{name} {value:,}' for name, value in sorted(manifest.counts.items()))
  return f'{values.output}: {counts}'


def _tokenizer(values: flags.FlagValues) -> str:
  from compactlm_jax.data.tokenizer import train_wordpiece

  made = train_wordpiece(values.input, values.vocab_size, values.output, lowercase=values.lowercase)
  return f'{values.output}: {made.vocab_size:,} word pieces'


def _train(values: flags.FlagValues) -> str:
  from compactlm_jax.config import RunConfig, from_config_dict
  from compactlm_jax.cpu import keep_memory
  from compactlm_jax.jobs import run_train

  keep_memory()
  config = from_config_dict(RunConfig, values.config)
  allowed = tuple(name.strip() for name in values.allow_change.split(',') if name.strip())
  results = run_train(config, values.workdir, allow_change=allowed, steal_lock=values.steal_lock)
  return f'{values.workdir}/results.json: {json.dumps(results["metrics"])}'


def _export(values: flags.FlagValues) -> str:
  from compactlm_jax.jobs import run_export

  bundle = run_export(values.checkpoint, values.output)
  cfg = bundle.config
  return f'{values.output}: {cfg.architecture}, {cfg.num_layers} layers, {cfg.hidden_size} wide'


def _plan(values: flags.FlagValues) -> str:
  os.environ['JAX_PLATFORMS'] = 'cpu'  # nothing is computed, and a TPU that is here may be in use
  from compactlm_jax.config import RunConfig, from_config_dict
  from compactlm_jax.plan.main import plan_run, too_large
  from compactlm_jax.plan.report import as_json, as_table

  for flag in ('output', 'hlo'):  # before the compiler takes its minutes
    if not pathlib.Path(values[flag].value or '.').absolute().parent.is_dir():
      raise ConfigError(f'--{flag}: the folder of {values[flag].value} is not there')
  config = from_config_dict(RunConfig, values.config)
  name = str(getattr(values['config'], 'config_filename', ''))
  report = plan_run(config, name, values.topology, sweep=bool(values.sweep), thorough=values.thorough)
  _write(values.output, json.dumps(as_json(report), indent=2) + '\n')
  _write(values.hlo, getattr(report.program, 'hlo', ''))
  if problem := too_large(report):
    print(as_table(report))
    raise ConfigError(problem)
  return as_table(report)


def _write(path: str, text: str) -> None:
  if path and text:
    pathlib.Path(path).write_text(text, encoding='utf-8')


COMMANDS = {
  'demo': Command(
    'Distil a real encoder on real text, and show what was gained.',
    'compactlm demo --workdir=demo_run',
    _text('workdir', 'demo_run', 'Where assets, data and models are kept; a second run reuses them.'),
    (),
    _demo,
  ),
  'prepare': Command(
    'Tokenise text into rows of equal length: a TFDS dataset of ArrayRecord shards.',
    "compactlm prepare --input='text/*.txt.gz' --tokenizer=MODEL --output=data/rows --seq_len=128",
    _all(
      _text('input', None, 'Comma-separated globs of text files (.gz is read), tfds:NAME, or hf:NAME[:CONFIG].'),
      _text('tokenizer', None, 'Folder with the tokenizer, for example a model folder.'),
      _text('output', None, 'Folder to write.'),
      _number('seq_len', None, 'Row length in tokens, special tokens included.'),
      _choice(
        'mode',
        ['packed', 'pairs', 'sentences'],
        "'packed' fills rows with whole documents, 'pairs' builds two segments as ELECTRA does, 'sentences' puts one "
        'line in a row.',
      ),
      _number('holdout_rows', 0, "Rows that become a 'validation' split."),
      _number('workers', 0, 'Threads that tokenise; 0 takes all cores. The output does not depend on it.'),
      _number('seed', 0, 'Of pairs and held-out rows.'),
      _choice('pair_rule', ['electra', 'convbert'], "'convbert' builds pairs with the bug that ConvBERT trained with."),
      _text('split', 'train', 'Split of a tfds: or hf: input.'),
      _text('text_key', 'text', 'Text field of a tfds: or hf: input.'),
      _switch('overwrite', 'Replace an output that was made with other settings.'),
    ),
    ('input', 'tokenizer', 'output', 'seq_len'),
    _prepare,
  ),
  'tokenizer': Command(
    'Train a WordPiece vocabulary.',
    "compactlm tokenizer --input='text/*.txt' --vocab_size=30522 --output=tokenizer",
    _all(
      _text('input', None, 'Comma-separated globs of text files (.gz is read).'),
      _number('vocab_size', None, 'Word pieces, special tokens included.'),
      _text('output', None, 'Folder to write.'),
      lambda values: flags.DEFINE_bool('lowercase', True, 'Lower-case and strip accents.', flag_values=values),
    ),
    ('input', 'vocab_size', 'output'),
    _tokenizer,
  ),
  'train': Command(
    'Pre-train, distil or fine-tune; the same command resumes after a kill.',
    'compactlm train --config=configs/tiny.py:distill --workdir=runs/tiny --config.steps=100',
    _all(
      _text('workdir', None, 'Run directory: config.json, metrics.jsonl, checkpoints/, results.json.'),
      _text('allow_change', '', 'Comma-separated fields that may differ from the run that is resumed.'),
      _switch('steal_lock', 'Take the directory over from a run on another host that is known to be dead.'),
    ),
    ('config', 'workdir'),
    _train,
    configured=True,
  ),
  'plan': Command(
    'Compile the training step for a TPU that is not here: memory, step time, hours.',
    'compactlm plan --config=configs/convbert.py:base --topology=v3-8',
    _all(
      _text('topology', None, 'TPU slice: v2-8, v3-8, v3-32, v3-128, v4-8, v5e-8, v5p-8, v6e-8, or chips as v3:4x4.'),
      _choice('sweep', ['', 'batch'], "'batch' looks for the largest batch that fits; each try is a compilation."),
      _switch('thorough', 'Compile with the effort of a run; takes three times as long.'),
      _text('output', '', 'JSON file to write.'),
      _text('hlo', '', 'File for the optimised program of one core, as text.'),
    ),
    ('config', 'topology'),
    _plan,
    configured=True,
  ),
  'export': Command(
    'Write a trained model as a Hugging Face folder.',
    'compactlm export --checkpoint=runs/tiny --output=exported',
    _all(
      _text('checkpoint', None, 'Run directory or model folder.'),
      _text('output', None, 'Folder to write.'),
      _choice('format', ['hf'], "'hf': config.json, model.safetensors and tokenizer for transformers."),
    ),
    ('checkpoint', 'output'),
    _export,
  ),
}


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
    lines += [f'  --{flag.name}', *textwrap.wrap(text, 96, initial_indent='      ', subsequent_indent='      ')]
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
  if len(left) > 1:
    raise ConfigError(f'unexpected argument {left[1]!r}; flags are written --name=value. See: compactlm {name} --help')
  for flag in command.required:
    if flag == 'config' and file and values[flag].value is None:
      raise ConfigError(f'{file}: get_config() returns nothing')
    if values[flag].value is None:
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
  handler.setFormatter(logging.Formatter('%(message)s'))
  root.addHandler(handler)
  level = own.level
  own.setLevel(logging.INFO)
  try:
    yield
  finally:
    own.setLevel(level)
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
  return _guarded(name, rest)


def _guarded(name: str, arguments: Sequence[str]) -> int:
  try:
    with _log_to_stderr():
      print(COMMANDS[name].run(_parse(name, arguments)))
    return 0
  except CompactLMError as e:
    print(f'compactlm {name}: {e}', file=sys.stderr)
    return e.exit_code
  except KeyboardInterrupt:
    print(f'compactlm {name}: interrupted', file=sys.stderr)
    return 130
  except Exception as e:
    if isinstance(e, OSError) and e.errno in (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EROFS, errno.EIO):
      where = f': {e.filename}' if e.filename else ''
      print(f'compactlm {name}: {e.strerror}{where}; free space or fix permissions', file=sys.stderr)
      return 74
    traceback.print_exc()
    print(f'compactlm {name}: this is a bug in compactlm-jax; the lines above say where', file=sys.stderr)
    return 70


def entry() -> Any:
  """The console script: exits at once, without waiting for reading threads of the input pipeline."""
  code = main()
  with contextlib.suppress(BrokenPipeError):  # the reader of a pipe has seen enough
    sys.stdout.flush()
    sys.stderr.flush()
  os._exit(code)
