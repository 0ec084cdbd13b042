"""From a name to a local folder: a folder as it is, else a model of the Hugging Face hub."""

from __future__ import annotations

import re

from etils import epath

from compactlm_jax.errors import DataError

PATTERNS = (
  'config.json',
  'model*.safetensors',
  'model.safetensors.index.json',
  '*token*.json',
  'vocab.txt',
  'vocab.json',
  'merges.txt',
)
"""What is downloaded: weights as safetensors, configuration, tokenizer. Never code, never pickles."""


def local_folder(name: epath.PathLike) -> epath.Path:
  """The folder itself, or a download of the hub model `owner/name` where no such folder exists.

  Raises:
    DataError: no such folder and not a hub name, or the download failed.
  """
  path = epath.Path(name)
  if path.is_dir():
    return path
  if not _hub_name(str(name)) or epath.Path(str(name).split('/')[0]).exists():
    raise DataError(f"{name}: no such folder (a model of the Hugging Face hub is named 'owner/name')")
  import huggingface_hub  # heavy, and rarely needed

  try:
    return epath.Path(huggingface_hub.snapshot_download(str(name), allow_patterns=list(PATTERNS)))
  except Exception as e:  # the hub client raises errors of several libraries: offline, unknown name, no access
    reason = (str(e).strip().splitlines() or [type(e).__name__])[0]
    raise DataError(
      f'{name}: no such folder, and it could not be downloaded from the Hugging Face hub ({reason}); '
      'without a network, copy the model folder here and give its path'
    ) from e


def _hub_name(name: str) -> bool:
  return re.fullmatch(r'\w[\w.-]*/\w[\w.-]*', name) is not None
