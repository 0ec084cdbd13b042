"""Files that commands write for rows of a table."""

from __future__ import annotations

import os

from etils import epath

from compactlm_jax.errors import ConfigError
from compactlm_jax.storage import absolute, is_remote


def output_table(output: str, source: str) -> epath.Path:
  """The path of `--output`.

  Raises:
    ConfigError: neither .tsv nor .jsonl, a folder, its folder is not there, or it is `source`, the file that is read.
  """
  target = epath.Path(output)
  if target.suffix not in ('.tsv', '.jsonl'):
    raise ConfigError(f'--output: {output} must end in .tsv or .jsonl')
  if not is_remote(target) and not absolute(target).parent.is_dir():
    raise ConfigError(f'--output: the folder of {output} is not there')
  if not is_remote(target) and target.is_dir():
    raise ConfigError(f'--output: {output} is a folder; name a file')
  if not is_remote(target) and target.exists() and epath.Path(source).exists() and os.path.samefile(target, source):
    raise ConfigError(f'--output: {output} is the file that is read; name another')
  return target
