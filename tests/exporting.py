"""How far the logits of an exported folder are from those of torch transformers, and what makes such folders."""

import jax
import jax.numpy as jnp
import numpy as np

from compactlm_jax.config import EncoderConfig
from compactlm_jax.interop.bundle import Bundle, from_pretrained, save_pretrained
from compactlm_jax.nn.encoder import encode, encoder_shapes
from compactlm_jax.nn.heads import MlmHead, RtdHead

SIZES = {'vocab_size': 120, 'hidden_size': 64, 'num_layers': 3, 'intermediate_size': 128, 'max_positions': 64}
KINDS = {
  'BertForMaskedLM': EncoderConfig('bert', num_heads=4, scan_unroll=1, **SIZES),
  'BertForSequenceClassification': EncoderConfig('bert', num_heads=4, pooler=True, scan_unroll=1, **SIZES),
  'ElectraForPreTraining': EncoderConfig('electra', num_heads=4, embedding_size=32, scan_unroll=1, **SIZES),
  'ConvBertForMaskedLM': EncoderConfig.mixed(
    heads=8, head_ratio=2, embedding_size=32, num_groups=2, conv_sees_padding=True, scan_unroll=1, **SIZES
  ),
}
"""Class of transformers -> encoder; the convolution reads padding as it does there (ours, by default, does not)."""
LABELS = 3


def random_bundle(kind, seed):
  """A model of this class with noise in every parameter."""
  config, rng = KINDS[kind], np.random.default_rng(seed)
  shapes = dict(encoder_shapes(config))
  x, key = jnp.zeros((1, 2, config.hidden_size)), jax.random.key(0)
  word = jnp.zeros((config.vocab_size, config.embedding_size))
  if kind.endswith('MaskedLM'):
    shapes['mlm_head'] = jax.eval_shape(MlmHead(config).init, key, x, word)['params']
  elif kind.endswith('PreTraining'):
    shapes['rtd_head'] = jax.eval_shape(RtdHead(config).init, key, x)['params']
  else:
    like = jax.ShapeDtypeStruct
    shapes['classifier'] = {
      'kernel': like((config.hidden_size, LABELS), np.float32),
      'bias': like((LABELS,), np.float32),
    }

  def noise(path, leaf):
    value = 0.1 * rng.standard_normal(leaf.shape).astype(np.float32)
    return value + np.float32(path[-1].key == 'scale')

  return Bundle(config, jax.tree_util.tree_map_with_path(noise, shapes))


def logits(bundle, kind, batch):
  """Ours."""
  params, config = bundle.params, bundle.config

  @jax.jit
  def run(params):
    out = encode(params, config, *batch)
    if kind.endswith('MaskedLM'):
      word = params['encoder']['embeddings']['word']['embedding']
      return MlmHead(config).apply({'params': params['mlm_head']}, out.last_BTD, word)
    if kind.endswith('PreTraining'):
      return RtdHead(config).apply({'params': params['rtd_head']}, out.last_BTD)
    return out.pooled_BD @ params['classifier']['kernel'] + params['classifier']['bias'][None]

  return np.asarray(run(params))


def deviation(kind, folder, seed=0, inputs=100):
  """(largest absolute difference of a logit, largest logit) over random inputs of 1 to 64 tokens with padding.

  Args:
    kind: of KINDS.
    folder: does not exist yet; the export is written there.
    seed: of weights and inputs.
    inputs: how many.
  """
  import torch
  import transformers

  transformers.utils.logging.disable_progress_bar()
  save_pretrained(random_bundle(kind, seed), folder)
  rng, length = np.random.default_rng(seed + 1), SIZES['max_positions']
  mask = (np.arange(length) < rng.integers(1, length + 1, inputs)[:, None]).astype(np.int32)
  ids = np.where(mask, rng.integers(5, SIZES['vocab_size'], mask.shape), 0).astype(np.int32)
  types = rng.integers(0, 2, mask.shape).astype(np.int32)
  ours = logits(from_pretrained(folder), kind, (ids, mask, types))
  model = getattr(transformers, kind).from_pretrained(folder).eval()
  with torch.no_grad():
    names = ('input_ids', 'attention_mask', 'token_type_ids')
    given = {name: torch.tensor(a, dtype=torch.long) for name, a in zip(names, (ids, mask, types))}
    theirs = model(**given).logits.numpy()
  assert ours.shape == theirs.shape
  return float(np.abs(ours - theirs).max()), float(np.abs(theirs).max())
