"""Files that commands write for rows of a table."""

from __future__ import annotations

import json
import os
from typing import Any

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


def tsv_cell(value: Any, *, exact: bool = False) -> str:
  """A cell of a .tsv, which knows no quoting: tabs and line ends become blanks.

  Args:
    value: None is an empty cell.
    exact: for what is copied: numbers have all their digits, blanks stay as they are where nothing has to go, and what
      is neither text, number nor truth value is JSON. Otherwise numbers have six digits, and each run of blanks is one.
  """
  if value is None:
    return ''
  if exact and not isinstance(value, (str, bool, int, float)):
    text = json.dumps(value, ensure_ascii=False)
  else:
    text = f'{value:.6g}' if isinstance(value, float) and not exact else str(value)
  return text if exact and not set(text) & set('\t\n\r') else ' '.join(text.split())
