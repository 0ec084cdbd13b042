"""Causal language models on WikiText-2: a Transformer against mixed attention, at equal parameters and steps.

Both models of configs/wikitext.py (wt2-transformer, wt2-mixed: 1.88 million parameters) train from the same rows in the
same order, with the learning rate whose run of seed 0 ends with the lowest training loss, once per seed. Printed are
perplexities of the validation text, per word and per token; per word means the nats of all predicted tokens, special
ones included, over the whitespace-separated words. This is far from convergence: 1,200 steps of 1,024 tokens are two
fifths of the text.

Usage: python benchmarks/wikitext2.py --data=DIR --workdir=RUNS [--seeds=3] [--steps=1200] [--rates=1e-3,2e-3,4e-3]
DIR holds train.txt.gz and valid.txt.gz (or .txt) of WikiText-2 raw. Runs that are over are not run again; the results
are also written to RUNS/wikitext2.json. Ten runs of about 90 seconds on two idle cores.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import pathlib
import statistics
from typing import Any

import learning

from compactlm_jax.config import RunConfig
from compactlm_jax.cpu import keep_memory

MODELS = {'transformer': 'wt2-transformer', 'mixed attention': 'wt2-mixed'}


def configs(args: argparse.Namespace, workdir: pathlib.Path) -> dict[str, RunConfig]:
  """Both runs, on the user's text."""
  models = {name: learning.published('wikitext.py', variant) for name, variant in MODELS.items()}
  first = models['transformer']
  train, valid = learning.text_file(args.data, 'train'), learning.text_file(args.data, 'valid')
  tokenizer = learning.tokenizer_for(train, workdir / 'tokenizer', first.encoder.vocab_size, lowercase=False)
  seq_len = first.data.seq_len
  data = dataclasses.replace(
    first.data,
    path=learning.rows(train, tokenizer, workdir / 'rows', seq_len),
    eval_path=learning.rows(valid, tokenizer, workdir / 'held_out', seq_len),
  )
  return {
    name: dataclasses.replace(
      config,
      data=data,
      steps=args.steps,
      checkpoint_every=args.steps,
      encoder=dataclasses.replace(config.encoder, vocab_size=tokenizer.vocab_size),
    )
    for name, config in models.items()
  }


def measure(name: str, config: RunConfig, args: argparse.Namespace, workdir: pathlib.Path) -> dict[str, Any]:
  """What one model reached, by seed."""
  folder = workdir / name.replace(' ', '-')
  rate, tried = learning.choose_rate(config, learning.rates_of(args.rates), folder)
  config = learning.with_rate(config, rate)
  runs = []
  for seed in range(args.seeds):
    each = dataclasses.replace(config, seed=seed)
    results, _ = learning.run(each, learning.folder_of(each, folder))
    runs.append({'seed': seed, 'seconds': results['seconds'], **results['metrics']})
    print(f'{name}, seed {seed}: {results["metrics"]}, {results["seconds"]:.0f} s', flush=True)
  count = learning.parameters(config)
  return {'parameters': count, 'learning_rate': rate, 'training_loss_by_rate': tried, 'runs': runs}


def spread(values: list[float]) -> str:
  """mean ± sample deviation (lowest to highest)."""
  deviation = f' ± {statistics.stdev(values):.1f}' if len(values) > 1 else ''
  return f'{statistics.mean(values):.1f}{deviation} ({min(values):.1f} to {max(values):.1f})'


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument('--data', required=True)
  parser.add_argument('--workdir', required=True)
  parser.add_argument('--seeds', type=int, default=3)
  parser.add_argument('--steps', type=int, default=1200)
  parser.add_argument('--rates', default='1e-3,2e-3,4e-3')
  args = parser.parse_args()
  keep_memory()
  workdir = pathlib.Path(args.workdir)
  found = {name: measure(name, config, args, workdir) for name, config in configs(args, workdir).items()}
  print(f'\nWikiText-2 validation, {args.steps} steps, {args.seeds} seeds: mean ± deviation (lowest to highest)\n')
  print(
    '| model | parameters | learning rate | perplexity per word | perplexity per token |\n|---|---:|---:|---:|---:|'
  )
  for name, model in found.items():
    words, tokens = (spread([r[f'perplexity_{unit}'] for r in model['runs']]) for unit in ('word', 'token'))
    print(f'| {name} | {model["parameters"]:,} | {model["learning_rate"]:g} | {words} | {tokens} |')
  pairs = zip(*(model['runs'] for model in found.values()))
  differences = [b['perplexity_word'] - a['perplexity_word'] for a, b in pairs]
  print(f'\nmixed attention minus transformer, per word and seed: {", ".join(f"{d:+.1f}" for d in differences)}')
  (workdir / 'wikitext2.json').write_text(json.dumps({'steps': args.steps, 'models': found}, indent=2) + '\n')


if __name__ == '__main__':
  main()
