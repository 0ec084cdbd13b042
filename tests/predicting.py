"""A tiny model with a head of random weights and a vocabulary of words, for tests of prediction."""

import json

import jax
import numpy as np

from compactlm_jax.config import EncoderConfig
from compactlm_jax.interop.bundle import Bundle
from compactlm_jax.interop.tokenizer_files import TokenizerFiles
from compactlm_jax.nn.encoder import encoder_shapes

SIZES = dict(vocab_size=40, hidden_size=16, num_layers=1, intermediate_size=24, max_positions=24, scan_unroll=1)
CONFIG = EncoderConfig(num_heads=2, **SIZES)
WORDS = tuple(f'w{i}' for i in range(35))
VOCAB = '\n'.join(['[PAD]', '[UNK]', '[CLS]', '[SEP]', '[MASK]', *WORDS]) + '\n'
TOKENIZER = TokenizerFiles(
  {'vocab.txt': VOCAB.encode(), 'tokenizer_config.json': json.dumps({'tokenizer_class': 'BertTokenizer'}).encode()}
)
LABELS = ('no', 'yes', 'maybe')


def make_bundle(classes=3, labels=LABELS, config=CONFIG, head='classifier'):
  rng = np.random.default_rng(1)
  params = jax.tree.map(lambda s: (rng.standard_normal(s.shape) / 2).astype(s.dtype), encoder_shapes(config))
  kernel = rng.standard_normal((config.hidden_size, classes)).astype(np.float32)
  params[head] = {'kernel': kernel, 'bias': rng.standard_normal(classes).astype(np.float32)}
  return Bundle(config, params, TOKENIZER, labels)


def make_texts(count=13, seed=0, longest=20):
  rng = np.random.default_rng(seed)
  return [' '.join(rng.choice(WORDS, rng.integers(1, longest))) for _ in range(count)]
