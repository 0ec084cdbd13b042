"""config.json in and out: what is equal, what is derived, what is refused and why."""

import pytest

from compactlm_jax.config import EncoderConfig
from compactlm_jax.errors import ConfigError
from compactlm_jax.interop.hf_config import DEFAULTS, OUR_KEY, architecture, from_hf, to_hf, unread_heads

SMALL = dict(vocab_size=31, hidden_size=24, num_layers=2, max_positions=16)
EXPRESSIBLE = [
  EncoderConfig(num_heads=4, **SMALL),
  EncoderConfig(num_heads=3, intermediate_size=7, pooler=True, layer_norm_epsilon=1e-5, pad_token_id=3, **SMALL),
  EncoderConfig('electra', num_heads=4, embedding_size=8, hidden_dropout=0.0, initializer_range=0.03, **SMALL),
  EncoderConfig('convbert', num_heads=3, head_size=4, conv_kernel_size=9, num_groups=2, embedding_size=8,
                conv_sees_padding=True, **SMALL),
  EncoderConfig('convbert', num_heads=1, head_size=12, conv_kernel_size=3, conv_sees_padding=False, dtype='bfloat16',
                remat=True, scan_unroll=2, **SMALL),
  EncoderConfig(num_heads=4, causal=True, **SMALL),
]  # fmt: skip


@pytest.mark.parametrize('config', EXPRESSIBLE, ids=lambda c: f'{c.architecture}-{c.num_heads}')
def test_round_trip(config):
  written = to_hf(config)
  assert from_hf(written, pooler=config.pooler) == config
  assert to_hf(from_hf(written, pooler=config.pooler)) == written


@pytest.mark.torch
@pytest.mark.parametrize('config', EXPRESSIBLE, ids=lambda c: f'{c.architecture}-{c.num_heads}')
def test_transformers_reads_the_written_config(config):
  transformers = pytest.importorskip('transformers')
  cls = {'bert': 'BertConfig', 'electra': 'ElectraConfig', 'convbert': 'ConvBertConfig'}[config.architecture]
  written = to_hf(config)
  read = getattr(transformers, cls).from_dict(written)
  for key, value in written.items():
    if key != 'dtype':
      assert getattr(read, key) == value, key


@pytest.mark.parametrize('kind', DEFAULTS)
def test_defaults_are_those_of_transformers(kind):
  """A new release that changes one fails here first."""
  transformers = pytest.importorskip('transformers')
  cls = {'bert': 'BertConfig', 'electra': 'ElectraConfig', 'convbert': 'ConvBertConfig'}[kind]
  defaults = getattr(transformers, cls)()
  assert {key: getattr(defaults, key) for key in DEFAULTS[kind]} == DEFAULTS[kind]
  assert defaults.hidden_act == 'gelu'
  assert from_hf({'model_type': kind}).hidden_size == defaults.hidden_size


@pytest.mark.parametrize(
  ('heads', 'ratio', 'hidden', 'branch', 'size'),
  [(4, 2, 16, 2, 4), (12, 2, 768, 6, 64), (8, 4, 16, 2, 4), (1, 2, 16, 1, 8), (7, 2, 24, 3, 4), (3, 1, 12, 3, 2)],
)
def test_convbert_heads_are_derived_as_transformers_does(heads, ratio, hidden, branch, size):
  config = from_hf({'model_type': 'convbert', 'num_attention_heads': heads, 'head_ratio': ratio, 'hidden_size': hidden})
  assert (config.num_heads, config.head_size, config.conv_sees_padding) == (branch, size, True)


def test_the_clean_mode_travels_under_our_key():
  clean = EXPRESSIBLE[4]
  assert to_hf(clean)[OUR_KEY]['conv_sees_padding'] is False
  assert OUR_KEY not in to_hf(EXPRESSIBLE[3])
  assert OUR_KEY not in to_hf(EXPRESSIBLE[0])


@pytest.mark.parametrize(
  ('changes', 'message'),
  [
    (dict(model_type='roberta'), "model_type 'roberta' is not supported"),
    (dict(model_type=None), 'model_type None is not supported'),
    (dict(model_type=['bert']), 'is not supported'),
    (dict(hidden_act='gelu_new'), "hidden_act 'gelu_new'"),
    (dict(hidden_act='relu'), "hidden_act 'relu'"),
    (dict(position_embedding_type='relative_key'), 'position_embedding_type .*relative'),
    (dict(is_decoder='yes'), "is_decoder 'yes'"),
    (dict(model_type='convbert', is_decoder=True), 'is_decoder True: .*convolution reads later'),
    (dict(add_cross_attention=True), 'add_cross_attention'),
    (dict(pruned_heads={'0': [1]}), 'pruned_heads'),
    (dict(auto_map={'AutoModel': 'x--y.Model'}), 'auto_map .*never run'),
    (dict(quantization_config={'bits': 4}), 'quantization_config'),
    (dict(problem_type='multi_label_classification'), "problem_type 'multi_label_classification': .*one label"),
    (dict(architectures=['BertForMultipleChoice']), "architectures 'BertForMultipleChoice': choosing among"),
    (dict(vocab_size='many'), "vocab_size 'many' must be of type int"),
    (dict(hidden_size=True), 'hidden_size True must be of type int'),
    (dict(num_hidden_layers=2.0), 'num_hidden_layers 2.0 must be of type int'),
    (dict(hidden_size=-8), 'hidden_size -8 must be positive'),
    (dict(num_hidden_layers=0), 'num_hidden_layers 0 must be positive'),
    (dict(num_attention_heads=5), 'not divisible by num_heads 5'),
    (dict(hidden_dropout_prob=1.5), 'hidden_dropout'),
    (dict(pad_token_id=99999), 'pad_token_id 99999 is outside'),
    (dict(model_type='convbert', num_attention_heads=10, head_ratio=2), 'do not fill hidden_size'),
    (dict(model_type='convbert', head_ratio=0), 'head_ratio 0 must be positive'),
    (dict(model_type='convbert', conv_kernel_size=4), 'must be odd'),
    (dict(model_type='convbert', conv_kernel_size=0), 'conv_kernel_size 0'),
    (dict(model_type='convbert', num_groups=5), 'num_groups'),
    ({OUR_KEY: {'surprise': 1}}, 'may only hold'),
    ({OUR_KEY: {'remat': 1}}, 'remat 1 must be of type bool'),
  ],
)
def test_import_refuses_with_the_reason(changes, message):
  raw = {'model_type': 'bert', 'hidden_size': 24, 'num_attention_heads': 4, 'vocab_size': 31, 'embedding_size': 8}
  with pytest.raises(ConfigError, match=message):
    from_hf({**raw, **changes})


@pytest.mark.parametrize(
  ('config', 'message'),
  [
    (EncoderConfig.mixed(heads=8, head_ratio=4, **SMALL), r'head_size.*2 x 2 heads of 3 give 12 \(a head ratio'),
    (EncoderConfig.mixed(heads=1, head_ratio=2, **SMALL), 'head_size.*2 x 1 heads of 24 give 48'),
    (EncoderConfig('convbert', num_heads=4, **SMALL), 'conv_kernel_size.*architecture to .electra.'),
    (EncoderConfig('bert', num_heads=2, head_size=6, **SMALL), r'head_size.*2 \* 6 = 12'),
    (EncoderConfig('electra', num_heads=2, head_size=6, **SMALL), 'head_size'),
    (EncoderConfig('bert', num_heads=4, embedding_size=8, **SMALL), 'embedding_size.*architecture to .electra.'),
    (EncoderConfig('bert', num_heads=4, num_groups=2, **SMALL), 'num_groups'),
    (EncoderConfig('bert', num_heads=4, conv_kernel_size=9, **SMALL), 'conv_kernel_size.*architecture to .convbert.'),
    (EncoderConfig('electra', num_heads=4, pooler=True, **SMALL), 'pooler.*drop_pooler'),
    (EncoderConfig.mixed(heads=4, head_ratio=2, causal=True, **SMALL), 'causal: .*convolution reads later'),
    (EncoderConfig.mixed(heads=4, head_ratio=2, conv_kind='dynamic', **SMALL), "conv_kind: .*no 'dynamic' conv"),
    (EncoderConfig.mixed(heads=4, head_ratio=2, self_attention=False, **SMALL), 'self_attention: .*always has'),
    (EncoderConfig.mixed(heads=4, head_ratio=1, **SMALL), r'head_size.*\(a head ratio other than 2'),
  ],
)
def test_export_refuses_with_the_reason(config, message):
  with pytest.raises(ConfigError, match=message):
    to_hf(config)


def test_published_convberts_are_expressible():
  for hidden, heads, embedding, groups in ((256, 4, 128, 1), (384, 8, 128, 2), (768, 12, 768, 1)):
    config = EncoderConfig.mixed(
      heads=heads, head_ratio=2, hidden_size=hidden, embedding_size=embedding, num_groups=groups
    )
    assert to_hf(config)['num_attention_heads'] == heads
    assert from_hf(to_hf(config)) == config


READ = {
  'BertForMaskedLM': {'mlm_head'},
  'BertForSequenceClassification': {'classifier'},
  'ConvBertForSequenceClassification': {'classifier'},
  'ElectraForSequenceClassification': {'classifier'},
  'BertForQuestionAnswering': {'span'},
  'ElectraForPreTraining': {'rtd_head'},
  'ElectraForMaskedLM': {'mlm_head'},
  'ConvBertForMaskedLM': {'mlm_head'},
  'BertLMHeadModel': {'mlm_head'},
  'ElectraForCausalLM': {'mlm_head'},
}


@pytest.mark.parametrize(
  ('kind', 'pooler', 'heads', 'expected'),
  [
    ('bert', True, (), 'BertModel'),
    ('bert', False, ('mlm_head', 'rtd_head'), 'BertForMaskedLM'),
    ('bert', True, ('classifier', 'mlm_head'), 'BertForSequenceClassification'),
    ('bert', False, ('classifier',), 'BertForSequenceClassification'),
    ('electra', False, ('mlm_head', 'rtd_head'), 'ElectraForPreTraining'),
    ('electra', False, ('mlm_head',), 'ElectraForMaskedLM'),
    ('convbert', False, ('mlm_head', 'rtd_head'), 'ConvBertForMaskedLM'),
    ('convbert', False, ('rtd_head', 'classifier'), 'ConvBertForSequenceClassification'),
    ('electra', False, ('classifier', 'span'), 'ElectraForSequenceClassification'),
    ('bert', False, ('classifier', 'span'), 'BertForSequenceClassification'),
    ('bert', True, ('span',), 'BertForQuestionAnswering'),
    ('causal bert', False, ('mlm_head',), 'BertLMHeadModel'),
    ('causal electra', False, ('mlm_head',), 'ElectraForCausalLM'),
    ('causal bert', False, (), 'BertModel'),
  ],
)
def test_architectures(kind, pooler, heads, expected):
  config = EncoderConfig(kind.split()[-1], **{**SMALL, 'num_heads': 4}, pooler=pooler, causal=kind.startswith('causal'))
  assert architecture(config, heads, 3) == expected
  assert unread_heads(config, heads, 3) == sorted(set(heads) - READ.get(expected, set()))
