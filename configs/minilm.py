"""MiniLM and MiniLMv2: every published student, the teacher-assistant chain, and the paper's ablations.

Claim: a student trained with these settings on English Wikipedia and BookCorpus reaches, after fine-tuning, what the
authors report (development sets; SQuAD2 F1 / MNLI-m / SST-2; Wang et al. 2020, 2021). Not yet reproduced here; the one
public reproduction found, of v2-l6-h768, has MNLI-m 82.9 for the published 84.2.
  BERT-base teacher: 76.8 / 84.5 / 93.2        l6-h768: 76.4 / 84.0 / 92.0
  l6-h384, l4-h384, l3-h384: 72.4 / 82.2 / 91.0, 69.4 / 80.3 / 90.2, 66.2 / 78.8 / 89.3
  the same through an assistant: 72.7 / 82.4 / 91.2, 69.7 / 80.6 / 90.6, 66.9 / 79.1 / 89.7
  in-house teacher of BERT-base size, 160 GB of text: inhouse-l12-h384 81.7 / 85.7 / 93.0, and through it
  inhouse-from-assistant-l6-h384 75.6 / 83.3 / 91.5
  l12-h384-e128: 80.6 / 85.2 / 92.1 (authors' answer to reviewers, NeurIPS 2020; its settings were not given, here those
  of inhouse-l12-h384)
  v2 (MNLI-m / SQuAD2 F1), BERT-base: v2-l6-h768 84.2 / 76.3, v2-l6-h384 82.8 / 72.9; BERT-large: 85.0 / 77.7 and
  83.0 / 74.3; RoBERTa-large: l6-h768 87.0 / 81.6, l12-h384 86.9 / 82.3, l6-h384 84.4 / 76.4
  multilingual (XNLI / MLQA F1): xlmr-l12-h384 71.1 / 63.2, xlmr-l6-h384 68.0 / 53.7; v2 72.9 / 64.9 and 69.3 / 59.0
  ablations of l6-h384: without the value relation 71.0 / 80.9 / 89.9, value MSE 71.4 / 82.0 / 90.8, layer to layer
  71.6 / 81.8 / 90.6. The paper's value MSE projects the student's values; here it compares equal widths, so
  ablation-value-mse is a 6 x 768 student.
Hardware: the authors used 8 V100 with fp16; hours were not published. Use --config.encoder.dtype=bfloat16 on a TPU.
Limits: RoBERTa and XLM-R teachers are published settings; their weights must first be in BERT's layout (their positions
start at 2), with their own tokenizer.
Command: compactlm train --config=configs/minilm.py:l6-h384 --config.teacher=BERT_FOLDER --config.data.path=DIR \
  --workdir=RUN
Chain:   compactlm train --config=configs/minilm.py:assistant-l12-h384 --config.teacher=BERT_FOLDER ... --workdir=TA
         compactlm train --config=configs/minilm.py:from-assistant-l6-h384 --config.teacher=TA ... --workdir=RUN
"""

from typing import Any

from compactlm_jax.config import DataConfig, DistillConfig, EncoderConfig, OptimizerConfig, RunConfig, to_config_dict
from compactlm_jax.errors import ConfigError

ROBERTA_VOCAB, XLMR_VOCAB = 50265, 250002


def student(layers: int, width: int, **changes: Any) -> EncoderConfig:
  """A published student: 12 heads, feed-forward 4 x width, BERT's pooler (untrained by this loss)."""
  fields = {'hidden_size': width, 'num_layers': layers, 'num_heads': 12, 'pooler': True}
  return EncoderConfig(**{**fields, **changes})


def run(
  encoder: EncoderConfig, learning_rate: float, batch_size: int, steps: int = 400_000, **changes: Any
) -> RunConfig:
  """The settings that all published runs share: rows of 512, warm-up 4,000, linear decay, dropout and decay as BERT."""
  distill, beta2 = changes.pop('distill', DistillConfig()), changes.pop('beta2', 0.999)
  return RunConfig(
    task='distill',
    steps=steps,
    batch_size=batch_size,
    encoder=encoder,
    distill=distill,
    data=DataConfig(seq_len=512),
    optimizer=OptimizerConfig(learning_rate=learning_rate, warmup_steps=4000, beta2=beta2, weight_decay=0.01),
    checkpoint_every=5000,
    log_every=100,
    **changes,
  )


def v2(encoder: EncoderConfig, relation_heads: int, teacher_layer: int = 0) -> RunConfig:
  """MiniLMv2: query, key and value relations over relation heads; lr 6e-4, batch 256 (MiniLM)."""
  relations = DistillConfig(relations=('qq', 'kk', 'vv'), relation_heads=relation_heads, teacher_layer=teacher_layer)
  return run(encoder, 6e-4, 256, distill=relations)


def ablation(encoder: EncoderConfig, **changes: Any) -> RunConfig:
  """A BERT-base run with one choice of the paper undone."""
  return run(encoder, *((5e-4, 1024) if encoder.hidden_size == 768 else (3e-4, 256)), distill=DistillConfig(**changes))


VARIANTS = {
  'l6-h768': run(student(6, 768), 5e-4, 1024),
  **{f'l{n}-h384': run(student(n, 384), 3e-4, 256) for n in (12, 6, 4, 3)},
  'assistant-l12-h384': run(student(12, 384), 3e-4, 256),
  **{f'from-assistant-l{n}-h384': run(student(n, 384), 3e-4, 256) for n in (6, 4, 3)},
  'inhouse-l12-h384': run(student(12, 384), 6e-4, 2048, beta2=0.98),
  'inhouse-from-assistant-l6-h384': run(student(6, 384), 4e-4, 512, beta2=0.98),
  'l12-h384-e128': run(
    student(12, 384, architecture='electra', embedding_size=128, pooler=False), 6e-4, 2048, beta2=0.98
  ),
  'xlmr-l12-h384': run(student(12, 384, vocab_size=XLMR_VOCAB), 3e-4, 256, steps=1_000_000),
  'xlmr-l6-h384': run(student(6, 384, vocab_size=XLMR_VOCAB), 6e-4, 512),
  'v2-l6-h768': v2(student(6, 768), 48),
  'v2-l6-h384': v2(student(6, 384), 48),
  'v2-bert-large-l6-h768': v2(student(6, 768), 64, teacher_layer=21),
  'v2-bert-large-l6-h384': v2(student(6, 384), 64, teacher_layer=21),
  **{
    f'v2-roberta-large-l{n}-h{width}': v2(student(n, width, vocab_size=ROBERTA_VOCAB), 64, teacher_layer=19)
    for n, width in ((6, 768), (12, 384), (6, 384))
  },
  **{f'v2-xlmr-large-l{n}-h384': v2(student(n, 384, vocab_size=XLMR_VOCAB), 64, teacher_layer=19) for n in (12, 6)},
  'ablation-attention-only': ablation(student(6, 384), relations=('qk',)),
  'ablation-value-mse': ablation(student(6, 768), value_loss='mse'),
  'ablation-layer-wise': ablation(student(6, 384), layers='uniform'),
  'ablation-qq-kk-added': ablation(student(6, 384), relations=('qk', 'vv', 'qq', 'kk')),
  'ablation-qq-kk-for-attention': ablation(student(6, 384), relations=('vv', 'qq', 'kk')),
}


def get_config(variant: str = 'l6-h384'):
  """The configuration of one published or ablated run; `--config.teacher` and `--config.data.path` are the user's.

  Raises:
    ConfigError: an unknown variant.
  """
  if variant not in VARIANTS:
    raise ConfigError(f'configs/minilm.py has no variant {variant!r}; use one of {", ".join(VARIANTS)}')
  return to_config_dict(VARIANTS[variant])
