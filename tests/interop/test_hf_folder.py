"""Hostile, damaged and incomplete folders are refused by name, and nothing in them runs."""

import json

import numpy as np
import pytest
import safetensors.numpy

from compactlm_jax.errors import ConfigError, DataError
from compactlm_jax.interop import folder as folder_module
from compactlm_jax.interop.bundle import Bundle, from_pretrained, save_pretrained
from compactlm_jax.interop.folder import open_folder, read_tensors

CONFIG = dict(
  model_type='bert', vocab_size=7, hidden_size=4, num_hidden_layers=2, num_attention_heads=2, intermediate_size=8,
  max_position_embeddings=5,
)  # fmt: skip
D, F = 4, 8


def _tensors():
  """A complete BERT by transformers' names, without transformers."""
  rng = np.random.default_rng(0)
  shapes = {
    'embeddings.word_embeddings.weight': (7, D),
    'embeddings.position_embeddings.weight': (5, D),
    'embeddings.token_type_embeddings.weight': (2, D),
    'embeddings.LayerNorm.weight': (D,),
    'embeddings.LayerNorm.bias': (D,),
  }
  for i in range(2):
    layer = f'encoder.layer.{i}'
    for name in ('attention.self.query', 'attention.self.key', 'attention.self.value', 'attention.output.dense'):
      shapes |= {f'{layer}.{name}.weight': (D, D), f'{layer}.{name}.bias': (D,)}
    shapes |= {f'{layer}.intermediate.dense.weight': (F, D), f'{layer}.intermediate.dense.bias': (F,)}
    shapes |= {f'{layer}.output.dense.weight': (D, F), f'{layer}.output.dense.bias': (D,)}
    for name in ('attention.output.LayerNorm', 'output.LayerNorm'):
      shapes |= {f'{layer}.{name}.weight': (D,), f'{layer}.{name}.bias': (D,)}
  return {name: rng.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}


def _write(folder, tensors=None, **config):
  folder.mkdir(exist_ok=True)
  (folder / 'config.json').write_text(json.dumps({**CONFIG, **config}))
  safetensors.numpy.save_file(_tensors() if tensors is None else tensors, folder / 'model.safetensors')
  return folder


def _shard(folder, names=('model-00001-of-00002.safetensors', 'model-00002-of-00002.safetensors')):
  """The same model in two shards; returns the index."""
  _write(folder)
  (folder / 'model.safetensors').unlink()
  tensors = _tensors()
  placed = {name: names[i % 2] for i, name in enumerate(sorted(tensors))}
  for shard in names:
    safetensors.numpy.save_file({n: tensors[n] for n in tensors if placed[n] == shard}, folder / shard)
  return {'metadata': {}, 'weight_map': placed}


def _index(folder, index):
  (folder / 'model.safetensors.index.json').write_text(json.dumps(index))
  return folder


def test_a_complete_folder_is_read(tmp_path):
  """The starting point of all that follows: without a defect nothing is refused."""
  bundle = from_pretrained(_write(tmp_path / 'm'))
  expected = _tensors()['encoder.layer.1.intermediate.dense.weight'].T
  assert np.array_equal(bundle.params['encoder']['layers']['ffn_in']['kernel'][1], expected)
  sharded = from_pretrained(_index(tmp_path / 's', _shard(tmp_path / 's')))
  assert np.array_equal(sharded.params['encoder']['layers']['ffn_in']['kernel'][1], expected)


def test_the_remedy_for_pickles_names_the_class(tmp_path):
  """Hostile ones are in faults/test_hostile.py. Mutation: always AutoModel, which reads no head."""
  folder = _write(tmp_path / 'm')
  (folder / 'model.safetensors').rename(folder / 'pytorch_model.bin')
  for architectures, named in (
    (['ConvBertForMaskedLM'], 'ConvBertForMaskedLM'),
    (['a b'], 'AutoModel'),
    (3, 'AutoModel'),
  ):
    (folder / 'config.json').write_text(json.dumps({**CONFIG, 'architectures': architectures}))
    with pytest.raises(DataError, match=f"transformers' {named}.from_pretrained"):
      from_pretrained(folder)


def test_links_of_the_download_cache_are_followed(tmp_path):
  home = tmp_path / 'models--a--b'
  (home / 'blobs').mkdir(parents=True)
  (home / 'snapshots').mkdir()
  folder = _write(home / 'snapshots/rev')
  (folder / 'model.safetensors').rename(home / 'blobs/hash')
  (folder / 'model.safetensors').symlink_to('../../blobs/hash')
  assert from_pretrained(folder).config.num_layers == 2


@pytest.mark.parametrize('keep', [0, 4, 8, 100, -1])
def test_truncated_weights_name_the_file(keep, tmp_path):
  folder = _write(tmp_path / 'm')
  data = (folder / 'model.safetensors').read_bytes()
  (folder / 'model.safetensors').write_bytes(data[:keep])
  with pytest.raises(DataError, match=r'model\.safetensors: damaged or truncated'):
    from_pretrained(folder)


def test_sizes_are_capped(tmp_path, monkeypatch):
  folder = _write(tmp_path / 'm')
  size = (folder / 'model.safetensors').stat().st_size
  monkeypatch.setattr(folder_module, 'MAX_TOTAL_BYTES', size - 1)
  with pytest.raises(DataError, match=f'{size} bytes, more than'):
    from_pretrained(folder)
  monkeypatch.setattr(folder_module, 'MAX_TOTAL_BYTES', size)
  monkeypatch.setattr(folder_module, 'MAX_HEADER_BYTES', 99)
  with pytest.raises(DataError, match='header of'):
    from_pretrained(folder)


def test_the_cap_counts_all_shards_together(tmp_path, monkeypatch):
  folder = _index(tmp_path / 'm', _shard(tmp_path / 'm'))
  sizes = [p.stat().st_size for p in folder.glob('*.safetensors')]
  monkeypatch.setattr(folder_module, 'MAX_TOTAL_BYTES', sum(sizes) - 1)
  with pytest.raises(DataError, match='more than'):
    read_tensors(open_folder(folder))


def test_every_tensor_is_in_exactly_one_shard(tmp_path):
  index = _shard(tmp_path / 'a')
  (tmp_path / 'a/model-00002-of-00002.safetensors').unlink()
  with pytest.raises(DataError, match=r'model-00002-of-00002\.safetensors: cannot be read'):
    from_pretrained(_index(tmp_path / 'a', index))
  index = _shard(tmp_path / 'b')
  del index['weight_map']['embeddings.LayerNorm.bias']
  with pytest.raises(DataError, match='holds tensor embeddings.LayerNorm.bias, which .* places in None'):
    from_pretrained(_index(tmp_path / 'b', index))
  index = _shard(tmp_path / 'c')
  index['weight_map']['ghost'] = 'model-00001-of-00002.safetensors'
  with pytest.raises(DataError, match='tensor ghost is not in'):
    from_pretrained(_index(tmp_path / 'c', index))
  index = _shard(tmp_path / 'd')
  safetensors.numpy.save_file(_tensors(), tmp_path / 'd/model-00001-of-00002.safetensors')  # holds all of them
  with pytest.raises(DataError, match='which .* places in model-00002'):
    from_pretrained(_index(tmp_path / 'd', index))


def _without(name):
  return {k: v for k, v in _tensors().items() if k != name}


LAST = 'encoder.layer.1.output.dense.weight'
DECODER = 'cls.predictions.decoder.weight'
WORD = 'embeddings.word_embeddings.weight'


@pytest.mark.parametrize(
  ('tensors', 'error', 'message'),
  [
    (_without(LAST), DataError, f'{LAST}: missing'),
    ({**_tensors(), 'extra.weight': np.zeros(3, np.float32)}, DataError, 'extra.weight: unexpected'),
    ({**_tensors(), LAST.replace('1', '2'): np.zeros((D, F), np.float32)}, DataError, r'layer\.2.*of 2 layers'),
    ({**_tensors(), LAST: _tensors()[LAST].T.copy()}, ConfigError, rf'{LAST}: found shape \(8, 4\), expected \(4, 8\)'),
    ({**_tensors(), LAST: _tensors()[LAST].astype(np.int32)}, DataError, f'{LAST}: found dtype int32, expected'),
    ({**_tensors(), LAST: _tensors()[LAST].astype(np.float64)}, DataError, f'{LAST}: found dtype float64, expected'),
    ({**_tensors(), LAST: _tensors()[LAST] * np.nan}, DataError, f'{LAST}: holds values that are not finite'),
    ({**_tensors(), DECODER: _tensors()[WORD] + 1}, DataError, 'must hold the same values .an untied decoder'),
    ({**_tensors(), f'bert.{LAST}': _tensors()[LAST] + 1}, DataError, 'must hold the same values'),
    ({**_tensors(), 'classifier.dense.weight': np.zeros((D, D), np.float32)}, DataError, 'task head .* save the'),
    ({**_tensors(), 'classifier.weight': np.zeros((3, D), np.float32)}, DataError, 'task head'),
    ({**_tensors(), 'pooler.dense.weight': np.zeros((D, D), np.float32)}, DataError, 'pooler.dense.bias: missing'),
    ({**_tensors(), 'cls.predictions.bias': np.zeros(7, np.float32)}, DataError, 'cls.predictions.transform.*missing'),
  ],
  ids=['missing', 'extra', 'layer too many', 'shape', 'integer', 'double', 'nan', 'untied decoder', 'both prefixes',
       'two-layer classifier', 'classifier without pooler', 'half a pooler', 'half a head'],
)  # fmt: skip
def test_wrong_tensors_are_refused_by_name(tensors, error, message, tmp_path):
  with pytest.raises(error, match=message):
    from_pretrained(_write(tmp_path / 'm', tensors))


def test_known_extras_are_accepted(tmp_path):
  """Index buffers, tied decoders, TensorFlow's LayerNorm names, the next-sentence head."""
  plain = from_pretrained(_write(tmp_path / 'plain'))
  tensors = {k.replace('LayerNorm.weight', 'LayerNorm.gamma').replace('LayerNorm.bias', 'LayerNorm.beta'): v
             for k, v in _tensors().items()}  # fmt: skip
  tensors |= {
    'bert.embeddings.position_ids': np.arange(5, dtype=np.int64)[None],
    'cls.seq_relationship.weight': np.ones((2, D), np.float32),
    'cls.seq_relationship.bias': np.ones(2, np.float32),
    DECODER: tensors[WORD],
  }
  same = from_pretrained(_write(tmp_path / 'm', tensors))
  assert set(same.params) == {'encoder'}
  np.testing.assert_equal(_numpy(same.params), _numpy(plain.params))


def _numpy(tree):
  return {k: _numpy(v) for k, v in tree.items()} if isinstance(tree, dict) else np.asarray(tree)


@pytest.mark.parametrize('text', ['', '{', '[]', '\xff', '{"model_type": "bert", "vocab_size": 7' + '[' * 99999])
def test_a_damaged_config_is_named(text, tmp_path):
  folder = _write(tmp_path / 'm')
  (folder / 'config.json').write_bytes(text.encode('latin-1'))
  with pytest.raises(DataError, match=r'config\.json'):
    from_pretrained(folder)


def test_missing_things_are_named(tmp_path, monkeypatch):
  with pytest.raises(DataError, match='no such folder'):
    from_pretrained(tmp_path / 'nowhere')
  (tmp_path / 'empty').mkdir()
  with pytest.raises(DataError, match=r'config\.json: cannot be read'):
    from_pretrained(tmp_path / 'empty')
  folder = _write(tmp_path / 'm')
  (folder / 'model.safetensors').unlink()
  with pytest.raises(DataError, match='holds no weights'):
    from_pretrained(folder)


def test_a_hub_name_offline_says_so(tmp_path, monkeypatch):
  """Only owner/name may ask the network; a path, or a folder that half exists, never does."""
  import huggingface_hub

  asked = []

  def download(name, **kwargs):
    asked.append((name, kwargs))
    raise OSError('offline mode is enabled')

  monkeypatch.setattr(huggingface_hub, 'snapshot_download', download)
  monkeypatch.chdir(tmp_path)
  (tmp_path / 'runs').mkdir()
  for path in ('runs/mistyped', './owner/name', '/abs/name', 'plain', '../owner/name', 'a/b/c', '~/name'):
    with pytest.raises(DataError, match='no such folder'):
      from_pretrained(path)
  assert not asked
  with pytest.raises(DataError, match=r'owner/name: .*offline mode is enabled.*copy the model folder'):
    from_pretrained('owner/name')
  (name, kwargs), = asked  # fmt: skip
  assert name == 'owner/name'
  assert not [p for p in kwargs['allow_patterns'] if not p.endswith(('.json', '.safetensors', '.txt'))]


@pytest.mark.parametrize('name', ['config.json', 'README.md'])
def test_a_flipped_bit_is_found_by_the_manifest(name, tmp_path):
  """Of weights: faults/test_hostile.py. Mutation: do not pass the manifest's digests on."""
  save_pretrained(from_pretrained(_write(tmp_path / 'm')), tmp_path / 'e')
  data = bytearray((tmp_path / 'e' / name).read_bytes())
  data[-2] ^= 1
  (tmp_path / 'e' / name).write_bytes(bytes(data))
  if name == 'README.md':  # not read at import
    assert isinstance(from_pretrained(tmp_path / 'e'), Bundle)
    return
  with pytest.raises(DataError, match=f'{name}: its SHA-256 is not the one in manifest.json'):
    from_pretrained(tmp_path / 'e')


def test_manifests_are_complete_or_refused(tmp_path):
  save_pretrained(from_pretrained(_write(tmp_path / 'm')), tmp_path / 'e')
  (tmp_path / 'e/vocab.txt').write_text('[PAD]\n')
  with pytest.raises(DataError, match=r'vocab\.txt: not listed in manifest\.json'):
    from_pretrained(tmp_path / 'e')
  (tmp_path / 'e/vocab.txt').unlink()
  (tmp_path / 'e/README.md').unlink()
  with pytest.raises(DataError, match=r'README\.md: listed in manifest\.json but missing'):
    from_pretrained(tmp_path / 'e')
  (tmp_path / 'e/manifest.json').write_text('{"format": "compactlm-jax export", "files": {"../x": {"sha256": ""}}}')
  with pytest.raises(DataError, match='not a plain file name'):
    from_pretrained(tmp_path / 'e')
  (tmp_path / 'm/manifest.json').write_text('{"another": "program"}')
  assert from_pretrained(tmp_path / 'm').config.num_layers == 2
