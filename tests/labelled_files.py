"""A model folder and labelled files that it can learn, for jobs on tables."""

import jax
import numpy as np

from compactlm_jax.data.wordpiece import train_wordpiece
from compactlm_jax.interop.bundle import Bundle, save_pretrained
from compactlm_jax.interop.folder import open_folder
from compactlm_jax.interop.tokenizer_files import read_tokenizer
from compactlm_jax.nn.encoder import init_encoder

VOCAB = 120
WORDS = 'the small large river house tree runs stands falls under over near cold warm light blue'.split()


def write_files(folder, encoder, rows=80):
  """FOLDER/model (random weights, a tokenizer of VOCAB pieces), train.tsv and dev.tsv: 'yes' where a text is cold."""
  rng = np.random.default_rng(0)
  lines = [' '.join(rng.choice(WORDS, rng.integers(2, 6))) for _ in range(2 * rows)]
  lines = [f'{line} cold' if i % 2 else line.replace('cold', 'warm') for i, line in enumerate(lines)]
  (folder / 'text.txt').write_text('\n'.join(lines))
  train_wordpiece(str(folder / 'text.txt'), VOCAB, folder / 'tokenizer')
  bundle = Bundle(encoder, init_encoder(encoder, jax.random.key(0)), read_tokenizer(open_folder(folder / 'tokenizer')))
  save_pretrained(bundle, folder / 'model')
  for name, part in (('train', lines[:rows]), ('dev', lines[rows:])):
    table = ''.join(f'{line}\t{"yes" if "cold" in line else "no"}\n' for line in part)
    (folder / f'{name}.tsv').write_text(f'text\tlabel\n{table}')
  return folder
