"""ELECTRA: a generator fills hidden positions, a discriminator finds what it replaced (Clark et al. 2020).

ConvBERT is pre-trained in the same way; its generator is a small ConvBERT.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from compactlm_jax.config import SHARED_EMBEDDINGS, ElectraConfig, EncoderConfig, MaskConfig, to_json
from compactlm_jax.losses.reduce import masked_mean, masked_sum
from compactlm_jax.losses.tokens import replaced_token_loss
from compactlm_jax.nn.encoder import encode, init_encoder
from compactlm_jax.nn.heads import RtdHead
from compactlm_jax.ops.corruption import mask_tokens, sample_tokens, write_tokens
from compactlm_jax.tasks.mlm import (
  ALL_BUT_POOLER,
  check_masked_model,
  evaluation_key,
  init_mlm,
  mlm_logits,
  slot_values,
  with_row_weights,
)
from compactlm_jax.tree import overlaid
from compactlm_jax.types import Batch, Metrics, Params, SpecialTokens, Task, struct


class _Towers(NamedTuple):
  """What the forward pass is made of."""

  encoder: EncoderConfig
  config: ElectraConfig
  mask: MaskConfig
  special: SpecialTokens


def make_electra_task(
  encoder: EncoderConfig,
  config: ElectraConfig,
  mask: MaskConfig,
  special: SpecialTokens,
  start: Params | None = None,
) -> Task:
  """A task that trains generator and discriminator jointly.

  loss = generator_weight * MLM + discriminator_weight * RTD. MLM is a mean over the real slots, RTD over all tokens
  that are not padding. The generator's samples are written into the original row; a sample that happens to be the
  original token counts as original. Nothing flows back through the sampling.

  With gradient accumulation the parts are weighed by their tokens: RTD is exact, and MLM up to the rounding of the
  number of slots in a row.

  Args:
    encoder: the discriminator.
    config: size of the generator, weights, sharing, sampling.
    mask: which tokens are hidden.
    special: ids of the special tokens.
    start: sub-trees to continue from, of the tree that `init` makes; parts it lacks start at random.

  Raises:
    ConfigError: a generator that these fractions cannot make, or special tokens that the vocabulary lacks.
  """
  check_masked_model(encoder, special)
  config.generator_encoder(encoder)  # raises where there is none
  towers = _Towers(encoder, config, mask, special)

  def loss(params: Params, frozen: Any, batch: Batch, key: jax.Array, step: jax.Array) -> tuple[jax.Array, Metrics]:
    rows, out = _run(towers, params, batch, key, True)
    measures = {**generator_measures(rows), **discriminator_measures(out)}
    metrics = {name: masked_mean(*pair) for name, pair in measures.items()}
    value = config.generator_weight * metrics['mlm_loss'] + config.discriminator_weight * metrics['rtd_loss']
    return value, {**metrics, 'weight': out.tokens_BT.sum()}

  def evaluate(params: Params, frozen: Any, batch: Batch) -> dict[str, tuple[jax.Array, jax.Array]]:
    rows, out = _run(towers, params, batch, evaluation_key(batch), False)
    measures = {**generator_measures(rows), **discriminator_measures(out)}
    sums = {name: masked_sum(*pair) for name, pair in measures.items()}
    # A discriminator that calls nothing replaced has a precision of 0 there, not an undefined one.
    return {name: (total, jnp.maximum(count, 1e-9)) for name, (total, count) in sums.items()}

  def summarize(means: Any) -> dict[str, float]:
    weighed = config.generator_weight * means['mlm_loss'] + config.discriminator_weight * means['rtd_loss']
    return {'loss': weighed}

  return Task(
    name='electra',
    init=lambda key: jax.tree.map(jnp.asarray, overlaid(init_electra(encoder, config, key), start or {})),
    loss=loss,
    evaluate=evaluate,
    trainable=ALL_BUT_POOLER,
    summarize=summarize,
    model={'encoder': to_json(encoder), 'electra': to_json(config), 'mask': to_json(mask)},
  )


@struct
class Corrupted:
  """Rows with a generator's samples in place of some tokens, and what it lost on them.

  Attributes:
    fake_BT: the tokens that a discriminator reads.
    losses_BP: cross-entropy of the generator at its slots.
    hits_BP: 1 where its likeliest token is the right one.
    slots_BP: weights of the slots, 0 for those that are not used.
  """

  fake_BT: jax.Array
  losses_BP: jax.Array
  hits_BP: jax.Array
  slots_BP: jax.Array


def corrupt(
  params: Params,
  encoder: EncoderConfig,
  config: ElectraConfig,
  mask: MaskConfig,
  special: SpecialTokens,
  batch: Batch,
  keys: tuple[jax.Array, jax.Array, jax.Array | None],
) -> Corrupted:
  """Hides tokens and lets the generator fill them; nothing flows back through the sampling.

  Args:
    params: of `make_electra_task`.
    encoder: the discriminator.
    config: size of the generator, sharing, sampling.
    mask: which tokens are hidden.
    special: ids of the special tokens.
    batch: the rows.
    keys: of hiding, of sampling, and of dropout (None without).
  """
  masked = mask_tokens(keys[0], batch.input_ids, batch.attention_mask, mask, special, encoder.vocab_size)
  small = config.generator_encoder(encoder)
  logits_BPV = mlm_logits(generator_params(params, config), small, masked, batch, keys[2])
  forbidden_BP = masked.ids_BP if config.disallow_correct else None
  sampled_BP = sample_tokens(keys[1], logits_BPV, temperature=config.temperature, forbidden_BP=forbidden_BP)
  fake_BT, _ = write_tokens(batch.input_ids, masked.positions_BP, sampled_BP, masked.weights_BP > 0)
  return Corrupted(fake_BT, *slot_values(logits_BPV, masked), slots_BP=with_row_weights(masked, batch).weights_BP)


@struct
class Judged:
  """What a discriminator said about each token, and how much the token counts."""

  losses_BT: jax.Array
  replaced_BT: jax.Array
  guessed_BT: jax.Array
  tokens_BT: jax.Array


def judge(
  params: Params,
  encoder: EncoderConfig,
  fake_BT: jax.Array,
  batch: Batch,
  dropout_key: jax.Array | None,
  word_BTE: jax.Array | None = None,
) -> Judged:
  """Asks a discriminator which tokens were replaced.

  Args:
    params: a tree with 'encoder' and 'rtd_head'.
    encoder: its configuration.
    fake_BT: what it reads.
    batch: the original rows.
    dropout_key: None for evaluation.
    word_BTE: see `encode`.
  """
  rows = (fake_BT, batch.attention_mask, batch.token_type_ids)
  out = encode(params, encoder, *rows, dropout_key=dropout_key, word_BTE=word_BTE)
  logits_BT = jnp.asarray(RtdHead(encoder).apply({'params': params['rtd_head']}, out.last_BTD))
  replaced_BT = fake_BT != batch.input_ids
  tokens_BT = batch.attention_mask.astype(jnp.float32)
  return Judged(
    losses_BT=replaced_token_loss(logits_BT, replaced_BT),
    replaced_BT=replaced_BT.astype(jnp.float32),
    guessed_BT=(logits_BT > 0).astype(jnp.float32),
    tokens_BT=tokens_BT if batch.weights is None else tokens_BT * batch.weights[:, None],
  )


def _run(towers: _Towers, params: Params, batch: Batch, key: jax.Array, train: bool) -> tuple[Corrupted, Judged]:
  mask_key, sample_key, *dropout_keys = jax.random.split(key, 4)
  generator_key, discriminator_key = dropout_keys if train else (None, None)
  keys = (mask_key, sample_key, generator_key)
  rows = corrupt(params, towers.encoder, towers.config, towers.mask, towers.special, batch, keys)
  return rows, judge(params, towers.encoder, rows.fake_BT, batch, discriminator_key)


def generator_measures(rows: Corrupted) -> dict[str, tuple[jax.Array, jax.Array]]:
  """Metric of the generator -> (values, weights), to be averaged."""
  return {'mlm_loss': (rows.losses_BP, rows.slots_BP), 'mlm_accuracy': (rows.hits_BP, rows.slots_BP)}


def discriminator_measures(out: Judged) -> dict[str, tuple[jax.Array, jax.Array]]:
  """Metric of a discriminator -> (values, weights), to be averaged."""
  right_BT = (out.guessed_BT == out.replaced_BT).astype(jnp.float32)
  weights = {
    'precision_replaced': out.guessed_BT,
    'recall_replaced': out.replaced_BT,
    'precision_original': 1 - out.guessed_BT,
    'recall_original': 1 - out.replaced_BT,
  }
  return {
    'rtd_loss': (out.losses_BT, out.tokens_BT),
    'rtd_accuracy': (right_BT, out.tokens_BT),
    'replaced_fraction': (out.replaced_BT, out.tokens_BT),
    **{name: (right_BT, out.tokens_BT * chosen_BT) for name, chosen_BT in weights.items()},
  }


def init_electra(encoder: EncoderConfig, config: ElectraConfig, key: jax.Array) -> Params:
  """Random {'encoder', 'rtd_head', 'generator': {'encoder', 'mlm_head'}}, without what the generator shares.

  With sharing 'embeddings' the generator's encoder has its own projection at most; with 'all' only its head is its own.
  """
  encoder_key, head_key, generator_key = jax.random.split(key, 3)
  head = RtdHead(encoder).init(head_key, jnp.zeros((1, 1, encoder.hidden_size)))['params']
  generator = init_mlm(config.generator_encoder(encoder), generator_key)
  own = {'mlm_head': generator['mlm_head']}
  if config.sharing != 'all':
    own['encoder'] = generator['encoder']
  if config.sharing == 'embeddings':
    tables = generator['encoder']['embeddings']
    embeddings = {name: tree for name, tree in tables.items() if name not in SHARED_EMBEDDINGS}
    own['encoder'] = {'layers': generator['encoder']['layers'], **({'embeddings': embeddings} if embeddings else {})}
  return {**init_encoder(encoder, encoder_key), 'rtd_head': head, 'generator': own}


def generator_params(params: Params, config: ElectraConfig) -> Params:
  """The generator as a tree of its own, {'encoder', 'mlm_head'}, with the tables that it shares in place."""
  own = params['generator']
  if config.sharing == 'all':
    return {'encoder': params['encoder'], 'mlm_head': own['mlm_head']}
  if config.sharing == 'none':
    return dict(own)
  shared = {name: params['encoder']['embeddings'][name] for name in SHARED_EMBEDDINGS}
  embeddings = {**shared, **own['encoder'].get('embeddings', {})}
  return {'encoder': {**own['encoder'], 'embeddings': embeddings}, 'mlm_head': own['mlm_head']}
