import gzip
import hashlib
import json
import shutil
import subprocess
import sys
import types
from pathlib import Path

import numpy as np
import pytest
import tensorflow_datasets as tfds

from compactlm_jax.data import packing, text
from compactlm_jax.data import prepare as prepare_module
from compactlm_jax.data.manifest import read_manifest
from compactlm_jax.data.prepare import prepare
from compactlm_jax.data.source import open_dataset
from compactlm_jax.data.tokenizer import load_tokenizer
from compactlm_jax.errors import ConfigError, DataError, StorageError

WIKITEXT = Path(__file__).parents[2] / '../shared/data/wikitext2-raw/valid.txt.gz'


def digests(folder):
  return {
    str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest() for p in folder.rglob('*') if p.is_file()
  }


def read_rows(folder, split='train'):
  return list(tfds.builder_from_directory(str(folder)).as_data_source(split))


def expected_rows(path, tokenizer, seq_len, mode):
  """Straight-line version: one thread, whole file in memory."""
  stream = []
  for block in path.read_text(encoding='utf-8').split('\n\n'):
    stream += [*(tokenizer.encode([line.strip()])[0] for line in block.split('\n') if line.strip()), None]
  ids = (stream, seq_len, tokenizer.cls_id, tokenizer.sep_id)
  if mode == 'packed':
    return list(packing.pack_documents(*ids))
  return list(packing.one_per_line(*ids) if mode == 'sentences' else packing.sentence_pairs(*ids, seed=3))


@pytest.mark.parametrize('mode', ['packed', 'pairs', 'sentences'])
def test_bytes_do_not_depend_on_workers_and_rows_are_right(mode, corpus, vocabulary, tmp_path, monkeypatch):
  monkeypatch.setattr('compactlm_jax.data.rows._CHUNK_CHARS', 300)
  options = {'seed': 3, 'shard_rows': 50, 'holdout_rows': 7}
  one = prepare(str(corpus), str(vocabulary), tmp_path / 'one', 32, mode, workers=1, **options)
  three = prepare(str(corpus), str(vocabulary), tmp_path / 'three', 32, mode, workers=3, **options)
  assert digests(tmp_path / 'one') == digests(tmp_path / 'three') and one == three
  assert len(one.splits['train']) > 1

  tokenizer = load_tokenizer(vocabulary)
  expected = expected_rows(corpus, tokenizer, 32, mode)
  rows = read_rows(tmp_path / 'one') + read_rows(tmp_path / 'one', 'validation')
  assert len(rows) == len(expected) == one.counts['rows'] and len(read_rows(tmp_path / 'one', 'validation')) == 7
  got = sorted((tuple(r['input_ids'][: r['length']].tolist()), int(r['token_type_ids'].sum())) for r in rows)
  assert got == sorted((tuple(r.ids), max(0, len(r.ids) - r.second)) for r in expected)
  assert all((r['input_ids'][r['length'] :] == tokenizer.pad_id).all() for r in rows)
  assert rows[0]['input_ids'].dtype == np.uint16 and rows[0]['token_type_ids'].dtype == np.uint8


def test_same_bytes_in_another_process_without_jax_or_tensorflow(corpus, vocabulary, tmp_path):
  code = (
    'import sys, warnings; warnings.simplefilter("error")\n'
    'from compactlm_jax.data.prepare import prepare\n'
    'prepare(sys.argv[1], sys.argv[2], sys.argv[3], 32)\n'
    'assert not {"tensorflow", "torch", "jax", "transformers"} & set(sys.modules)'
  )
  subprocess.run([sys.executable, '-c', code, corpus, vocabulary, tmp_path / 'there'], check=True)
  prepare(str(corpus), str(vocabulary), tmp_path / 'elsewhere' / 'here', 32)
  assert digests(tmp_path / 'there') == digests(tmp_path / 'elsewhere' / 'here')


def test_manifest(corpus, vocabulary, tmp_path):
  manifest = prepare(str(corpus), str(vocabulary), tmp_path / 'out', 32)
  assert read_manifest(tmp_path / 'out') == manifest
  rows = read_rows(tmp_path / 'out')
  text = corpus.read_text(encoding='utf-8')
  assert manifest.counts == {
    'documents': 120,
    'lines': sum(bool(line) for line in text.split('\n')),
    'rows': len(rows),
    'tokens': sum(r['length'] for r in rows),
    'words': len(text.split()),
    'unknown_tokens': sum(int((r['input_ids'] == 1).sum()) for r in rows),
    'real_token_fraction': round(sum(r['length'] for r in rows) / (32 * len(rows)), 6),
  }
  assert manifest.settings['sources'] == [
    {'name': 'text.txt', 'size': corpus.stat().st_size, 'sha256': hashlib.sha256(corpus.read_bytes()).hexdigest()}
  ]
  tokenizer = load_tokenizer(tmp_path / 'out' / 'tokenizer')
  assert tokenizer.fingerprint() == manifest.fingerprint and tokenizer.vocab_size == manifest.vocab_size
  for shard in manifest.splits['train']:
    content = (tmp_path / 'out' / shard.file).read_bytes()
    assert (shard.bytes, shard.sha256) == (len(content), hashlib.sha256(content).hexdigest())
  assert str(tmp_path) not in (tmp_path / 'out' / 'manifest.json').read_text()
  assert sorted(p.name for p in tmp_path.iterdir()) == ['out']  # no scratch folder stays


@pytest.mark.parametrize('mode', ['packed', 'pairs', 'sentences'])
def test_words_of_each_split_are_those_that_start_in_its_rows(mode, corpus, vocabulary, tmp_path):
  """Mutation: forget the words of a row that the reservoir takes."""
  manifest = prepare(str(corpus), str(vocabulary), tmp_path / 'out', 16, mode, holdout_rows=9)
  tokenizer = load_tokenizer(vocabulary)
  # In this text a token starts a word unless it continues one or is the dot behind one.
  pieces = {i: t for t, i in tokenizer.backend.get_vocab().items()}
  inner = {i for i, t in pieces.items() if t.startswith('##') or t in ('.', '[CLS]', '[SEP]')}
  for split in ('train', 'validation'):
    rows = [r['input_ids'][: r['length']].tolist() for r in read_rows(tmp_path / 'out', split)]
    words, tokens = sum(i not in inner for ids in rows for i in ids), sum(map(len, rows))
    assert manifest.contents[split] == {'rows': len(rows), 'tokens': tokens, 'words': words}
    source = open_dataset(tmp_path / 'out', split)
    assert source.words_per_token == manifest.words_per_token(split) == words / (tokens - len(rows)) > 0.1
    assert source.part(0, 5).words_per_token == 0  # unknown
  total = sum(content['words'] for content in manifest.contents.values())
  assert total == manifest.counts['words'] <= len(corpus.read_text().split())
  assert mode != 'packed' or total == len(corpus.read_text().split())


def test_a_manifest_without_words_can_still_be_read(corpus, vocabulary, tmp_path):
  prepare(str(corpus), str(vocabulary), tmp_path, 32)
  old = json.loads((tmp_path / 'manifest.json').read_text())
  del old['contents']
  (tmp_path / 'manifest.json').write_text(json.dumps(old))
  assert read_manifest(tmp_path).words_per_token('train') == 0


def test_held_out_rows_are_a_uniform_sample(corpus, vocabulary, tmp_path):
  prepare(str(corpus), str(vocabulary), tmp_path / 'all', 32, 'sentences')
  every = [tuple(r['input_ids']) for r in read_rows(tmp_path / 'all')]
  places = []
  for seed in range(6):
    prepare(str(corpus), str(vocabulary), tmp_path / str(seed), 32, 'sentences', seed=seed, holdout_rows=40)
    places += [every.index(tuple(r['input_ids'])) for r in read_rows(tmp_path / str(seed), 'validation')]
  assert abs(np.mean(places) / len(every) - 0.5) < 0.08 and len(set(places)) > 100


def test_same_settings_are_reused_others_refused(corpus, vocabulary, tmp_path):
  out = tmp_path / 'out'
  first = prepare(str(corpus), str(vocabulary), out, 32)
  stamp = (out / 'manifest.json').stat().st_mtime_ns
  assert prepare(str(corpus), str(vocabulary), out, 32, workers=2) == first
  assert (out / 'manifest.json').stat().st_mtime_ns == stamp
  with pytest.raises(ConfigError, match=r'other settings \(seq_len, shard_rows\).*overwrite'):
    prepare(str(corpus), str(vocabulary), out, 48)
  assert prepare(str(corpus), str(vocabulary), out, 48, overwrite=True).seq_len == 48
  assert len(read_rows(out)[0]['input_ids']) == 48
  shutil.copy(corpus, tmp_path / 'text.txt')
  with (tmp_path / 'text.txt').open('r+b') as f:
    f.write(b'X')
  with pytest.raises(ConfigError, match=r'other settings \(sources\)'):
    prepare(str(tmp_path / 'text.txt'), str(vocabulary), out, 48)
  (out / read_manifest(out).splits['train'][0].file).write_bytes(b'short')
  with pytest.raises(DataError, match='5 bytes, but'):
    prepare(str(corpus), str(vocabulary), out, 48)
  prepare(str(corpus), str(vocabulary), out, 48, overwrite=True)
  assert len(read_rows(out)) > 0


def test_a_foreign_folder_is_never_replaced(corpus, vocabulary, tmp_path):
  (tmp_path / 'out').mkdir()
  (tmp_path / 'out' / 'thesis.txt').write_text('mine')
  for overwrite in (False, True):
    with pytest.raises(ConfigError, match='not a prepared dataset'):
      prepare(str(corpus), str(vocabulary), tmp_path / 'out', 32, overwrite=overwrite)
  assert (tmp_path / 'out' / 'thesis.txt').read_text() == 'mine'
  (tmp_path / 'empty').mkdir()
  prepare(str(corpus), str(vocabulary), tmp_path / 'empty', 32)


@pytest.mark.parametrize('packed', [False, True])
def test_not_utf8(packed, vocabulary, tmp_path):
  good = 'fine\ndéjà\n'.encode()
  content = good + b'ab\xffcd\n'
  path = tmp_path / ('bad.txt.gz' if packed else 'bad.txt')
  path.write_bytes(gzip.compress(content) if packed else content)
  with pytest.raises(DataError, match=rf'bad.txt.*not UTF-8.* {len(good) + 2} .*iconv'):
    prepare(str(path), str(vocabulary), tmp_path / 'out', 32)
  assert not (tmp_path / 'out').exists() and len(list(tmp_path.iterdir())) == 1


def test_bad_input(corpus, vocabulary, tmp_path):
  def run(spec, **options):
    prepare(spec, str(vocabulary), tmp_path / 'out', 32, **options)

  with pytest.raises(DataError, match=r'missing\*.txt.*no file matches'):
    run(f'{corpus},{tmp_path}/missing*.txt')
  with pytest.raises(DataError, match='is a folder'):
    run(str(tmp_path))
  (tmp_path / 'empty.txt').write_text('\n\n  \n')
  with pytest.raises(DataError, match='empty.txt: no rows'):
    run(str(tmp_path / 'empty.txt'))
  (tmp_path / 'cut.txt.gz').write_bytes(gzip.compress(b'a b c\n' * 1000)[:-20])
  with pytest.raises(DataError, match='cut.txt.gz: damaged gzip'):
    run(str(tmp_path / 'cut.txt.gz'))
  with pytest.raises(DataError, match='holdout_rows 9999 leaves none'):
    run(str(corpus), holdout_rows=9999)
  with pytest.raises(ConfigError, match="mode 'words' is unknown"):
    run(str(corpus), mode='words')
  with pytest.raises(ConfigError, match='workers -1'):
    run(str(corpus), workers=-1)
  with pytest.raises(ConfigError, match='seq_len 4'):
    prepare(str(corpus), str(vocabulary), tmp_path / 'out', 4)
  assert sorted(p.name for p in tmp_path.iterdir()) == ['cut.txt.gz', 'empty.txt']


def test_globs_gzip_and_order(vocabulary, tmp_path):
  (tmp_path / 'b.txt').write_text('river\n')
  (tmp_path / 'a.txt.gz').write_bytes(gzip.compress(b'\xef\xbb\xbfhouse\r\n'))
  (tmp_path / 'c.md').write_text('tree\n')
  out = tmp_path / 'out'
  manifest = prepare(f'{tmp_path}/*.txt*, {tmp_path}/c.md', str(vocabulary), out, 16, 'sentences')
  assert [s['name'] for s in manifest.settings['sources']] == ['a.txt.gz', 'b.txt', 'c.md']
  tokenizer = load_tokenizer(vocabulary)
  texts = [tokenizer.backend.decode(r['input_ids'][1 : r['length'] - 1].tolist()) for r in read_rows(out)]
  assert texts == ['house', 'river', 'tree'] and manifest.counts['documents'] == 3


def test_no_free_disk(corpus, vocabulary, tmp_path, monkeypatch):
  monkeypatch.setattr(shutil, 'disk_usage', lambda _: types.SimpleNamespace(free=1 << 20))
  with pytest.raises(StorageError, match='1 MiB free, at least 64 MiB needed'):
    prepare(str(corpus), str(vocabulary), tmp_path / 'out', 32)
  assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
  'error', [OSError(28, 'No space left on device'), RuntimeError('write: No space left on device')]
)
def test_disk_full_while_writing(error, corpus, vocabulary, tmp_path, monkeypatch):
  def fail(*_):
    raise error

  monkeypatch.setattr(prepare_module.shards, 'write_dataset', fail)
  with pytest.raises(StorageError, match='out: cannot be written'):
    prepare(str(corpus), str(vocabulary), tmp_path / 'out', 32)
  assert not list(tmp_path.iterdir())


def test_scratch_of_a_killed_run_is_removed(corpus, vocabulary, tmp_path):
  code = (
    'import os, sys; from compactlm_jax.data import prepare as p\n'
    'p.shards.write_dataset = lambda *_: os._exit(9)\n'
    'p.prepare(sys.argv[1], sys.argv[2], sys.argv[3], 32)'
  )
  out = tmp_path / 'out'
  assert subprocess.run([sys.executable, '-c', code, corpus, vocabulary, out]).returncode == 9
  assert [p.name[:9] for p in tmp_path.iterdir()] == ['.out.tmp-']
  prepare(str(corpus), str(vocabulary), out, 32)
  assert [p.name for p in tmp_path.iterdir()] == ['out']


class Articles(tfds.core.GeneratorBasedBuilder):
  """Two articles."""

  VERSION = tfds.core.Version('1.0.0')

  def _info(self):
    features = tfds.features.FeaturesDict({'text': tfds.features.Text(), 'title': tfds.features.Text()})
    return tfds.core.DatasetInfo(builder=self, features=features, disable_shuffling=True)

  def _split_generators(self, dl_manager):
    return {'train': self._generate_examples()}

  def _generate_examples(self):
    for i, article in enumerate(['the river\nthe house\n\nthe tree', 'a small light']):
      yield i, {'text': article, 'title': 'large'}


@pytest.fixture(scope='module')
def articles(tmp_path_factory):
  builder = Articles(data_dir=str(tmp_path_factory.mktemp('tfds')), file_format='array_record')
  builder.download_and_prepare()
  return builder


def decoded(folder, vocabulary):
  tokenizer = load_tokenizer(vocabulary)
  return [tokenizer.backend.decode(r['input_ids'][1 : r['length'] - 1].tolist()) for r in read_rows(folder)]


def test_tfds_input(articles, vocabulary, tmp_path):
  expected = ['the river', 'the house', 'the tree', 'a small light']
  manifest = prepare(f'tfds:{articles.data_dir}', str(vocabulary), tmp_path / 'a', 16, 'sentences')
  assert decoded(tmp_path / 'a', vocabulary) == expected and manifest.counts['documents'] == 3
  assert manifest.settings['sources'][0]['name'] == 'tfds:articles/1.0.0/train'
  assert prepare(articles.data_dir, str(vocabulary), tmp_path / 'a', 16, 'sentences') == manifest
  prepare(articles.data_dir, str(vocabulary), tmp_path / 'b', 16, 'sentences', text_key='title')
  assert decoded(tmp_path / 'b', vocabulary) == ['large', 'large']
  with pytest.raises(ConfigError, match=r"no field 'body'.*text, title"):
    prepare(articles.data_dir, str(vocabulary), tmp_path / 'c', 16, text_key='body')
  with pytest.raises(ConfigError, match="tfds:no_such_name, split 'train': cannot be opened"):
    prepare('tfds:no_such_name', str(vocabulary), tmp_path / 'c', 16)
  with pytest.raises(ConfigError, match="split 'dev': cannot be opened"):
    prepare(articles.data_dir, str(vocabulary), tmp_path / 'c', 16, split='dev')


def test_hugging_face_input(vocabulary, tmp_path, monkeypatch):
  monkeypatch.setitem(sys.modules, 'datasets', None)
  with pytest.raises(ConfigError, match='hf:some/name needs the package .datasets.; install it'):
    prepare('hf:some/name', str(vocabulary), tmp_path / 'out', 16)

  class Rows(list):
    column_names = ('text',)

  fake = types.ModuleType('datasets')
  fake.load_dataset = lambda path, config, split: Rows([{'text': 'the river\n'}, {'text': f'{path} {config} {split}'}])
  monkeypatch.setitem(sys.modules, 'datasets', fake)
  prepare('hf:river:house', str(vocabulary), tmp_path / 'out', 32, 'sentences', split='tree')
  assert decoded(tmp_path / 'out', vocabulary) == ['the river', 'river house tree']
  with pytest.raises(ConfigError, match="no field 'body'"):
    prepare('hf:river', str(vocabulary), tmp_path / 'out', 32, text_key='body')
  fake.load_dataset = lambda path, config, split: Rows([{'text': None}])
  with pytest.raises(DataError, match='record 0 holds NoneType'):
    prepare('hf:river', str(vocabulary), tmp_path / 'other', 32)


@pytest.mark.skipif(not WIKITEXT.exists(), reason='shared data is absent')
def test_real_text(vocabulary, tmp_path):
  manifest = prepare(str(WIKITEXT), str(vocabulary), tmp_path / 'out', 128, workers=2)
  assert manifest.counts['real_token_fraction'] > 0.999 and manifest.counts['lines'] == 2461
  # 213,886 are published, without an <eos> per line; six are lone combining signs, which lower-casing drops.
  assert manifest.counts['words'] == 213_880
  assert json.loads((tmp_path / 'out' / 'dataset_info.json').read_text())['fileFormat'] == 'array_record'
  assert len(read_rows(tmp_path / 'out')) == manifest.counts['rows']


def test_progress_is_a_bar_on_a_terminal_and_lines_in_a_log(corpus, vocabulary, tmp_path, monkeypatch, capsys, caplog):
  monkeypatch.setattr(text, '_LOG_SECONDS', -1)
  with caplog.at_level('INFO', 'compactlm_jax'):
    prepare(str(corpus), str(vocabulary), tmp_path / 'log', 32)
  assert 'prepare: 0.0 of 0.0 MB read' in caplog.text and 'rows of 32 tokens' in caplog.text
  assert capsys.readouterr().err.count('prepare:') == 0
  monkeypatch.setattr(sys.stderr, 'isatty', lambda: True)
  prepare(str(corpus), str(vocabulary), tmp_path / 'bar', 32)
  assert 'prepare: 100%' in capsys.readouterr().err
