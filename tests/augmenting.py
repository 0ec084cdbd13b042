"""A tiny masked language model with a vocabulary of words of letters, whole and in pieces: for augmentation."""

import json

import jax
import numpy as np

from compactlm_jax.config import EncoderConfig
from compactlm_jax.data.tokenizer import load_tokenizer
from compactlm_jax.interop.bundle import Bundle
from compactlm_jax.interop.tokenizer_files import TokenizerFiles
from compactlm_jax.tasks.mlm import init_mlm

SINGLE = 'house river tree road light stone bird cloud green blue cold warm runs stands falls sings'.split()
SEVERAL = 'treehouse riverstone lightning birdcloud roadrunner'.split()
STOPS = 'the a and over is'.split()
PIECES = '##house ##stone ##ning ##cloud ##runner'.split()
VOCAB = ['[PAD]', '[UNK]', '[CLS]', '[SEP]', '[MASK]', '.', "'", 't', 'don', '3d', *STOPS, *SINGLE, *PIECES]
TOKENIZER = TokenizerFiles(
  {
    'vocab.txt': ('\n'.join(VOCAB) + '\n').encode(),
    'tokenizer_config.json': json.dumps({'tokenizer_class': 'BertTokenizer', 'do_lower_case': True}).encode(),
  }
)
CONFIG = EncoderConfig(
  vocab_size=len(VOCAB), hidden_size=16, num_layers=1, num_heads=2, intermediate_size=24, max_positions=40,
  embedding_size=16, scan_unroll=1,
)  # fmt: skip


def make_model(config=CONFIG, seed=0):
  """Weights that are large enough for guesses to depend on the text."""
  rng = np.random.default_rng(seed)
  shapes = jax.eval_shape(lambda: init_mlm(config, jax.random.key(0)))
  params = jax.tree.map(lambda s: (rng.standard_normal(s.shape) / 2).astype(s.dtype), shapes)
  return Bundle(config, params, TOKENIZER)


def make_tokenizer(folder):
  TOKENIZER.write(folder)
  return load_tokenizer(folder)


def make_texts(count=12, seed=0, longest=9):
  rng = np.random.default_rng(seed)
  words = [*SINGLE, *SEVERAL, *STOPS]
  return [' '.join(rng.choice(words, rng.integers(2, longest))) + ' .' for _ in range(count)]
