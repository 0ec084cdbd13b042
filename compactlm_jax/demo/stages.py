"""The demo's stages: text, distillation, fine-tuning. A stage that is finished is not repeated."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from typing import Any

import numpy as np
from etils import epath

from compactlm_jax.config import DataConfig, DistillConfig, EncoderConfig, OptimizerConfig, RunConfig, to_json
from compactlm_jax.data.prepare import prepare
from compactlm_jax.errors import ConfigError
from compactlm_jax.interop.bundle import Bundle
from compactlm_jax.jobs import run_train
from compactlm_jax.train.rundir import read_run

SEQ_LEN = 32
HELD_OUT = 3000
TUNED = 2000
SEEDS = (0, 1, 2)
STUDENT_LAYERS = (2, 4, 6)


@dataclasses.dataclass(frozen=True)
class Text:
  """Prepared data.

  Attributes:
    rows: sentences for distillation, one a row.
    held_out: rows of sentences that no training sees.
    train, dev: tables for fine-tuning; dev holds the sentences of `held_out`.
  """

  rows: str
  held_out: str
  train: str
  dev: str


def prepare_text(
  sentences: list[tuple[str, float]],
  teacher: epath.Path,
  folder: epath.Path,
  *,
  held_out: int = HELD_OUT,
  tuned: int = TUNED,
) -> Text:
  """Holds sentences out, writes the tables for fine-tuning and the rows for distillation.

  Args:
    sentences: from `assets.read_sentences`.
    teacher: folder of the model whose tokenizer makes the rows.
    folder: where to.
    held_out: sentences that no training sees.
    tuned: sentences for fine-tuning.
  """
  order = [int(i) for i in np.random.default_rng(0).permutation(len(sentences))]
  rated = [i for i in order if sentences[i][1] != 0]
  dev, train = rated[:held_out], rated[held_out : held_out + tuned]
  hidden = set(dev)
  rest = [i for i in order if i not in hidden]
  folder.mkdir(parents=True, exist_ok=True)
  for name, chosen in (('rows', rest), ('held_out', dev)):
    text = folder / f'{name}.txt'
    text.write_text('\n'.join(sentences[i][0] for i in chosen) + '\n')
    prepare(str(text), str(teacher), folder / name, SEQ_LEN, 'sentences')
  for name, chosen in (('train', train), ('dev', dev)):
    lines = [f'{"positive" if sentences[i][1] > 0 else "negative"}\t{sentences[i][0]}' for i in chosen]
    (folder / f'{name}.tsv').write_text('\n'.join(['label\ttext', *lines]) + '\n')
  return Text(*(str(folder / name) for name in ('rows', 'held_out', 'train.tsv', 'dev.tsv')))


def student_of(teacher: EncoderConfig) -> EncoderConfig:
  """Half the teacher's layers, same width; without dropout, which only slows such a short run down."""
  return dataclasses.replace(
    teacher, num_layers=len(STUDENT_LAYERS), pooler=False, scan_unroll=0, hidden_dropout=0.0, attention_dropout=0.0
  )


def distill_config(teacher: Bundle, folder: epath.Path, text: Text, steps: int) -> RunConfig:
  """MiniLM v1, one sentence a row; the student starts from three of the teacher's layers."""
  return RunConfig(
    task='distill',
    steps=steps,
    batch_size=32,
    checkpoint_every=200,
    teacher=str(folder),
    encoder=student_of(teacher.config),
    data=DataConfig(path=text.rows, eval_path=text.held_out),
    optimizer=OptimizerConfig(learning_rate=1e-3, warmup_fraction=0.1),
    distill=DistillConfig(student_init='teacher_layers', init_layers=STUDENT_LAYERS),
  )


def finetune_config(model: epath.Path, text: Text, seed: int) -> RunConfig:
  """Positive or negative? The same recipe for every model."""
  return RunConfig(
    task='finetune',
    seed=seed,
    epochs=1.0,
    batch_size=16,
    log_every=5,
    model=str(model),
    data=DataConfig(train=text.train, dev=text.dev, seq_len=32),
    optimizer=OptimizerConfig(learning_rate=1e-4, warmup_fraction=0.1),
  )


def finished(config: RunConfig, workdir: epath.Path) -> dict[str, Any]:
  """Results of the run in `workdir`, which is started or resumed unless it is complete."""
  try:
    same = to_json(read_run(workdir)[0]) == to_json(config)
  except ConfigError:
    same = False
  if not same and workdir.exists():
    workdir.rmtree()  # another version of the demo made it
  done = workdir / 'results.json'
  return json.loads(done.read_text()) if done.exists() else run_train(config, str(workdir))


def accuracies(model: epath.Path, text: Text, runs: epath.Path, seeds: tuple[int, ...]) -> list[float]:
  """Held-out accuracy in percent after fine-tuning with each seed; runs of other weights are not reused."""
  weights = hashlib.sha256((model / 'model.safetensors').read_bytes()).hexdigest()[:8]
  scores = []
  for seed in seeds:
    results = finished(finetune_config(model, text, seed), runs / f'{model.name}-{weights}-seed{seed}')
    scores.append(100 * results['metrics']['accuracy'])
  return scores
