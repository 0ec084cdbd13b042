"""Encoders that stock classes cannot hold: the modelling file, config.json and its checks, PyTorch beside them."""

import ast
import dataclasses
import json
import pathlib
import sys
import tomllib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ragged import masked

from compactlm_jax.compress.shrink import shrink
from compactlm_jax.config import EncoderConfig
from compactlm_jax.errors import ConfigError
from compactlm_jax.interop import custom
from compactlm_jax.interop.bundle import Bundle, from_pretrained, save_pretrained
from compactlm_jax.interop.hf_config import from_hf, to_hf
from compactlm_jax.interop.sparse import save_sparse
from compactlm_jax.nn.encoder import encode, encoder_shapes

SMALL = dict(vocab_size=37, hidden_size=16, num_layers=4, num_heads=4, intermediate_size=24, max_positions=32)
KINDS = {
  'bert': {},
  'electra': dict(embedding_size=8),
  'convbert': dict(embedding_size=8, head_size=2, conv_kernel_size=3, conv_sees_padding=True, num_groups=2),
}
PRUNED = dict(heads_per_layer=(1, 0, 0, 3), neurons_per_layer=(0, 0, 6, 8))
"""One head left, everything pruned, no head left, some of both left."""
_ENCODE = jax.jit(encode, static_argnums=1, static_argnames='all_hidden')


def _bundle(kind='bert', head='', seed=0, **fields):
  """An encoder and a head; every parameter is random, so that none is without effect."""
  pooled = {'pooler': kind == 'bert' and head != 'span'}  # transformers' span models have none
  config = EncoderConfig(kind, **{**SMALL, **KINDS[kind], **pooled, 'scan_unroll': 1, **fields})
  rng = np.random.default_rng(seed)
  params = jax.tree.map(lambda s: (rng.standard_normal(s.shape) / 3).astype(s.dtype), encoder_shapes(config))
  if head:
    size = {'classifier': 3, 'span': 2}[head]
    kernel = rng.standard_normal((config.hidden_size, size)).astype(np.float32)
    params[head] = {'kernel': kernel, 'bias': rng.standard_normal(size).astype(np.float32)}
  return Bundle(config, jax.tree.map(jnp.asarray, params))


def _equal(a, b):
  return jax.tree.structure(a) == jax.tree.structure(b) and jax.tree.all(jax.tree.map(np.array_equal, a, b))


def _edited(folder, **changes):
  """Changes config.json, as a user would."""
  (folder / 'manifest.json').unlink(missing_ok=True)
  raw = json.loads((folder / 'config.json').read_text()) | changes
  (folder / 'config.json').write_text(json.dumps(raw))


def test_the_file_is_small_and_has_the_classes_that_config_json_names():
  """Mutation: leave ElectraForPreTraining out of the file."""
  tree = ast.parse(custom.source())
  found = {node.name for node in tree.body if isinstance(node, ast.ClassDef)}
  for kind, classes in custom.CLASSES.items():
    name = {'bert': 'Bert', 'electra': 'Electra', 'convbert': 'ConvBert'}[kind]
    assert {f'CompactBert{cls}'.replace('Bert', name, 1) for cls in classes} <= found
  imported = {node.module.split('.')[0] for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
  assert imported == {'torch', 'transformers'}
  project = tomllib.loads((pathlib.Path(__file__).parents[2] / 'pyproject.toml').read_text())
  assert f'{custom.FILE}.txt' in project['tool']['setuptools']['package-data']['compactlm_jax.interop']  # in the wheel
  lines = custom.source().decode().splitlines()
  assert len(lines) <= 200 and max(map(len, lines)) <= 120


@pytest.mark.parametrize('head', ['classifier', 'span'])
@pytest.mark.parametrize('kind', KINDS)
def test_ragged_encoders_come_back_with_every_bit(kind, head, tmp_path, caplog):
  """Mutation: write the head size of the stock model, or leave out one list."""
  bundle = _bundle(kind, head, **PRUNED)
  save_pretrained(bundle, tmp_path / 'm')
  assert 'transformers needs trust_remote_code=True' in caplog.text
  back = from_pretrained(tmp_path / 'm')
  assert back.config == bundle.config
  assert _equal(back.params, bundle.params)
  assert (tmp_path / 'm' / custom.FILE).read_bytes() == custom.source()
  card = (tmp_path / 'm/README.md').read_text()
  assert 'trust_remote_code=True)' in card and '| heads left, by layer | 1, 0, 0, 3 |' in card
  save_pretrained(bundle, tmp_path / 'again')
  assert _files(tmp_path / 'again') == _files(tmp_path / 'm')


def _files(folder):
  return {p.name: p.read_bytes() for p in folder.iterdir()}


def test_nothing_in_the_folder_is_run(tmp_path):
  """Another file under its name, and none: the encoder is the same."""
  bundle = _bundle(**PRUNED)
  save_pretrained(bundle, tmp_path / 'm')
  (tmp_path / 'm/manifest.json').unlink()
  (tmp_path / 'm' / custom.FILE).write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\nraise SystemExit")
  assert _equal(from_pretrained(tmp_path / 'm').params, bundle.params)
  assert not (tmp_path / 'ran').exists()
  (tmp_path / 'm' / custom.FILE).unlink()
  _edited(tmp_path / 'm', auto_map={'AutoModel': f'own/er--{custom.FILE[:-3]}.CompactBertModel'})  # as the hub names it
  assert _equal(from_pretrained(tmp_path / 'm').params, bundle.params)
  named = ('modeling_other.CompactBertModel', 'my_modeling_compactlm.CompactBertModel', 'modeling_compactlm.Bert')
  for other in (*({'AutoModel': name} for name in named), {'AutoModel': ['a', 'b']}, 'x'):
    _edited(tmp_path / 'm', auto_map=other)
    with pytest.raises(ConfigError, match='auto_map .*code from outside'):
      from_pretrained(tmp_path / 'm')


def test_what_stock_classes_hold_stays_without_the_file(tmp_path, caplog):
  """All heads and fewer neurons, everywhere as many. Mutation: needed() looks at neurons."""
  save_pretrained(_bundle(intermediate_size=6), tmp_path / 'm')
  assert not (tmp_path / 'm' / custom.FILE).exists() and 'trust_remote_code' not in caplog.text
  raw = json.loads((tmp_path / 'm/config.json').read_text())
  assert raw['architectures'] == ['BertModel'] and not {'auto_map', 'head_size', 'heads_per_layer'} & set(raw)


@pytest.mark.parametrize(
  ('changes', 'message'),
  [
    (dict(heads_per_layer=[1, 0, 0]), r'heads_per_layer \[1, 0, 0\] must be a list of 4 whole numbers'),
    (dict(heads_per_layer=[1, 0, 0, 5]), 'heads_per_layer .*5 in layer 3 is not between 0 and 4, which num_attention'),
    (dict(heads_per_layer=[-1, 0, 0, 3]), 'heads_per_layer .*-1 in layer 0 is not between 0 and 4'),
    (dict(heads_per_layer=[1, 0, 0, True]), 'heads_per_layer .*whole numbers'),
    (dict(heads_per_layer='1,0,0,3'), 'heads_per_layer .*whole numbers'),
    (dict(neurons_per_layer=[0, 0, 6, 8, 8]), 'neurons_per_layer .*list of 4'),
    (dict(neurons_per_layer=[0, 0, 6, 25]), 'neurons_per_layer .*25 in layer 3 .*24, which intermediate_size gives'),
    (dict(neurons_per_layer=[0, 0, 6.0, 8]), 'neurons_per_layer .*whole numbers'),
    (dict(neurons_per_layer=[0, 0, 6, 7]), r'tensor encoder\.layer\.3\.\S*: found shape .*expected'),
    (dict(head_size=0), 'head_size 0 must be a whole number above 0'),
    (dict(head_size='4'), "head_size '4' must be"),
    (dict(head_size=True), 'head_size True must be'),
    (dict(head_size=8), r'tensor encoder\.layer\.\d\.attention\S*: found shape .*expected'),
    (dict(heads_per_layer=None), r'tensor encoder\.layer\.\d\.attention\S*: found shape .*expected'),
  ],
)
def test_sizes_that_make_no_sense_are_named(changes, message, tmp_path):
  save_pretrained(_bundle(**PRUNED), tmp_path / 'm')
  _edited(tmp_path / 'm', **changes)
  with pytest.raises(ConfigError, match=message):
    from_pretrained(tmp_path / 'm')


def test_neurons_that_do_not_divide_over_groups_are_named():
  raw = to_hf(_bundle('convbert', **PRUNED).config, code=True)
  with pytest.raises(ConfigError, match='neurons_per_layer.*num_groups 2'):
    from_hf(raw | {'neurons_per_layer': [0, 0, 6, 7]})


def test_what_the_file_cannot_express_is_refused(tmp_path):
  with pytest.raises(ConfigError, match='causal: .*has no decoder; use layout=.padded.'):
    save_pretrained(_bundle(causal=True, **PRUNED), tmp_path / 'm')
  with pytest.raises(ConfigError, match='pooler: .*drop_pooler'):
    save_pretrained(_bundle('electra', pooler=True, **PRUNED), tmp_path / 'm')
  with pytest.raises(ConfigError, match="layout 'dense': unknown; use 'auto' or 'padded'"):
    save_pretrained(_bundle(**PRUNED), tmp_path / 'm', layout='dense')
  with pytest.raises(ConfigError, match=r'head_size: .*5 \* 4 = 20'):
    save_pretrained(_bundle(num_heads=5, head_size=4), tmp_path / 'm', layout='padded')
  with pytest.raises(ConfigError, match='heads_per_layer: .*layers are equal'):
    to_hf(_bundle(**PRUNED).config)
  assert not (tmp_path / 'm').exists()


def test_sparse_folders_hold_no_modelling_file(tmp_path, caplog):
  bundle = _bundle(**PRUNED)
  save_sparse(bundle, tmp_path / 'm')
  assert not (tmp_path / 'm' / custom.FILE).exists() and 'trust_remote_code' not in caplog.text
  assert _equal(from_pretrained(tmp_path / 'm').params, bundle.params)


# PyTorch


@pytest.fixture(scope='module')
def hub(tmp_path_factory):
  """transformers, with a folder of its own for the code that it copies and imports."""
  transformers = pytest.importorskip('transformers')
  pytest.importorskip('torch')
  from transformers import dynamic_module_utils

  before = list(sys.modules)
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(dynamic_module_utils, 'HF_MODULES_CACHE', str(tmp_path_factory.mktemp('modules')))
    patch.setattr(sys, 'path', [*sys.path])
    yield transformers
  for name in set(sys.modules) - set(before):
    if name.startswith('transformers_modules'):
      del sys.modules[name]


def _ours(bundle, batch):
  """(every hidden state, logits of the head)."""
  out = _ENCODE({'encoder': bundle.params['encoder']}, bundle.config, *batch, all_hidden=True)
  (head,) = set(bundle.params) - {'encoder'}
  x = out.last_BTD if head == 'span' else out.pooled_BD if bundle.config.pooler else out.last_BTD[:, 0]
  logits = np.asarray(x) @ np.asarray(bundle.params[head]['kernel']) + np.asarray(bundle.params[head]['bias'])
  return np.asarray(out.hidden_NBTD), logits


def _theirs(model, batch):
  """The same, with gradients."""
  import torch

  ids, mask, types = (torch.tensor(a, dtype=torch.long) for a in batch)
  out = model(input_ids=ids, attention_mask=mask, token_type_ids=types, output_hidden_states=True)
  logits = torch.stack([out.start_logits, out.end_logits], -1) if hasattr(out, 'start_logits') else out.logits
  return torch.stack(out.hidden_states), logits


def _assert_close(model, bundle, batch):
  for theirs, ours in zip(_theirs(model.eval(), batch), _ours(bundle, batch)):
    np.testing.assert_allclose(theirs.detach().numpy(), ours, rtol=0, atol=1e-5)


def _load(cls, folder, **options):
  """The model, all of its weights read and no weights left."""
  model, info = cls.from_pretrained(folder, output_loading_info=True, **options)
  assert not any(info.values()), info
  return model


AUTO = {'classifier': 'AutoModelForSequenceClassification', 'span': 'AutoModelForQuestionAnswering'}


@pytest.mark.torch
@pytest.mark.parametrize(
  ('kind', 'head'),
  [
    ('bert', 'classifier'),
    ('bert', 'span'),
    ('electra', 'classifier'),
    ('electra', 'span'),
    ('convbert', 'classifier'),
    ('convbert', 'span'),
  ],
)
def test_transformers_computes_the_same_and_trains(kind, head, tools, hub, tmp_path):
  """Hidden states and logits; then a step of training, PyTorch's own save and load, and back here.

  Mutations: `scaling` of the stock head size; a layer without neurons adds no bias; heads_per_layer shifted by one.
  """
  import torch

  bundle, batch = _bundle(kind, head, **PRUNED), tools.random_batch(np.random.default_rng(1))
  save_pretrained(bundle, tmp_path / 'ours')
  auto = getattr(hub, AUTO[head])
  model = _load(auto, tmp_path / 'ours', trust_remote_code=True)
  assert type(model).__name__.startswith(custom.PREFIX)
  _assert_close(model, bundle, batch)

  optimizer = torch.optim.SGD(model.parameters(), 0.1)
  _theirs(model.train(), batch)[1].square().mean().backward()
  assert all(torch.isfinite(p.grad).all() for p in model.parameters())
  optimizer.step()
  expected = [tensor.detach().numpy() for tensor in _theirs(model.eval(), batch)]
  assert not np.allclose(expected[1], _ours(bundle, batch)[1])
  model.save_pretrained(tmp_path / 'theirs')
  again = _load(auto, tmp_path / 'theirs', trust_remote_code=True)
  for new, old in zip(_theirs(again.eval(), batch), expected):
    np.testing.assert_allclose(new.detach().numpy(), old, rtol=0, atol=1e-6)


@pytest.mark.torch
@pytest.mark.parametrize(
  'sizes',
  [dict(heads_per_layer=(4, 0, 4, 4)), dict(neurons_per_layer=(24, 24, 0, 24)), dict(heads_per_layer=(4, 4, 3, 4))],
)
@pytest.mark.parametrize('kind', KINDS)
def test_stock_classes_refuse_the_folder(kind, sizes, hub, tmp_path):
  """AutoModel without trust_remote_code takes them without a word. Mutation: write no empty weights."""
  save_pretrained(_bundle(kind, 'classifier', **sizes), tmp_path / 'm')
  with pytest.raises(RuntimeError, match='ignore_mismatched_sizes'):
    getattr(hub, AUTO['classifier']).from_pretrained(tmp_path / 'm')


@pytest.mark.torch
@pytest.mark.parametrize(('kind', 'head'), [('bert', 'classifier'), ('electra', 'span'), ('convbert', 'classifier')])
def test_masked_shrunk_exported_and_padded_are_one_model(kind, head, tools, hub, tmp_path):
  """With the sizes of `PRUNED`. Mutation: the padded layout is written from the tree before padding."""
  dense, batch = _bundle(kind, head), tools.random_batch(np.random.default_rng(1))
  heads, neurons = np.zeros((4, 4), bool), np.zeros((4, 24), bool)
  heads[0, 2] = heads[3, 1:] = neurons[2, ::4] = neurons[3, 2::3] = True
  masks = {'encoder/layers/attention/heads': heads, 'encoder/layers/neurons': neurons}
  bundle = dataclasses.replace(dense, params=masked(dense.params, dense.config, masks))
  reference = _ours(bundle, batch)
  small = dataclasses.replace(bundle, **dict(zip(('params', 'config'), shrink(bundle.params, bundle.config))))
  assert small.config == dataclasses.replace(dense.config, **PRUNED)
  for layout, folder in (('auto', tmp_path / 'small'), ('padded', tmp_path / 'padded')):
    save_pretrained(small, folder, layout)
    back = from_pretrained(folder)
    assert back.config == (small if layout == 'auto' else dense).config
    for found, expected in zip(_ours(back, batch), reference):
      np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5)
    if layout == 'auto':
      model = _load(getattr(hub, AUTO[head]), folder, trust_remote_code=True)
    else:
      assert not (folder / custom.FILE).exists() and 'trust_remote_code' not in (folder / 'README.md').read_text()
      (name,) = json.loads((folder / 'config.json').read_text())['architectures']
      model = _load(getattr(hub, name), folder)
    for found, expected in zip(_theirs(model.eval(), batch), reference):
      np.testing.assert_allclose(found.detach().numpy(), expected, rtol=0, atol=1e-5)


@pytest.mark.torch
@pytest.mark.parametrize('kind', KINDS)
def test_what_transformers_saved_is_read_here(kind, tools, hub, tmp_path):
  """Loaded and saved there without a change: the same bits come back."""
  bundle = _bundle(kind, 'classifier', **PRUNED)
  save_pretrained(bundle, tmp_path / 'ours')
  _load(getattr(hub, AUTO['classifier']), tmp_path / 'ours', trust_remote_code=True).save_pretrained(
    tmp_path / 'theirs'
  )
  back = from_pretrained(tmp_path / 'theirs')
  assert back.config == bundle.config
  assert _equal(back.params, bundle.params)


@pytest.mark.torch
def test_attentions_and_both_kernels_of_attention(tools, hub, tmp_path):
  """A layer without heads keeps its place among the attentions; eager attention gives what the fused one does."""
  import torch

  bundle, batch = _bundle('bert', 'classifier', **PRUNED), tools.random_batch(np.random.default_rng(1))
  save_pretrained(bundle, tmp_path / 'm')
  for kernel in ('eager', 'sdpa'):
    auto = getattr(hub, AUTO['classifier'])
    model = _load(auto, tmp_path / 'm', trust_remote_code=True, attn_implementation=kernel)
    _assert_close(model, bundle, batch)
  model.set_attn_implementation('eager')
  out = model(input_ids=torch.tensor(batch[0], dtype=torch.long), output_attentions=True)
  assert [a.shape[1] for a in out.attentions] == list(PRUNED['heads_per_layer'])


@pytest.mark.torch
@pytest.mark.parametrize(
  ('kind', 'fields'),
  [
    ('bert', dict(num_heads=3, head_size=4)),  # 16 does not divide by 3
    ('electra', dict(num_heads=5, head_size=4)),  # wider than the hidden size
    ('convbert', dict(num_heads=1, head_size=16)),  # the published generator of ConvBERT-small
  ],
)
def test_heads_that_do_not_fill_the_hidden_size(kind, fields, tools, hub, tmp_path):
  """Equal layers, but fewer heads than stock. Mutation: head_size is not written."""
  bundle, batch = _bundle(kind, 'classifier', **fields), tools.random_batch(np.random.default_rng(1))
  save_pretrained(bundle, tmp_path / 'm')
  back = from_pretrained(tmp_path / 'm')
  assert back.config == bundle.config and _equal(back.params, bundle.params)
  _assert_close(_load(getattr(hub, AUTO['classifier']), tmp_path / 'm', trust_remote_code=True), bundle, batch)


@pytest.mark.torch
@pytest.mark.parametrize(
  ('head', 'fields'),
  [
    ('classifier', PRUNED),
    ('span', {**PRUNED, 'conv_kernel_size': 5}),
    ('classifier', dict(neurons_per_layer=(24, 24, 6, 8))),  # heads of the stock number, as of blocks
    ('classifier', dict(num_heads=1, num_groups=1, conv_kernel_size=9)),
  ],
)
def test_a_convolution_that_ignores_padding_does_so_there(head, fields, tools, hub, tmp_path):
  """Rows with padding and without, saved there and loaded again. Mutations: mask what makes the kernels alone, or the
  values alone."""
  import torch

  fields = {**fields, 'conv_sees_padding': False}
  bundle, batch = _bundle('convbert', head, **fields), tools.random_batch(np.random.default_rng(1))
  save_pretrained(bundle, tmp_path / 'm')
  auto = getattr(hub, AUTO[head])
  model = _load(auto, tmp_path / 'm', trust_remote_code=True)
  real = batch[1].astype(bool)
  hidden, logits = (tensor.detach().numpy() for tensor in _theirs(model.eval(), batch))
  expected_NBTD, expected = _ours(bundle, batch)
  np.testing.assert_allclose(hidden[:, real], expected_NBTD[:, real], rtol=0, atol=1e-5)
  rows = real if head == 'span' else ...
  np.testing.assert_allclose(logits[rows], expected[rows], rtol=0, atol=1e-5)
  sees = dataclasses.replace(bundle, config=dataclasses.replace(bundle.config, conv_sees_padding=True))
  assert np.abs(_ours(sees, batch)[1][rows] - expected[rows]).max() > 1e-3  # padding would be seen
  short = tuple(array[1:2, :11] for array in batch)  # the same row without padding, and without a mask
  ids, types = (torch.tensor(short[i], dtype=torch.long) for i in (0, 2))
  out = model(input_ids=ids, token_type_ids=types, output_attentions=True)
  alone = torch.stack([out.start_logits, out.end_logits], -1) if head == 'span' else out.logits
  np.testing.assert_allclose(alone.detach().numpy()[0], logits[1, :11] if head == 'span' else logits[1], atol=1e-5)
  assert len(out.attentions) == bundle.config.num_layers
  model.save_pretrained(tmp_path / 'theirs')
  again = _load(auto, tmp_path / 'theirs', trust_remote_code=True).eval()
  np.testing.assert_allclose(_theirs(again, batch)[1].detach().numpy(), logits, rtol=0, atol=1e-6)
  _theirs(model.train(), batch)[1].square().mean().backward()
  assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.grad is not None)


@pytest.mark.torch
@pytest.mark.parametrize('kind', KINDS)
def test_every_class_starts_fresh_from_the_configuration(kind, hub, tmp_path):
  """Without weights: BERT's initial ones in the stated sizes. The auto_map leads to each class.

  Mutation: leave out `_init_weights`.
  """
  import torch

  save_pretrained(_bundle(kind, **PRUNED), tmp_path / 'm')
  config = hub.AutoConfig.from_pretrained(tmp_path / 'm')
  for auto, reference in config.auto_map.items():
    model = getattr(hub, auto).from_config(config, trust_remote_code=True)
    assert type(model).__name__ == reference.split('.')[-1]
    last = model.base_model.encoder.layer[3]
    assert last.attention.self.query.out_features == 3 * KINDS[kind].get('head_size', 4)
    assert all(torch.isfinite(p).all() for p in model.parameters())
    assert last.attention.self.query.weight.std() < 0.05  # initializer_range, not PyTorch's own 0.14
  assert config.num_attention_heads == (8 if kind == 'convbert' else 4)
