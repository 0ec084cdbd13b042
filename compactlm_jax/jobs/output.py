"""Files that commands write for rows of a table."""

from __future__ import annotations

import os

from etils import epath

from compactlm_jax.errors import ConfigError
from compactlm_jax.storage import is_remote, require_file_place


def output_table(output: str, source: str) -> epath.Path:
  """The path of `--output`.

  Raises:
    ConfigError: neither .tsv nor .jsonl, a folder, its folder is not there, or it is `source`, the file that is read.
  """
  target = epath.Path(output)
  if target.suffix not in ('.tsv', '.jsonl'):
    raise ConfigError(f'--output: {output} must end in .tsv or .jsonl')
  require_file_place('output', output)
  if not is_remote(target) and target.exists() and epath.Path(source).exists() and os.path.samefile(target, source):
    raise ConfigError(f'--output: {output} is the file that is read; name another')
  return target
