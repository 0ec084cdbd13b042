"""Tiny models of transformers with random values in every parameter, and a tiny tokenizer."""

import dataclasses
import json

import numpy as np
import pytest

V, T = 37, 19

BERT = [
  dict(hidden_size=16, num_attention_heads=4, intermediate_size=24),
  dict(hidden_size=15, num_attention_heads=3, intermediate_size=20, num_hidden_layers=3, layer_norm_eps=1e-6),
  dict(hidden_size=24, num_attention_heads=1, type_vocab_size=3, max_position_embeddings=T),
]
ELECTRA = [
  dict(embedding_size=8, hidden_size=16, num_attention_heads=4),
  dict(embedding_size=15, hidden_size=15, num_attention_heads=5, num_hidden_layers=1),
  dict(embedding_size=24, hidden_size=12, num_attention_heads=3),
]
CONVBERT = [
  dict(embedding_size=16, hidden_size=16, num_attention_heads=4),
  dict(embedding_size=8, hidden_size=24, num_attention_heads=6, conv_kernel_size=3, num_groups=2),
  dict(embedding_size=20, hidden_size=32, num_attention_heads=2, conv_kernel_size=9, num_groups=4),
  dict(embedding_size=8, hidden_size=16, num_attention_heads=8, head_ratio=4, conv_kernel_size=5),
  dict(embedding_size=8, hidden_size=24, num_attention_heads=7, head_ratio=2, num_hidden_layers=3),
  dict(embedding_size=8, hidden_size=16, num_attention_heads=1, head_ratio=2, conv_kernel_size=3),
  dict(embedding_size=12, hidden_size=12, num_attention_heads=3, head_ratio=1, num_groups=2, pad_token_id=0),
]
CASES = [
  *[(cls, options) for options in BERT for cls in ('BertModel', 'BertForMaskedLM')],
  ('BertForPreTraining', BERT[0]),
  ('BertForSequenceClassification', BERT[1]),
  *[(cls, options) for options in ELECTRA for cls in ('ElectraForPreTraining', 'ElectraForMaskedLM')],
  ('ElectraModel', ELECTRA[0]),
  *[('ConvBertForMaskedLM', options) for options in CONVBERT],
  ('ConvBertModel', CONVBERT[1]),
]
"""Embedding size equal, smaller and larger than hidden; groups 1, 2, 4; kernels 3, 5, 9; odd heads; ratios 1, 2, 4."""


def case_id(case):
  return f'{case[0]}-{"-".join(str(v) for v in case[1].values())}'


def torch_model(cls, options, seed=0):
  """A transformers model with no parameter at an initial zero or one, five times as wide as usual."""
  torch, transformers = pytest.importorskip('torch'), pytest.importorskip('transformers')
  kind = cls.split('For')[0].removesuffix('Model')
  sizes = dict(vocab_size=V, num_hidden_layers=2, intermediate_size=4 * options['hidden_size'], num_labels=3)
  config = getattr(transformers, kind + 'Config')(**{**sizes, 'max_position_embeddings': 32, **options})
  model = getattr(transformers, cls)(config).eval()
  generator = torch.Generator().manual_seed(seed)
  with torch.no_grad():
    for name, p in model.named_parameters():
      noise = 0.1 * torch.randn(p.shape, generator=generator)
      p.copy_(1 + noise if name.endswith('LayerNorm.weight') else noise)
  return model


def random_batch(rng, types=2):
  """Token ids, mask with rows of full, partial and minimal length, segments."""
  mask = (np.arange(T) < np.array([[T], [11], [1]])).astype(np.int32)
  ids = np.where(mask, rng.integers(2, V, (3, T)), 1).astype(np.int32)
  return ids, mask, rng.integers(0, types, (3, T)).astype(np.int32)


@dataclasses.dataclass(frozen=True)
class Tools:
  """What the tests share."""

  torch_model = staticmethod(torch_model)
  random_batch = staticmethod(random_batch)

  @staticmethod
  def save_torch(cls, options, folder, **kwargs):
    """Writes a random transformers model with transformers itself."""
    model = torch_model(cls, options)
    model.save_pretrained(folder, **kwargs)
    return model

  @staticmethod
  def add_vocab(folder, size=V, pad='[PAD]', pad_id=0):
    """A WordPiece vocabulary of `size` tokens beside a model."""
    tokens = [f'w{i}' for i in range(size)]
    for i, special in enumerate(['[UNK]', '[CLS]', '[SEP]', '[MASK]']):
      tokens[size - 1 - i] = special
    tokens[pad_id] = pad
    (folder / 'vocab.txt').write_text('\n'.join(tokens) + '\n')
    (folder / 'tokenizer_config.json').write_text(json.dumps({'tokenizer_class': 'BertTokenizer', 'pad_token': pad}))


@pytest.fixture(scope='session')
def tools():
  return Tools


def pytest_generate_tests(metafunc):
  if 'case' in metafunc.fixturenames:
    metafunc.parametrize('case', CASES, ids=case_id)
