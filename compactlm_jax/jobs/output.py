"""Files that commands write for rows of a table."""

from __future__ import annotations

import pathlib

from compactlm_jax.errors import ConfigError


def output_table(output: str) -> pathlib.Path:
  """The path of `--output`.

  Raises:
    ConfigError: neither .tsv nor .jsonl, or its folder is not there.
  """
  target = pathlib.Path(output)
  if target.suffix not in ('.tsv', '.jsonl'):
    raise ConfigError(f'--output: {output} must end in .tsv or .jsonl')
  if not target.absolute().parent.is_dir():
    raise ConfigError(f'--output: the folder of {output} is not there')
  return target
