"""`compactlm demo`: fetch, prepare, distil, measure, export."""

from __future__ import annotations

import dataclasses
import json
import logging
import time

import jax
from etils import epath

from compactlm_jax.config import RunConfig
from compactlm_jax.demo import assets, measure, stages
from compactlm_jax.interop.bundle import Bundle, from_pretrained, save_pretrained
from compactlm_jax.jobs import load_model, run_export
from compactlm_jax.tasks.distill import make_distill_task

log = logging.getLogger(__name__)

STEPS = 600


@dataclasses.dataclass(frozen=True)
class Row:
  """One line of the demo's table.

  Attributes:
    name: the model.
    parameters: of the encoder.
    kl: relation KL on held-out text, nats.
    accuracy, spread: percent, mean and standard deviation over the fine-tuning seeds.
    latency: milliseconds per sentence.
    megabytes: of model.safetensors.
  """

  name: str
  parameters: int
  kl: float
  accuracy: float
  spread: float
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
  run_export(str(root / 'runs' / 'distill'), str(models / 'student'))
  save_pretrained(undistilled(teacher, config), models / 'undistilled')

  log.info('3/4 fine-tuning teacher and students with %d seeds each', len(stages.SEEDS))
  folders = {
    'teacher': teacher_folder,
    'undistilled student': models / 'undistilled',
    'distilled student': models / 'student',
  }
  scores = {name: stages.accuracy(folder, text, root / 'runs') for name, folder in folders.items()}

  log.info('4/4 measuring')
  some = [sentence for sentence, _ in sentences[:40]]
  rows = [row(name, folder, teacher, scores[name], text.held_out, some) for name, folder in folders.items()]
  (root / 'table.json').write_text(json.dumps([dataclasses.asdict(r) for r in rows], indent=2) + '\n')
  return f'{table(rows)}\n\n{next_steps(root, time.monotonic() - started)}'


def undistilled(teacher: Bundle, config: RunConfig) -> Bundle:
  """The student as it was before the first step."""
  task = make_distill_task(config.encoder, teacher.config, teacher.params, config.distill)
  return Bundle(config.encoder, task.init(jax.random.key(config.seed)), teacher.tokenizer)


def row(
  name: str, folder: epath.Path, teacher: Bundle, score: tuple[float, float], held_out: str, sentences: list[str]
) -> Row:
  """Measures one model."""
  model = load_model(folder)
  return Row(
    name,
    measure.parameters(model),
    measure.relation_kl(model, teacher, held_out),
    *score,
    measure.latency(model, folder, sentences),
    measure.file_bytes(folder) / 1e6,
  )


def table(rows: list[Row]) -> str:
  """The measured table, as Markdown that is also readable on a terminal."""
  lines = [
    '| model               | parameters | relation KL | accuracy (3 seeds) | ms / sentence | file     |',
    '|---------------------|-----------:|------------:|-------------------:|--------------:|---------:|',
  ]
  for r in rows:
    score = f'{r.accuracy:.1f} ± {r.spread:.1f} %'
    lines.append(
      f'| {r.name:<19} | {r.parameters / 1e6:>8.1f} M | {r.kl:>11.3f} | {score:>18} | {r.latency:>13.2f} '
      f'| {r.megabytes:>5.1f} MB |'
    )
  return '\n'.join(lines)


def next_steps(root: epath.Path, seconds: float) -> str:
  """What can be typed next."""
  student = root / 'models' / 'student'
  return f"""Relation KL (nats per head and token, lower is better) and accuracy are on sentences that no training saw.
Took {seconds:.0f} s. The distilled student is a Hugging Face folder: {student}

Next:
  python -c "from transformers import AutoModel; print(AutoModel.from_pretrained('{student}'))"   # with PyTorch
  python -c "import compactlm_jax as clm; print(clm.from_pretrained('{student}').config)"
  compactlm train --config=configs/finetune.py:table --workdir=runs/mine --config.model={student} \\
    --config.data.train={root}/text/train.tsv --config.data.dev={root}/text/dev.tsv"""
