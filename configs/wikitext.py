"""Causal language models on WikiText: a Transformer against mixed attention, at equal parameters and steps.

Claim: on WikiText-103 at small size the authors report a perplexity of 34.21 for the Transformer and 32.95 for mixed
attention (answer to reviewers, NeurIPS 2020). They published no settings of their language models, neither sizes nor
tokens nor training, so those here are ours: ELECTRA-small's sizes, word pieces, 100,000 steps of 64 rows of 512 tokens.
Not yet reproduced here.
  transformer        13,546,682 parameters: 12 layers of 256, 4 heads, feed-forward 1024
  mixed              13,552,178 (+0.04 %): 2 heads of attention and 2 of convolution (9 taps), feed-forward 1080, so
                     that the parameters are equal
WikiText-2 on two CPU cores, for trends: benchmarks/wikitext2.py runs both with three seeds and prints the perplexities.
  wt2-transformer    1,883,520 parameters: 4 layers of 128, 4 heads, feed-forward 512, 8192 word pieces
  wt2-mixed          1,884,456 (+0.05 %): likewise with feed-forward 536
The wt2 runs see less than half of the text once: no dropout, and learning rates that the benchmark chose by whole runs.
Perplexity: `perplexity_word` divides the nats of all predicted tokens, special ones included, by the words of the text;
published figures for WikiText divide by words and line ends. A row does not see the row before it, which costs some;
figures with a longer context are lower. Text keeps its case (--nolowercase).
Hardware: a TPU v3-8 for WikiText-103 (`compactlm plan` tells hours), two CPU cores for WikiText-2 (two minutes).
Commands:
  compactlm tokenizer --input=train.txt.gz --vocab_size=30522 --nolowercase --output=TOKENIZER   (wt2: 8192)
  compactlm prepare --input=train.txt.gz --tokenizer=TOKENIZER --seq_len=512 --output=ROWS       (wt2: 128)
  compactlm prepare --input=valid.txt.gz --tokenizer=TOKENIZER --seq_len=512 --output=HELD_OUT   (wt2: 128)
  compactlm train --config=configs/wikitext.py:mixed --config.data.path=ROWS --config.data.eval_path=HELD_OUT \
    --workdir=RUN
"""

from typing import Any

from compactlm_jax.config import DataConfig, EncoderConfig, OptimizerConfig, RunConfig, to_config_dict
from compactlm_jax.errors import ConfigError


def transformer(feed_forward: int, **fields: Any) -> EncoderConfig:
  """Self-attention of 4 heads."""
  return EncoderConfig(
    architecture='electra', num_heads=4, intermediate_size=feed_forward, embedding_size=128, causal=True, **fields
  )


def mixed(feed_forward: int, **fields: Any) -> EncoderConfig:
  """The same with half of the heads replaced by span-based dynamic convolution."""
  return EncoderConfig.mixed(
    heads=4, head_ratio=2, intermediate_size=feed_forward, embedding_size=128, causal=True, **fields
  )


def wikitext103(encoder: EncoderConfig) -> RunConfig:
  """What both models share."""
  return RunConfig(
    task='lm',
    steps=100_000,
    batch_size=64,
    encoder=encoder,
    data=DataConfig(seq_len=512),
    optimizer=OptimizerConfig(learning_rate=1e-3, warmup_steps=4000),
    checkpoint_every=5000,
    log_every=100,
    eval_every=10_000,
  )


def wikitext2(encoder: EncoderConfig) -> RunConfig:
  """What both models share."""
  return RunConfig(
    task='lm',
    steps=1200,
    batch_size=8,
    encoder=encoder,
    data=DataConfig(seq_len=128),
    optimizer=OptimizerConfig(learning_rate=2e-3, warmup_fraction=0.1),
    checkpoint_every=1200,
    log_every=10,
  )


SMALL = {'hidden_size': 256, 'num_layers': 12, 'dtype': 'bfloat16'}
TINY = {
  'vocab_size': 8192,
  'hidden_size': 128,
  'num_layers': 4,
  'max_positions': 128,
  'hidden_dropout': 0.0,
  'attention_dropout': 0.0,
}
VARIANTS = {
  'transformer': wikitext103(transformer(1024, **SMALL)),
  'mixed': wikitext103(mixed(1080, **SMALL)),
  'wt2-transformer': wikitext2(transformer(512, **TINY)),
  'wt2-mixed': wikitext2(mixed(536, **TINY)),
}


def get_config(variant: str = 'mixed'):
  """The configuration of one model.

  Raises:
    ConfigError: an unknown variant.
  """
  if variant not in VARIANTS:
    raise ConfigError(f'configs/wikitext.py has no variant {variant!r}; use one of {", ".join(VARIANTS)}')
  return to_config_dict(VARIANTS[variant])
