"""The parts of a dataset, written by an Apache Beam pipeline."""

import hashlib

import pytest

pytest.importorskip('apache_beam')

from compactlm_jax.data import beam, parts, shards
from compactlm_jax.data.parts import Spread
from compactlm_jax.data.prepare import prepare
from compactlm_jax.errors import ConfigError, DataError, StorageError

# Beam's own, and those of grpc's threads.
pytestmark = [pytest.mark.filterwarnings('ignore'), pytest.mark.filterwarnings('default::UserWarning')]
IN_MEMORY = '--direct_running_mode=in_memory'


def digests(folder):
  files = (p for p in folder.rglob('*') if p.is_file())
  return {str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest() for p in files}


@pytest.fixture(scope='module')
def texts(corpus, tmp_path_factory):
  folder = tmp_path_factory.mktemp('texts')
  for i, block in enumerate(corpus.read_text(encoding='utf-8').split('\n\n')[:40]):
    with (folder / f'{i % 5}.txt').open('a', encoding='utf-8') as file:
      file.write(block + '\n\n')
  return f'{folder}/*.txt'


def run(texts, vocabulary, output, **options):
  fields = {'holdout_rows': 5, 'parts': 3, 'runner': 'local', 'beam_options': IN_MEMORY, **options}
  spread = Spread(fields['parts'], fields['runner'], fields['beam_options'])
  return prepare(
    texts, str(vocabulary), output, 32, 'pairs', seed=3, holdout_rows=fields['holdout_rows'], spread=spread
  )


def test_the_same_bytes_as_here(texts, vocabulary, tmp_path, caplog):
  """Mutation: tokenise with another vocabulary on workers; let parts share random numbers in the order they come."""
  here = run(texts, vocabulary, tmp_path / 'here')
  with caplog.at_level('INFO', 'compactlm_jax'):
    assert run(texts, vocabulary, tmp_path / 'beam', runner='DirectRunner') == here
  assert digests(tmp_path / 'beam') == digests(tmp_path / 'here')
  assert sorted(p.name for p in tmp_path.iterdir()) == ['beam', 'here']


def test_progress_is_shown(texts, vocabulary, tmp_path, monkeypatch, caplog):
  """Mutation: do not look a last time."""
  monkeypatch.setattr('compactlm_jax.data.text._LOG_SECONDS', -1)
  with caplog.at_level('INFO', 'compactlm_jax'):
    run(texts, vocabulary, tmp_path / 'beam', runner='DirectRunner')
  said = [r.getMessage() for r in caplog.records if r.getMessage().startswith('prepare:')]
  assert said and said[-1].split()[1] == said[-1].split()[3]


def test_bad_text_ends_with_65_and_is_not_tried_again(vocabulary, tmp_path, monkeypatch):
  """Mutation: raise DataError on the worker (it comes back as a RuntimeError, and a runner tries again)."""
  written = []
  write = parts._write
  monkeypatch.setattr(parts, '_write', lambda plan, part, *a: (written.append(part.index), write(plan, part, *a)))
  (tmp_path / 'a.txt').write_bytes(b'fine\n')
  (tmp_path / 'b.txt').write_bytes(b'ab\xffcd\n')
  options = {'holdout_rows': 0, 'parts': 2, 'runner': 'DirectRunner'}
  with pytest.raises(DataError, match='part 0 of 2: .*b.txt: not UTF-8'):
    run(f'{tmp_path}/?.txt', vocabulary, tmp_path / 'out', **options)
  assert sorted(written) == [0, 1] and not (tmp_path / 'out').exists()
  (tmp_path / 'b.txt').write_bytes(b'good\n')
  run(f'{tmp_path}/?.txt', vocabulary, tmp_path / 'out', **options)
  assert sorted(p.name for p in tmp_path.iterdir()) == ['a.txt', 'b.txt', 'out']


def test_a_worker_that_fails_once_changes_nothing_and_one_that_goes_on_ends_with_74(
  texts, vocabulary, tmp_path, monkeypatch
):
  """Mutation: raise at the first failure; swallow the last."""
  here = tmp_path / 'here'
  run(texts, vocabulary, here)
  encode, calls = shards.Layout.encode, []

  def fails(self, example):
    calls.append(1)
    if len(calls) in failing:
      raise RuntimeError('write: No space left on device')
    return encode(self, example)

  monkeypatch.setattr(shards.Layout, 'encode', fails)
  monkeypatch.setattr(parts, '_PAUSE_SECONDS', 0)
  failing = {15}
  run(texts, vocabulary, tmp_path / 'once', runner='DirectRunner')
  assert len(calls) > 15 and digests(tmp_path / 'once') == digests(here)
  failing = range(10**9)
  with pytest.raises(StorageError, match='--runner=DirectRunner: the pipeline failed .*No space left.* does the rest'):
    run(texts, vocabulary, tmp_path / 'never', runner='DirectRunner')
  assert not (tmp_path / 'never').exists()
  failing = ()
  run(texts, vocabulary, tmp_path / 'never', runner='DirectRunner')
  assert digests(tmp_path / 'never') == digests(here)


def test_bad_input(texts, vocabulary, tmp_path):
  """Mutation: let Dataflow find out an hour later."""
  with pytest.raises(ConfigError, match='--runner=DataflowRunner: its workers cannot reach .*out'):
    run(texts, vocabulary, tmp_path / 'out', runner='DataflowRunner', beam_options='')
  with pytest.raises(ConfigError, match='--beam_options: .* cannot be read'):
    beam.writer('DirectRunner', '"--a')


def test_what_dataflow_needs_is_named(texts, vocabulary, tmp_path, monkeypatch):
  """As Beam says it, with the module that is missing behind it. Mutation: take it for the clients of buckets."""

  def without(*_):
    try:
      raise ImportError("cannot import name 'dataflow' from 'google.cloud'")
    except ImportError as e:
      raise ImportError('Google Cloud Dataflow runner not available, please install apache_beam[gcp]') from e

  monkeypatch.setattr(beam, '_run', without)
  with pytest.raises(ConfigError, match=r"extra gcp: pip install 'compactlm-jax\[dataflow,gcs\]'"):
    run(texts, vocabulary, tmp_path / 'out', runner='DirectRunner')


@pytest.mark.slow
def test_processes_write_the_same_bytes(texts, vocabulary, tmp_path):
  run(texts, vocabulary, tmp_path / 'here')
  options = '--direct_running_mode=multi_processing --direct_num_workers=2'
  run(texts, vocabulary, tmp_path / 'beam', runner='DirectRunner', beam_options=options)
  assert digests(tmp_path / 'beam') == digests(tmp_path / 'here')
