"""Replaced-token detection learns: a tiny ELECTRA and a tiny ConvBERT of equal parameters and steps, as curves.

Both pre-train from the same rows in the same order (lower-case WikiText-2 raw, word pieces trained on it), with a
generator half as wide, lambda 50, Adam with bias correction (the originals have a long warm-up instead), and, of
--rates, the learning rate whose run ends with the lowest training loss. Drawn are training losses (pale, averaged over
ten lines) and the measures of held-out rows. One seed each: this shows that both learn, not which is better.

Usage: python benchmarks/electra_curves.py --data=DIR --workdir=RUNS [--steps=7200] [--rates=1e-3]
DIR holds train.txt.gz (or .txt). Runs that are over are not run again. Writes RUNS/electra_curves.png and .json. A run
of 7,200 steps takes about 8 minutes on two idle cores. Needs matplotlib: pip install 'compactlm-jax[plots]'
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import pathlib
from typing import Any

import learning
import matplotlib

matplotlib.use('Agg')
from matplotlib import pyplot as plt

from compactlm_jax.config import DataConfig, ElectraConfig, EncoderConfig, OptimizerConfig, RunConfig
from compactlm_jax.cpu import keep_memory

SIZES = {'hidden_size': 128, 'num_layers': 3, 'embedding_size': 128, 'max_positions': 128}
# Dropout would only slow down runs that see each row less than twice. 536 neurons make up for the smaller attention.
STILL = {'hidden_dropout': 0.0, 'attention_dropout': 0.0}
COLORS = {'ELECTRA': '#1f6feb', 'ConvBERT': '#d1571b'}
PANELS = (
  ('rtd_loss', 'RTD loss (nats per token)'),
  ('mlm_loss', 'MLM loss (nats per masked token)'),
  ('mlm_accuracy', 'MLM accuracy'),
  ('recall_replaced', '"replaced": recall (solid), precision (dashed)'),
)


def encoders(vocab_size: int) -> dict[str, EncoderConfig]:
  """The two discriminators; their numbers of parameters differ by less than 1 %."""
  sizes: dict[str, Any] = {**SIZES, **STILL, 'vocab_size': vocab_size}
  return {
    'ELECTRA': EncoderConfig(architecture='electra', num_heads=4, intermediate_size=512, **sizes),
    'ConvBERT': EncoderConfig.mixed(heads=4, head_ratio=2, intermediate_size=536, **sizes),
  }


def configs(args: argparse.Namespace, workdir: pathlib.Path) -> dict[str, RunConfig]:
  """Both runs, on the user's text."""
  text = learning.text_file(args.data, 'train')
  tokenizer = learning.tokenizer_for(text, workdir / 'tokenizer', 8192, lowercase=True)
  path = learning.rows(text, tokenizer, workdir / 'rows', args.seq_len, holdout_rows=256 * 128 // args.seq_len)
  return {
    name: RunConfig(
      task='electra',
      steps=args.steps,
      batch_size=1024
      // args.seq_len,  # many small steps: the discriminator takes hundreds to leave the rate of replaced tokens behind
      encoder=encoder,
      data=DataConfig(path=path, seq_len=args.seq_len),
      electra=ElectraConfig(generator_size=0.5),
      optimizer=OptimizerConfig(warmup_fraction=0.1),
      checkpoint_every=args.steps,
      eval_every=max(20, args.steps // 20),
    )
    for name, encoder in encoders(tokenizer.vocab_size).items()
  }


def curve(lines: list[dict[str, Any]], name: str) -> tuple[list[int], list[float]]:
  """(steps, values) of a metric."""
  found = [(line['step'], line[name]) for line in lines if name in line]
  return [step for step, _ in found], [value for _, value in found]


def guessing(lines: list[dict[str, Any]]) -> tuple[list[int], list[float]]:
  """(steps, entropy of the held-out fraction of replaced tokens, in nats)."""
  steps, fractions = curve(lines, 'eval_replaced_fraction')
  return steps, [-p * math.log(p) - (1 - p) * math.log(1 - p) for p in fractions]


def smooth(values: list[float], width: int = 10) -> list[float]:
  """Means of each value and up to `width` - 1 before it."""
  return [sum(part) / len(part) for part in (values[max(0, i + 1 - width) : i + 1] for i in range(len(values)))]


def draw(models: dict[str, list[dict[str, Any]]], titles: dict[str, str], path: pathlib.Path) -> None:
  """One panel per measure, one colour per model."""
  figure, axes = plt.subplots(2, 2, figsize=(11, 7.5), layout='constrained')
  for axis, (name, title) in zip(axes.flat, PANELS):
    for model, lines in models.items():
      color = COLORS[model]
      steps, values = curve(lines, f'eval_{name}')
      axis.plot(steps, values, color=color, linewidth=2, label=titles[model])
      if name == 'recall_replaced':
        axis.plot(*curve(lines, 'eval_precision_replaced'), color=color, linewidth=2, linestyle='--')
        continue
      if name == 'rtd_loss':  # of a discriminator that knows how many tokens were replaced, and not which
        axis.plot(*guessing(lines), color=color, linewidth=1.5, linestyle=':')
      steps, values = curve(lines, name)
      axis.plot(steps, smooth(values), color=color, linewidth=1, alpha=0.35)
    axis.set_title(title)
    axis.set_xlabel('step')
    axis.grid(alpha=0.3)
    if name.endswith('loss'):  # the first steps are off the scale
      held = [value for lines in models.values() for value in curve(lines, f'eval_{name}')[1]]
      low, high = min(held), max(held)
      axis.set_ylim(low - 0.1 * (high - low), high + 0.2 * (high - low))
    if name == 'rtd_loss':
      axis.legend()
  figure.suptitle(
    'Replaced-token detection on WikiText-2, held-out rows (pale: training; dotted: guessing by the replaced share)'
  )
  figure.savefig(path, dpi=110)
  plt.close(figure)


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument('--data', required=True)
  parser.add_argument('--workdir', required=True)
  parser.add_argument('--steps', type=int, default=7200)
  parser.add_argument('--seq_len', type=int, default=128)
  parser.add_argument('--rates', default='1e-3')
  args = parser.parse_args()
  keep_memory()
  workdir = pathlib.Path(args.workdir)
  report: dict[str, Any] = {'steps': args.steps, 'models': {}}
  curves, titles = {}, {}
  for name, config in configs(args, workdir).items():
    folder = workdir / name.lower()
    rate, tried = learning.choose_rate(config, learning.rates_of(args.rates), folder)
    config = learning.with_rate(config, rate)
    results, lines = learning.run(config, learning.folder_of(config, folder))
    final = {f'eval_{key}': value for key, value in results['metrics'].items()}
    curves[name] = [*lines, {'step': args.steps, **final}]
    count = learning.parameters(config)
    titles[name] = f'{name}, {count / 1e6:.2f} M parameters, rate {rate:g}'
    report['models'][name] = {
      'parameters': count,
      'learning_rate': rate,
      'training_loss_by_rate': tried,
      'encoder': dataclasses.asdict(config.encoder),
      **results,
      'curves': curves[name],
    }
    shown = {key: round(value, 4) for key, value in results['metrics'].items()}
    print(f'{titles[name]}, {results["seconds"]:.0f} s: {json.dumps(shown)}', flush=True)
  draw(curves, titles, workdir / 'electra_curves.png')
  (workdir / 'electra_curves.json').write_text(json.dumps(report, indent=1) + '\n')
  print(f'{workdir / "electra_curves.png"}, {workdir / "electra_curves.json"}')


if __name__ == '__main__':
  main()
