"""GLUE from official files to scores: which rows are trained on, which metrics a run reports."""

import dataclasses

import jax
import numpy as np
import pytest
from tiny import STILL, tiny_config

from compactlm_jax.config import DataConfig, FinetuneConfig
from compactlm_jax.data.glue_tasks import glue_task
from compactlm_jax.data.wordpiece import train_wordpiece
from compactlm_jax.errors import ConfigError, DataError
from compactlm_jax.interop.bundle import Bundle, save_pretrained
from compactlm_jax.interop.folder import open_folder
from compactlm_jax.interop.tokenizer_files import read_tokenizer
from compactlm_jax.jobs import build_job
from compactlm_jax.nn.encoder import init_encoder

V = 120
MODEL = dataclasses.replace(STILL, vocab_size=V, num_layers=1, initializer_range=0.2)
WORDS = 'the small large river house tree runs stands falls under over near cold warm light blue'.split()


def save(folder, name, columns, rows):
  folder.mkdir(parents=True, exist_ok=True)
  (folder / f'{name}.tsv').write_text(''.join('\t'.join(row) + '\n' for row in [columns, *rows]))


@pytest.fixture(scope='module')
def files(tmp_path_factory):
  """model/ and MNLI, STS-B and RTE in the official layout: 24 training rows, 10 and (mismatched) 7 dev rows."""
  root = tmp_path_factory.mktemp('glue')
  (root / 'text.txt').write_text('\n'.join(' '.join(WORDS[i:] + WORDS[:i]) for i in range(16)))
  train_wordpiece(str(root / 'text.txt'), V, root / 'tokenizer')
  params = init_encoder(MODEL, jax.random.key(0))
  save_pretrained(Bundle(MODEL, params, read_tokenizer(open_folder(root / 'tokenizer'))), root / 'model')
  rng = np.random.default_rng(0)
  counts = {'train': 24, 'dev': 10, 'dev_matched': 10, 'dev_mismatched': 7}
  for name in ('mnli', 'stsb', 'rte'):
    task = glue_task(name)
    for split in (task.splits[0], *task.dev_splits):
      rows = []
      for i in range(counts[split.file]):
        pair = [' '.join(rng.choice(WORDS, 4)) for _ in range(2)]
        rows.append(
          [str(i), *pair, task.written[i % len(task.written)] if task.written else f'{rng.uniform(0, 5):.3f}']
        )
      save(root / 'GLUE' / task.folder, split.file, ['index', *task.texts, task.label], rows)
  return root


def config(files, benchmark, seq_len=16, **finetune):
  data = DataConfig(path=str(files / 'GLUE'), seq_len=seq_len)
  options = FinetuneConfig(benchmark=benchmark, **finetune)
  return tiny_config('finetune', model=str(files / 'model'), data=data, finetune=options, encoder=MODEL, steps=3)


def test_mnli_is_evaluated_on_both_development_sets(files):
  """Mutation: no prefix, so that one hides the other."""
  evals = build_job(config(files, 'mnli')).evals
  assert [(e.prefix, sum(int(b.weights.sum()) for b in e.batches())) for e in evals] == [('', 10), ('mismatched_', 7)]
  labels = np.asarray(next(iter(evals[1].batches())).labels)[:7]
  assert labels.tolist() == [0, 1, 2, 0, 1, 2, 0]
  assert evals[1].score({'outputs': np.eye(3)[labels * 0], 'labels': labels}) == {'accuracy': pytest.approx(3 / 7)}


def test_sts_b_in_the_way_of_electra(files):
  """Both orders are trained on, the development set has one. Mutation: swap it too."""
  plain, job = (build_job(config(files, 'stsb', swap_pairs=swap, score_scale=5.0)) for swap in (False, True))
  (held,) = job.evals
  assert len(plain.batches.source) == 24 and len(job.batches.source) == 48
  rows = next(iter(held.batches()))
  gold = [float(row.split('\t')[-1]) for row in (files / 'GLUE/STS-B/dev.tsv').read_text().splitlines()[1:]]
  np.testing.assert_allclose(np.asarray(rows.labels)[:10], gold, rtol=1e-6)
  assert rows.weights.sum() == 10
  scores = held.score({'outputs': np.array(gold)[:, None] * 2 + 1, 'labels': np.array(gold)})
  assert scores == {'pearson': pytest.approx(1), 'spearman': pytest.approx(1)}


def test_bad_input_is_named(files):
  with pytest.raises(DataError, match=r'no CoLA/dev.tsv \(or .tsv.gz\) there'):
    build_job(config(files, 'cola'))
  with pytest.raises(ConfigError, match="'RTEE' is unknown; did you mean rte"):
    config(files, 'RTEE')
