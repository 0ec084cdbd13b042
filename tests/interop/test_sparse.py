"""Sparse folders: written, measured, read back to the same model, and refused where they are inconsistent."""

import dataclasses
import fnmatch
import json

import jax
import numpy as np
import pytest
import safetensors.numpy
from killing import Kill, killed_at

from compactlm_jax.config import EncoderConfig
from compactlm_jax.errors import ConfigError, DataError, NumericsError
from compactlm_jax.interop import folder as folder_module
from compactlm_jax.interop import hub
from compactlm_jax.interop.bundle import Bundle, from_pretrained, save_pretrained
from compactlm_jax.interop.sparse import save_sparse
from compactlm_jax.interop.tokenizer_files import TokenizerFiles
from compactlm_jax.nn.encoder import encode, encoder_shapes
from compactlm_jax.tree import map_named, named_leaves

SIZES = dict(vocab_size=37, hidden_size=32, num_layers=2, num_heads=4, max_positions=32)
KINDS = {
  'bert': {},
  'pooled': dict(architecture='bert', pooler=True),
  'electra': dict(embedding_size=8),
  'convbert': dict(
    embedding_size=8, num_heads=2, head_size=8, conv_kernel_size=3, num_groups=2, conv_sees_padding=True
  ),
  'ragged': dict(
    architecture='bert', intermediate_size=128, num_layers=3, heads_per_layer=(1, 0, 4), neurons_per_layer=(16, 128, 0)
  ),
}
QUERY = 'encoder.layer.1.attention.self.query.weight'


def _bundle(kind='bert', density=0.03, classes=0, tokenizer=None, **fields):
  """Kernels of the layers with this share of values left by a mask, among negative zeros."""
  config = EncoderConfig(**{'architecture': kind, **SIZES, **KINDS[kind], **fields})
  rng = np.random.default_rng(7)

  def leaf(name, shape):
    value = rng.standard_normal(shape.shape).astype(np.float32) / 4
    return value * (rng.random(shape.shape) < density) if '/layers' in name and name.endswith('/kernel') else value

  params = map_named(leaf, encoder_shapes(config))
  if classes:
    kernel = rng.standard_normal((config.hidden_size, classes)).astype(np.float32)
    params['classifier'] = {'kernel': kernel, 'bias': np.ones(classes, np.float32)}
  return Bundle(config, params, tokenizer, ('no', 'yes', 'maybe')[: classes if classes > 1 else 0])


def _files(folder):
  return {p.name: p.read_bytes() for p in folder.iterdir()}


def _logits(bundle):
  rng = np.random.default_rng(0)
  ids = rng.integers(0, 37, (2, 9)).astype(np.int32)
  config = dataclasses.replace(bundle.config, scan_unroll=1)
  out = jax.jit(encode, static_argnums=1)(bundle.params, config, ids, np.ones_like(ids), np.zeros_like(ids))
  x = np.asarray(out.last_BTD[:, 0] if out.pooled_BD is None else out.pooled_BD)
  return x @ np.asarray(bundle.params['classifier']['kernel']) + np.asarray(bundle.params['classifier']['bias'])


@pytest.mark.parametrize('kind', KINDS)
def test_float32_comes_back_exactly_with_the_same_logits(kind, tmp_path, caplog):
  """Mutation: swap two values of a matrix; forget the prefix 'bert.' that a head brings."""
  bundle = _bundle(kind, classes=3)
  save_sparse(bundle, tmp_path / 'e')
  back = from_pretrained(tmp_path / 'e')
  assert 'auto_map' not in json.loads((tmp_path / 'e/config.json').read_text())
  assert not list((tmp_path / 'e').glob('*.py*')) and 'transformers' not in caplog.text
  assert (back.config, back.labels) == (bundle.config, bundle.labels)
  expected, found = named_leaves(bundle.params), named_leaves(back.params)
  assert list(found) == list(expected)
  for name, leaf in expected.items():
    np.testing.assert_array_equal(found[name], leaf, err_msg=name)
  np.testing.assert_array_equal(_logits(back), _logits(bundle))


@pytest.mark.parametrize('values', ['bfloat16', 'int8'])
@pytest.mark.parametrize('kind', KINDS)
def test_rounded_values_touch_the_matrices_of_the_encoder_alone(kind, values, tmp_path):
  """Mutation: take every tensor of two axes for a matrix: ConvBERT's pointwise bias and the heads have two."""
  bundle = _bundle(kind, density=0.4, classes=2)
  save_sparse(bundle, tmp_path / 'e', values)
  back = named_leaves(from_pretrained(tmp_path / 'e').params)
  for name, leaf in named_leaves(bundle.params).items():
    error = np.abs(np.asarray(back[name]) - leaf)
    if name.startswith('encoder/') and name.endswith(('/kernel', '/embedding')):
      assert 0 < error.max() and not np.asarray(back[name])[leaf == 0].any()
      assert (error <= (np.abs(leaf) / 256 if values == 'bfloat16' else np.abs(leaf).max() / 254 * 1.001)).all()
    else:
      np.testing.assert_array_equal(back[name], leaf, err_msg=name)


def test_the_folder_is_that_of_save_pretrained_but_for_the_weights(tools, tmp_path):
  (tmp_path / 'vocab').mkdir()
  tools.add_vocab(tmp_path / 'vocab')
  bundle = _bundle(classes=2, tokenizer=TokenizerFiles(_files(tmp_path / 'vocab')))
  save_pretrained(bundle, tmp_path / 'dense')
  report = save_sparse(bundle, tmp_path / 'sparse', 'int8')
  dense, sparse = _files(tmp_path / 'dense'), _files(tmp_path / 'sparse')
  assert set(sparse) - set(dense) == {'model.sparse.safetensors'}
  assert set(dense) - set(sparse) == {'model.safetensors'}
  assert {name for name in set(dense) & set(sparse) if dense[name] != sparse[name]} == {
    'config.json',
    'README.md',
    'manifest.json',
  }
  config = json.loads(sparse['config.json'])
  assert config.pop('compactlm_sparse') == {'version': 1, 'values': 'int8'}
  assert config == json.loads(dense['config.json'])
  assert b'int8' in sparse['README.md'] and b'only compactlm-jax reads this folder' in sparse['README.md']
  assert b'from transformers' not in sparse['README.md']
  assert from_pretrained(tmp_path / 'sparse').tokenizer.files == bundle.tokenizer.files
  assert report.bytes == len(sparse['model.sparse.safetensors'])
  assert 0 <= len(dense['model.safetensors']) - report.dense_bytes < 5000  # BERT's head, as transformers has it
  assert any(fnmatch.fnmatch('model.sparse.safetensors', pattern) for pattern in hub.PATTERNS)
  save_sparse(bundle, tmp_path / 'sparse', 'int8')  # over the earlier one
  assert _files(tmp_path / 'sparse') == sparse
  save_pretrained(bundle, tmp_path / 'sparse')
  assert _files(tmp_path / 'sparse') == dense


@pytest.mark.parametrize('call', [1, 3, 6])
def test_a_kill_leaves_the_old_export_or_none(call, tmp_path, monkeypatch):
  """Mutation: write the weights after the other files."""
  save_sparse(_bundle(), tmp_path / 'e')
  old = _files(tmp_path / 'e')
  with killed_at(monkeypatch, call), pytest.raises(Kill):
    save_sparse(_bundle(), tmp_path / 'e', 'int8')
  assert not (tmp_path / 'e').exists() or _files(tmp_path / 'e') == old


def test_a_layer_of_bert_base_takes_what_was_promised(tmp_path):
  """97 % zeros: at most 6 % of the dense layer in float32 and 2.5 % in int8. Mutation: columns alone, without gaps."""
  bundle = _bundle(vocab_size=2, max_positions=2, hidden_size=768, num_heads=12, num_layers=1)
  dense = 4 * sum(leaf.size for name, leaf in named_leaves(bundle.params).items() if '/layers/' in name)
  for values, most in (('float32', 0.06), ('int8', 0.025)):
    layers = save_sparse(bundle, tmp_path / values, values).layers
    assert layers.dense_bytes == dense and layers.elements == dense // 4
    assert layers.bytes <= most * dense
    assert layers.encodings == {'dense': 10, 'gaps': 6}
    file = (tmp_path / values / 'model.sparse.safetensors').stat().st_size
    outside = sum(leaf.size for name, leaf in named_leaves(bundle.params).items() if '/layers/' not in name)
    assert file <= most * dense + 4 * outside  # with the header


@pytest.mark.parametrize('values', ['bfloat16', 'int8'])
def test_the_report_adds_up(values, tmp_path):
  """Mutation: leave scales out of the bytes; count negative zeros."""
  bundle = _bundle('convbert', density=0.3, classes=2)
  report = save_sparse(bundle, tmp_path / 'e', values)
  stored = safetensors.numpy.load_file(tmp_path / 'e/model.sparse.safetensors')
  assert sum(size.bytes for size in report.tensors.values()) == sum(array.nbytes for array in stored.values())
  assert sum(size.bytes for size in report.kinds.values()) == sum(size.bytes for size in report.tensors.values())
  query = report.kinds['encoder.layer.{i}.attention.self.query.weight']
  kernel = np.asarray(bundle.params['encoder']['layers']['attention']['query']['kernel'])
  back = np.asarray(from_pretrained(tmp_path / 'e').params['encoder']['layers']['attention']['query']['kernel'])
  assert (query.elements, query.nonzeros, query.dense_bytes) == (kernel.size, np.count_nonzero(back), 4 * kernel.size)
  assert query.encodings == {'bitmask': 2}
  assert query.bytes == kernel.size // 8 + {'bfloat16': 2, 'int8': 1}[values] * query.nonzeros + 2 * 8 + (
    4 * 2 * kernel.shape[2] if values == 'int8' else 0
  )
  inside = sum(size.bytes for name, size in report.tensors.items() if '.layer.' in name)
  assert report.layers.bytes == inside < report.bytes


def test_what_cannot_be_written_is_refused(tmp_path):
  with pytest.raises(ConfigError, match="values 'int4': unknown; use one of 'float32', 'bfloat16', 'int8'"):
    save_sparse(_bundle(), tmp_path / 'e', 'int4')
  bundle = _bundle()
  bundle.params['encoder']['layers']['attention']['query']['kernel'][1, 2, 3] = np.nan
  with pytest.raises(NumericsError, match='query/kernel: holds values that are not finite'):
    save_sparse(bundle, tmp_path / 'e')
  bundle.params['encoder']['layers']['attention']['query']['kernel'][1, 2, 3] = 3.4e38
  with pytest.raises(NumericsError, match=f'tensor {QUERY}: .*too large for bfloat16'):
    save_sparse(bundle, tmp_path / 'e', 'bfloat16')
  assert list(tmp_path.iterdir()) == []


@pytest.fixture
def written(tmp_path):
  """A sparse folder without a manifest, so that its files may be changed; its tensors."""
  save_sparse(_bundle(), tmp_path / 'e')
  (tmp_path / 'e/manifest.json').unlink()
  return tmp_path / 'e', safetensors.numpy.load_file(tmp_path / 'e/model.sparse.safetensors')


def _with_config(folder, **changes):
  raw = {**json.loads((folder / 'config.json').read_text()), **changes}
  (folder / 'config.json').write_text(json.dumps({k: v for k, v in raw.items() if v is not None}))


@pytest.mark.parametrize(
  ('described', 'message'),
  [
    ({'version': 2, 'values': 'float32'}, 'version 2 is unknown, this release reads version 1'),
    ({'version': True, 'values': 'float32'}, 'does not say which version'),
    ({'values': 'float32'}, 'does not say which version'),
    ([1], 'does not say which version'),
    ({'version': 1, 'values': 'int4'}, 'must hold version and values'),
    ({'version': 1}, 'must hold version and values'),
    ({'version': 1, 'values': ['float32']}, 'must hold version and values'),
    ({'version': 1, 'values': 'float32', 'blocks': 4}, 'must hold version and values'),
    ({'version': 1, 'values': 'int8'}, 'tensor .*: scales missing'),
    ({'version': 1, 'values': 'bfloat16'}, 'tensor .*: values are float32, expected bfloat16'),
  ],
)
def test_an_unknown_format_is_refused(described, message, written):
  folder, _ = written
  _with_config(folder, compactlm_sparse=described)
  with pytest.raises(DataError, match=message):
    from_pretrained(folder)


def _resized(shape):
  """The query's columns in a matrix that claims another shape."""
  rows = np.zeros(33, np.uint32)
  empty = {'columns': np.zeros(0, np.uint16), 'values': np.zeros(0, np.float32), 'rows': rows}
  parts = {f'{QUERY}/{part}': array for part, array in empty.items()}
  return {f'{QUERY}/bitmask': None, f'{QUERY}/gaps': None, **parts, f'{QUERY}/shape': np.array(shape, np.int32)}


@pytest.mark.parametrize(
  ('changes', 'message'),
  [
    ({QUERY: np.zeros((32, 32), np.float32)}, f'tensor {QUERY}: stored twice, as dense and as bitmask'),
    ({f'{QUERY}/values': None}, f'tensor {QUERY}: values missing'),
    ({f'{QUERY}/shape': None}, f'tensor {QUERY}: has no shape'),
    ({f'{QUERY}/notes': np.zeros(3, np.uint8)}, f'tensor {QUERY}: unexpected notes'),
    ({f'{QUERY}/values': np.zeros(3, np.float32)}, f'tensor {QUERY}: bitmask marks'),
    ({f'{QUERY}/bitmask': np.zeros(3, np.uint8)}, f'tensor {QUERY}: bitmask of 3 bytes'),
    (_resized((32, 31)), rf'tensor {QUERY}: found shape \(32, 31\), expected \(32, 32\)'),
    (_resized((1 << 30, 1 << 30)), rf'tensor {QUERY}: found shape \(1073741824, 1073741824\), expected \(32, 32\)'),
    (_resized((-32, -32)), rf'tensor {QUERY}: found shape'),
    ({'encoder.layer.0.output.dense.bias': np.zeros(32, np.float16)}, r'output\.dense\.bias: found dtype float16'),
    ({'encoder.layer.0.output.dense.bias/values': np.zeros(3, np.float32)}, 'bias is no matrix of the encoder'),
    ({'extra/bitmask': np.zeros(3, np.uint8)}, 'tensor extra/bitmask: unexpected'),
    ({'extra': np.zeros(3, np.float32)}, 'tensor extra: unexpected'),
    ({'encoder.layer.7.output.dense.bias': np.zeros(32, np.float32)}, r'layer\.7.*unexpected'),
    ({'embeddings.LayerNorm.bias': None}, r'embeddings\.LayerNorm\.bias: missing'),
  ],
  ids=lambda v: '' if isinstance(v, str) else ' '.join(v)[-50:],
)
def test_inconsistent_tensors_are_refused_by_name(changes, message, written):
  """Mutation: each check of `read_sparse` left out in turn."""
  folder, tensors = written
  tensors = {name: array for name, array in {**tensors, **changes}.items() if array is not None}
  safetensors.numpy.save_file(tensors, folder / 'model.sparse.safetensors')
  with pytest.raises(DataError, match=message):
    from_pretrained(folder)


def test_values_that_are_not_finite_are_refused(written):
  folder, tensors = written
  tensors[f'{QUERY}/values'][0] = np.inf
  safetensors.numpy.save_file(tensors, folder / 'model.sparse.safetensors')
  with pytest.raises(DataError, match=f'tensor {QUERY}: holds values that are not finite'):
    from_pretrained(folder)


def test_a_small_file_cannot_claim_a_huge_model(written, monkeypatch):
  """A million by a million zeros are a few bytes. Mutation: check the shape of the configuration alone."""
  folder, tensors = written
  _with_config(folder, hidden_size=1 << 20)
  huge = {'rows': np.zeros((1 << 20) + 1, np.uint32), 'shape': np.array([1 << 20, 1 << 20], np.int32)}
  huge |= {'columns': np.zeros(0, np.uint16), 'values': np.zeros(0, np.float32)}
  safetensors.numpy.save_file({f'{QUERY}/{k}': v for k, v in huge.items()}, folder / 'model.sparse.safetensors')
  with pytest.raises(DataError, match=f'tensor {QUERY}: .* unpack to {1 << 42} bytes, more than are ever read'):
    from_pretrained(folder)


def test_weights_and_their_description_belong_together(written):
  folder, tensors = written
  safetensors.numpy.save_file(tensors, folder / 'model.safetensors')
  with pytest.raises(DataError, match=r'holds both model\.safetensors and model\.sparse\.safetensors'):
    from_pretrained(folder)
  (folder / 'model.safetensors').unlink()
  (folder / 'model.sparse.safetensors').rename(folder / 'other')
  with pytest.raises(DataError, match=r'model\.sparse\.safetensors: cannot be read'):
    from_pretrained(folder)
  (folder / 'other').rename(folder / 'model.sparse.safetensors')
  _with_config(folder, compactlm_sparse=None)
  with pytest.raises(DataError, match=r'model\.sparse\.safetensors: config\.json does not describe it'):
    from_pretrained(folder)


@pytest.mark.parametrize('keep', [4, 100, -1])
def test_a_truncated_file_is_refused(keep, written):
  folder, _ = written
  path = folder / 'model.sparse.safetensors'
  path.write_bytes(path.read_bytes()[:keep])
  with pytest.raises(DataError, match=r'model\.sparse\.safetensors: damaged or truncated'):
    from_pretrained(folder)


def test_the_cap_counts_what_is_unpacked(written, monkeypatch):
  folder, _ = written
  matrices = 4 * sum(
    leaf.size for name, leaf in named_leaves(_bundle().params).items() if name.endswith(('/kernel', '/embedding'))
  )
  monkeypatch.setattr(folder_module, 'MAX_TOTAL_BYTES', matrices)
  from_pretrained(folder)
  monkeypatch.setattr(folder_module, 'MAX_TOTAL_BYTES', matrices - 1)
  with pytest.raises(DataError, match=f'unpack to {matrices} bytes'):
    from_pretrained(folder)
