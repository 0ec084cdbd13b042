"""Hugging Face `config.json` <-> EncoderConfig. What one side cannot express is refused with the reason."""

from __future__ import annotations

import logging
from collections.abc import Collection, Mapping
from typing import Any

from compactlm_jax.config import EncoderConfig, from_config_dict, to_json
from compactlm_jax.errors import ConfigError
from compactlm_jax.interop import custom, first_token
from compactlm_jax.interop.names import reads_pooler

log = logging.getLogger(__name__)

OUR_KEY = 'compactlm'
"""Key of config.json for what transformers has no word for; transformers keeps and ignores it."""

NATIVE = 'compactlm'
"""model_type of a folder that only this library reads: its encoder stands whole under `OUR_KEY`."""

_FIELDS = (
  ('vocab_size', 'vocab_size'),
  ('hidden_size', 'hidden_size'),
  ('num_layers', 'num_hidden_layers'),
  ('intermediate_size', 'intermediate_size'),
  ('max_positions', 'max_position_embeddings'),
  ('type_vocab_size', 'type_vocab_size'),
  ('layer_norm_epsilon', 'layer_norm_eps'),
  ('hidden_dropout', 'hidden_dropout_prob'),
  ('attention_dropout', 'attention_probs_dropout_prob'),
  ('initializer_range', 'initializer_range'),
)
"""(our field, transformers' key), in every architecture."""

_COMMON: dict[str, int | float] = {
  'vocab_size': 30522,
  'hidden_size': 768,
  'num_hidden_layers': 12,
  'num_attention_heads': 12,
  'intermediate_size': 3072,
  'hidden_dropout_prob': 0.1,
  'attention_probs_dropout_prob': 0.1,
  'max_position_embeddings': 512,
  'type_vocab_size': 2,
  'initializer_range': 0.02,
  'layer_norm_eps': 1e-12,
  'pad_token_id': 0,
}
_CONVBERT = {'embedding_size': 768, 'head_ratio': 2, 'conv_kernel_size': 9, 'num_groups': 1, 'pad_token_id': 1}
_ELECTRA = {'embedding_size': 128, 'hidden_size': 256, 'num_attention_heads': 4, 'intermediate_size': 1024}
DEFAULTS: dict[str, dict[str, int | float]] = {
  'bert': _COMMON,
  'electra': {**_COMMON, **_ELECTRA},
  'convbert': {**_COMMON, **_CONVBERT},
}
"""What transformers' configuration classes assume for a key that config.json lacks, by model type."""

_LOCAL = ('conv_sees_padding', 'dtype', 'remat', 'scan_unroll')
"""Our fields that live under `OUR_KEY`."""

_REFUSED: tuple[tuple[str, tuple[Any, ...], str], ...] = (
  ('position_embedding_type', ('absolute',), 'relative positions are not implemented'),
  ('add_cross_attention', (False,), 'cross-attention is not implemented'),
  ('pruned_heads', ({}, []), 'heads pruned by transformers are not read; prune the whole model here'),
  ('quantization_config', (), 'quantised weights are not read; save the model in float32'),
)
"""(key, values that are fine, reason)."""


def from_hf(raw: Mapping[str, Any], *, pooler: bool = False) -> EncoderConfig:
  """The EncoderConfig of a parsed config.json.

  Args:
    raw: the JSON object; absent keys take the defaults of transformers' class.
    pooler: whether the weights hold BERT's pooler (config.json does not say).

  Returns:
    A configuration in parity mode: an imported ConvBERT's convolution sees padding, as transformers' does.

  Raises:
    ConfigError: an unknown architecture, a wrong type, or something that our encoder cannot express.
  """
  kind = raw.get('model_type')
  if kind == NATIVE:
    return from_config_dict(EncoderConfig, raw.get(OUR_KEY), f'json: {OUR_KEY}.')  # 'config.json: ...' in messages
  if not isinstance(kind, str) or kind not in DEFAULTS:
    raise ConfigError(
      f'config.json: model_type {kind!r} is not supported; BERT, ELECTRA and ConvBERT are '
      f'({", ".join(map(repr, DEFAULTS))})'
    )
  _refuse(raw, kind)

  def number(key: str) -> Any:
    value, default = raw.get(key, DEFAULTS[kind][key]), DEFAULTS[kind][key]
    if key == 'pad_token_id' and value is None:
      return 0
    if isinstance(value, bool) or not isinstance(value, (int, float) if isinstance(default, float) else int):
      raise ConfigError(f'config.json: {key} {value!r} must be of type {type(default).__name__}')
    return type(default)(value)

  fields: dict[str, Any] = {ours: number(theirs) for ours, theirs in _FIELDS}
  for ours, theirs in _FIELDS:
    if fields[ours] < 0 or (isinstance(fields[ours], int) and fields[ours] < 1):
      raise ConfigError(f'config.json: {theirs} {fields[ours]} must be positive')
  fields['pad_token_id'] = number('pad_token_id')
  if not 0 <= fields['pad_token_id'] < fields['vocab_size']:
    raise ConfigError(f'config.json: pad_token_id {fields["pad_token_id"]} is outside the vocabulary')
  fields['causal'] = bool(raw.get('is_decoder'))
  fields['embedding_size'] = number('embedding_size') if kind != 'bert' else fields['hidden_size']
  fields['num_heads'] = number('num_attention_heads')
  if kind == 'convbert':
    fixed = raw.get('head_size') is not None
    fields.update(_mixed_heads(fields['hidden_size'], fields['num_heads'], number('head_ratio'), fixed))
    fields.update(conv_kernel_size=number('conv_kernel_size'), num_groups=number('num_groups'), conv_sees_padding=True)
    if fields['conv_kernel_size'] < 1:
      raise ConfigError(f'config.json: conv_kernel_size {fields["conv_kernel_size"]} must be positive and odd')
  fields |= custom.sizes(raw, fields)
  return EncoderConfig(architecture=kind, pooler=pooler, **{**fields, **_local_fields(raw)})


def _refuse(raw: Mapping[str, Any], kind: str) -> None:
  """What a model of this kind may not ask for."""
  for key, fine, reason in _REFUSED:
    if raw.get(key) is not None and raw[key] not in fine:
      raise ConfigError(f'config.json: {key} {raw[key]!r}: {reason}')
  if raw.get('auto_map') is not None and not custom.read_by(raw['auto_map']):
    raise ConfigError(
      f'config.json: auto_map {raw["auto_map"]!r}: it asks for code from outside, which is never run; save with the '
      'plain transformers classes'
    )
  causal = raw.get('is_decoder') or False
  if causal not in (False, True) or (causal and kind == 'convbert'):
    raise ConfigError(
      f"config.json: is_decoder {causal!r}: transformers' ConvBERT masks attention only, its convolution reads later "
      'positions; set is_decoder to false'
    )
  if raw.get('problem_type') == 'multi_label_classification':
    raise ConfigError(
      "config.json: problem_type 'multi_label_classification': classifiers here choose one label of each row; to take "
      'the encoder alone, save it with the class AutoModel and remove problem_type'
    )
  named = raw.get('architectures')
  for cls in named if isinstance(named, list) else ():
    if isinstance(cls, str) and cls.endswith('ForMultipleChoice'):
      raise ConfigError(
        f'config.json: architectures {cls!r}: choosing among several texts is not implemented, and its scores are no '
        'regression; to take the encoder alone, save it with the class AutoModel'
      )
  activation = raw.get('hidden_act', 'gelu')
  if activation not in ('gelu', 'gelu_python'):
    raise ConfigError(f"config.json: hidden_act {activation!r}; only the exact (erf) 'gelu' is implemented")


def _mixed_heads(hidden: int, heads: int, ratio: int, fixed: bool) -> dict[str, int]:
  """Heads per branch and head size as ConvBertSelfAttention derives them; not the original's hidden / heads."""
  if heads < 1 or ratio < 1:
    raise ConfigError(f'config.json: num_attention_heads {heads} and head_ratio {ratio} must be positive')
  branch = max(1, heads // ratio)
  if fixed:  # the file says the head size itself
    return {'num_heads': branch}
  size = (hidden // branch) // 2
  if 2 * branch * size != hidden:
    raise ConfigError(
      f'config.json: num_attention_heads {heads} with head_ratio {ratio} gives 2 x {branch} heads of {size}, '
      f'which do not fill hidden_size {hidden}; transformers cannot run this model either'
    )
  return {'num_heads': branch, 'head_size': size}


def _local_fields(raw: Mapping[str, Any]) -> dict[str, Any]:
  local = raw.get(OUR_KEY, {})
  if not isinstance(local, dict) or not set(local) <= set(_LOCAL):
    raise ConfigError(f'config.json: {OUR_KEY} {local!r} may only hold {", ".join(_LOCAL)}')
  for name, value in local.items():
    kind = type(getattr(EncoderConfig, name))
    if type(value) is not kind:
      raise ConfigError(f'config.json: {OUR_KEY}.{name} {value!r} must be of type {kind.__name__}')
  return dict(local)


def labels_of(raw: Mapping[str, Any]) -> tuple[str, ...]:
  """The class names of a parsed config.json, in the order of their indices; () where they say no more than LABEL_i.

  Raises:
    ConfigError: `id2label` is no mapping from 0, 1, ... to different names.
  """
  named = raw.get('id2label')
  if named is None:
    return ()
  problem = f'config.json: id2label {named!r} must map 0, 1, ... to different class names'
  if not isinstance(named, dict) or set(named) != {str(i) for i in range(len(named))}:
    raise ConfigError(problem)
  labels = tuple(named[str(i)] for i in range(len(named)))
  if not all(isinstance(label, str) for label in labels) or len(set(labels)) != len(labels):
    raise ConfigError(problem)
  return () if labels == default_labels(len(labels)) else labels


def default_labels(num_classes: int) -> tuple[str, ...]:
  """What transformers calls classes without names."""
  return tuple(f'LABEL_{i}' for i in range(num_classes))


def to_hf(
  config: EncoderConfig,
  heads: Collection[str] = (),
  num_classes: int = 0,
  labels: tuple[str, ...] = (),
  *,
  code: bool = False,
) -> dict[str, Any]:
  """A complete config.json that transformers loads.

  Args:
    config: the encoder.
    heads: the heads in the exported tree, of `names.HEADS`.
    num_classes: outputs of a classifier among them; 1 predicts a number.
    labels: their names; () leaves LABEL_i.
    code: for an encoder whose layers need the modelling file of `custom`, name the file's classes.

  Raises:
    ConfigError: another number of labels than of outputs; or transformers has no model of this shape (the message
      gives the reason).
  """
  require_expressible(config, code=code)
  out: dict[str, Any] = {theirs: getattr(config, ours) for ours, theirs in _FIELDS}
  out |= {
    'model_type': config.architecture,
    'architectures': [architecture(config, heads, num_classes)],
    'num_attention_heads': config.num_heads,
    'hidden_act': 'gelu',
    'pad_token_id': config.pad_token_id,
    'tie_word_embeddings': True,
    'dtype': 'float32',
  }
  if config.causal:
    out['is_decoder'] = True
  local = {name: getattr(config, name) for name in _LOCAL}
  if config.architecture != 'bert':
    out['embedding_size'] = config.embedding_size
  if config.architecture == 'convbert':
    out |= {'num_attention_heads': 2 * config.num_heads, 'head_ratio': 2}
    out |= {'conv_kernel_size': config.conv_kernel_size, 'num_groups': config.num_groups}
    out |= {'bos_token_id': None, 'eos_token_id': None}  # transformers would assume RoBERTa's 0 and 2
    if not (config.conv_sees_padding or code):  # the file of `custom` obeys
      log.warning(
        'exporting a ConvBERT whose convolution ignores padding: transformers lets it read padded positions, so that '
        'its outputs near padding differ from ours; rows without padding agree'
      )
  if 'classifier' in heads:
    if len(labels) not in (0, num_classes):
      raise ConfigError(f'labels: {len(labels)} names for the {num_classes} outputs of the classifier')
    names = labels or default_labels(num_classes)
    out['id2label'] = {str(i): name for i, name in enumerate(names)}
    out['label2id'] = {name: i for i, name in enumerate(names)}
    if num_classes == 1:
      out['problem_type'] = 'regression'
  expected = {name: getattr(EncoderConfig, name) for name in _LOCAL}
  expected['conv_sees_padding'] = config.architecture == 'convbert'
  changed = {name: value for name, value in local.items() if value != expected[name]}
  out |= {OUR_KEY: changed} if changed else {}
  return custom.described(config, out) if code else out


def to_native(config: EncoderConfig) -> dict[str, Any]:
  """A config.json for an encoder that transformers cannot express: it refuses the folder, `from_hf` reads it."""
  return {'model_type': NATIVE, OUR_KEY: to_json(config)}


def architecture(config: EncoderConfig, heads: Collection[str], num_classes: int = 0) -> str:
  """The transformers class that reads the most of an exported tree; `num_classes` as in `to_hf`."""
  kind = custom.STOCK[config.architecture]
  if 'classifier' in heads and (reads_pooler(config) or first_token.fits(config, num_classes)):
    return kind + 'ForSequenceClassification'
  if 'span' in heads and 'classifier' not in heads:  # id2label would give its layer another size
    return kind + 'ForQuestionAnswering'
  if 'rtd_head' in heads and config.architecture == 'electra':
    return kind + 'ForPreTraining'
  if config.causal and 'mlm_head' in heads:
    return 'BertLMHeadModel' if config.architecture == 'bert' else kind + 'ForCausalLM'
  return kind + ('ForMaskedLM' if 'mlm_head' in heads else 'Model')


def require_expressible(config: EncoderConfig, *, code: bool = False) -> None:
  """Checks that transformers has such a model, or has it with the modelling file of `custom` if `code`.

  Raises:
    ConfigError: it has not; the message names the field and the reason.
  """
  kind, width = config.architecture, config.num_heads * config.head_size

  def refuse(field: str, reason: str) -> None:
    raise ConfigError(f'config.encoder.{field}: cannot be exported to transformers: {reason}')

  if code and config.causal:
    refuse('causal', "the modelling file for layers of their own sizes has no decoder; use layout='padded'")
  for field in ('heads_per_layer', 'neurons_per_layer'):
    if getattr(config, field) and not code:
      refuse(field, 'its layers are equal; save_pretrained adds a modelling file, or pads the layers')
  if config.pooler and kind != 'bert':
    refuse('pooler', f'its {kind} has no pooler; export without it (bundle.drop_pooler)')
  if kind == 'convbert':
    if config.causal:
      refuse('causal', "its ConvBERT's convolution reads later positions; evaluate the run itself")
    if config.conv_kind != 'span':
      refuse('conv_kind', f'its ConvBERT makes kernels from spans, there is no {config.conv_kind!r} convolution')
    if not config.self_attention:
      refuse('self_attention', 'its ConvBERT always has self-attention beside the convolution')
    if not config.conv_kernel_size:
      refuse('conv_kernel_size', "a ConvBERT without convolution does not exist there; set architecture to 'electra'")
    if 2 * width != config.hidden_size and not code:
      refuse(
        'head_size',
        f'its ConvBERT derives the head size so that both branches fill hidden_size {config.hidden_size}; here '
        f'2 x {config.num_heads} heads of {config.head_size} give {2 * width} (a head ratio other than 2, or a '
        'sub-network with fewer heads)',
      )
    return
  if config.conv_kernel_size:
    refuse('conv_kernel_size', f"its {kind} has no convolution; set architecture to 'convbert'")
  if config.num_groups > 1:
    refuse('num_groups', f"its {kind} has no grouped feed-forward; only 'convbert' has")
  if width != config.hidden_size and not code:
    refuse(
      'head_size',
      f'its {kind} needs num_heads * head_size = hidden_size; here {config.num_heads} * {config.head_size} = {width}, '
      f'hidden_size {config.hidden_size}',
    )
  if kind == 'bert' and config.embedding_size != config.hidden_size:
    refuse('embedding_size', "its bert has no embedding projection; set architecture to 'electra' (without a pooler)")


def unread_heads(config: EncoderConfig, heads: Collection[str], num_classes: int = 0) -> list[str]:
  """The heads in an exported tree that the class named in config.json does not read."""
  cls = architecture(config, heads, num_classes)
  read = {
    'ForQuestionAnswering': 'span',
    'ForSequenceClassification': 'classifier',
    'ForPreTraining': 'rtd_head',
    'ForMaskedLM': 'mlm_head',
    'ForCausalLM': 'mlm_head',
    'LMHeadModel': 'mlm_head',
  }
  return sorted(set(heads) - {head for suffix, head in read.items() if cls.endswith(suffix)})
