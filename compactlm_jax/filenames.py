"""File names that both the data readers and the Hugging Face converter know. Imports nothing."""

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
