"""The encoder: BERT, ELECTRA, ConvBERT and their students, by configuration.

Layers are stacked on a leading axis and run by `nn.scan`; a range of layers is a slice of that axis. Where layers
differ in size (`EncoderConfig.heads_per_layer`, `neurons_per_layer`), each run of equal ones is a stack and a scan.
"""

from __future__ import annotations

import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from compactlm_jax.config import EncoderConfig, runs
from compactlm_jax.errors import ConfigError
from compactlm_jax.nn.attention import MixedAttention
from compactlm_jax.nn.layers import Bias, Embedding, Embeddings, GroupedDense, LayerNorm, MaskedDense, MaskFn
from compactlm_jax.ops.dense import gelu
from compactlm_jax.ops.dropout import dropout, keep_mask, site_words
from compactlm_jax.types import QKV, EncoderOutput, Params

_SITES = 3  # places of dropout in a layer


class EncoderLayer(nn.Module):
  """Post-LayerNorm Transformer layer: mixed attention, then a (grouped) feed-forward of erf GELU."""

  config: EncoderConfig
  mask_fn: MaskFn | None = None

  @nn.compact
  def __call__(
    self, x_BTD: Float[Array, 'B T D'], mask_BT: Int[Array, 'B T'], key: jax.Array | None, index: Int[Array, '']
  ) -> tuple[Float[Array, 'B T D'], QKV | None]:
    cfg = self.config
    sites = [_SITES * index + i for i in range(_SITES)]  # of dropout, by number of the layer in the model

    def dense(features: int, name: str) -> nn.Module:
      if not cfg.intermediate_size:
        return Bias(features, name=name)
      if cfg.num_groups > 1:
        return GroupedDense(features, cfg.num_groups, cfg, self.mask_fn, name=name)
      return MaskedDense(features, cfg, self.mask_fn, name=name)

    attended_BTD, qkv = MixedAttention(cfg, self.mask_fn, name='attention')(x_BTD, mask_BT, key, sites[0])
    attended_BTD = dropout(attended_BTD, cfg.hidden_dropout, key, sites[1])
    x_BTD = LayerNorm(cfg.layer_norm_epsilon, name='attention_norm')(x_BTD + attended_BTD)
    h_BTF = gelu(dense(cfg.intermediate_size, 'ffn_in')(x_BTD)) if cfg.intermediate_size else x_BTD
    out_BTD = dropout(dense(cfg.hidden_size, 'ffn_out')(h_BTF), cfg.hidden_dropout, key, sites[2])
    return LayerNorm(cfg.layer_norm_epsilon, name='ffn_norm')(x_BTD + out_BTD), qkv


class Encoder(nn.Module):
  """Embeddings, `num_layers` layers, and BERT's pooler if the configuration asks for it."""

  config: EncoderConfig
  mask_fn: MaskFn | None = None

  def setup(self) -> None:
    self.embeddings = Embeddings(self.config)
    stacks = [EncoderLayer(run, self.mask_fn) for _, _, run in runs(self.config)]
    self.layers = stacks if self.config.ragged else stacks[0]  # a list names its modules layers_0, layers_1, ...
    if self.config.pooler:
      self.pooler = MaskedDense(self.config.hidden_size, self.config)

  def __call__(
    self,
    input_ids_BT: Int[Array, 'B T'],
    mask_BT: Int[Array, 'B T'],
    token_type_ids_BT: Int[Array, 'B T'],
    *,
    dropout_key: jax.Array | None = None,
    all_hidden: bool = False,
    qkv_layers: tuple[int, ...] = (),
    skip_above: bool = False,
    word_BTE: Float[Array, 'B T E'] | None = None,
  ) -> EncoderOutput:
    """See `encode`."""
    cfg = self.config
    x_BTD = self.embeddings(input_ids_BT, token_type_ids_BT, dropout_key, _SITES * cfg.num_layers, word_BTE)
    run = functools.partial(self._run, mask_BT=mask_BT, key=dropout_key, all_hidden=all_hidden)
    hidden, captured, done = [x_BTD[None]], {}, 0
    for layer in () if self.is_initializing() else sorted(set(qkv_layers)):
      x_BTD, below, _ = run(x_BTD, done, layer - 1, capture=False)
      x_BTD, at, captured[layer] = run(x_BTD, layer - 1, layer, capture=True)
      hidden, done = [*hidden, below, at], layer
    if not (skip_above and qkv_layers):
      x_BTD, above, _ = run(x_BTD, done, cfg.num_layers, capture=False)
      hidden.append(above)
    return EncoderOutput(
      last_BTD=x_BTD,
      pooled_BD=jnp.tanh(self.pooler(x_BTD[:, 0])) if cfg.pooler else None,
      hidden_NBTD=jnp.concatenate([h for h in hidden if h is not None]) if all_hidden else None,
      qkv=tuple(captured[layer] for layer in qkv_layers if layer in captured),
    )

  def _run(self, x_BTD, start, stop, *, mask_BT, key, all_hidden, capture):
    """Runs layers [start, stop): (x, their outputs if `all_hidden`, q/k/v of the one layer if `capture`)."""
    hidden, qkv = [], None
    stacks = self.layers if self.config.ragged else [self.layers]
    for (first, last, _), stack in zip(runs(self.config), stacks):
      begin, end = max(start, first), min(stop, last)
      if begin < end:
        part = None if (begin, end) == (first, last) else slice(begin - first, end - first)
        indices = jnp.arange(begin, end)
        x_BTD, out, qkv = self._scan(stack, x_BTD, indices, part, mask_BT, key, all_hidden, capture)
        hidden.append(out)
    if not all_hidden or not hidden:
      return x_BTD, None, qkv
    return x_BTD, hidden[0] if len(hidden) == 1 else jnp.concatenate(hidden), qkv

  def _scan(self, stack, x_BTD, indices, part, mask_BT, key, all_hidden, capture):
    """`_run` for the layers `indices` of the model: those of a stack of equal layers, or the `part` of it."""
    cfg = self.config

    def body(layer: EncoderLayer, x_BTD, index):
      given_BTD = x_BTD
      x_BTD, qkv = layer(x_BTD, mask_BT, key, index)
      if cfg.layer_drop and key is not None:
        words = site_words(key, _SITES * cfg.num_layers + 1 + index)
        x_BTD = jnp.where(keep_mask(words, (1, 1, 1), cfg.layer_drop), x_BTD, given_BTD)
      return x_BTD, (x_BTD if all_hidden else None, qkv if capture else None)

    count = len(indices)
    unroll = cfg.scan_unroll if 0 < 2 * cfg.scan_unroll <= count else count  # a loop that runs once is none
    # Outside of loops XLA would merge what `remat` computes again with the forward pass.
    looped = unroll < count and count % unroll == 0

    def scan(layer: EncoderLayer, x_BTD):
      return nn.scan(
        nn.remat(body, prevent_cse=not looped) if cfg.remat else body,
        variable_axes={'params': 0, 'scores': 0},
        split_rngs={'params': True},
        unroll=unroll,
      )(layer, x_BTD, indices)

    if part is not None:
      scan = nn.map_variables(
        scan, ('params', 'scores'), trans_in_fn=lambda v: jax.tree.map(lambda leaf: leaf[part], v)
      )
    x_BTD, (hidden, qkv) = scan(stack, x_BTD)
    return x_BTD, hidden, jax.tree.map(lambda leaf: leaf[0], qkv)


def encode(
  params: Params,
  config: EncoderConfig,
  input_ids: Int[Array, 'B T'],
  attention_mask: Int[Array, 'B T'] | None = None,
  token_type_ids: Int[Array, 'B T'] | None = None,
  *,
  dropout_key: jax.Array | None = None,
  all_hidden: bool = False,
  qkv_layers: tuple[int, ...] = (),
  skip_above: bool = False,
  mask_fn: MaskFn | None = None,
  word_BTE: Float[Array, 'B T E'] | None = None,
) -> EncoderOutput:
  """Encodes token ids. Pure; under `jax.jit`, `config` and the keyword flags are static.

  Args:
    params: a tree with 'encoder', and 'scores' beside it if its kernels are masked.
    config: the encoder's configuration.
    input_ids: token ids in [0, vocab_size); others give NaN.
    attention_mask: 1 for real tokens; None means that all are.
    token_type_ids: segments; None means 0.
    dropout_key: a key for training; None for evaluation.
    all_hidden: also return the embedding output and every layer's output.
    qkv_layers: 1-based numbers of the layers whose queries, keys and values are returned.
    skip_above: do not run what lies above the last of `qkv_layers`; `last_BTD` is then that layer's output (its
      computation is dropped by the compiler when unused).
    mask_fn: scores -> mask, for trees with a 'scores' collection.
    word_BTE: rows of the word table that were looked up before (`look_up`); the table is then not read.

  Returns:
    An EncoderOutput.

  Raises:
    ConfigError: more tokens than positions; `qkv_layers` that are not there, or of an encoder without self-attention.
  """
  _check_request(config, input_ids.shape[1], qkv_layers)
  mask = jnp.ones_like(input_ids) if attention_mask is None else attention_mask
  types = jnp.zeros_like(input_ids) if token_type_ids is None else token_type_ids
  variables: dict[str, Any] = {'params': params['encoder']}
  if 'scores' in params:
    variables['scores'] = params['scores']['encoder']
  out = Encoder(config, mask_fn).apply(
    variables,
    input_ids,
    mask,
    types,
    dropout_key=dropout_key,
    all_hidden=all_hidden,
    qkv_layers=qkv_layers,
    skip_above=skip_above,
    word_BTE=word_BTE,
  )
  assert isinstance(out, EncoderOutput)  # apply is typed for mutable collections too
  return out


def _check_request(config: EncoderConfig, tokens: int, qkv_layers: tuple[int, ...]) -> None:
  if tokens > config.max_positions:
    raise ConfigError(
      f'config.encoder.max_positions: rows of {tokens} tokens, and the encoder has {config.max_positions} positions; '
      'cut the rows, or train with more positions'
    )
  if qkv_layers and not config.self_attention:
    raise ConfigError(
      'config.encoder.self_attention: False leaves no keys and values to return; ask for no layer in qkv_layers'
    )
  if any(not 1 <= layer <= config.num_layers for layer in qkv_layers):
    raise ConfigError(f'qkv_layers {qkv_layers}: layers are numbered from 1 to {config.num_layers}')


def look_up(params: Params, config: EncoderConfig, input_ids: Int[Array, 'B T']) -> Float[Array, 'B T E']:
  """The rows of the word table for `encode(word_BTE=...)`: looked up once for several encoders that share it.

  Args:
    params: a tree with 'encoder'.
    config: the encoder's configuration.
    input_ids: token ids in [0, vocab_size); others give NaN.
  """
  table = Embedding(config.vocab_size, config.embedding_size, config)
  return jnp.asarray(table.apply({'params': params['encoder']['embeddings']['word']}, input_ids))


@functools.partial(jax.jit, static_argnums=0)
def init_encoder(config: EncoderConfig, key: jax.Array) -> Params:
  """Random parameters {'encoder': ...}: truncated normal kernels, zero biases, unit LayerNorms (BERT)."""
  ids = jnp.zeros((1, 2), jnp.int32)
  return {'encoder': Encoder(config).init(key, ids, ids, ids)['params']}


def encoder_shapes(config: EncoderConfig) -> Params:
  """The tree of `init_encoder` as shapes and dtypes, without computing anything."""
  return jax.eval_shape(functools.partial(init_encoder, config), jax.random.key(0))
