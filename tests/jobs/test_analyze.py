"""`compactlm analyze` on tiny models: what it writes, what it counts, what it refuses."""

import dataclasses
import gzip
import json
import re

import jax.numpy as jnp
import numpy as np
import pytest
from tiny import ENCODER

from compactlm_jax import cli
from compactlm_jax.analysis.report import KEYS
from compactlm_jax.config import Cell, EncoderConfig
from compactlm_jax.data.wordpiece import train_wordpiece
from compactlm_jax.errors import DataError
from compactlm_jax.interop.bundle import Bundle, save_pretrained
from compactlm_jax.interop.folder import open_folder
from compactlm_jax.interop.tokenizer_files import read_tokenizer
from compactlm_jax.jobs import analyze, load_model
from compactlm_jax.jobs.grid import cell_bundle
from compactlm_jax.nn.encoder import encoder_shapes
from compactlm_jax.tree import map_named

pytest.importorskip('matplotlib')

V = 120
WORDS = 'the small large river house tree runs stands falls under over near cold warm light blue'.split()
PLAIN = dataclasses.replace(ENCODER, vocab_size=V)
MIXED = EncoderConfig.mixed(
  heads=4, head_ratio=2, hidden_size=16, num_layers=1, vocab_size=V, max_positions=20, conv_sees_padding=True
)


def save(config, tokenizer, folder, pruned=''):
  """Random weights, negative ones of kernels that end in `pruned` replaced by zeros."""
  rng = np.random.default_rng(0)
  shapes = encoder_shapes(config)

  def fresh(name, leaf):
    values = 0.3 * rng.normal(size=leaf.shape)
    return jnp.asarray(np.maximum(values, 0) if pruned and name.endswith(pruned) else values, jnp.float32)

  params = map_named(fresh, shapes)
  save_pretrained(Bundle(config, params, read_tokenizer(open_folder(tokenizer))), folder)


@pytest.fixture(scope='module')
def files(tmp_path_factory):
  """text.txt, plain/ and mixed/ of one vocabulary, other/ of another one."""
  folder = tmp_path_factory.mktemp('analyze')
  rng = np.random.default_rng(0)
  lines = [' '.join(rng.choice(WORDS, n)) + '.' for n in (3, 30, 9, 5)]
  (folder / 'text.txt').write_text('\n'.join([lines[0], '', *lines[1:]]) + '\n')
  (folder / 'text.txt.gz').write_bytes(gzip.compress((folder / 'text.txt').read_bytes()))
  long = '\n'.join(' '.join(rng.permutation(WORDS)) + '.' for _ in range(50))
  (folder / 'words.txt').write_text(long)
  (folder / 'others.txt').write_text(long.replace('river', 'mountain'))
  for words, tokenizer in (('words', 'tokenizer'), ('others', 'other_tokenizer')):
    train_wordpiece(str(folder / f'{words}.txt'), V, folder / tokenizer)
  save(PLAIN, folder / 'tokenizer', folder / 'plain')
  save(MIXED, folder / 'tokenizer', folder / 'mixed', pruned='attention/value/kernel')
  save(PLAIN, folder / 'other_tokenizer', folder / 'other')
  return folder


def call(files, output, *flags, model='mixed', text='text.txt'):
  return cli.main(['analyze', f'--model={files / model}', f'--text={files / text}', f'--output={output}', *flags])


@pytest.fixture(scope='module')
def compared(files, tmp_path_factory):
  """A finished analysis of a ConvBERT beside a BERT, from a .gz."""
  output = tmp_path_factory.mktemp('out') / 'analysis'
  assert call(files, output, f'--compare={files / "plain"}', text='text.txt.gz') == 0
  return output


def strict(path):
  def refuse(name):
    raise AssertionError(f'{name} is not JSON')

  return json.loads(path.read_text(), parse_constant=refuse)


def test_everything_is_written_and_listed(compared):
  """Mutations: a picture not in the report; NaN of taps left in the JSON."""
  found = strict(compared / 'analysis.json')
  names = {name for key in KEYS for name in key.split(', ')}
  assert set(found) == names and found['complete'] is True
  pictures = set(found['pictures'])
  assert {p.name for p in compared.iterdir()} == pictures | {'analysis.json', 'report.md'}
  assert pictures == {
    'model_attention_layer_01.png', 'model_convolution_layer_01.png', 'model_concentration.png', 'model_values.png',
    'compare_attention_layer_01.png', 'compare_attention_layer_02.png', 'compare_concentration.png',
    'compare_values.png', 'attention_kl.png', 'value_kl.png', 'cka.png', 'components.png',
    'model_remaining.png', 'surviving_weights.png',
  }  # fmt: skip
  report = (compared / 'report.md').read_text()
  assert all(f'[{name}]({name}): {caption}' in report for name, caption in found['pictures'].items())
  assert '# mixed and plain' in report and '1 of them cut to 16 tokens' in report


def test_counts_and_shapes(compared):
  """Blank lines are no rows; the length is what both models have. Mutations: count padding; cut without counting."""
  found = strict(compared / 'analysis.json')
  text, sentence = found['text'], found['sentence']
  assert (text['rows'], text['cut_rows'], text['seq_len']) == (4, 1, 16)
  assert sentence['line'] == 3 and sentence['tokens'][0] == '[CLS]' and len(sentence['tokens']) == 12
  assert text['tokens'] == 6 + 16 + 12 + 8
  shape = np.shape(sentence['model']['attention'])
  assert shape == (1, 2, 12, 12) and np.shape(sentence['compare']['attention']) == (2, 2, 12, 12)
  assert np.shape(sentence['model']['taps']) == (1, 2, 12, 9) and sentence['model']['taps'][0][0][0][0] is None
  assert sentence['compare']['taps'] is None
  pairs = found['layer_pairs']
  assert np.shape(pairs['attention_kl']) == np.shape(pairs['value_kl']) == (2, 1)
  assert np.shape(pairs['cka']) == (3, 2) and (pairs['rows'], pairs['columns']) == ('compare', 'model')
  for role, layers in (('model', 1), ('compare', 2)):
    own = found['concentration'][role]
    assert np.shape(own['heads']) == (layers, 2) == np.shape(own['entropy'])
    np.testing.assert_allclose(np.add(own['near'], own['far']), 1, atol=2e-5)
  assert 'convolution' in found['components']['model']['parts']
  assert set(found['components']['compare']['parts']['encoder']) == {
    'parameters', 'flops', 'xla_flops', 'milliseconds',
  }  # fmt: skip


def test_what_pruning_left_is_counted(compared):
  """One matrix of the first model lost its negative weights. Mutations: the histogram of one model; shares of zeros."""
  found = strict(compared / 'analysis.json')['sparsity']
  one, other = found['model'], found['compare']
  assert other['density'] == 1 and other['nonzero'] == other['weights'] == sum(other['counts']) + other['beyond']
  assert 0.3 < one['by_matrix']['attention/value'][0] < 0.7 and one['by_matrix']['attention/query'] == [1.0]
  assert sum(one['counts']) + one['beyond'] == one['nonzero'] < one['weights'] and one['edges'] == other['edges']
  pictures = strict(compared / 'analysis.json')['pictures']
  assert 'in mixed and plain' in pictures['surviving_weights.png']
  said = f'that can be masked {one["nonzero"]:,} remain ({100 * one["density"]:.2f} %)'
  assert said in (compared / 'report.md').read_text()


def test_an_earlier_analysis_is_replaced_and_nothing_else(files, compared, tmp_path, capsys):
  """Mutations: leave pictures of the earlier one; overwrite a folder with other files; trust its list of files."""
  output, bystander = tmp_path / 'analysis', tmp_path / 'bystander.png'
  output.mkdir()
  bystander.write_text('mine')
  for path in compared.iterdir():
    (output / path.name).write_bytes(path.read_bytes())
  old = strict(output / 'analysis.json')
  old['pictures'] |= {'../bystander.png': 'x'}
  (output / 'analysis.json').write_text(json.dumps(old))
  assert call(files, output, '--rows=1', '--sentence=1', model='plain') == 0
  found = strict(output / 'analysis.json')
  assert found['text']['rows'] == 1 and set(found['models']) == {'model'}
  assert found['sparsity'] is None  # nothing was pruned
  assert {p.name for p in output.iterdir()} == set(found['pictures']) | {'analysis.json', 'report.md'}
  assert bystander.read_text() == 'mine'
  np.testing.assert_allclose(np.diag(found['layer_pairs']['cka']), 1, rtol=1e-3)
  (output / 'notes.txt').write_text('mine')
  capsys.readouterr()
  assert call(files, output) == 78
  assert "holds 'notes.txt', which no analysis wrote" in capsys.readouterr().err
  assert strict(output / 'analysis.json') == found


def test_a_killed_analysis_is_taken_over(tmp_path):
  """Mutation: write the list of files last."""

  class Killed(Exception):
    pass

  class Content(dict):
    def items(self):
      yield 'a.png', b'1'
      raise Killed

  with pytest.raises(Killed):
    analyze._write(Content({'a.png': b'1', 'b.png': b'2'}), str(tmp_path))
  assert strict(tmp_path / 'analysis.json')['complete'] is False
  analyze._require_own(str(tmp_path))


@pytest.mark.parametrize(
  ('flags', 'code', 'message'),
  [
    ({'--compare': 'other'}, 78, 'its tokenizer is not that of'),
    ({'--text': 'none.txt'}, 65, 'no file matches'),
    ({'--text': 'empty.txt'}, 65, 'no tokens to analyse'),
    ({'--model': 'convolution'}, 78, 'self_attention: a model without self-attention'),
    ({'--model': 'none'}, None, 'none'),
    ({'--seq_len': '21'}, 78, '--seq_len: 21 is more than the 20 positions'),
    ({'--seq_len': '2'}, 78, '--seq_len: 2 leaves no room'),
    ({'--sentence': '5'}, 65, '--sentence: .* has 4 lines that were read, none with tokens of number 5'),
    ({'--output': 'text.txt'}, 78, 'is a file; name a folder'),
  ],
)
def test_refusals(files, tmp_path, capsys, monkeypatch, flags, code, message):
  (files / 'empty.txt').write_text('\n\n')
  load = analyze.load_model

  def without_attention(path):  # no Hugging Face folder says this
    bundle = load(str(path).replace('convolution', 'mixed'))
    return dataclasses.replace(bundle, config=dataclasses.replace(bundle.config, self_attention=False))

  if flags.get('--model') == 'convolution':
    monkeypatch.setattr(analyze, 'load_model', without_attention)
  named = {'--model': 'mixed', '--text': 'text.txt', '--output': None, **flags}
  paths = {flag: files / value for flag, value in named.items() if value and not flag.startswith('--se')}
  numbers = {flag: value for flag, value in flags.items() if flag.startswith('--se')}
  arguments = {'--output': tmp_path / 'out', **paths, **numbers}
  got = cli.main(['analyze', *(f'{flag}={value}' for flag, value in arguments.items())])
  said = capsys.readouterr().err
  assert got == code if code else got in (65, 78)
  assert 'Traceback' not in said and re.search(message, said), said
  assert not (tmp_path / 'out').exists()


def test_a_sub_network_is_drawn_beside_what_it_was_cut_from(files, tmp_path):
  """Whichever is named first. Mutations: no picture if it is the first; the layers of the other one."""
  cut, output = tmp_path / 'cut', tmp_path / 'out'
  save_pretrained(cell_bundle(load_model(str(files / 'plain')), Cell(0.5, 0.5)), cut)
  flags = [f'--model={cut}', f'--compare={files / "plain"}', f'--text={files / "text.txt"}', f'--output={output}']
  assert cli.main(['analyze', *flags]) == 0
  found = strict(output / 'analysis.json')
  drawn = [name for name in found['pictures'] if name.startswith('cut_')]
  assert drawn == ['cut_layer_01.png'] and (output / drawn[0]).read_bytes().startswith(b'\x89PNG')
  assert 'layer 1 of plain before heads were cut' in found['pictures'][drawn[0]]
  sizes = {role: (model['heads'], model['layers']) for role, model in found['models'].items()}
  assert sizes == {'model': (1, 1), 'compare': (2, 2)}
  assert np.shape(found['layer_pairs']['attention_kl']) == (2, 1)


def test_names_of_pictures(tmp_path, monkeypatch):
  """Those that were given, and the folder's own for '.'. Mutations: the name that is written; the links' targets."""
  for name in ('large', 'small'):
    (tmp_path / name).mkdir()
  (tmp_path / 'link').symlink_to('large')
  monkeypatch.chdir(tmp_path / 'small')
  assert analyze._names({'model': '.', 'compared': '../link'}) == ['small', 'link']
  assert analyze._names({'model': '..', 'compared': 'gs://bucket/a/link/'}) == [tmp_path.name, 'link']
  assert analyze._names({'model': '.', 'compared': '../small'}) == ['small (model)', 'small (compared)']


def test_rows_are_batched_once_each_in_few_shapes(files):
  """Mutations: forget the last window; sort away the numbers of lines."""
  tokenizer = analyze.tokenizer_of(files / 'plain')
  rng = np.random.default_rng(1)
  lines = [' '.join(rng.choice(WORDS, rng.integers(1, 40))) for _ in range(70)] + ['\u200b'] * 2
  reading = analyze._Reading(tokenizer, 71, 32, 0)
  batches = list(reading.batches(iter(lines), 4))
  lengths = [len(x) + 2 for x in tokenizer.encode(lines[:70])]
  assert sorted(int(n) for _, mask in batches for n in mask.sum(1) if n) == sorted(min(n, 32) for n in lengths)
  assert reading.rows == 71 and reading.cut == sum(n > 32 for n in lengths)
  assert {ids.shape for ids, _ in batches} <= {(4, 8), (4, 16), (4, 32)}
  line, ids = reading.chosen('x')
  assert lengths[line - 1] == len(ids) in range(8, 25)
  assert line - 1 == next(i for i, n in enumerate(lengths) if n in range(8, 25))
  with pytest.raises(DataError, match='number 99'):
    asked = analyze._Reading(tokenizer, 0, 32, 99)
    list(asked.batches(iter(lines), 4))
    asked.chosen('x')
