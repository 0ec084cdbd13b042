"""`compactlm export`: which files a model gives, what is counted of a pruned one, what is refused."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ragged import ENCODERS, assert_same, masked, masks_of, outputs, random_tree

from compactlm_jax import cli
from compactlm_jax.checkpoint import Checkpoints
from compactlm_jax.config import PruneConfig, to_json
from compactlm_jax.errors import ConfigError, StorageError
from compactlm_jax.interop.bundle import Bundle, from_pretrained, save_pretrained
from compactlm_jax.jobs import export, load_model, run_export
from compactlm_jax.jobs.export_tables import as_dict, as_text
from compactlm_jax.jobs.latency import Latencies, Timing
from compactlm_jax.tree import map_named, named_leaves, nested
from compactlm_jax.types import TrainState

CONFIG = dataclasses.replace(ENCODERS['bert without pooler'], type_vocab_size=2)
HEADS, NEURONS = (2, 1, 0), (3, 0, 6)


def files(folder):
  return {p.name: p.read_bytes() for p in folder.iterdir()}


@pytest.fixture(scope='module')
def folders(tmp_path_factory):
  """dense/, heads/ (heads and neurons pruned), even/ (one head and two neurons left everywhere), weights/ (every other
  weight pruned): folders of the stock sizes."""
  folder, tree = tmp_path_factory.mktemp('export'), random_tree(CONFIG)

  def every_other(name, leaf):
    mask = np.arange(leaf.size).reshape(leaf.shape) % 2 if name.endswith('kernel') and 'layers' in name else 1
    return jnp.asarray(leaf * mask, jnp.float32)

  trees = {
    'dense': tree,
    'heads': masked(tree, CONFIG, masks_of(CONFIG, HEADS, NEURONS)),
    'even': masked(tree, CONFIG, masks_of(CONFIG, (1, 1, 1), (2, 2, 2))),
    'weights': map_named(every_other, tree),
  }
  for name, params in trees.items():
    save_pretrained(Bundle(CONFIG, params), folder / name)
  return folder


@pytest.fixture
def measured(monkeypatch):
  """The models that `measure` is given, in place of half a minute of work."""
  calls = []

  def measure(models, batch_sizes, seq_len, seconds):
    calls.append((dict(models), batch_sizes, seq_len))
    rows = [Timing(name, b, 'jax', 2.0, 1.0 if name == 'dense' else 0.4, 3) for b in batch_sizes for name in models]
    return Latencies(tuple(rows), seq_len, 'cpu')

  monkeypatch.setattr(export, 'measure', measure)
  return calls


def test_a_few_dead_neurons_leave_the_stock_sizes(tmp_path, measured):
  """One neuron is not worth a modelling file; 'shrunk' removes it all the same. Mutation: no least share."""
  wide = dataclasses.replace(CONFIG, intermediate_size=200)
  tree = masked(random_tree(wide), wide, masks_of(wide, (wide.num_heads,) * 3, (200, 199, 200)))
  save_pretrained(Bundle(wide, tree), tmp_path / 'model')
  auto = run_export(str(tmp_path / 'model'), str(tmp_path / 'auto'))
  assert auto.bundle.config == wide and not (tmp_path / 'auto' / 'modeling_compactlm.py').exists()
  shrunk = run_export(str(tmp_path / 'model'), str(tmp_path / 'shrunk'), layout='shrunk')
  assert shrunk.bundle.config.neurons_per_layer == (200, 199, 200)
  assert from_pretrained(tmp_path / 'shrunk').config == shrunk.bundle.config


def test_a_model_without_zeros_gives_the_files_it_always_gave(folders, tmp_path, measured):
  """Nothing is counted or timed. Mutations: shrink always; count a dense model as pruned."""
  found = run_export(str(folders / 'dense'), str(tmp_path / 'out'), latency=True)
  assert files(tmp_path / 'out') == files(folders / 'dense')
  assert found.zeros is None and found.latency is None and not measured
  assert as_text(found) == f'{tmp_path}/out: bert, 3 layers, 8 wide' and as_dict(found)['bytes'] is None


def test_a_sub_network_without_zeros_is_laid_out(folders, tmp_path):
  """As `export --width` does it, and from its folder again: one head of two is filled up. Mutation: refuse every model
  without zeros."""
  run_export(str(folders / 'even'), str(tmp_path / 'even'))
  cell = from_pretrained(tmp_path / 'even')
  assert cell.config.num_heads == 1
  for layout in ('shrunk', 'padded'):
    export.export_model(cell, str(tmp_path / layout), layout=layout)
  run_export(str(tmp_path / 'even'), str(tmp_path / 'filled'), layout='padded')
  assert files(tmp_path / 'filled') == files(tmp_path / 'padded')
  assert from_pretrained(tmp_path / 'filled').config.num_heads == CONFIG.num_heads
  with pytest.raises(ConfigError, match='--layout=shrunk: .*even has no zeros'):
    run_export(str(tmp_path / 'even'), str(tmp_path / 'none'), layout='shrunk')


@pytest.mark.parametrize('name', ['heads', 'even'])
def test_zeros_of_whole_heads_and_neurons_are_removed(name, folders, tmp_path, measured):
  """The outputs stay. Mutations: export the dense model; time one of them twice; count heads of the small model."""
  found = run_export(str(folders / name), str(tmp_path / 'out'), latency=True)
  dense, small = load_model(folders / name), from_pretrained(tmp_path / 'out')
  assert_same(outputs(small.params, small.config), outputs(dense.params, dense.config))
  if name == 'heads':
    assert (small.config.heads_per_layer, small.config.neurons_per_layer) == (HEADS, NEURONS)
  else:
    assert (small.config.num_heads, small.config.intermediate_size, small.config.ragged) == (1, 2, False)
  assert found.bytes == (tmp_path / 'out' / 'model.safetensors').stat().st_size
  assert found.dense_bytes == (folders / name / 'model.safetensors').stat().st_size > found.bytes
  ((models, batches, length),) = measured
  assert 'Heads (of 2) and neurons (of 6) that are left' in as_text(found)
  assert batches == (1, 32) and length == 8 and list(models) == ['dense', 'exported']
  assert models['dense'].config == CONFIG and models['exported'].config == small.config == found.bundle.config


def test_padded_keeps_the_stock_sizes(folders, tmp_path, measured):
  """Of a smaller folder too. Mutations: shrink before padding; count zeros of what was removed as never there."""
  found = run_export(str(folders / 'heads'), str(tmp_path / 'padded'), layout='padded', latency=True)
  assert files(tmp_path / 'padded') == files(folders / 'heads') and found.bytes == found.dense_bytes
  assert list(measured[0][0]) == ['dense'] and 'save no time here' in as_text(found)
  small = run_export(str(folders / 'heads'), str(tmp_path / 'small'))
  again = run_export(str(tmp_path / 'small'), str(tmp_path / 'again'), layout='padded', latency=True)
  stock = from_pretrained(tmp_path / 'again')
  assert not stock.config.ragged and again.bytes == again.dense_bytes == found.bytes
  assert measured[1][0]['dense'].config == stock.config == again.dense_config
  assert_same(outputs(stock.params, stock.config), outputs(small.bundle.params, small.bundle.config))


def test_sparse_folders_hold_the_same_weights(folders, tmp_path, measured):
  """Mutation: shrink them too, or round them."""
  found = run_export(str(folders / 'weights'), str(tmp_path / 'out'), format='sparse', latency=True)
  assert not (tmp_path / 'out' / 'model.safetensors').exists() and list(measured[0][0]) == ['dense']
  back, own = (named_leaves(from_pretrained(path).params) for path in (tmp_path / 'out', folders / 'weights'))
  for name, leaf in own.items():
    np.testing.assert_array_equal(back[name], leaf, err_msg=name)
  assert found.bytes == (tmp_path / 'out' / 'model.sparse.safetensors').stat().st_size
  assert found.dense_bytes == (folders / 'weights' / 'model.safetensors').stat().st_size
  assert found.layers < found.dense_layers == sum(a.nbytes for n, a in own.items() if n.startswith('encoder/layers'))
  assert as_dict(found)['bytes'] == {
    'bytes': found.bytes, 'dense_bytes': found.dense_bytes, 'layers': found.layers, 'dense_layers': found.dense_layers,
  }  # fmt: skip
  rounded = run_export(str(folders / 'weights'), str(tmp_path / 'int8'), format='sparse', values='int8')
  assert rounded.layers < found.layers and rounded.latency is None


def test_onnx_is_smaller_too(folders, tmp_path):
  """Mutation: write the graph of the dense model."""
  onnx = pytest.importorskip('onnx')
  found = run_export(str(folders / 'heads'), str(tmp_path / 'out'), format='onnx')
  model = onnx.load(tmp_path / 'out' / 'model.onnx')
  assert found.bytes == (tmp_path / 'out' / 'model.onnx').stat().st_size
  held = sum(int(np.prod(tensor.dims)) for tensor in model.graph.initializer)
  small = sum(leaf.size for leaf in jax.tree.leaves(found.bundle.params))
  dense = sum(leaf.size for leaf in jax.tree.leaves(load_model(folders / 'heads').params))
  assert small <= held < dense


@pytest.mark.parametrize(
  ('name', 'options', 'message'),
  [
    ('dense', {'format': 'sparse'}, r'--format=sparse: .*dense has no zeros .* nothing of it was pruned; prune it'),
    (
      'dense',
      {'layout': 'shrunk'},
      '--layout=shrunk: .*dense has no zeros .* or leave --layout out',
    ),
    ('dense', {'layout': 'padded'}, '--layout=padded: .*dense has no zeros .* or leave --layout out'),
    ('weights', {'values': 'int8'}, '--values=int8: is for --format=sparse; --format=hf holds float32'),
    ('weights', {'values': 'bfloat16', 'format': 'onnx'}, '--values=bfloat16: is for --format=sparse'),
    ('weights', {'layout': 'padded', 'format': 'onnx'}, '--layout=padded: is for --format=hf'),
    ('weights', {'layout': 'padded', 'format': 'sparse'}, '--layout=padded: is for --format=hf'),
    ('weights', {'format': 'tf'}, '--format=tf: use one of hf, sparse, onnx'),
    ('weights', {'layout': 'wide'}, '--layout=wide: use one of auto, shrunk, padded'),
    ('weights', {'format': 'sparse', 'values': 'int4'}, '--values=int4: use one of float32, bfloat16, int8'),
  ],
)
def test_options_that_do_not_go_together_are_refused(name, options, message, folders, tmp_path):
  """Before anything is written. Mutation: leave a check out."""
  with pytest.raises(ConfigError, match=message):
    run_export(str(folders / name), str(tmp_path / 'out'), **options)
  assert not (tmp_path / 'out').exists()


def test_the_tables_hold_what_numpy_counts(folders, tmp_path, measured):
  """Mutations: what remains for what is gone; the slower engine as the faster one."""
  found = run_export(str(folders / 'heads'), str(tmp_path / 'out'), latency=True)
  text = as_text(found)
  leaves = {n: np.asarray(a) for n, a in named_leaves(load_model(folders / 'heads').params).items()}
  kernels = {n: a for n, a in leaves.items() if 'layers' in n and n.endswith('kernel')}
  gone, whole = sum(int((a == 0).sum()) for a in kernels.values()), sum(a.size for a in kernels.values())
  assert f"Zeros: {gone:,} of {whole:,} weights in the encoder's matrices ({100 * gone / whole:.2f} %" in text
  tables = [[[c.strip() for c in line[1:-1].split('|')] for line in block.splitlines()] for block in text.split('\n\n')]
  zeros = next(t for t in tables if t[0][0] == 'layer' and t[0][-1] == 'all')
  assert zeros[0] == ['layer', 'query', 'key', 'value', 'output', 'ffn_in', 'ffn_out', 'all'] and len(zeros) == 6
  for column, matrix in ((1, 'attention/query'), (5, 'ffn_in')):
    shares = [f'{100 * np.mean(layer == 0):.2f}' for layer in kernels[f'encoder/layers/{matrix}/kernel']]
    assert [row[column] for row in zeros[2:5]] == shares
  assert [row[0] for row in zeros[2:]] == ['1', '2', '3', 'all'] and zeros[-1][-1] == f'{100 * gone / whole:.2f}'
  sizes = next(t for t in tables if t[0] == ['layer', 'heads', 'neurons'])
  assert sizes[2:] == [[str(i), str(h), str(n)] for i, (h, n) in enumerate(zip(HEADS, NEURONS), 1)]
  disk = next(t for t in tables if t[0][1:] == ['exported', 'dense', 'of dense'])
  share = f'{100 * found.bytes / found.dense_bytes:.1f} %'
  assert disk[2] == ['file of weights', f'{found.bytes:,}', f'{found.dense_bytes:,}', share]
  assert next(line.split() for line in text.splitlines() if line.startswith('| exported |    32'))[5:8:2] == [
    '2.00',
    '2.50',
  ]


def test_the_command_prints_the_numbers_and_writes_them(folders, tmp_path, measured, capsys):
  """Beside the model's folder, whose bytes are the same each time. Mutations: write them inside; time it regardless."""
  flags = [f'--checkpoint={folders / "heads"}', f'--report={tmp_path}/numbers.json']
  assert cli.main(['export', f'--output={tmp_path}/out', *flags]) == 0
  said = capsys.readouterr().out
  assert all(f'\n{word}' in said for word in ('Zeros: ', 'Heads (of', 'Bytes on disk', 'Latency'))
  found = json.loads((tmp_path / 'numbers.json').read_text())
  assert found['heads_per_layer'] == list(HEADS) and found['zeros']['density'] < 1
  assert found['bytes']['bytes'] < found['bytes']['dense_bytes'] and found['latency']['rows'][0]['name'] == 'dense'
  first = files(tmp_path / 'out')
  assert cli.main(['export', f'--output={tmp_path}/out', '--nolatency', *flags]) == 0
  assert files(tmp_path / 'out') == first and len(measured) == 1
  assert 'Latency' not in capsys.readouterr().out
  assert json.loads((tmp_path / 'numbers.json').read_text())['latency'] is None


def test_a_failed_export_leaves_the_earlier_one(folders, tmp_path, monkeypatch):
  """Mutation: write file by file into the folder."""
  run_export(str(folders / 'heads'), str(tmp_path / 'out'))
  before = files(tmp_path / 'out')
  from compactlm_jax.interop import writing

  def full(content, folder):
    raise OSError(28, 'No space left on device')

  monkeypatch.setattr(writing, '_write', full)
  for options in ({}, {'format': 'sparse'}):
    with pytest.raises(StorageError, match='No space left'):
      run_export(str(folders / 'weights'), str(tmp_path / 'out'), **options)
  assert files(tmp_path / 'out') == before and [p.name for p in tmp_path.iterdir()] == ['out']


def test_a_pruned_run_is_exported_with_its_masks(tmp_path):
  """A checkpoint of scores, L0's. Mutation: export the unmasked weights."""
  tree, masks = random_tree(CONFIG), masks_of(CONFIG, HEADS, NEURONS)
  scores = nested({name: 9.0 * (2.0 * jnp.asarray(mask, jnp.float32) - 1) for name, mask in masks.items()})
  prune = PruneConfig(method='l0', structure='heads+neurons')
  model = {'encoder': to_json(CONFIG), 'prune': to_json(prune)}
  with Checkpoints(tmp_path / 'run' / 'checkpoints', 1) as checkpoints:
    state = TrainState(jnp.int32(1), {**tree, 'scores': scores}, ())
    checkpoints.save(1, state, {'model': model, 'task': 'prune', 'identity': {}}, wait=True)
  found = run_export(str(tmp_path / 'run'), str(tmp_path / 'out'))
  small = from_pretrained(tmp_path / 'out')
  assert (small.config.heads_per_layer, small.config.neurons_per_layer) == (HEADS, NEURONS)
  assert_same(outputs(small.params, small.config), outputs(masked(tree, CONFIG, masks), CONFIG))
  assert found.zeros['density'] == pytest.approx(found.zeros['nonzero'] / found.zeros['weights'])
