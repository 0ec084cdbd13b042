"""FLOPs counted from the model, against numbers worked out by hand."""

import dataclasses

import pytest

from compactlm_jax.config import (
  AdaptConfig,
  DataConfig,
  DistillConfig,
  ElectraConfig,
  EncoderConfig,
  FinetuneConfig,
  MaskConfig,
  RunConfig,
  SpanConfig,
)
from compactlm_jax.nn.flops import conv_flops, encoder_flops, layer_flops, mlm_head_flops, span_head_flops
from compactlm_jax.plan.flops import model_flops

BERT = EncoderConfig()
CONVBERT = EncoderConfig.mixed(heads=12, head_ratio=2, hidden_size=768)


def test_a_layer_of_bert_base():
  """4 products of 768 x 768, two of 768 x 3072; scores and mixing read 128 keys of 768. Mutation: forget the mixing."""
  assert layer_flops(BERT, 128) == 2 * (4 * 768 * 768 + 2 * 768 * 3072) + 2 * 2 * 128 * 768
  assert layer_flops(dataclasses.replace(BERT, causal=True), 127) == layer_flops(BERT, 64)


def test_a_layer_of_convbert_base():
  """6 heads of 64 in each branch, 9 taps. Mutation: count the output projection for one branch only."""
  span = 2 * 9 * 768 + 2 * 768 * 384
  conv = span + 2 * 384 * 6 * 9 + 2 * 768 * 384 + 2 * 9 * 384
  assert conv_flops(CONVBERT) == conv
  attention = 3 * 2 * 768 * 384 + 2 * 2 * 128 * 384
  assert layer_flops(CONVBERT, 128) == attention + conv + 2 * 768 * 768 + 2 * 2 * 768 * 3072


def test_ablations():
  """Without attention: no keys, values and scores. Plain dynamic: no span. Mutation: read `self_attention` nowhere."""
  alone = dataclasses.replace(CONVBERT, self_attention=False, num_heads=12)
  plain = dataclasses.replace(CONVBERT, conv_kind='dynamic')
  feed_forward = 4 * 768 * 3072
  assert layer_flops(alone, 128) == 2 * 768 * 768 + conv_flops(alone) + 2 * 768 * 768 + feed_forward
  assert conv_flops(CONVBERT) - conv_flops(plain) == 2 * 9 * 768 + 2 * 768 * 384
  grouped = dataclasses.replace(BERT, num_groups=2)
  assert layer_flops(BERT, 128) - layer_flops(grouped, 128) == feed_forward / 2


def test_six_times_weights_times_tokens():
  """BERT-base as a masked model at 128: within 5 % of the rule of thumb with attention and head added."""
  config = RunConfig(task='mlm', steps=1, batch_size=256, data=DataConfig(seq_len=128))
  tokens, weights = 256 * 128, 12 * 12 * 768**2
  head = 3 * 256 * 19 * 2 * 768 * (768 + 30522)
  attention = 3 * tokens * 12 * 4 * 128 * 768
  assert model_flops(config) == 6 * weights * tokens + attention + head
  assert model_flops(config) == pytest.approx(6 * weights * tokens, rel=0.15)


def test_replaced_token_detection():
  """Discriminator, generator, their heads; logits at 19 slots. Mutation: count logits at all positions."""
  encoder = EncoderConfig(architecture='electra', hidden_size=256, num_heads=4, embedding_size=128)
  config = RunConfig(
    task='electra', steps=1, batch_size=128, encoder=encoder, electra=ElectraConfig(generator_size=0.25)
  )
  layer = 2 * (4 * 256**2 + 2 * 256 * 1024) + 4 * 128 * 256
  small = 2 * (4 * 64**2 + 2 * 64 * 256) + 4 * 128 * 64
  per_row = 128 * (2 * 128 * 256 + 12 * layer + 2 * 256 * 257) + 128 * (2 * 128 * 64 + 12 * small)
  per_row += 19 * 2 * 128 * (64 + 30522)
  assert model_flops(config) == 3 * 128 * per_row


def test_language_model_and_classifier():
  encoder = EncoderConfig(causal=True)
  config = RunConfig(task='lm', steps=1, batch_size=2, encoder=encoder, data=DataConfig(seq_len=32))
  assert model_flops(config) == 3 * 2 * (32 * encoder_flops(encoder, 32) + 31 * mlm_head_flops(encoder))
  config = RunConfig(task='finetune', steps=1, batch_size=2, finetune=FinetuneConfig(num_classes=3))
  assert model_flops(config) == 3 * 2 * (128 * encoder_flops(BERT, 128) + 2 * 768 * 3)


def test_distillation_reads_the_teacher_once():
  """A 6-layer student; both stop at the compared projections. Mutation: count the teacher three times."""
  student = EncoderConfig(num_layers=6, hidden_size=384)
  config = RunConfig(task='distill', steps=1, batch_size=4, encoder=student, distill=DistillConfig())
  relations = 2 * 2 * 128 * 128  # qk and vv, per unit of width
  below = 128 * 5 * (24 * 384**2 + 4 * 128 * 384) + 128 * 3 * 2 * 384**2 + relations * 384
  taught = 128 * 11 * (24 * 768**2 + 4 * 128 * 768) + 128 * 3 * 2 * 768**2 + relations * 768
  assert model_flops(config, BERT) == 4 * (3 * below + taught)
  assert MaskConfig().slots(128) == 19


def test_span_heads():
  """Joint, v2: a start logit and the right half of the kernel per token, one start, one answerability per row."""
  assert span_head_flops(8, 10) == 2 * 10 * 8 * 2
  ends = 2 * 10 * 8 * 512 + 2 * 8 * 512 + 2 * 10 * 512
  assert span_head_flops(8, 10, joint=True) == 2 * 10 * 8 + ends
  impossible = 2 * 10 * 8 + 2 * 16 * 512 + 2 * 512
  assert span_head_flops(8, 10, joint=True, answerable=True) == 2 * 10 * 8 + ends + impossible


def test_spans_scores_and_a_fine_tuned_teacher():
  """A frozen teacher counts once, a score is one output. Mutation: count SQuAD as a classifier."""
  data = DataConfig(seq_len=384)
  for version, head in ((1, 'independent'), (2, 'joint')):
    squad = FinetuneConfig(benchmark=f'squad{version}')
    run = RunConfig(task='finetune', steps=1, batch_size=2, data=data, finetune=squad, span=SpanConfig(head=head))
    joint = head == 'joint'
    own = 384 * encoder_flops(BERT, 384) + span_head_flops(768, 384, joint=joint, answerable=joint)
    assert model_flops(run) == 3 * 2 * own
  score = RunConfig(task='finetune', steps=1, batch_size=2, finetune=FinetuneConfig(benchmark='stsb', pooled=True))
  own = 128 * encoder_flops(BERT, 128) + 2 * 768 * (768 + 1)
  assert model_flops(score) == 3 * 2 * own
  assert model_flops(score, dataclasses.replace(BERT, pooler=True)) == (3 + 1) * 2 * own


def test_an_adaptive_network_costs_its_cells_and_its_teacher_once():
  """Twelve cells are 2.5 x 2.25 networks. Mutations: count the teacher for each cell; forget the sampling."""
  finetune = FinetuneConfig(num_classes=2)
  adapt = AdaptConfig(stages=('depth',))
  own, head = 128 * encoder_flops(BERT, 128), 2 * 768 * 2
  config = RunConfig(task='adapt', steps=1, batch_size=2, finetune=finetune, adapt=adapt)
  cells_of_step = 2.5 * 2.25 * own + 12 * head
  assert model_flops(config, BERT) == 2 * (3 * cells_of_step + own + head)
  same = dataclasses.replace(config, adapt=dataclasses.replace(adapt, depth_teacher='same_width'))
  assert model_flops(same, BERT) == 2 * (3 * cells_of_step + 2.5 * own + 4 * head)
  labels = dataclasses.replace(config, adapt=AdaptConfig(stages=('final',), sampling='sandwich', random_cells=5))
  ends = 1.125 * own + 2 * head
  assert model_flops(labels) == pytest.approx(2 * 3 * (ends + (cells_of_step - ends) / 2), rel=1e-12)
