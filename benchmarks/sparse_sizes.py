"""Size on disk of sparse exports (`compactlm export --format=sparse`) against dense ones, by density and stored values.

The layers of an encoder are pruned to each density by magnitude, matrix by matrix; biases, LayerNorms and embeddings
stay whole. 'layers' is what pruning can shrink, 'file' has the embeddings too. What was written is read back and
compared: float32 values must be the same.

Usage: python benchmarks/sparse_sizes.py [--model=FOLDER] [--densities=.5,.1,.03] [--values=float32,bfloat16,int8]
Without FOLDER a BERT-base of random weights (109 M parameters; a few minutes and 2 GB of memory).
"""

from __future__ import annotations

import argparse
import os
import tempfile

os.environ.setdefault('JAX_PLATFORMS', 'cpu')

import jax
import numpy as np

from compactlm_jax import Bundle, EncoderConfig, from_pretrained
from compactlm_jax.compress.structure import maskable
from compactlm_jax.interop.sparse import SizeReport, save_sparse
from compactlm_jax.nn.encoder import init_encoder
from compactlm_jax.tree import named_leaves, nested, overlaid


def pruned(bundle: Bundle, density: float) -> Bundle:
  """The bundle with the largest weights of each matrix of its layers."""
  leaves, out = named_leaves(bundle.params), {}
  for name in maskable(bundle.config):
    kernel = np.array(leaves[name])
    for matrix in kernel.reshape(len(kernel), -1):
      smallest = np.argpartition(np.abs(matrix), -int(density * matrix.size))[: -int(density * matrix.size)]
      matrix[smallest] = 0
    out[name] = kernel
  return Bundle(bundle.config, overlaid(bundle.params, nested(out)), bundle.tokenizer)


def measured(bundle: Bundle, values: str) -> SizeReport:
  """Sizes of an export; exact values are checked."""
  with tempfile.TemporaryDirectory() as folder:
    report = save_sparse(bundle, f'{folder}/sparse', values)
    if values == 'float32':
      read = named_leaves(from_pretrained(f'{folder}/sparse').params)
      for name, leaf in named_leaves(bundle.params).items():
        np.testing.assert_array_equal(read[name], leaf, err_msg=name)
  return report


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument('--model', default='')
  parser.add_argument('--densities', default='.5,.1,.03')
  parser.add_argument('--values', default='float32,bfloat16,int8')
  args = parser.parse_args()
  if args.model:
    dense = from_pretrained(args.model)
  else:
    config = EncoderConfig()
    dense = Bundle(config, jax.device_get(init_encoder(config, jax.random.key(0))), None)
  print('| remaining | values | layers, MB | of dense | file, MB | of dense |\n|---:|---|---:|---:|---:|---:|')
  for density in map(float, args.densities.split(',')):
    bundle = pruned(dense, density)
    for values in args.values.split(','):
      found = measured(bundle, values)
      layers = f'{found.layers.bytes / 1e6:.1f} | {found.layers.bytes / found.layers.dense_bytes:.2%}'
      whole = f'{found.bytes / 1e6:.1f} | {found.bytes / found.dense_bytes:.2%}'
      print(f'| {density:.0%} | {values} | {layers} | {whole} |', flush=True)


if __name__ == '__main__':
  main()
