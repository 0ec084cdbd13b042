"""Pre-training from and to bundles: what is given, what is fresh, what does not fit, and the pair of folders."""

import contextlib
import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from killing import Kill, killed_at

from compactlm_jax.config import ElectraConfig, EncoderConfig
from compactlm_jax.errors import ConfigError
from compactlm_jax.interop import names
from compactlm_jax.interop.bundle import Bundle, from_pretrained, save_pretrained
from compactlm_jax.interop.hf_config import from_hf
from compactlm_jax.interop.pretrained import electra_start, mlm_start, save_pretraining
from compactlm_jax.nn.encoder import encode
from compactlm_jax.tasks.electra import generator_params
from compactlm_jax.tree import named_leaves, nested

SMALL = dict(vocab_size=17, hidden_size=16, num_layers=2, max_positions=8)
BIG = EncoderConfig('electra', num_heads=4, embedding_size=12, **SMALL)
MIXED = EncoderConfig.mixed(heads=8, head_ratio=2, embedding_size=8, conv_kernel_size=3, num_groups=2, **SMALL)
HALF = ElectraConfig(generator_size=0.5)
TABLES = [f'encoder/embeddings/{part}' for part in ('word', 'position', 'token_type', 'norm')]


def _bundle(config, heads=(), seed=0):
  rng = np.random.default_rng(seed)
  shapes = names.leaf_shapes(config, ('encoder', *heads), 3)
  return Bundle(config, nested({n: rng.standard_normal(s).astype(np.float32) for n, s in shapes.items()}))


def _pair(encoder=BIG, electra=HALF):
  generator = electra.generator_encoder(encoder)
  return _bundle(encoder, ['rtd_head'], 1), _bundle(generator, ['mlm_head'], 2), encoder, generator


def _equal(a, b):
  a, b = named_leaves(a), named_leaves(b)
  return list(a) == list(b) and all(np.array_equal(a[n], b[n]) for n in a)


def _full(sharing, encoder=BIG, electra=HALF):
  """A whole tree of the task, by its definition, written out here again."""
  if sharing == 'all':
    electra = ElectraConfig(generator_size=1.0, sharing='all')
  discriminator, generator, *configs = _pair(encoder, electra)
  tree = {**discriminator.params, 'generator': generator.params}
  if sharing == 'all':
    tree['generator'] = {'mlm_head': generator.params['mlm_head']}
  if sharing == 'embeddings':
    own = {k: v for k, v in generator.params['encoder'].items() if k != 'embeddings'}
    if 'projection' in generator.params['encoder']['embeddings']:
      own['embeddings'] = {'projection': generator.params['encoder']['embeddings']['projection']}
    tree['generator'] = {**generator.params, 'encoder': own}
  return tree, *configs


def _unprojected():
  return dataclasses.replace(BIG, embedding_size=16)


@pytest.mark.parametrize('sharing', ['embeddings', 'none', 'all'])
@pytest.mark.parametrize('encoder', [BIG, MIXED, _unprojected()], ids=['electra', 'convbert', 'unprojected'])
def test_a_finished_run_goes_out_and_comes_back(sharing, encoder, caplog):
  """Both bundles are complete, and starting from them gives the run's tree bit for bit, with nothing fresh.

  Mutation: leave LayerNorm out of what is shared.
  """
  tree, *configs = _full(sharing, encoder)
  electra = ElectraConfig(generator_size=1.0, sharing=sharing)
  discriminator = Bundle(configs[0], {name: tree[name] for name in ('encoder', 'rtd_head')})
  generator = Bundle(configs[1], generator_params(tree, electra))
  for bundle, head in ((discriminator, 'rtd_head'), (generator, 'mlm_head')):
    shapes = names.leaf_shapes(bundle.config, ('encoder', head))
    assert {n: a.shape for n, a in named_leaves(bundle.params).items()} == shapes
  start, fresh = electra_start(discriminator, generator, *configs, sharing)
  assert fresh == ()
  assert _equal(start, tree)
  assert not caplog.records


def test_the_generators_tables_serve_both_without_a_discriminator():
  discriminator, generator, *configs = _pair()
  start, fresh = electra_start(None, generator, *configs, 'embeddings')
  assert fresh == ('encoder/embeddings/projection', 'encoder/layers', 'rtd_head')
  assert set(start['encoder']) == {'embeddings'}
  assert start['encoder']['embeddings']['word'] == generator.params['encoder']['embeddings']['word']
  assert set(start['generator']['encoder']['embeddings']) == {'projection'}
  _, fresh = electra_start(None, generator, *configs, 'none')
  assert fresh == ('encoder', 'rtd_head')
  _, fresh = electra_start(discriminator, None, *configs, 'embeddings')
  assert fresh == ('generator',)
  assert electra_start(None, None, *configs, 'embeddings') == ({}, ('encoder', 'rtd_head', 'generator'))


def test_heads_that_are_missing_are_fresh_and_others_are_left_out(caplog):
  caplog.set_level('INFO')
  _, _, *configs = _pair()
  discriminator = _bundle(configs[0], ['mlm_head', 'classifier'])
  start, fresh = electra_start(discriminator, _bundle(configs[1]), *configs, 'none')
  assert fresh == ('rtd_head', 'generator/mlm_head')
  assert set(start) == {'encoder', 'generator'}
  assert 'the discriminator given also holds classifier, mlm_head' in caplog.text


def test_a_berts_pooler_has_no_place():
  bert = EncoderConfig('bert', num_heads=4, pooler=True, **SMALL)
  encoder = dataclasses.replace(bert, pooler=False)
  start, fresh = electra_start(_bundle(bert), None, encoder, HALF.generator_encoder(encoder), 'embeddings')
  assert set(start['encoder']) == {'embeddings', 'layers'}
  assert fresh == ('rtd_head', 'generator')


def test_tables_that_differ_are_named_and_the_discriminators_are_used(caplog):
  """Mutation: let the generator's leaves win."""
  discriminator, generator, *configs = _pair()
  start, _ = electra_start(discriminator, generator, *configs, 'embeddings')
  assert re.search(r'encoder/embeddings/\S+ \(and 4 more\) differs between generator and discriminator', caplog.text)
  assert _equal(start['encoder'], discriminator.params['encoder'])
  caplog.clear()
  electra_start(discriminator, generator, *configs, 'none')
  assert not caplog.records


@pytest.mark.parametrize('encoder', [BIG, MIXED], ids=['electra', 'convbert'])
@pytest.mark.parametrize(
  'wanted',
  [
    ElectraConfig(generator_size=1.0),
    ElectraConfig(generator_size=0.25),
    ElectraConfig(generator_layers=0.5),
    ElectraConfig(generator_size=0.5, generator_heads=8),
    ElectraConfig(generator_size=0.25, generator_layers=0.5, generator_heads=2),
  ],
)
def test_what_the_message_says_to_set_makes_a_generator_fit(encoder, wanted):
  """Doing what each message asks for ends with a start. Mutation: swap generator_size and generator_layers."""
  generator = _bundle(wanted.generator_encoder(encoder), ['mlm_head'])
  electra = ElectraConfig(generator_size=0.5)
  for _ in range(4):
    try:
      electra_start(None, generator, encoder, electra.generator_encoder(encoder), 'embeddings')
      break
    except ConfigError as e:
      field, value = re.search(r'set electra\.(\w+)=([\d.]+)$', str(e)).groups()
      assert str(e).startswith(f'config.electra.{field}: the generator given has ')
      electra = dataclasses.replace(electra, **{field: int(value) if field == 'generator_heads' else float(value)})
  assert electra.generator_encoder(encoder) == generator.config


@pytest.mark.parametrize(
  ('changes', 'message'),
  [
    (dict(vocab_size=19), 'electra.generator: the generator given has vocab_size 19, the configuration asks for 17; '
     "it is the discriminator's too; take its own generator, or set encoder.vocab_size=19"),
    (dict(hidden_size=32), 'electra.generator_size: .*32.*asks for 8; a generator larger than its discriminator'),
    (dict(intermediate_size=12), 'electra.generator: .*intermediate_size 12.*asks for 32; it follows'),
    (dict(conv_kernel_size=3), 'electra.generator: .*conv_kernel_size 3.*asks for 0'),
  ],
)  # fmt: skip
def test_a_generator_that_cannot_fit_is_refused(changes, message):
  generator = dataclasses.replace(HALF.generator_encoder(BIG), **changes)
  with pytest.raises(ConfigError, match=message):
    electra_start(None, _bundle(generator), BIG, HALF.generator_encoder(BIG), 'embeddings')


def test_a_discriminator_that_does_not_fit_is_refused_by_field():
  other = dataclasses.replace(BIG, num_layers=3)
  with pytest.raises(ConfigError, match=r'config\.encoder\.num_layers: the discriminator given has num_layers 3, the '
                     'configuration asks for 2; set encoder.num_layers=3'):  # fmt: skip
    electra_start(_bundle(other), None, BIG, HALF.generator_encoder(BIG), 'embeddings')
  with pytest.raises(ConfigError, match='the model given has num_layers 3'):
    mlm_start(_bundle(other), BIG)


@pytest.mark.parametrize(
  ('field', 'sizes', 'halved'), [('heads_per_layer', (4, 1), (2, 1)), ('neurons_per_layer', (64, 8), (32, 8))]
)
def test_layers_of_their_own_sizes_are_refused_by_field(field, sizes, halved):
  """Their stacks have other names, so that all layers would start fresh. Mutation: leave the field out of `_SIZES`."""
  ragged, asked = dataclasses.replace(BIG, **{field: sizes}), f'{sizes[0]},{sizes[1]}'
  with pytest.raises(ConfigError, match=rf'^config\.encoder\.{field}: the model given.*; set encoder.{field}={asked}$'):
    mlm_start(_bundle(ragged), BIG)
  with pytest.raises(ConfigError, match=rf'^config\.encoder\.{field}: the model given.*; leave encoder.{field} empty$'):
    mlm_start(_bundle(BIG), ragged)
  small = HALF.generator_encoder(BIG)
  with pytest.raises(ConfigError, match=rf'^config\.electra\.generator: the generator given has {field} '):
    electra_start(None, _bundle(dataclasses.replace(small, **{field: halved})), BIG, small, 'embeddings')


def test_a_tree_that_is_not_its_configurations_is_refused_by_name():
  bundle = _bundle(BIG)
  bundle.params['encoder']['layers']['ffn_in']['bias'] = np.zeros((2, 3), np.float32)
  with pytest.raises(ConfigError, match=r'encoder/layers/ffn_in/bias: the model given holds \(2, 3\), .* \(2, 64\)'):
    mlm_start(bundle, BIG)


def test_modes_that_differ_are_said(caplog):
  mlm_start(_bundle(MIXED), dataclasses.replace(MIXED, conv_sees_padding=True))
  assert 'the model given has conv_sees_padding False and continues with True' in caplog.text


def test_the_start_of_a_language_model():
  full = _bundle(BIG, ['mlm_head'])
  start, fresh = mlm_start(full, BIG)
  assert fresh == () and _equal(start, full.params)
  start, fresh = mlm_start(_bundle(BIG, ['rtd_head']), BIG)
  assert fresh == ('mlm_head',) and set(start) == {'encoder'}


def _tree(folder):
  return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob('*') if p.is_file()}


def _save(folder, seed=0, encoder=BIG):
  discriminator, generator, *_ = _pair(encoder)
  bias = discriminator.params['rtd_head']['output']['bias']
  bias += seed
  save_pretraining(discriminator, generator, folder)


def test_the_pair_is_replaced_as_one_and_foreign_files_are_kept(tmp_path):
  """Mutation: leave 'folders' out of the manifest: the second export refuses; take any folder: deletes notes."""
  target = tmp_path / 'e'
  _save(target)
  first = _tree(target)
  assert {'config.json', 'generator/config.json', 'generator/manifest.json'} <= set(first)
  assert 'in `generator/`' in (target / 'README.md').read_text()
  _save(target, 1)
  assert _tree(target) != first
  _save(target)
  assert _tree(target) == first
  assert from_pretrained(target / 'generator').config == HALF.generator_encoder(BIG)
  (target / 'generator/notes.txt').write_text('mine')
  with pytest.raises(ConfigError, match=r"generator: holds 'notes\.txt', which no export wrote"):
    _save(target)
  with pytest.raises(ConfigError, match='which no export wrote'):
    save_pretrained(_bundle(BIG), target)
  (target / 'generator/notes.txt').unlink()
  (target / 'mine').mkdir()
  save_pretrained(_bundle(BIG), target / 'mine')
  with pytest.raises(ConfigError, match="holds 'mine', which no export wrote"):
    _save(target)
  (tmp_path / 'e/mine').rename(tmp_path / 'mine')
  save_pretrained(_bundle(BIG), target)  # one model where a pair was: the generator goes with it
  assert not (target / 'generator').exists()


@pytest.mark.parametrize('call', range(1, 16))
def test_a_kill_leaves_a_whole_pair_or_none(call, tmp_path, monkeypatch):
  """A kill is an exception that nothing catches. Mutation: write the generator in an export of its own."""
  target = tmp_path / 'e'
  _save(target)
  old = _tree(target)
  _save(tmp_path / 'expected', 1)
  new = _tree(tmp_path / 'expected')
  with killed_at(monkeypatch, call), contextlib.suppress(Kill):
    _save(target, 1)
  assert not target.exists() or _tree(target) in (old, new)
  _save(target, 1)
  assert _tree(target) == new
  assert sorted(p.name for p in tmp_path.iterdir()) == ['e', 'expected']


@pytest.mark.torch
@pytest.mark.filterwarnings('ignore::DeprecationWarning')
def test_a_generator_of_one_wide_head_has_a_modelling_file(tmp_path):
  """ConvBERT-small's: as wide as the generator, where the class of transformers halves it.

  Mutation: export it without the file (transformers would refuse its shapes).
  """
  torch = pytest.importorskip('torch')
  transformers = pytest.importorskip('transformers')
  encoder = EncoderConfig.mixed(
    heads=4, head_ratio=2, embedding_size=8, conv_kernel_size=3, conv_sees_padding=True, **SMALL
  )
  discriminator, generator, *configs = _pair(encoder, ElectraConfig(generator_size=0.25))
  assert (generator.config.num_heads, generator.config.head_size, generator.config.hidden_size) == (1, 4, 4)
  save_pretraining(discriminator, generator, tmp_path / 'e')
  back = from_pretrained(tmp_path / 'e/generator')
  assert back.config == generator.config and _equal(back.params, generator.params)
  _, fresh = electra_start(discriminator, back, *configs, 'embeddings')
  assert fresh == ()
  model = transformers.AutoModelForMaskedLM.from_pretrained(tmp_path / 'e/generator', trust_remote_code=True).eval()
  ids = np.arange(8, dtype=np.int32).reshape(1, 8)
  with torch.no_grad():
    theirs = model(torch.tensor(ids, dtype=torch.long), output_hidden_states=True).hidden_states[-1].numpy()
  ours = encode(jax.tree.map(jnp.asarray, generator.params), generator.config, jnp.asarray(ids)).last_BTD
  np.testing.assert_allclose(ours, theirs, atol=1e-5)
  assert not (tmp_path / 'e/modeling_compactlm.py').exists()


@pytest.mark.parametrize(
  ('ours', 'message'),
  [
    (None, r'config\.json: compactlm: expected a section'),
    ({'hidden_size': 'wide'}, r"config\.json: compactlm\.hidden_size: 'wide' is not of type int"),
    ({'surprise': 1}, r'config\.json: compactlm\.surprise: unknown field'),
  ],
)
def test_a_native_configuration_is_checked(ours, message):
  with pytest.raises(ConfigError, match=message):
    from_hf({'model_type': 'compactlm', 'compactlm': ours})


def test_the_file_names_the_replaced_token_head(tmp_path):
  discriminator, generator, *_ = _pair(MIXED)
  save_pretraining(discriminator, generator, tmp_path / 'e')
  assert 'discriminator_predictions.*' in (tmp_path / 'e/README.md').read_text()
  back = from_pretrained(tmp_path / 'e')
  assert jax.tree.all(jax.tree.map(lambda a, b: bool((a == b).all()), back.params, discriminator.params))
