"""Reports as text: every number of NumPy's, published rows as their sources have them, nothing torn by odd names."""

import csv
import io
import json

import numpy as np
import pytest
from finished_runs import finished, series

from compactlm_jax.config import FinetuneConfig
from compactlm_jax.config.finetune import GLUE, SQUAD
from compactlm_jax.report import as_csv, as_json, as_markdown, collect
from compactlm_jax.report.published import published
from compactlm_jax.report.tables import number
from compactlm_jax.train.rundir import read_run

ACCURACIES = [0.81, 0.79, 0.86]


@pytest.fixture
def report(tmp_path):
  parent = series(tmp_path / 'sst|2', ACCURACIES, finetune=FinetuneConfig(benchmark='sst2'))
  (parent / 'seed-3').mkdir()
  return collect([str(parent)], read_run)


def cells(text):
  """Tables of a markdown text: [[row, ...], ...] as dicts."""
  tables = [block.splitlines() for block in text.split('\n\n') if block.startswith('| ')]
  rows = [[[c.strip() for c in line.replace('\\|', '/')[1:-1].split('|')] for line in table] for table in tables]
  return [[dict(zip(table[0], row)) for row in table[2:]] for table in rows]


def test_markdown_holds_what_numpy_computes(report):
  """Mutation: swap two columns, or leave '|' in names as it is."""
  text = as_markdown(report)
  assert text.startswith('## sst2\n') and 'Published by others, not measured here' in text
  scores, quoted, runs = cells(text)
  assert [row['metric'] for row in scores] == ['accuracy', 'loss']
  row = scores[0]
  values = np.array(ACCURACIES)
  assert (row['runs'], row['n'], row['best'], row['worst']) == ('sst/2', '3', '0.8600 (seed 2)', '0.7900 (seed 1)')
  for name, value in {
    'median': np.median(values),
    'mean': values.mean(),
    'standard deviation': values.std(ddof=1),
    'standard error': values.std(ddof=1) / np.sqrt(3),
  }.items():
    assert row[name] == f'{value:.4f}'
  assert scores[1]['best'] == '0.1400 (seed 2)'
  assert {'published model', 'metric', 'score', 'spread', 'source'} == set(quoted[0]) and len(quoted) > 10
  assert [(r['seed'], r['accuracy'], r['steps']) for r in runs] == [
    ('0', '0.8100', '10'),
    ('1', '0.7900', '10'),
    ('2', '0.8600', '10'),
  ]
  of_file = report.groups[0].runs[1]
  assert (runs[1]['config'], runs[1]['code']) == (of_file.config_hash, of_file.code)
  assert f'# sst|2, seed 0, 1, 2\n{of_file.command}\n' in text
  assert 'seed-3: it has not started' in text
  assert cells(as_markdown(report, runs=False)) == [scores]


def test_csv_has_a_line_for_each_number(report):
  """Mutation: leave out the summaries, or quote nothing."""
  rows = list(csv.DictReader(io.StringIO(as_csv(report))))
  runs = [r for r in rows if r['record'] == 'run' and r['metric'] == 'accuracy']
  assert [float(r['value']) for r in runs] == ACCURACIES and [r['seed'] for r in runs] == ['0', '1', '2']
  found = {r['statistic']: r['value'] for r in rows if r['record'] == 'summary' and r['metric'] == 'accuracy'}
  assert list(found) == ['n', 'median', 'mean', 'std', 'stderr', 'best', 'worst']
  assert float(found['std']) == pytest.approx(np.std(ACCURACIES, ddof=1), rel=1e-12)
  assert {r['group'] for r in rows if r['record'] == 'published'} >= {'ConvBERT-small (14M)', 'BERT-base (109M)'}
  assert all(r['command'] == report.groups[0].runs[0].command for r in runs)


def test_json_is_nested_and_any_parser_reads_it(report, tmp_path):
  """Mutation: let NaN through."""
  found = json.loads(as_json(report), parse_constant=lambda name: pytest.fail(name))
  (group,) = found['groups']
  assert (group['name'], group['subject'], group['task']) == ('sst|2', 'sst2', 'finetune')
  assert group['metrics']['accuracy']['mean'] == pytest.approx(np.mean(ACCURACIES), rel=1e-12)
  assert [run['metrics']['accuracy'] for run in group['runs']] == ACCURACIES and group['runs'][0]['command']
  assert found['left_out'][0]['why'] == 'it has not started'
  assert {row['benchmark'] for row in found['published']} == {'sst2'}
  alone = tmp_path / 'alone'
  alone.mkdir()
  finished(alone, {'accuracy': float('nan')})
  found = json.loads(as_json(collect([str(alone)], read_run)), parse_constant=lambda name: pytest.fail(name))
  assert found['groups'][0]['metrics']['accuracy']['mean'] is None and found['published'] == []
  assert found['notes'] == ['alone: accuracy of seed 0 is not finite']


def test_benchmarks_stand_in_tables_of_their_own(tmp_path):
  """Mutation: one table for all groups."""
  for name in ('rte', 'cola'):
    series(tmp_path / name, [0.5, 0.6], finetune=FinetuneConfig(benchmark=name))
  text = as_markdown(collect([str(tmp_path / 'rte'), str(tmp_path / 'cola')], read_run))
  assert text.index('## rte') < text.index('## cola') and len(cells(text)) == 6


def test_published_rows_are_those_of_the_sources():
  """A few of each source, and the ends of rows. Mutation: shift a column."""

  def score(benchmark, model, metric):
    (found,) = [r for r in published(benchmark) if r.model.startswith(model) and r.metric == metric]
    return found

  assert score('cola', 'ELECTRA-Small++', 'matthews').value == pytest.approx(0.570)
  assert score('squad2', 'ELECTRA-Small++', 'exact').value == 70.1
  assert score('rte', 'ELECTRA-Small-OWT', 'accuracy').value == pytest.approx(0.685)
  assert score('rte', 'ELECTRA-Small-OWT', 'accuracy').std == pytest.approx(0.0193)
  assert score('stsb', 'ELECTRA-Large', 'spearman').value == pytest.approx(0.926)
  assert score('stsb', 'ConvBERT-small', 'spearman').stderr == pytest.approx(0.003)
  assert score('mnli', 'ConvBERT-small', 'accuracy').value == pytest.approx(0.814)
  assert score('mnli', 'ConvBERT-base', 'mismatched_accuracy').value == pytest.approx(0.879)
  assert score('squad2', 'MiniLM 12x384', 'f1').value == 81.7
  assert score('qqp', 'MiniLM 6x384', '').value == pytest.approx(0.906)
  assert score('mrpc', 'MobileBERT', '').value == pytest.approx(0.870)
  assert published('') == published('wnli') == ()
  for name in set(GLUE) - {'wnli'} | set(SQUAD):
    rows = published(name)
    assert len(rows) >= 4 and all(r.source and r.model for r in rows)
    assert all((0.4 < r.value < 1) != name.startswith('squad') for r in rows)
  assert not any(r.model.startswith('ELECTRA-Small-OWT') for r in published('squad1'))


def test_numbers_keep_their_digits():
  """Mutation: four decimals always."""
  assert [number(x) for x in (None, 0.0, 0.12345, 12.5, 1.23456e-5)] == [
    '-',
    '0.0000',
    '0.1235',
    '12.5000',
    '1.235e-05',
  ]
  assert number(float('nan')) == 'nan'
