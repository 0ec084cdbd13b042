"""Exact parameter counts of the published pre-training pairs: discriminator, replaced-token head, generator, its head.

From shapes alone. ConvBERT's figures are computed from the released code's shapes and agree with the published 17M and
106M (ConvBERT, table 2); ELECTRA's are counted by transformers' own classes.
"""

import dataclasses
import math

import pytest

from compactlm_jax.config import ElectraConfig, EncoderConfig
from compactlm_jax.interop.hf_config import to_hf
from compactlm_jax.interop.names import leaf_shapes

mixed = EncoderConfig.mixed
QUARTER, THIRD = ElectraConfig(generator_size=0.25), ElectraConfig(generator_size=1 / 3)
CONVBERT = {
  'small': (mixed(heads=4, head_ratio=2, hidden_size=256, embedding_size=128), QUARTER),
  'medium-small': (mixed(heads=8, head_ratio=2, hidden_size=384, embedding_size=128, num_groups=2), QUARTER),
  'base': (mixed(heads=12, head_ratio=2, hidden_size=768), THIRD),
}
# Of each: embeddings, one layer, encoder, with the replaced-token head; the same of the generator, its head.
COUNTS = {
  'small': (4_005_888, 761_490, 13_143_768, 13_209_817, 3_981_120, 63_561, 4_743_852, 39_098),
  'medium-small': (4_022_400, 1_121_124, 17_475_888, 17_624_113, 3_985_248, 71_625, 4_844_748, 43_194),
  'base': (23_837_184, 6_820_278, 105_680_520, 106_271_881, 24_034_048, 761_490, 33_171_928, 229_434),
}
ELECTRA = {
  'small': (EncoderConfig('electra', hidden_size=256, num_heads=4, embedding_size=128), QUARTER),
  'small++': (
    EncoderConfig('electra', hidden_size=256, num_heads=4, embedding_size=128),
    ElectraConfig(generator_size=1.0),
  ),
  'base': (EncoderConfig('electra'), THIRD),
  'large': (EncoderConfig('electra', hidden_size=1024, num_layers=24, num_heads=16), QUARTER),
}


def _count(config, *parts, under=''):
  return sum(math.prod(shape) for name, shape in leaf_shapes(config, parts).items() if name.startswith(under))


@pytest.mark.parametrize(
  ('width', 'groups', 'millions'), [(384, 4, 14.1), (432, 4, 16.7), (384, 2, 17.6), (432, 2, 21.2)]
)
def test_sizes_of_the_ablations_that_configs_infer(width, groups, millions):
  """With the replaced-token head, as configs/convbert.py says. Mutation: other groups."""
  config = mixed(heads=8, head_ratio=2, hidden_size=width, embedding_size=128, num_groups=groups)
  assert round(_count(config, 'encoder', 'rtd_head') / 1e6, 1) == millions


@pytest.mark.parametrize('size', CONVBERT)
def test_convbert_counts(size):
  """Mutation: halve the generator's one head, as transformers does, or group its feed-forward otherwise."""
  encoder, electra = CONVBERT[size]
  generator, layers = electra.generator_encoder(encoder), encoder.num_layers
  assert COUNTS[size] == (
    _count(encoder, 'encoder', under='encoder/embeddings'),
    _count(encoder, 'encoder', under='encoder/layers') / layers,
    _count(encoder, 'encoder'),
    _count(encoder, 'encoder', 'rtd_head'),
    _count(generator, 'encoder', under='encoder/embeddings'),
    _count(generator, 'encoder', under='encoder/layers') / layers,
    _count(generator, 'encoder'),
    _count(generator, 'mlm_head'),
  )


def test_convbert_heads_of_the_generators_follow_the_head_ratio():
  heads = {}
  for size, (encoder, electra) in CONVBERT.items():
    generator = electra.generator_encoder(encoder)
    heads[size] = (generator.hidden_size, generator.num_heads, generator.head_size)
  assert heads == {'small': (64, 1, 64), 'medium-small': (96, 1, 48), 'base': (256, 2, 64)}


@pytest.mark.parametrize('size', ['small', 'base'])
def test_electra_encoder_counts(size):
  assert _count(ELECTRA[size][0], 'encoder') == {'small': 13_483_008, 'base': 108_891_648}[size]


@pytest.mark.torch
@pytest.mark.parametrize('size', ELECTRA)
def test_electra_counts_are_those_of_transformers(size):
  """Discriminator with its head, generator with its head (its tied word table counted once), without memory."""
  torch, transformers = pytest.importorskip('torch'), pytest.importorskip('transformers')
  encoder, electra = ELECTRA[size]
  generator = electra.generator_encoder(encoder)
  assert generator.head_size == 64
  for cls, config, head in (('PreTraining', encoder, 'rtd_head'), ('MaskedLM', generator, 'mlm_head')):
    with torch.device('meta'):
      described = transformers.ElectraConfig.from_dict(to_hf(config, [head]))
      model = getattr(transformers, f'ElectraFor{cls}')(described)
    assert sum(p.numel() for p in model.parameters()) == _count(config, 'encoder', head)


@pytest.mark.torch
@pytest.mark.parametrize('size', ['small (2 heads)', 'medium-small', 'base'])
def test_convbert_counts_are_those_of_transformers(size):
  """But for the small generator of one head, which transformers would halve."""
  torch, transformers = pytest.importorskip('torch'), pytest.importorskip('transformers')
  encoder, electra = CONVBERT[size.split()[0]]
  if size.startswith('small'):
    electra = dataclasses.replace(electra, generator_heads=2)
  for cls, config, heads in (
    ('ConvBertModel', encoder, []),
    ('ConvBertForMaskedLM', electra.generator_encoder(encoder), ['mlm_head']),
  ):
    with torch.device('meta'):
      model = getattr(transformers, cls)(transformers.ConvBertConfig.from_dict(to_hf(config, heads)))
    assert sum(p.numel() for p in model.parameters()) == _count(config, 'encoder', *heads)
