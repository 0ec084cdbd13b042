"""The README.md of an exported folder."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from compactlm_jax.config import EncoderConfig
from compactlm_jax.interop import custom, first_token
from compactlm_jax.interop.hf_config import unread_heads
from compactlm_jax.interop.sparse_file import SPARSE_KEY


def model_card(
  config: EncoderConfig, heads: Collection[str], parameters: int, described: Mapping[str, Any], generator: str = ''
) -> str:
  """What the folder holds and how to load it. A function of its arguments alone: no dates, no paths."""
  sparse = described.get(SPARSE_KEY)
  cls = described['architectures'][0] if 'architectures' in described and not sparse else None
  code, options = custom.needed(config), ''  # of `cls`, if transformers reads the folder
  if cls and cls.endswith('BertModel') and config.architecture == 'bert' and not config.pooler:
    options = ', add_pooling_layer=False'
  if cls and code:
    cls, options = custom.auto_class(cls), f'{options}, trust_remote_code=True'
  lines = [
    '---',
    f'library_name: {"transformers" if cls else "compactlm-jax"}',
    'tags: [compactlm-jax]',
    '---',
    '',
    f'# {config.architecture}, {config.num_layers} layers, {config.hidden_size} wide',
    '',
    f'{parameters:,} parameters, {sparse["values"] if sparse else "float32"}, exported by compactlm-jax.',
    '',
    '| | |',
    '|---|---|',
    f'| vocabulary / positions | {config.vocab_size} / {config.max_positions} |',
    f'| embedding / hidden / feed-forward | {config.embedding_size} / {config.hidden_size} '
    f'/ {config.intermediate_size} |',
    f'| attention heads x size | {config.num_heads} x {config.head_size} |',
    *_per_layer(config),
    f'| heads in the file | {", ".join(heads) or "none"} |',
  ]
  if config.conv_kernel_size:
    lines.append(f'| convolution heads x taps | {config.num_heads} x {config.conv_kernel_size} |')
    lines.append(f'| feed-forward groups | {config.num_groups} |')
  lines += ['', '```python']
  if cls:
    lines += [f'from transformers import {cls}', f"model = {cls}.from_pretrained('this folder'{options})", '']
  lines += [
    'import compactlm_jax as clm',
    "bundle = clm.from_pretrained('this folder')",
    '```',
    '',
  ]
  if sparse:
    lines.append('Zeros are not stored: only compactlm-jax reads this folder; `save_pretrained` writes one for others.')
    return '\n'.join([*lines, ''])
  if not cls:
    return '\n'.join([*lines, 'transformers has no model of this shape; only compactlm-jax reads this folder.', ''])
  if code:
    lines += [
      'No class of transformers has layers of these sizes. `trust_remote_code=True` makes it run the file',
      '`modeling_compactlm.py` of this folder, which gives them to stock classes; compactlm-jax never runs it.',
      "`save_pretrained(bundle, folder, layout='padded')` writes a larger folder for the stock classes alone.",
      '',
    ]
  return '\n'.join([*lines, *_notes(config, heads, described, generator)])


def _per_layer(config: EncoderConfig) -> list[str]:
  """Rows of the table for sizes that differ from layer to layer."""
  named = {'heads': config.heads_per_layer, 'feed-forward neurons': config.neurons_per_layer}
  return [f'| {what} left, by layer | {", ".join(map(str, sizes))} |' for what, sizes in named.items() if sizes]


def _notes(config: EncoderConfig, heads: Collection[str], described: Mapping[str, Any], generator: str) -> list[str]:
  """What whoever loads the folder with transformers should know."""
  named = described['architectures'][0]
  cls = named.removeprefix(custom.PREFIX)
  unread = unread_heads(config, heads, len(described.get('id2label', ())))
  lines = []
  if config.architecture == 'convbert' and not config.conv_sees_padding and named == cls:  # our own file obeys
    lines += [
      'This model was trained with a convolution that ignores padding. transformers lets it read padded positions, so',
      'that its outputs near padding differ; rows without padding agree. compactlm-jax restores the trained mode.',
      '',
    ]
  if unread:
    lines += [f'transformers ignores: {", ".join(unread)}. compactlm-jax reads them.', '']
  if 'rtd_head' in unread:
    lines += ['The replaced-token head is `discriminator_predictions.*`, as in ELECTRA.', '']
  if generator:
    lines += [f'The generator that this discriminator was trained with is in `{generator}/`.', '']
  if 'classifier' in unread:
    lines += ['The classifier (`compactlm_classifier.*`) reads the last hidden state of the first token.', '']
  if cls in ('ElectraForSequenceClassification', 'ConvBertForSequenceClassification'):
    lines += [
      'The classifier is one layer on the first token. `classifier.dense` and `classifier.out_proj` hold it exactly:',
      'gelu(z) - gelu(-z) = z.',
      '',
    ]
  if cls == 'BertForSequenceClassification' and not config.pooler:
    lines += [
      'The classifier is one layer on the first token. BERT reads its pooler, a dense layer and tanh: here this is',
      f'{first_token.SMALL:g} times the identity, and `classifier.weight` is divided by that. The logits are the same.',
      '',
    ]
  if described.get('problem_type') == 'regression':
    lines += ['The classifier has one output: a number in the unit of the labels.', '']
  return lines
