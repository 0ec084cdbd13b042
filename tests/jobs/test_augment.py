"""Augmentation from file to file: rows and counts, shards, interruptions, bad input."""

import gzip
import json
import os
import shutil
import signal

import numpy as np
import pytest
from augmenting import SINGLE, make_model, make_texts

from compactlm_jax.cli.main import main
from compactlm_jax.data.glue import read_glue
from compactlm_jax.data.table import read_table
from compactlm_jax.errors import ConfigError
from compactlm_jax.interop.bundle import save_pretrained
from compactlm_jax.jobs import augment as module
from compactlm_jax.jobs.augment import Counts, Options, as_text, run_augment

OPTIONS = Options(copies=4, batch_size=16)


@pytest.fixture(scope='module')
def model(tmp_path_factory):
  folder = tmp_path_factory.mktemp('models') / 'mlm'
  save_pretrained(make_model(), folder)
  return str(folder)


@pytest.fixture(autouse=True)
def small_shards(monkeypatch):
  monkeypatch.setattr(module, 'SHARD_ROWS', 4)


def write_table(folder, count=10, name='in.tsv'):
  texts = make_texts(count)
  texts[5] = texts[0]
  content = 'id\ttext\tlabel\n' + ''.join(f'{i}\t{text}\t{i % 2}\n' for i, text in enumerate(texts))
  (folder / name).write_bytes(gzip.compress(content.encode()) if name.endswith('.gz') else content.encode())
  return str(folder / name), texts


def test_rows_keep_their_columns_and_the_original_comes_first(model, tmp_path):
  """And the counts are those of the rows. Mutations: take the draws of one row for all; count dropped copies."""
  source, texts = write_table(tmp_path, name='in.tsv.gz')
  output = tmp_path / 'out.tsv'
  counts = run_augment(source, model, str(output), OPTIONS)
  header, *lines = output.read_text().splitlines()
  rows = [line.split('\t') for line in lines]
  assert header == 'id\ttext\tlabel' and len(rows) == counts.written > 30 and counts.rows == 10
  assert counts.repeated == 10 * 5 - len(rows)
  different = 0
  for i, text in enumerate(texts):
    own = [row for row in rows if row[0] == str(i)]
    assert own[0][1] == text and all(row[2] == str(i % 2) for row in own)
    assert len({row[1] for row in own}) == len(own)
    words = np.array([row[1].split(' ') for row in own])
    different += (words[1:] != words[0]).sum()
  assert [row[1] for row in rows if row[0] == '0'] != [row[1] for row in rows if row[0] == '5']
  assert different == counts.replaced > 0
  table = read_table(output)
  assert len(table) == len(rows) and table.classes == ('0', '1')
  said = as_text(str(output), counts)
  assert f'10 rows in, {len(rows)} rows out' in said and f'replaced in the copies: {counts.replaced}' in said
  assert f'{counts.guesses:,} for {counts.guessed_words:,} words' in said
  assert json.loads((tmp_path / 'out.tsv.json').read_text())['counts']['written'] == len(rows)
  assert sorted(file.name for file in tmp_path.iterdir()) == ['in.tsv.gz', 'out.tsv', 'out.tsv.json']


def test_an_interrupted_call_gives_the_same_bytes(model, tmp_path, monkeypatch):
  """And computes no shard twice; smaller batches may continue. Mutation: count rows from the start of the shard."""
  source, _ = write_table(tmp_path)
  whole = run_augment(source, model, str(tmp_path / 'whole.tsv'), OPTIONS)
  computed, shard = [], module.augment_shard

  def fails_once(chunk, first, *rest):
    if first == 8 and computed.count(8) == 0:
      computed.append(8)
      raise RuntimeError('killed')
    computed.append(first)
    return shard(chunk, first, *rest)

  monkeypatch.setattr(module, 'augment_shard', fails_once)
  with pytest.raises(RuntimeError, match='killed'):
    run_augment(source, model, str(tmp_path / 'parts.tsv'), OPTIONS)
  assert not (tmp_path / 'parts.tsv').exists()
  other = run_augment(source, model, str(tmp_path / 'parts.tsv'), Options(copies=4, batch_size=8))
  assert computed == [0, 4, 8, 8] and other == whole
  assert (tmp_path / 'parts.tsv').read_bytes() == (tmp_path / 'whole.tsv').read_bytes()


def test_a_row_depends_on_the_seed_and_its_number_alone(model, tmp_path, monkeypatch):
  """Mutation: draw on from row to row."""
  source, _ = write_table(tmp_path)
  run_augment(source, model, str(tmp_path / 'a.tsv'), OPTIONS)
  monkeypatch.setattr(module, 'SHARD_ROWS', 7)
  run_augment(source, model, str(tmp_path / 'b.tsv'), OPTIONS)
  run_augment(source, model, str(tmp_path / 'c.tsv'), Options(copies=4, batch_size=16, seed=1))
  first, second, third = ((tmp_path / f'{name}.tsv').read_text() for name in 'abc')
  assert first == second != third


def test_a_signal_stops_between_shards_and_the_same_command_continues(model, tmp_path, monkeypatch, capsys):
  """Exit code 75. Mutation: look for a stop after the last shard alone."""
  source, _ = write_table(tmp_path)
  argv = ['augment', f'--input={source}', f'--model={model}', f'--output={tmp_path / "out.jsonl"}', '--copies=2']
  shard = module.augment_shard

  def asked(*arguments):
    os.kill(os.getpid(), signal.SIGTERM)
    return shard(*arguments)

  monkeypatch.setattr(module, 'augment_shard', asked)
  assert main(argv) == 75 and 'asked to stop after 4 of 10 rows; the same command continues' in capsys.readouterr().err
  monkeypatch.setattr(module, 'augment_shard', shard)
  assert main(argv) == 0 and '10 rows in' in capsys.readouterr().out
  rows = [json.loads(line) for line in (tmp_path / 'out.jsonl').read_text().splitlines()]
  assert [row['id'] for row in rows] == sorted(row['id'] for row in rows) and list(rows[0]) == ['id', 'text', 'label']


def test_a_finished_output_is_kept_and_others_are_not_touched(model, tmp_path, monkeypatch):
  """Mutation: compare no settings."""
  source, _ = write_table(tmp_path)
  output = tmp_path / 'out.tsv'
  counts = run_augment(source, model, str(output), OPTIONS)
  before, shard = output.read_bytes(), module.augment_shard
  monkeypatch.setattr(module, 'augment_shard', None)
  assert run_augment(source, model, str(output), OPTIONS) == counts
  monkeypatch.setattr(module, 'augment_shard', shard)
  other = Options(copies=2, batch_size=16)
  with pytest.raises(ConfigError, match=r'--output: .*out.tsv exists and was made in another way'):
    run_augment(source, model, str(output), other)
  assert output.read_bytes() == before
  run_augment(source, model, str(output), other, overwrite=True)
  assert 0 < len(output.read_bytes()) < len(before)


@pytest.mark.parametrize(('old', 'new'), [(b'\n', b'\nx'), (b'"rows"', b'"rats"'), (b'{', b'['), (b'', b'')])
def test_damaged_shards_are_made_again(model, tmp_path, monkeypatch, old, new):
  """Mutation: trust whatever the folder of shards holds."""
  source, _ = write_table(tmp_path)
  whole = run_augment(source, model, str(tmp_path / 'whole.tsv'), OPTIONS)
  with monkeypatch.context() as patch, pytest.raises(RuntimeError, match='killed'):
    patch.setattr(module, '_join', lambda *args: (_ for _ in ()).throw(RuntimeError('killed')))
    run_augment(source, model, str(tmp_path / 'out.tsv'), OPTIONS)
  shard = next(tmp_path.glob('.out*/000000'))
  shard.write_bytes(shard.read_bytes().replace(old, new, 1) if old else b'')
  assert run_augment(source, model, str(tmp_path / 'out.tsv'), OPTIONS) == whole
  assert (tmp_path / 'out.tsv').read_bytes() == (tmp_path / 'whole.tsv').read_bytes()


def test_a_report_that_is_damaged_is_not_believed(model, tmp_path):
  """Mutation: make counts of whatever stands there."""
  source, _ = write_table(tmp_path)
  run_augment(source, model, str(tmp_path / 'out.tsv'), OPTIONS)
  report = tmp_path / 'out.tsv.json'
  report.write_text(report.read_text().replace('"rows":', '"rats":'))
  with pytest.raises(ConfigError, match='exists and was made in another way'):
    run_augment(source, model, str(tmp_path / 'out.tsv'), OPTIONS)


def test_a_call_that_was_killed_while_it_cleared_its_shards_is_over(model, tmp_path, monkeypatch):
  """Mutation: take any folder of shards for an output that is not finished."""
  source, _ = write_table(tmp_path)
  remove = shutil.rmtree

  def killed(folder):
    (folder / 'settings.json').unlink()
    raise RuntimeError('killed')

  monkeypatch.setattr(module.shutil, 'rmtree', killed)
  with pytest.raises(RuntimeError, match='killed'):
    run_augment(source, model, str(tmp_path / 'out.tsv'), OPTIONS)
  monkeypatch.setattr(module.shutil, 'rmtree', remove)
  monkeypatch.setattr(module, 'augment_shard', None)
  counts = run_augment(source, model, str(tmp_path / 'out.tsv'), OPTIONS)
  assert counts.written == len((tmp_path / 'out.tsv').read_text().splitlines()) - 1
  assert sorted(file.name for file in tmp_path.iterdir()) == ['in.tsv', 'out.tsv', 'out.tsv.json']


def test_the_beginning_of_another_augmentation_is_not_continued(model, tmp_path, monkeypatch):
  """Mutation: continue whatever lies there."""
  source, _ = write_table(tmp_path)
  shard = module.augment_shard
  monkeypatch.setattr(
    module, 'augment_shard', lambda chunk, first, *rest: shard(chunk, first, *rest) if not first else 1
  )
  with pytest.raises(TypeError):
    run_augment(source, model, str(tmp_path / 'out.tsv'), OPTIONS)
  monkeypatch.setattr(module, 'augment_shard', shard)
  with pytest.raises(ConfigError, match=r'beginning of an augmentation with other settings \(copies, seed\)'):
    run_augment(source, model, str(tmp_path / 'out.tsv'), Options(copies=3, seed=2))


@pytest.mark.parametrize(('pairs', 'rows'), [('clean', 5), ('published', 6)])
def test_pairs_of_a_glue_task(pairs, rows, model, tmp_path):
  """Its official file, and its readers read the output. Mutation: write the index of a class as its label."""
  lines = ['index\tsentence1\tsentence2\tlabel', f'0\t{" ".join(SINGLE[:6])}\t{" ".join(SINGLE[6:12])}\tnot_entailment']
  (tmp_path / 'train.tsv').write_text('\n'.join(lines) + '\n')
  output = str(tmp_path / 'out.tsv')
  run_augment(str(tmp_path / 'train.tsv'), model, output, Options(task='rte', copies=2, pairs=pairs, probability=0.9))
  table = read_glue('rte', output, 'train')
  assert len(table) == rows and table.labels.tolist() == [1] * rows
  assert table.texts[0][0] == ' '.join(SINGLE[:6]) and table.texts[1][0] == ' '.join(SINGLE[6:12])
  unchanged = [table.texts[0].count(' '.join(SINGLE[:6])), table.texts[1].count(' '.join(SINGLE[6:12]))]
  assert unchanged == ([3, 3] if pairs == 'clean' else [1, 4])


@pytest.mark.parametrize(('task', 'copies'), [('cola', 30), ('sst2', 20), ('', 30)])
def test_published_numbers_of_copies(task, copies):
  assert Options(task=task).wanted_copies == copies and Options(task=task, copies=3).wanted_copies == 3


def test_files_without_a_header_and_scores(model, tmp_path):
  """CoLA and STS-B. Mutation: write scores as float64."""
  (tmp_path / 'cola.tsv').write_text('gj04\t1\t\ttree house road\ngj04\t0\t*\tbird stone cloud\n')
  run_augment(str(tmp_path / 'cola.tsv'), model, str(tmp_path / 'a.tsv'), Options(task='cola', copies=1))
  assert (tmp_path / 'a.tsv').read_text().splitlines()[:2] == ['sentence\tlabel', 'tree house road\t1']
  assert read_glue('cola', tmp_path / 'a.tsv', 'train').classes == ('unacceptable', 'acceptable')
  (tmp_path / 'stsb.tsv').write_text('sentence1\tsentence2\tscore\ntree house\troad\t3.8\n')
  run_augment(str(tmp_path / 'stsb.tsv'), model, str(tmp_path / 'b.tsv'), Options(task='stsb', copies=1))
  assert (tmp_path / 'b.tsv').read_text().splitlines()[1] == 'tree house\troad\t3.8'


@pytest.mark.parametrize(
  ('content', 'flags', 'code', 'message'),
  [
    ('text\tlabel\nthe .\t1\n', [], 65, 'no word has a candidate (0 words were looked up); are text the text columns'),
    ('a\tlabel\ntree\t1\n', [], 78, "no column 'text'; columns are a, label"),
    ('text\tlabel\n', [], 65, 'no rows'),
    ('text\tlabel\ntree\t1\n', ['--vectors=VECTORS'], 65, ':2: 1 numbers, but the lines before have 2'),
    ('text\tlabel\ntree\t1\n', ['--probability=0'], 78, '--probability: 0.0 must be above 0'),
    ('text\tlabel\ntree\t1\n', ['--task=nope'], 78, "--task: GLUE has no task 'nope'; use one of cola"),
    ('text\tlabel\ntree\t1\n', ['--text_columns=text', '--task=rte'], 78, '--text_columns: GLUE task rte has its own'),
    ('text\tlabel\ntree\t1\n', ['--text_columns=text,label,text'], 78, 'must name one or two columns'),
    ('text\tlabel\ntree\t1\n', ['--output=out.csv'], 78, '--output: out.csv must end in .tsv or .jsonl'),
    ('text\tlabel\ntree\t1\n', ['--model=HEADLESS'], 78, 'has no head that guesses hidden words (heads: none)'),
  ],
)
def test_bad_input_leaves_nothing(content, flags, code, message, model, tmp_path, capsys):
  """Mutation: leave the shards of an augmentation without candidates."""
  (tmp_path / 'in.tsv').write_text(content)
  (tmp_path / 'v.txt').write_text('a 1 2\nb 1\n')
  bundle = make_model()
  bundle.params.pop('mlm_head')
  save_pretrained(bundle, tmp_path / 'headless')
  before = sorted(tmp_path.iterdir())
  places = {'VECTORS': tmp_path / 'v.txt', 'HEADLESS': tmp_path / 'headless'}
  given = [f'--input={tmp_path / "in.tsv"}', f'--model={model}', f'--output={tmp_path / "out.tsv"}', *flags]
  for name, place in places.items():
    given = [flag.replace(name, str(place)) for flag in given]
  assert main(['augment', *given]) == code
  assert message in capsys.readouterr().err and sorted(tmp_path.iterdir()) == before


def test_counts_add_up():
  assert Counts(rows=1, replaced=2) + Counts(rows=3, without=1) == Counts(rows=4, replaced=2, without=1)


def test_own_stop_words(model, tmp_path):
  """Mutation: always take the English ones."""
  source, _ = write_table(tmp_path)
  (tmp_path / 'stop.txt').write_text('\n'.join(word.title() for word in SINGLE))
  counts = run_augment(source, model, str(tmp_path / 'a.tsv'), Options(copies=1, stop_words=str(tmp_path / 'stop.txt')))
  plain = run_augment(source, model, str(tmp_path / 'b.tsv'), Options(copies=1))
  assert counts.guessed_words > 0 and counts.neighbour_words == plain.neighbour_words
  assert counts.guessed_words != plain.guessed_words
