"""ONNX export: onnxruntime gives what `encode` and the heads give, for every architecture and every pruned shape."""

import dataclasses
import functools
import json
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from compactlm_jax.config import EncoderConfig
from compactlm_jax.errors import ConfigError, DataError, NumericsError
from compactlm_jax.interop import onnx_export
from compactlm_jax.interop.bundle import Bundle, from_pretrained
from compactlm_jax.interop.onnx_export import export_onnx, onnx_model
from compactlm_jax.interop.tokenizer_files import TokenizerFiles
from compactlm_jax.nn.encoder import encode, encoder_shapes
from compactlm_jax.tasks.finetune import classify
from compactlm_jax.tasks.span import span_logits
from compactlm_jax.types import Batch

onnx = pytest.importorskip('onnx')
onnxruntime = pytest.importorskip('onnxruntime')

SMALL = dict(
  vocab_size=37, hidden_size=16, num_layers=2, num_heads=4, intermediate_size=24, max_positions=24, scan_unroll=1
)
MIXED = dict(conv_kernel_size=5, num_heads=3, head_size=4, embedding_size=8)
PRUNED = dict(heads_per_layer=(0, 1), neurons_per_layer=(8, 0))
CASES = {
  'bert': ('bert', {}),
  'bert-pooler': ('bert', dict(pooler=True, layer_norm_epsilon=1e-6)),
  'bert-narrow': ('bert', dict(num_heads=3, head_size=2, intermediate_size=1)),
  'bert-pruned': (
    'bert',
    dict(pooler=True, num_layers=4, heads_per_layer=(4, 0, 1, 0), neurons_per_layer=(24, 8, 0, 0)),
  ),
  'electra': ('electra', dict(embedding_size=8)),
  'convbert-clean': ('convbert', MIXED),
  'convbert-parity': ('convbert', dict(**MIXED, conv_sees_padding=True)),
  'convbert-grouped': ('convbert', dict(**MIXED, num_groups=2)),
  'convbert-dynamic': ('convbert', {**MIXED, 'conv_kind': 'dynamic', 'conv_kernel_size': 9}),
  'convbert-alone': ('convbert', dict(**MIXED, self_attention=False)),
  'convbert-one-tap': ('convbert', {**MIXED, 'conv_kernel_size': 1}),
  'convbert-pruned': ('convbert', dict(**MIXED, **PRUNED)),
  'convbert-pruned-grouped': ('convbert', dict(**MIXED, **PRUNED, num_groups=4, conv_sees_padding=True)),
}


def _bundle(kind='bert', heads=(), seed=0, tokenizer=None, labels=(), **fields):
  """Random weights, none of them zero, wide enough that every term shows in the outputs."""
  config = EncoderConfig(kind, **{**SMALL, **fields})
  rng = np.random.default_rng(seed)
  params = jax.tree.map(lambda s: jnp.asarray(0.4 * rng.standard_normal(s.shape), s.dtype), encoder_shapes(config))
  for name, outputs in heads:
    draw = rng.standard_normal((config.hidden_size + 1, outputs)).astype(np.float32)
    params[name] = {'kernel': jnp.asarray(draw[1:]), 'bias': jnp.asarray(draw[0])}
  return Bundle(config, params, tokenizer, labels)


def _batch(config, batch, length, seed=0):
  """Rows of falling length, the last one of a single token."""
  rng = np.random.default_rng([seed, batch, length])
  mask = (np.arange(length) < np.linspace(length, 1, batch).astype(int)[:, None]).astype(np.int64)
  ids, types = (rng.integers(0, high, (batch, length)) for high in (config.vocab_size, config.type_vocab_size))
  return ids, mask, types


def _session(bundle):
  model = onnx_model(bundle)
  onnx.checker.check_model(model, full_check=True)
  options = onnxruntime.SessionOptions()
  options.intra_op_num_threads = 1
  return onnxruntime.InferenceSession(model.SerializeToString(), options, providers=['CPUExecutionProvider'])


def _run(session, rows):
  names = [output.name for output in session.get_outputs()]
  feeds = dict(zip(('input_ids', 'attention_mask', 'token_type_ids'), rows, strict=True))
  return dict(zip(names, session.run(None, feeds), strict=True))


@functools.cache
def _jitted(function, config):
  return jax.jit(lambda params, *rows: function(params, config, Batch(*rows)))


def _expected(function, bundle, rows):
  """function(params, config, batch), compiled."""
  return _jitted(function, bundle.config)(bundle.params, *rows)


def _close(found, expected):
  np.testing.assert_allclose(found, np.asarray(expected), rtol=0, atol=1e-5)


@pytest.mark.parametrize('model', CASES)
def test_hidden_states_are_those_of_encode(model):
  """One session reads the whole batch, and each row by itself, cut to its length where padding cannot show.

  Mutations: no scale on the queries; `shared.reads` left out; kernels of groups swapped; a layer without heads that
  leaves the output's bias out; the depthwise kernel reversed; [K, H] in place of [H, K].
  """
  kind, fields = CASES[model]
  bundle = _bundle(kind, **fields)
  session, (ids, mask, types) = _session(bundle), _batch(bundle.config, 3, 24)
  lengths = mask.sum(1)
  run = jax.jit(functools.partial(encode, config=bundle.config))
  expected = run(bundle.params, input_ids=ids, attention_mask=mask, token_type_ids=types)
  found = _run(session, (ids, mask, types))
  assert set(found) == {'last_hidden_state'} | ({'pooler_output'} if bundle.config.pooler else set())
  _close(found['last_hidden_state'], expected.last_BTD)
  if bundle.config.pooler:
    _close(found['pooler_output'], expected.pooled_BD)
  for row, real in enumerate(lengths):
    cut = slice(24 if bundle.config.conv_sees_padding else real)
    alone = _run(session, [x[row : row + 1, cut] for x in (ids, mask, types)])['last_hidden_state']
    _close(alone[0, :real], expected.last_BTD[row, :real])


def test_a_row_of_padding_is_finite_and_the_same():
  """Mutation: minus infinity as the bias of padded keys."""
  bundle = _bundle(num_layers=1)
  ids, mask, types = _batch(bundle.config, 2, 5)
  mask[1], types[:] = 0, 0
  found = _run(_session(bundle), (ids, mask, types))['last_hidden_state']
  expected = jax.jit(functools.partial(encode, config=bundle.config))(bundle.params, input_ids=ids, attention_mask=mask)
  _close(found, expected.last_BTD)


@pytest.mark.parametrize(
  ('kind', 'fields', 'classes'),
  [
    ('bert', dict(pooler=True), 3),
    ('bert', dict(**PRUNED), 3),
    ('electra', dict(embedding_size=8), 1),
    ('convbert', dict(**MIXED, **PRUNED), 5),
  ],
)
def test_logits_of_classifiers(kind, fields, classes):
  """On the pooled vector and on the first token; one output is a regression. Mutation: the last token."""
  bundle = _bundle(kind, (('classifier', classes),), **fields)
  rows = _batch(bundle.config, 3, 9)
  found = _run(_session(bundle), rows)
  expected = _expected(classify, bundle, rows)
  assert set(found) == {'logits'} and found['logits'].shape == (3, classes)
  _close(found['logits'], expected)


def test_logits_of_a_span_head():
  """Mutation: start and end exchanged."""
  bundle = _bundle('electra', (('span', 2),), embedding_size=8)
  rows = _batch(bundle.config, 3, 9)
  found = _run(_session(bundle), rows)
  expected = _expected(span_logits, bundle, rows)
  assert list(found) == ['start_logits', 'end_logits']
  for name, logits in zip(found, expected, strict=True):
    _close(found[name], logits)


def test_everything_in_a_layer_pruned_is_the_dense_model_with_zeros():
  """Zeros in a dense model, computed here, against the graph of the model without those parts.

  Mutation: the output bias of an empty layer left out, of its attention or of its feed-forward.
  """
  dense = _bundle(heads=(('classifier', 3),), num_layers=2)
  stack = jax.tree.map(np.array, dense.params['encoder']['layers'])
  attention, size = stack['attention'], dense.config.head_size
  attention['output']['kernel'][0] = 0  # layer 1 loses everything, layer 2 all but its second head
  attention['output']['kernel'][1, :size] = attention['output']['kernel'][1, 2 * size :] = 0
  stack['ffn_out']['kernel'][:] = 0
  baked = {**dense.params, 'encoder': {**dense.params['encoder'], 'layers': stack}}
  rows = _batch(dense.config, 2, 8)
  expected = _expected(classify, Bundle(dense.config, baked), rows)

  kept = slice(size, 2 * size)
  one = jax.tree.map(lambda leaf: leaf[:1], stack)
  one['attention'] = {'output': {'bias': one['attention']['output']['bias']}}
  two = jax.tree.map(lambda leaf: leaf[1:], stack)
  for name in ('query', 'key', 'value'):
    two['attention'][name] = {part: leaf[..., kept] for part, leaf in two['attention'][name].items()}
  two['attention']['output']['kernel'] = two['attention']['output']['kernel'][:, kept]
  for layer in (one, two):
    del layer['ffn_in'], layer['ffn_out']['kernel']
  encoder = {name: tree for name, tree in dense.params['encoder'].items() if name != 'layers'}
  config = dataclasses.replace(dense.config, heads_per_layer=(0, 1), neurons_per_layer=(0, 0))
  pruned = {**dense.params, 'encoder': {**encoder, 'layers_0': one, 'layers_1': two}}
  _close(_run(_session(Bundle(config, pruned)), rows)['logits'], expected)


def test_ids_and_rows_beyond_the_tables_are_errors():
  """Mutation: take ids modulo the table."""
  bundle = _bundle(num_layers=1)
  session = _session(bundle)
  for ids in (np.zeros((1, 25), np.int64), np.full((1, 3), 37)):
    with pytest.raises(Exception, match='Non-zero status code'):
      _run(session, (ids, np.ones_like(ids), np.zeros_like(ids)))


def test_the_folder(tools, tmp_path, caplog):
  """The same bytes each time; the tokenizer and transformers' configuration beside the graph; pre-training left out.

  Mutation: labels left out of config.json.
  """
  (tmp_path / 'vocab').mkdir()
  tools.add_vocab(tmp_path / 'vocab')
  tokenizer = TokenizerFiles({p.name: p.read_bytes() for p in (tmp_path / 'vocab').iterdir()})
  bundle = _bundle(heads=(('classifier', 2),), tokenizer=tokenizer, labels=('no', 'yes'))
  bundle = dataclasses.replace(bundle, params={**bundle.params, 'rtd_head': {'dense': {'bias': jnp.zeros(3)}}})
  files = []
  for _ in range(2):
    export_onnx(bundle, tmp_path / 'e')
    files.append({p.name: p.read_bytes() for p in (tmp_path / 'e').iterdir()})
  assert files[0] == files[1]
  assert set(files[0]) == {'model.onnx', 'config.json', 'README.md', 'manifest.json', *tokenizer.files}
  assert 'left out of the graph: rtd_head' in caplog.text
  described = json.loads(files[0]['config.json'])
  assert described['id2label'] == {'0': 'no', '1': 'yes'} and described['model_type'] == 'bert'
  assert described['onnx'] == {'file': 'model.onnx', 'outputs': {'logits': ['batch', 2]}}
  session = onnxruntime.InferenceSession(str(tmp_path / 'e/model.onnx'), providers=['CPUExecutionProvider'])
  assert json.loads(session.get_modelmeta().custom_metadata_map['labels']) == ['no', 'yes']
  rows = tokenizer.load()(['w1 w2', 'w3'], padding=True, return_token_type_ids=True, return_tensors='np')
  feeds = {i.name: rows[i.name].astype('int64') for i in session.get_inputs()}  # as the model card says
  expected = _expected(classify, bundle, feeds.values())
  _close(session.run(None, feeds)[0], expected)
  with pytest.raises(DataError, match=r'model\.onnx: a graph for onnxruntime, not read here; .* --format=hf'):
    from_pretrained(tmp_path / 'e')


def test_a_pruned_model_tells_its_sizes(tmp_path, caplog):
  """Mutation: only what transformers can express is written."""
  kind, fields = CASES['bert-pruned']
  export_onnx(_bundle(kind, **fields), tmp_path / 'e')
  assert 'without a tokenizer' in caplog.text
  assert json.loads((tmp_path / 'e/config.json').read_text())['compactlm']['heads_per_layer'] == '4,0,1,0'
  assert '4, 0, 1, 0' in (tmp_path / 'e/README.md').read_text()


def test_nothing_is_said_of_the_convolution_of_transformers(tmp_path, caplog):
  """Which would read padding, but does not run here. Mutation: describe the mode of the model itself."""
  export_onnx(_bundle('convbert', conv_kernel_size=5, num_heads=2, head_size=4), tmp_path / 'e')
  assert json.loads((tmp_path / 'e/config.json').read_text())['model_type'] == 'convbert'
  assert 'padding' not in caplog.text


JOINT = {'start': {'kernel': jnp.zeros((16, 1)), 'bias': jnp.zeros(1)}}


@pytest.mark.parametrize(
  ('fields', 'more', 'message'),
  [
    (dict(causal=True), {}, r'encoder\.causal: a left-to-right model'),
    ({}, {'span': JOINT}, r'joint head .* use --format=hf'),
    ({}, {'scores': {'encoder': jnp.zeros(3)}}, 'parameter scores/encoder'),
    ({}, {'classifier': {'kernel': jnp.zeros((5, 2)), 'bias': jnp.zeros(2)}}, r'classifier/kernel: found .*\(5, 2\)'),
  ],
)
def test_what_cannot_be_exported(fields, more, message, tmp_path):
  bundle = _bundle(**fields)
  with pytest.raises(ConfigError, match=message):
    export_onnx(dataclasses.replace(bundle, params={**bundle.params, **more}), tmp_path / 'e')
  assert not (tmp_path / 'e').exists()


def test_weights_that_are_not_finite_or_too_large_are_refused(monkeypatch, tmp_path):
  bundle = _bundle(heads=(('classifier', 2),))
  bad = {**bundle.params, 'classifier': {**bundle.params['classifier'], 'bias': jnp.array([1.0, jnp.nan])}}
  with pytest.raises(NumericsError, match='classifier/bias'):
    export_onnx(dataclasses.replace(bundle, params=bad), tmp_path / 'e')
  monkeypatch.setattr(onnx_export, 'MAX_BYTES', 1000)
  with pytest.raises(ConfigError, match='bytes of weights; one ONNX file holds 1000 at most'):
    export_onnx(bundle, tmp_path / 'e')


def test_without_onnx_the_message_says_what_to_install(monkeypatch):
  monkeypatch.delitem(sys.modules, 'compactlm_jax.interop.onnx_graph', raising=False)
  monkeypatch.setitem(sys.modules, 'onnx', None)
  with pytest.raises(ConfigError, match=r"pip install 'compactlm-jax\[onnx\]'"):
    onnx_model(_bundle())
