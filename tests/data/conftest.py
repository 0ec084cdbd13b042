"""Text and a tokenizer that the data tests share."""

from pathlib import Path

import numpy as np
import pytest

from compactlm_jax.data.wordpiece import train_wordpiece

WORDS = (
  'the a small large river house tree runs stands falls under over near and cold warm light blue Café déjà'.split()
)


def write_text(path: Path, documents: int, seed: int = 0) -> Path:
  """Documents of one to six lines, separated by blank lines."""
  rng = np.random.default_rng(seed)
  blocks = []
  for _ in range(documents):
    lines = [' '.join(rng.choice(WORDS, rng.integers(1, 20))) + '.' for _ in range(rng.integers(1, 7))]
    blocks.append('\n'.join(lines) + '\n')
  path.write_text('\n'.join(blocks), encoding='utf-8')
  return path


@pytest.fixture(scope='session')
def corpus(tmp_path_factory):
  return write_text(tmp_path_factory.mktemp('corpus') / 'text.txt', 120)


@pytest.fixture(scope='session')
def vocabulary(corpus):
  """A tokenizer folder."""
  folder = corpus.parent / 'tokenizer'
  train_wordpiece(str(corpus), 120, folder)
  return folder
