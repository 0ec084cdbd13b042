"""The name table against our own parameter tree and against transformers' models."""

import jax
import numpy as np
import pytest

from compactlm_jax.config import EncoderConfig
from compactlm_jax.errors import ConfigError, NumericsError
from compactlm_jax.interop import names
from compactlm_jax.nn.encoder import encoder_shapes
from compactlm_jax.nn.heads import Classifier, MlmHead, RtdHead
from compactlm_jax.tree import named_leaves

SMALL = dict(vocab_size=13, hidden_size=8, num_layers=3, max_positions=6, type_vocab_size=3, intermediate_size=12)
CONFIGS = [
  EncoderConfig('bert', num_heads=2, pooler=True, **SMALL),
  EncoderConfig('electra', num_heads=4, embedding_size=6, **SMALL),
  EncoderConfig('convbert', num_heads=1, head_size=4, conv_kernel_size=5, num_groups=2, embedding_size=10, **SMALL),
  EncoderConfig('convbert', num_heads=2, head_size=2, conv_kernel_size=3, **SMALL),
  EncoderConfig('convbert', num_heads=2, head_size=2, conv_kernel_size=3, conv_kind='dynamic', **SMALL),
  EncoderConfig('convbert', num_heads=2, head_size=4, conv_kernel_size=3, self_attention=False, **SMALL),
]
IDS = ['bert', 'electra', 'convbert grouped', 'convbert', 'dynamic convolution', 'convolution only']


def _full_shapes(config):
  def heads(key):
    x_BTD = np.zeros((1, 2, config.hidden_size), np.float32)
    word_VE = np.zeros((config.vocab_size, config.embedding_size), np.float32)
    return {
      'mlm_head': MlmHead(config).init(key, x_BTD, word_VE)['params'],
      'rtd_head': RtdHead(config).init(key, x_BTD)['params'],
      'classifier': Classifier(5, config).init(key, x_BTD[0])['params'],
      'span': Classifier(2, config).init(key, x_BTD[0])['params'],
    }

  return {**encoder_shapes(config), **jax.eval_shape(heads, jax.random.key(0))}


def _random_tree(config, seed=0):
  rng = np.random.default_rng(seed)
  return jax.tree.map(lambda s: rng.standard_normal(s.shape).astype(np.float32), _full_shapes(config))


@pytest.mark.parametrize('config', CONFIGS, ids=IDS)
def test_the_table_covers_our_tree_exactly_and_names_are_unique(config):
  """Mutation: drop a row, or use one name twice."""
  rows = names.table(config)
  leaves = named_leaves(_full_shapes(config))
  assert sorted(row.path for row in rows) == sorted(leaves)
  assert len({row.name for row in rows}) == len(rows)
  sizes = names._sizes(config, 5)
  for row in rows:
    layers = (config.num_layers,) if row.stacked else ()
    assert layers + names._shape(row, sizes) == leaves[row.path].shape, row
  shapes = names.leaf_shapes(config, ('encoder', *names.HEADS), 5)
  assert shapes == {name: leaf.shape for name, leaf in leaves.items()}


@pytest.mark.parametrize('config', CONFIGS, ids=IDS)
def test_import_inverts_export_bit_for_bit(config):
  tree = _random_tree(config)
  tensors = names.export_tensors(tree, config)
  assert all(t.flags.c_contiguous and t.dtype == np.float32 for t in tensors.values())
  back = names.import_tensors(tensors, config)
  assert jax.tree.structure(back) == jax.tree.structure(tree)
  assert jax.tree.all(jax.tree.map(lambda a, b: np.array_equal(a, b), tree, back))
  assert names.count_parameters(tree) == sum(t.size for t in tensors.values())


@pytest.mark.torch
def test_names_and_shapes_are_those_of_transformers(case, tools):
  """Every parameter of the transformers class is in the export, tied ones under one of their names."""
  from compactlm_jax.interop.hf_config import from_hf

  cls, options = case
  model = tools.torch_model(cls, options)
  state = {name: tuple(value.shape) for name, value in model.state_dict().items()}
  config = from_hf(model.config.to_dict(), pooler=names.has_pooler(state))
  sizes = names._sizes(config, 3)
  accepted = names._accepted(names.table(config), config)
  for name, shape in state.items():
    if not name.startswith('cls.seq_relationship'):
      row, _ = accepted[name]
      assert names._hf_shape(row, sizes) == shape, name


def _drop(tree):
  del tree['encoder']['layers']['ffn_in']['bias']


def _add(tree):
  tree['scores'] = {'encoder': {'x': np.zeros(2, np.float32)}}


def _reshape(tree):
  tree['encoder']['layers']['ffn_in']['bias'] = np.zeros((2, 12), np.float32)


def _halve(tree):
  tree['encoder']['pooler']['bias'] = np.zeros(8, np.float16)


def _poison(tree):
  tree['encoder']['layers']['ffn_out']['bias'][1, 0] = np.inf


@pytest.mark.parametrize(
  ('change', 'error', 'message'),
  [
    (_drop, ConfigError, 'encoder/layers/ffn_in/bias: missing'),
    (_add, ConfigError, 'scores/encoder/x: .*scores of pruning are baked'),
    (_reshape, ConfigError, r'encoder/layers/ffn_in/bias: found float32\(2, 12\), expected float32\(3, 12\)'),
    (_halve, ConfigError, 'encoder/pooler/bias: found float16'),
    (_poison, NumericsError, 'encoder/layers/ffn_out/bias: .*not finite'),
  ],
)
def test_export_refuses_by_leaf(change, error, message):
  tree = _random_tree(CONFIGS[0])
  change(tree)
  with pytest.raises(error, match=message):
    names.export_tensors(tree, CONFIGS[0])
