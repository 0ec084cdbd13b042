"""File names that both the data readers and the Hugging Face converter know."""

from typing import Any

TOKENIZER_FILES = (
  'tokenizer.json',
  'tokenizer_config.json',
  'special_tokens_map.json',
  'added_tokens.json',
  'vocab.txt',
  'vocab.json',
  'merges.txt',
)
"""Files that make up a Hugging Face tokenizer; `vocab.txt` or `tokenizer.json` must be among them."""


def is_plain(name: Any) -> bool:
  """Whether a name from a file can be joined to a folder: text without a way out of it."""
  return isinstance(name, str) and bool(name) and not set(name) & set('/\\\0') and name not in ('.', '..')
