"""GLUE by the recipes of the originals. Variants: RECIPE-TASK, such as electra-small-cola or minilm-rte.

Recipes: electra-small, electra-base, electra-large, convbert-small, convbert-medium-small, convbert-base, bert, minilm,
minilm-cpu. Tasks: cola, sst2, mrpc, stsb, qqp, mnli, qnli, rte, wnli.
Claim: with these settings the authors report, on the development sets (CoLA Matthews / SST-2 / MRPC / STS-B Spearman /
QQP / MNLI matched / QNLI / RTE; accuracy unless said). All are published figures; measured ones are in
docs/measurements.md.
  electra-small   57.0 / 91.2 / 88.0 / 87.5 / 89.0 / 81.3 / 88.4 / 66.7 from the released weights, pre-trained on open
                  data 56.8 / 88.3 / 87.4 / 86.8 / 88.3 / 78.9 / 87.9 / 68.5 (google-research/electra, medians)
  electra-base    67.7 / 95.1 / 89.5 / 91.2 / 91.5 / 88.8 / 93.2 / 82.7
  electra-large   69.1 / 96.9 / 90.8 / 92.6 / 92.4 / 90.9 / 95.0 / 88.0
  convbert-small  59.4 / 90.2 / 86.7 / 87.8 / 90.3 / 81.4 / 88.3 / 67.4, average 81.4 (authors' answer to reviewers,
                  median of 9 runs; standard errors 1.4 / .4 / .6 / .3 / .2 / .2 / .1 / .8 in this order)
  convbert-medium-small  average 81.0 (the same answer; of a 14 M variant, see configs/convbert.py)
  convbert-base   69.2 / 94.6 / 90.4 / 90.7 / 92.0 / 88.1 / 93.0 / 83.4 (PaddlePaddle's reproduction); test average 86.4
  bert            58.9 / 93.2 / 87.3 / - / 91.3 / 84.5 / 91.7 / 68.6 (BERT-base in MiniLM's table)
  minilm          6 x 768: 49.2 / 92.0 / 88.4 / - / 91.0 / 84.0 / 91.0 / 71.5; 12 x 384: 58.5 / 93.0 / 89.5 / - / 91.3 /
                  85.7 / 91.5 / 73.3; 6 x 384: 47.5 / 91.5 / 88.9 / - / 90.6 / 83.3 / 90.5 / 68.8 (means of 4 runs)
Fine-tuning spreads (standard deviations of a reproduction of ELECTRA-small): CoLA 1.3, SST-2 .5, MRPC .7, STS-B .3,
QQP .1, MNLI .2, QNLI .3, RTE 1.9. Compare medians of several seeds.
Recipes: batches of 32 rows of 128 tokens, padded to 128 as the originals do; warm-up over 10 % of the steps, clipping
at 1, weight decay .01 (ELECTRA's code; its paper says 0).
  electra, convbert  learning rate 3e-4 (small, medium-small; the default of ELECTRA's code for small is 1e-4), 1e-4
                  (base), 5e-5 (large); layer-wise decay .8, for large .9, with the published off-by-one (the top layer
                  has decay^2); Adam without bias correction; linear decay from step 0; the raw first token; 3 epochs,
                  RTE and STS-B 10; MRPC and STS-B also in the other order; STS-B scores divided by 5
  bert            2e-5, 3 epochs (see GRIDS); the pooled token; optimiser as above, without layer-wise decay. The
                  original warms up to the full rate and then drops to the decayed one; here the decay holds from the
                  start.
  minilm          5e-5; 3 epochs, STS-B and WNLI 5, CoLA, MRPC and RTE 10 (see GRIDS: the paper chooses per task on the
                  development set); the pooled token; AdamW with bias correction and decay after the warm-up, as the
                  transformers scripts that its authors used
  minilm-cpu      minilm with batches of similar length, cut to 16, 32, 64 or 128 tokens: the same rows per epoch in
                  another order, faster where padding costs. Any recipe can have it:
                  --config.data.buckets=16,32,64,128 --config.data.group_by_length=True
Hardware: any; bfloat16 (--config.encoder.dtype=bfloat16) on a TPU.
Data: --config.data.path is the official folder (of all tasks or of one; .tsv or .tsv.gz), tfds:glue or
hf:nyu-mll/glue. A model without a pooler: --config.finetune.pooled=False.
Command: compactlm train --config=configs/glue.py:electra-small-cola --config.model=FOLDER --config.data.path=GLUE \
  --seeds=9 --workdir=RUNS
Grid:    for lr in 2e-5 3e-5 4e-5 5e-5; do for epochs in 3 4 5; do compactlm train \
  --config=configs/glue.py:minilm-rte --config.model=FOLDER --config.data.path=GLUE --seeds=4 \
  --config.optimizer.learning_rate=$lr --config.epochs=$epochs --workdir=RUNS/$lr-$epochs; done; done
"""

import dataclasses
import difflib
from typing import Any

from compactlm_jax.config import DataConfig, FinetuneConfig, OptimizerConfig, RunConfig, to_config_dict
from compactlm_jax.config.finetune import GLUE as TASKS
from compactlm_jax.errors import ConfigError

GRIDS: dict[str, dict[str, tuple[float, ...]]] = {
  'minilm': {'optimizer.learning_rate': (2e-5, 3e-5, 4e-5, 5e-5), 'epochs': (3.0, 4.0, 5.0)},
  'bert': {'optimizer.learning_rate': (2e-5, 3e-5, 4e-5, 5e-5), 'epochs': (3.0,)},
}
"""What was searched per task, by field. MiniLM: up to 10 epochs for CoLA, RTE and MRPC, 1.5e-5 for 12 layers."""


def run(task: str, epochs: float, finetune: dict[str, Any], **optimizer: Any) -> RunConfig:
  """What all recipes share."""
  return RunConfig(
    task='finetune',
    epochs=epochs,
    batch_size=32,
    data=DataConfig(seq_len=128),
    finetune=FinetuneConfig(benchmark=task, dropout=0.1, **finetune),
    optimizer=OptimizerConfig(warmup_fraction=0.1, weight_decay=0.01, **optimizer),
    log_every=50,
  )


def electra(task: str, learning_rate: float, layer_decay: float = 0.8) -> RunConfig:
  """ELECTRA's and ConvBERT's recipe (configure_finetuning.py of both)."""
  return run(
    task,
    10.0 if task in ('rte', 'stsb') else 3.0,
    {'swap_pairs': task in ('mrpc', 'stsb'), 'score_scale': 5.0 if task == 'stsb' else 1.0},
    learning_rate=learning_rate,
    layer_decay=layer_decay,
    layer_decay_rule='published',
    bias_correction=False,
    decay_from='start',
  )


def bert(task: str) -> RunConfig:
  """BERT's recipe (google-research/bert: run_classifier.py, optimization.py)."""
  return run(task, 3.0, {'pooled': True}, learning_rate=2e-5, bias_correction=False, decay_from='start')


def minilm(task: str, **data: Any) -> RunConfig:
  """MiniLM's recipe (appendix of the paper)."""
  epochs = {'stsb': 5.0, 'wnli': 5.0, 'cola': 10.0, 'mrpc': 10.0, 'rte': 10.0}.get(task, 3.0)
  config = run(task, epochs, {'pooled': True}, learning_rate=5e-5, epsilon=1e-8)
  return dataclasses.replace(config, data=dataclasses.replace(config.data, **data))


RECIPES = {
  'electra-small': lambda task: electra(task, 3e-4),
  'electra-base': lambda task: electra(task, 1e-4),
  'electra-large': lambda task: electra(task, 5e-5, 0.9),
  'convbert-small': lambda task: electra(task, 3e-4),
  'convbert-medium-small': lambda task: electra(task, 3e-4),
  'convbert-base': lambda task: electra(task, 1e-4),
  'bert': bert,
  'minilm': minilm,
  'minilm-cpu': lambda task: minilm(task, buckets=(16, 32, 64, 128), group_by_length=True),
}


def get_config(variant: str = 'electra-small-cola'):
  """The configuration of RECIPE-TASK; `--config.model` and `--config.data.path` are the user's.

  Raises:
    ConfigError: an unknown variant.
  """
  recipe, _, task = variant.rpartition('-')
  if recipe not in RECIPES or task not in TASKS:
    close = difflib.get_close_matches(variant, [f'{r}-{t}' for r in RECIPES for t in TASKS], 1)
    hint = f'; did you mean {close[0]}? Use' if close else '; use'
    raise ConfigError(
      f'configs/glue.py has no variant {variant!r}{hint} RECIPE-TASK with a recipe of {", ".join(RECIPES)} and a '
      f'task of {", ".join(TASKS)}'
    )
  return to_config_dict(RECIPES[recipe](task))
