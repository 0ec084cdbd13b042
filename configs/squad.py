"""SQuAD by the recipes of the originals. Variants: RECIPE-v1 (SQuAD v1.1) and RECIPE-v2 (v2.0), such as minilm-v2.

Recipes: electra-small, electra-base, electra-large, convbert-small, convbert-medium-small, convbert-base, bert, minilm,
minilm-12.
Claim: with these settings the authors report, on the development sets, exact match / F1 of v1.1; v2.0 (a dash: not
found). All are published figures, none has been measured here.
  electra-small   75.8 / -; 70.1 / -     (released weights; google-research/electra README, medians)
  electra-base    86.8 / -; 80.5 / -
  electra-large   89.7 / -; 88.1 / -
  convbert-base   84.8 / 91.3; 80.9 / 83.9 (PaddlePaddle's reproduction; the paper's own table could not be checked)
  bert            80.8 / 88.5 (Devlin et al. 2019, base); - / 76.8 (base, in MiniLM's table)
  minilm          - ; - / 76.4 for 6 x 768, 75.6 for 6 x 384 (means of 4 runs)
  minilm-12       - ; - / 81.7 for 12 x 384
Recipes: warm-up over 10 % of the steps, clipping at 1, weight decay .01 (ELECTRA's code; its paper says 0); windows 128
tokens apart, questions of 64 tokens, answers of at most 30, the 20 best starts and ends.
  electra, convbert  512 tokens, batches of 32, 2 epochs; learning rate 3e-4 (small, medium-small; the default of
                  ELECTRA's code for small is 1e-4), 1e-4 (base), 5e-5 (large); layer-wise decay .8, for large .9, with
                  the published off-by-one; Adam without bias correction; linear decay from step 0; the joint head:
                  beam of 20, 512 units, answerability of weight .5, no answer from log odds of -2.75 on
  bert            384 tokens, 5e-5; v1.1: batches of 32, 3 epochs; v2.0: batches of 48, 2 epochs; the independent head
  minilm          384 tokens, batches of 32, 3 epochs, 6e-5; minilm-12: batches of 48, 4e-5. Published for v2.0
Differences: starts and ends of the beam are taken from tokens of the context alone, and padding never competes with
tokens (BERT lets it); answerability is learnt on v2.0 only, v1.1 has nothing to learn there. The threshold of `bert`
and `minilm` is 0; results.json also has the best one for the questions at hand (best_f1_thresh), as the official
script does.
Hardware: any; bfloat16 (--config.encoder.dtype=bfloat16) on a TPU. v2.0 has about 130,000 windows of 384 tokens.
Data: --config.data.path is a folder with train-v1.1.json, dev-v1.1.json, train-v2.0.json, dev-v2.0.json (or .json.gz),
tfds:squad/v2.0 or hf:rajpurkar/squad_v2; or name files: --config.data.train=FILE --config.data.dev=FILE.
Command: compactlm train --config=configs/squad.py:electra-small-v1 --config.model=FOLDER --config.data.path=SQUAD \
  --seeds=5 --workdir=RUNS
Distil:  the same with `bert` or `minilm` and --config.teacher=RUN, a model fine-tuned by either recipe.
"""

import difflib

from compactlm_jax.config import DataConfig, FinetuneConfig, OptimizerConfig, RunConfig, SpanConfig, to_config_dict
from compactlm_jax.errors import ConfigError


def run(
  version: int,
  epochs: float,
  span: SpanConfig,
  optimizer: OptimizerConfig,
  *,
  seq_len: int = 384,
  batch_size: int = 32,
) -> RunConfig:
  """What all recipes share."""
  return RunConfig(
    task='finetune',
    epochs=epochs,
    batch_size=batch_size,
    data=DataConfig(seq_len=seq_len),
    finetune=FinetuneConfig(benchmark=f'squad{version}'),
    span=span,
    optimizer=optimizer,
    log_every=50,
  )


def electra(version: int, learning_rate: float, layer_decay: float = 0.8) -> RunConfig:
  """ELECTRA's and ConvBERT's recipe (configure_finetuning.py of both)."""
  optimizer = OptimizerConfig(
    learning_rate=learning_rate,
    warmup_fraction=0.1,
    layer_decay=layer_decay,
    layer_decay_rule='published',
    bias_correction=False,
    decay_from='start',
  )
  return run(version, 2.0, SpanConfig(head='joint', null_threshold=-2.75), optimizer, seq_len=512)


def bert(version: int) -> RunConfig:
  """BERT's recipe (Devlin et al. 2019, 4.2 and 4.3; google-research/bert: run_squad.py)."""
  optimizer = OptimizerConfig(learning_rate=5e-5, warmup_fraction=0.1, bias_correction=False, decay_from='start')
  epochs, batch_size = {1: (3.0, 32), 2: (2.0, 48)}[version]
  return run(version, epochs, SpanConfig(), optimizer, batch_size=batch_size)


def minilm(version: int, learning_rate: float = 6e-5, batch_size: int = 32) -> RunConfig:
  """MiniLM's recipe (appendix of the paper), with AdamW as the transformers scripts that its authors used."""
  optimizer = OptimizerConfig(learning_rate=learning_rate, warmup_fraction=0.1, epsilon=1e-8)
  return run(version, 3.0, SpanConfig(), optimizer, batch_size=batch_size)


RECIPES = {
  'electra-small': lambda version: electra(version, 3e-4),
  'electra-base': lambda version: electra(version, 1e-4),
  'electra-large': lambda version: electra(version, 5e-5, 0.9),
  'convbert-small': lambda version: electra(version, 3e-4),
  'convbert-medium-small': lambda version: electra(version, 3e-4),
  'convbert-base': lambda version: electra(version, 1e-4),
  'bert': bert,
  'minilm': minilm,
  'minilm-12': lambda version: minilm(version, 4e-5, 48),
}


def get_config(variant: str = 'electra-small-v2'):
  """The configuration of RECIPE-v1 or RECIPE-v2; `--config.model` and `--config.data.path` are the user's.

  Raises:
    ConfigError: an unknown variant.
  """
  recipe, _, version = variant.rpartition('-')
  if recipe not in RECIPES or version not in ('v1', 'v2'):
    close = difflib.get_close_matches(variant, [f'{r}-{v}' for r in RECIPES for v in ('v1', 'v2')], 1)
    hint = f'; did you mean {close[0]}?' if close else f'; use RECIPE-v1 or RECIPE-v2 with one of {", ".join(RECIPES)}'
    raise ConfigError(f'configs/squad.py has no variant {variant!r}{hint}')
  return to_config_dict(RECIPES[recipe](int(version[1])))
