"""`compactlm demo`: fetch, prepare, distil, measure, export."""

from __future__ import annotations

import dataclasses
import json
import logging
import pathlib
import statistics
import sys
import time

import jax
from etils import epath

from compactlm_jax.config import EncoderConfig, RunConfig
from compactlm_jax.demo import assets, measure, stages
from compactlm_jax.interop.bundle import Bundle, from_pretrained, save_pretrained
from compactlm_jax.jobs import load_model
from compactlm_jax.tasks.distill import make_distill_task

log = logging.getLogger(__name__)

STEPS = 800


@dataclasses.dataclass(frozen=True)
class Row:
  """One line of the demo's table.

  Attributes:
    name: the model.
    parameters: of the encoder.
    kl: relation KL on held-out text, nats.
    accuracy: mean over the fine-tuning seeds, percent.
    spread: highest minus lowest accuracy over the seeds.
    seeds: number of fine-tuning seeds.
    latency: milliseconds per sentence.
    megabytes: of model.safetensors.
  """

  name: str
  parameters: int
  kl: float
  accuracy: float
  spread: float
  seeds: int
  latency: float
  megabytes: float


def run_demo(workdir: str, steps: int = STEPS) -> str:
  """Runs all stages, reusing those that are finished.

  Args:
    workdir: where assets, data, runs and models are kept.
    steps: of distillation.

  Returns:
    The table and what to do next.
  """
  started, root = time.monotonic(), epath.Path(workdir)
  if jax.device_count() == 1 or jax.default_backend() != 'cpu':  # docs/reliability.md tells why
    jax.config.update('jax_compilation_cache_dir', str(root / 'compiled'))
  models = root / 'models'
  teacher_folder = assets.unpack_teacher(assets.fetch(assets.TEACHER, root / 'assets'), models / 'teacher')
  sentences = assets.read_sentences(assets.fetch(assets.SENTENCES, root / 'assets'))
  teacher = from_pretrained(teacher_folder)
  log.info('1/4 preparing %s sentences', f'{len(sentences):,}')
  text = stages.prepare_text(sentences, teacher_folder, root / 'text')

  log.info('2/4 distilling a %d-layer student for %d steps', len(stages.STUDENT_LAYERS), steps)
  config = stages.distill_config(teacher, teacher_folder, text, steps)
  stages.finished(config, root / 'runs' / 'distill')
  for name, model in (
    ('student', load_model(root / 'runs' / 'distill')),
    ('undistilled', undistilled(teacher, config)),
  ):
    save_pretrained(with_dropout(model, teacher.config), models / name)

  log.info('3/4 fine-tuning: the students with %d seeds each, the teacher with one', len(stages.SEEDS))
  folders = {
    'teacher': teacher_folder,
    'undistilled student': models / 'undistilled',
    'distilled student': models / 'student',
  }
  scores = {
    name: stages.accuracies(folder, text, root / 'runs', stages.SEEDS[:1] if name == 'teacher' else stages.SEEDS)
    for name, folder in folders.items()
  }

  log.info('4/4 measuring')
  some = [sentence for sentence, _ in sentences[:40]]
  rows = [row(name, folder, teacher, scores[name], text.held_out, some) for name, folder in folders.items()]
  (root / 'table.json').write_text(json.dumps([dataclasses.asdict(r) for r in rows], indent=2) + '\n')
  return f'{table(rows)}\n\n{next_steps(root, time.monotonic() - started)}'


def undistilled(teacher: Bundle, config: RunConfig) -> Bundle:
  """The student as it was before the first step."""
  task = make_distill_task(config.encoder, teacher.config, teacher.params, config.distill)
  return Bundle(config.encoder, task.init(jax.random.key(config.seed)), teacher.tokenizer)


def with_dropout(model: Bundle, like: EncoderConfig) -> Bundle:
  """The model with the teacher's dropout rates in its configuration, for whoever fine-tunes it."""
  config = dataclasses.replace(
    model.config, hidden_dropout=like.hidden_dropout, attention_dropout=like.attention_dropout
  )
  return dataclasses.replace(model, config=config)


def row(
  name: str, folder: epath.Path, teacher: Bundle, scores: list[float], held_out: str, sentences: list[str]
) -> Row:
  """Measures one model."""
  model = load_model(folder)
  return Row(
    name,
    measure.parameters(model),
    measure.relation_kl(model, teacher, held_out),
    statistics.mean(scores),
    max(scores) - min(scores),
    len(scores),
    measure.latency(model, folder, sentences),
    measure.file_bytes(folder) / 1e6,
  )


def table(rows: list[Row]) -> str:
  """The measured table, as Markdown that is also readable on a terminal."""
  lines = [
    '| model               | parameters | relation KL | accuracy (seeds, spread) | ms / sentence | file     |',
    '|---------------------|-----------:|------------:|-------------------------:|--------------:|---------:|',
  ]
  for r in rows:
    score = f'{r.accuracy:.1f} % ({r.seeds}, {r.spread:.1f})' if r.seeds > 1 else f'{r.accuracy:.1f} % (1)     '
    lines.append(
      f'| {r.name:<19} | {r.parameters / 1e6:>8.1f} M | {r.kl:>11.3f} | {score:>24} | {r.latency:>13.2f} '
      f'| {r.megabytes:>5.1f} MB |'
    )
  return '\n'.join(lines)


def next_steps(root: epath.Path, seconds: float) -> str:
  """What can be typed next."""
  student, binaries = root / 'models' / 'student', pathlib.Path(sys.executable).parent
  if binaries.is_relative_to(pathlib.Path.cwd()):
    binaries = binaries.relative_to(pathlib.Path.cwd())
  return f"""Relation KL (nats per head and token, lower is better) and accuracy are on sentences that no training saw;
spread is the highest minus the lowest accuracy over the seeds of fine-tuning.
Took {seconds:.0f} s. The distilled student is a Hugging Face folder: {student}

Next:
  python -c "from transformers import AutoModel; print(AutoModel.from_pretrained('{student}'))"   # where PyTorch is
  {binaries}/python -c "import compactlm_jax as clm; print(clm.from_pretrained('{student}').config)"
  {binaries}/compactlm train --config=configs/finetune.py:table --workdir=runs/mine --config.model={student} \\
    --config.data.train={root}/text/train.tsv --config.data.dev={root}/text/dev.tsv"""
