"""Datasets made in parts: the same bytes whoever writes them, in whatever order, and after whatever happens."""

import hashlib
import shutil
import subprocess
import sys

import pytest
import tensorflow_datasets as tfds
from hypothesis import given
from hypothesis import strategies as st

from compactlm_jax.data import parts, shards
from compactlm_jax.data.parts import Spread
from compactlm_jax.data.prepare import prepare
from compactlm_jax.data.text import TextSource, open_text
from compactlm_jax.data.tokenizer import load_tokenizer
from compactlm_jax.errors import ConfigError, DataError, StorageError

T = 32


def digests(folder):
  files = (p for p in folder.rglob('*') if p.is_file())
  return {str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest() for p in files}


def flip(file, offset):
  content = bytearray(file.read_bytes())
  content[offset] ^= 1
  file.write_bytes(content)


def rows(folder, split):
  found = tfds.builder_from_directory(str(folder)).as_data_source(split)
  return [tuple(r['input_ids'][: r['length']].tolist()) for r in found]


@pytest.fixture(scope='module')
def texts(corpus, tmp_path_factory):
  """A glob of five files of 3 to 35 documents."""
  documents = corpus.read_text(encoding='utf-8').split('\n\n')
  folder, start = tmp_path_factory.mktemp('texts'), 0
  for i, count in enumerate((3, 35, 20, 30, 32)):
    (folder / f'{i}.txt').write_text('\n\n'.join(documents[start : start + count]) + '\n', encoding='utf-8')
    start += count
  return f'{folder}/*.txt'


@pytest.fixture(scope='module')
def made(texts, vocabulary, tmp_path_factory):
  """A dataset of pairs in three parts."""
  folder = tmp_path_factory.mktemp('made') / 'out'
  prepare(texts, str(vocabulary), folder, T, 'pairs', seed=3, holdout_rows=10, spread=Spread(3), workers=1)
  return folder


def plan_of(texts, tokenizer, folder):
  """The plan of `made`, into a folder."""
  sources = open_text(texts, digests=False)
  settings = {'mode': 'pairs', 'seq_len': T, 'seed': 3, 'pair_rule': 'electra', 'holdout_rows': 10, 'parts': 3}
  settings |= {'shard_rows': 0, 'text_key': '', 'tokenizer': tokenizer.fingerprint()}
  settings['sources'] = [{'name': s.name, 'size': s.size, 'sha256': ''} for s in sources]
  folder.mkdir()
  return parts.plan_parts(sources, settings).into(folder, tokenizer)


def test_bytes_do_not_depend_on_who_writes_which_part_when(texts, vocabulary, made, tmp_path):
  """Mutation: take the seed of a part from the time, or count parts as they come."""
  tokenizer = load_tokenizer(vocabulary)
  plan = plan_of(texts, tokenizer, tmp_path / 'out')
  for index in (2, 0, 2, 1):
    parts.write_part(plan, plan.parts[index], tokenizer, workers=3)
  (tmp_path / 'out' / '.compactlm_rows-train.array_record-00001.tmp-dead').write_text('of a worker that was killed')
  parts.finish(plan, tokenizer)
  assert digests(tmp_path / 'out') == digests(made)
  assert len([name for name in digests(made) if 'train.array_record' in name]) == 3
  assert not [name for name in digests(made) if name.startswith(('part-', '.'))]


def test_rows_are_those_of_the_files_and_as_many_as_asked_for_are_held_out(texts, vocabulary, tmp_path):
  """Mutation: give each part all of holdout_rows; or forget the held-out rows of a part."""
  whole = prepare(texts, str(vocabulary), tmp_path / 'whole', T, 'sentences', holdout_rows=40)
  split = prepare(texts, str(vocabulary), tmp_path / 'parts', T, 'sentences', holdout_rows=40, spread=Spread(4))
  found = [rows(tmp_path / name, 'train') + rows(tmp_path / name, 'validation') for name in ('whole', 'parts')]
  assert sorted(found[0]) == sorted(found[1])
  assert len(rows(tmp_path / 'parts', 'validation')) == 40 == split.contents['validation']['rows']
  assert dict(whole.counts) == dict(split.counts)
  assert whole.settings['sources'] == split.settings['sources']
  of_parts = [set(rows(tmp_path / 'parts', 'validation')[a:b]) for a, b in ((0, 10), (30, 40))]
  assert not of_parts[0] & of_parts[1]  # each part holds its own rows out


@given(st.lists(st.integers(0, 1000), min_size=1, max_size=30), st.integers(1, 30), st.integers(0, 100))
def test_every_file_is_in_one_part_and_every_held_out_row_too(sizes, count, held):
  """Mutation: round shares instead of handing out what is left."""
  sources = [TextSource(f'{i}', size, '', lambda on_bytes: iter(()), f'/t/{i}') for i, size in enumerate(sizes)]
  settings = {'parts': count, 'holdout_rows': held}
  if count > len(sizes):
    with pytest.raises(ConfigError, match=f'--parts={count}: the input is {len(sizes)} file'):
      parts.plan_parts(sources, settings)
    return
  plan = parts.plan_parts(sources, settings)
  assert sorted(f for p in plan.parts for f in p.files) == sorted(plan.order)
  assert all(p.files and list(p.files) == sorted(p.files, key=plan.order.index) for p in plan.parts)
  assert sum(p.holdout_rows for p in plan.parts) == (held if sum(sizes) else min(held, count))
  assert max(p.size for p in plan.parts) - min(p.size for p in plan.parts) <= max(sizes)


def test_a_part_that_fails_is_written_again_and_never_seen_half(texts, vocabulary, made, tmp_path, monkeypatch):
  """Mutation: write to the final name (in `whole_file`), or raise at the first failure."""
  encode, calls, seen = shards.Layout.encode, [], []

  def fails_once(self, example):
    calls.append(1)
    if len(calls) == 20:
      raise OSError(5, 'Input/output error')
    return encode(self, example)

  monkeypatch.setattr(shards.Layout, 'encode', fails_once)
  monkeypatch.setattr(parts.time, 'sleep', lambda _: seen.extend(p.name for p in (tmp_path / '.out.parts').iterdir()))
  prepare(texts, str(vocabulary), tmp_path / 'out', T, 'pairs', seed=3, holdout_rows=10, spread=Spread(3))
  assert len(calls) > 20 and not seen
  assert digests(tmp_path / 'out') == digests(made) and [p.name for p in tmp_path.iterdir()] == ['out']


def test_a_part_that_goes_on_failing_ends_with_74(texts, vocabulary, tmp_path, monkeypatch):
  """Mutation: swallow the last error."""

  def fail(*_):
    raise OSError(28, 'No space left on device')

  monkeypatch.setattr(shards.Layout, 'encode', fail)
  monkeypatch.setattr(parts, '_PAUSE_SECONDS', 0)
  with pytest.raises(StorageError, match='out: cannot be written .*No space left'):
    prepare(texts, str(vocabulary), tmp_path / 'out', T, spread=Spread(3))
  assert not (tmp_path / 'out').exists() and not list((tmp_path / '.out.parts').iterdir())


def test_after_a_kill_only_the_rest_is_done(texts, vocabulary, made, tmp_path, monkeypatch):
  """Mutation: ignore the marks, or leave the settings out of them."""
  code = (
    'import os, sys\n'
    'from compactlm_jax.data import parts, prepare\n'
    'write = parts._write\n'
    'parts._write = lambda plan, part, *a: write(plan, part, *a) if part.index < 2 else os._exit(9)\n'
    "prepare.prepare(*sys.argv[1:], 32, 'pairs', seed=3, holdout_rows=10, spread=parts.Spread(3))"
  )
  out = tmp_path / 'out'
  assert subprocess.run([sys.executable, '-c', code, texts, vocabulary, out]).returncode == 9
  shutil.copytree(tmp_path / '.out.parts', tmp_path / '.other.parts')
  read = []
  examples = parts.make_examples
  monkeypatch.setattr(parts, 'make_examples', lambda sources, *a: (read.append(len(sources)), examples(sources, *a))[1])
  options = {'holdout_rows': 10, 'spread': Spread(3)}
  prepare(texts, str(vocabulary), out, T, 'pairs', seed=3, **options)
  assert len(read) == 1 and digests(out) == digests(made)
  prepare(texts, str(vocabulary), tmp_path / 'other', T, 'pairs', seed=4, **options)
  assert len(read) == 4  # what was there is of another seed


def test_a_last_phase_that_fails_is_done_again(texts, vocabulary, made, tmp_path, monkeypatch):
  """Mutations: remove held-out rows before the manifest is there; trust a mark whose held-out rows are gone or damaged,
  or a damaged mark.
  """
  options = {'holdout_rows': 10, 'spread': Spread(3)}
  calls, write = [], parts.write_manifest

  def once(*a):
    calls.append(1)
    if len(calls) == 1:
      raise OSError(28, 'No space left on device')
    return write(*a)

  monkeypatch.setattr(parts, 'write_manifest', once)
  for out in (tmp_path / 'out', tmp_path / 'other', tmp_path / 'flipped'):
    calls.clear()
    with pytest.raises(StorageError, match='cannot be written .*No space left'):
      prepare(texts, str(vocabulary), out, T, 'pairs', seed=3, **options)
    if out.name == 'other':
      (tmp_path / '.other.parts' / 'part-00000.held').unlink()
    if out.name == 'flipped':
      flip(tmp_path / '.flipped.parts' / 'part-00000.held', 20)
      mark = tmp_path / '.flipped.parts' / 'part-00001.json'
      flip(mark, mark.read_bytes().index(b'"counts"') + 20)
    prepare(texts, str(vocabulary), out, T, 'pairs', seed=3, **options)
    assert digests(out) == digests(made)


def test_same_settings_are_reused_and_changed_text_is_noticed(texts, vocabulary, tmp_path):
  """Mutation: compare names and sizes alone."""
  mine = tmp_path / 'text'
  mine.mkdir()
  for i, content in enumerate(('a small house\n', 'the cold river\n')):
    (mine / f'{i}.txt').write_text(content)
  options = {'mode': 'sentences', 'spread': Spread(2)}
  first = prepare(f'{mine}/*', str(vocabulary), tmp_path / 'out', T, **options)
  assert first.settings['parts'] == 2 and all(len(s['sha256']) == 64 for s in first.settings['sources'])
  stamp = (tmp_path / 'out' / 'manifest.json').stat().st_mtime_ns
  assert prepare(f'{mine}/*', str(vocabulary), tmp_path / 'out', T, workers=2, **options) == first
  assert (tmp_path / 'out' / 'manifest.json').stat().st_mtime_ns == stamp
  (mine / '1.txt').write_text('the warm river\n')
  with pytest.raises(ConfigError, match=r'other settings \(sources\)'):
    prepare(f'{mine}/*', str(vocabulary), tmp_path / 'out', T, **options)
  prepare(f'{mine}/*', str(vocabulary), tmp_path / 'out', T, overwrite=True, **options)
  assert rows(tmp_path / 'out', 'train')[1] != rows(tmp_path / 'out', 'train')[0]


def test_bad_input(texts, vocabulary, tmp_path):
  def run(spec=texts, **options):
    return prepare(spec, str(vocabulary), tmp_path / 'out', T, **options)

  with pytest.raises(ConfigError, match='--parts=6: the input is 5 file'):
    run(spread=Spread(6))
  with pytest.raises(ConfigError, match='--runner=DirectRunner .* --parts='):
    run(spread=Spread(0, 'DirectRunner'))
  with pytest.raises(ConfigError, match='shard_rows 5'):
    run(spread=Spread(2), shard_rows=5)
  with pytest.raises(ConfigError, match='parts -1'):
    run(spread=Spread(-1))
  (tmp_path / 'a.txt').write_bytes(b'fine\n')
  (tmp_path / 'b.txt').write_bytes(b'ab\xffcd\n')
  (tmp_path / 'c.txt').write_bytes(b'\n')
  with pytest.raises(DataError, match='part 0 of 2: .*b.txt: not UTF-8'):
    run(f'{tmp_path}/[ab].txt', spread=Spread(2))
  with pytest.raises(DataError, match='part 1 of 2: input c.txt: no rows.* fewer --parts'):
    run(f'{tmp_path}/[ac].txt', spread=Spread(2))


def test_without_beam_a_runner_says_what_to_install(texts, vocabulary, tmp_path, monkeypatch):
  """Mutation: import Beam without asking."""
  monkeypatch.setitem(sys.modules, 'apache_beam', None)
  monkeypatch.delitem(sys.modules, 'compactlm_jax.data.beam', raising=False)
  monkeypatch.delattr('compactlm_jax.data.beam', raising=False)  # set by whoever imported it in this process
  with pytest.raises(ConfigError, match=r'--runner=DirectRunner needs Apache Beam: pip install .compactlm-jax\[beam\]'):
    prepare(texts, str(vocabulary), tmp_path / 'out', T, spread=Spread(2, 'DirectRunner'))
