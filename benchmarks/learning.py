"""What the scripts that show learning curves share: rows from raw text, runs that are kept, the choice of a rate."""

from __future__ import annotations

import dataclasses
import math
import pathlib
import runpy
from typing import Any

import jax

from compactlm_jax.config import RunConfig, from_config_dict
from compactlm_jax.data.prepare import prepare
from compactlm_jax.data.tokenizer import Tokenizer, load_tokenizer
from compactlm_jax.data.wordpiece import train_wordpiece
from compactlm_jax.jobs import build_job, run_train
from compactlm_jax.metrics import read_metrics

ROOT = pathlib.Path(__file__).parents[1]


def published(file: str, variant: str) -> RunConfig:
  """A configuration of configs/."""
  return from_config_dict(RunConfig, runpy.run_path(str(ROOT / 'configs' / file))['get_config'](variant))


def text_file(data: str, split: str) -> str:
  """DATA/SPLIT.txt or DATA/SPLIT.txt.gz."""
  for path in (pathlib.Path(data) / f'{split}.txt.gz', pathlib.Path(data) / f'{split}.txt'):
    if path.exists():
      return str(path)
  raise SystemExit(f'{data}: neither {split}.txt nor {split}.txt.gz is there')


def tokenizer_for(text: str, folder: pathlib.Path, vocab_size: int, *, lowercase: bool) -> Tokenizer:
  """A WordPiece vocabulary of the text, trained once."""
  if (folder / 'tokenizer.json').exists():
    return load_tokenizer(folder)
  return train_wordpiece(text, vocab_size, folder, lowercase, overwrite=True)


def rows(text: str, tokenizer: Tokenizer, folder: pathlib.Path, seq_len: int, holdout_rows: int = 0) -> str:
  """Packed rows of the text; a folder that holds them already is reused."""
  prepare(text, tokenizer, folder, seq_len, holdout_rows=holdout_rows)
  return str(folder)


def parameters(config: RunConfig) -> int:
  """Trained parameters of a run."""
  shapes = jax.eval_shape(build_job(config).task.init, jax.random.key(0))
  return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(shapes))


def run(config: RunConfig, workdir: pathlib.Path) -> tuple[dict[str, Any], list[dict[str, Any]]]:
  """(results, lines of metrics.jsonl) of a run; one that is over is not run again, one that was cut off continues."""
  results = run_train(config, str(workdir))
  jax.clear_caches()
  return results, read_metrics(workdir)


def with_rate(config: RunConfig, rate: float) -> RunConfig:
  """The same run with another learning rate."""
  return dataclasses.replace(config, optimizer=dataclasses.replace(config.optimizer, learning_rate=rate))


def folder_of(config: RunConfig, folder: pathlib.Path) -> pathlib.Path:
  """Where a run is kept, by what differs between the runs of a script."""
  return folder / f'{config.steps}-steps-rate-{config.optimizer.learning_rate:g}-seed-{config.seed}'


def choose_rate(config: RunConfig, rates: tuple[float, ...], folder: pathlib.Path) -> tuple[float, dict[str, float]]:
  """The learning rate whose whole run ends with the lowest training loss; no held-out row is looked at.

  Short runs would choose wrongly: a rate that is too high for the first steps may be the best for all of them.

  Args:
    config: the run.
    rates: rates to try; one is taken as it is.
    folder: where the runs are kept.

  Returns:
    (the rate, mean training loss over the last quarter of each run).
  """
  if len(rates) == 1:
    return rates[0], {}
  losses = {}
  for rate in rates:
    each = with_rate(config, rate)
    _, lines = run(each, folder_of(each, folder))
    late = [line['loss'] for line in lines if 'loss' in line and line['step'] > 0.75 * config.steps]
    mean = sum(late) / len(late)
    losses[rate] = mean if math.isfinite(mean) else math.inf
    print(f'{folder.name}, rate {rate:g}: training loss {losses[rate]:.4f}', flush=True)
  best = min(losses, key=lambda rate: losses[rate])
  return best, {f'{rate:g}': round(loss, 4) for rate, loss in losses.items()}


def rates_of(text: str) -> tuple[float, ...]:
  """The numbers of a comma-separated flag."""
  return tuple(float(rate) for rate in text.split(','))
