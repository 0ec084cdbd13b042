"""DynaBERT: one network, many widths and depths, each exportable (Hou et al. 2020).

Variants: `table` for your own files; cola, sst2, mrpc, stsb, qqp, mnli, qnli, rte, wnli; pretrain-mlm,
pretrain-electra, pretrain-minilm.
Claim: with a fine-tuned BERT-base teacher and augmented data the authors report, for width x depth from 1 x 1 down to
.25 x .5 (answers to reviewers, NeurIPS 2020; development sets, mean of 5 runs): STS-B 89.96 (.08) to 87.04 (.04),
SST-2 93.11 (.34) to 91.89 (.38). The pre-training phase alone, 6 layers of BERT, MNLI-m after fine-tuning (in brackets
separately pre-trained small BERTs): (6, 768) 82.0 (81.8), (6, 512) 81.0 (80.3), (6, 256) 77.8 (76.0), (6, 128) 73.0
(72.4), (4, 768) 81.5 (80.1), (4, 512) 80.4 (78.6), (4, 256) 76.1 (74.9), (4, 128) 71.4 (70.7). Published figures; none
has been measured here.
Recipe (README of huawei-noah/Pretrained-Language-Model, DynaBERT): widths .25, .5, .75, 1 and depths .5, .75, 1;
three stages of 3 epochs each; 2e-5 with linear decay, no warm-up and no weight decay, clipping at 1, batches of 32 rows
of 128 tokens; the second term weighs .1 in the stage of widths and 1 in that of depths.
  table, TASK       stages run one after another, in WORKDIR/stages/width, WORKDIR/stages/depth and WORKDIR; the same
                    command continues after a kill. `steps` and `epochs` are those of each stage
  augmented rows    --config.adapt.augmented=FILE for the first two stages, written by `compactlm augment`. Without them
                    the first stage distils from the original rows; the original then trains it on labels
                    (--config.adapt.width_loss=labels)
  evaluations       the best network and each cell at its best are kept of every `eval_every`-th step. The original
                    evaluates every 50 steps (10 in the last stage), here 50 on small tasks, 500 or 2,000 on large
                    ones: an evaluation runs all cells
  pretrain-*        hidden sizes 128, 256, 512, 768 at 4 and 6 layers of a 6-layer BERT, every cell at every step. The
                    settings were not published; here those of BERT (mlm) and ELECTRA-base (electra) on rows of 128
                    tokens, and MiniLMv2 with 32 relation heads, which divide every width (minilm).
                    --config.adapt.sampling=sandwich trains 4 of the 8 cells per step
  RoBERTa           its weights must be put into BERT's layout first (see configs/minilm.py); its recipe warms up over
                    6 % of the steps (--config.optimizer.warmup_fraction=.06)
Hardware: any; bfloat16 (--config.encoder.dtype=bfloat16) on a TPU. The original: one V100. A step costs as much as a
step of each of the cells it trains: for the 12 cells of the grid 5.6 steps of the full network, and the teacher's pass.
Data: as in configs/glue.py and configs/finetune.py; of pretrain-* rows written by `compactlm prepare`.
Command: compactlm train --config=configs/dynabert.py:table --config.teacher=FINE_TUNED_RUN \
  --config.data.train=train.tsv --config.data.dev=dev.tsv --config.data.text_columns=text \
  --config.data.label_column=label --workdir=RUN
Command: compactlm train --config=configs/dynabert.py:rte --config.teacher=RTE_RUN --config.data.path=GLUE --workdir=RUN
Command: compactlm train --config=configs/dynabert.py:pretrain-minilm --config.teacher=BERT_FOLDER \
  --config.data.path=DIR --workdir=RUN
"""

from compactlm_jax.config import (
  AdaptConfig,
  DataConfig,
  DistillConfig,
  ElectraConfig,
  EncoderConfig,
  FinetuneConfig,
  MaskConfig,
  OptimizerConfig,
  RunConfig,
  to_config_dict,
)
from compactlm_jax.config.finetune import GLUE as TASKS
from compactlm_jax.errors import ConfigError

EVAL_EVERY = {'sst2': 500, 'qnli': 500, 'qqp': 2000, 'mnli': 2000}
"""Steps between evaluations, where they are not 50."""

SIZES = AdaptConfig(
  base='mlm',
  widths=(1.0,),
  depths=(2 / 3, 1.0),
  hidden_sizes=(128, 256, 512, 768),
  combine='mean',
  keep_best=False,
)
"""The published table of (layers, hidden size)."""

BERT6 = EncoderConfig(num_layers=6, pooler=True)
"""BERT-base with half of its layers."""


def labelled(**finetune) -> RunConfig:
  """The published recipe on labelled rows."""
  return RunConfig(
    task='adapt',
    epochs=3.0,
    batch_size=32,
    eval_every=50,
    data=DataConfig(seq_len=128),
    adapt=AdaptConfig(),
    finetune=FinetuneConfig(**finetune),
    optimizer=OptimizerConfig(learning_rate=2e-5, weight_decay=0.0, epsilon=1e-8),
    log_every=50,
  )


def task(name: str) -> RunConfig:
  """The recipe on a GLUE task; BERT's head reads the pooled token."""
  config = labelled(benchmark=name, pooled=True)
  return RunConfig(**{**vars(config), 'eval_every': EVAL_EVERY.get(name, 50)})


def pretrained(base: str, encoder: EncoderConfig, steps: int, warmup: int, learning_rate: float, **fields) -> RunConfig:
  """Elastic pre-training on prepared rows, 256 at a time; BERT and ELECTRA: no bias correction, decay from step 0."""
  as_bert = {} if base == 'distill' else {'bias_correction': False, 'decay_from': 'start'}
  return RunConfig(
    task='adapt',
    steps=steps,
    batch_size=256,
    encoder=encoder,
    adapt=AdaptConfig(**{**vars(SIZES), 'base': base}),
    optimizer=OptimizerConfig(learning_rate=learning_rate, warmup_steps=warmup, **as_bert),
    checkpoint_every=5000,
    log_every=100,
    **fields,
  )


VARIANTS = {
  'table': labelled(),
  **{name: task(name) for name in TASKS},
  'pretrain-mlm': pretrained(
    'mlm',
    BERT6,
    1_000_000,
    10_000,
    1e-4,
    data=DataConfig(seq_len=128),
    mask=MaskConfig(mask_rate=0.8, random_rate=0.1),
  ),
  'pretrain-electra': pretrained(
    'electra',
    EncoderConfig(architecture='electra', num_layers=6, glorot_projections=True),
    766_000,
    10_000,
    2e-4,
    data=DataConfig(seq_len=128),
    electra=ElectraConfig(generator_size=1 / 3),
  ),
  'pretrain-minilm': pretrained(
    'distill',
    BERT6,
    400_000,
    4000,
    6e-4,
    data=DataConfig(seq_len=512),
    distill=DistillConfig(relations=('qq', 'kk', 'vv'), relation_heads=32),
  ),
}


def get_config(variant: str = 'table'):
  """The configuration of a variant; `--config.teacher` and `--config.data` are the user's.

  Raises:
    ConfigError: an unknown variant.
  """
  if variant not in VARIANTS:
    raise ConfigError(f'configs/dynabert.py has no variant {variant!r}; use one of {", ".join(VARIANTS)}')
  return to_config_dict(VARIANTS[variant])
