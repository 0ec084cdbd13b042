"""Configuration: every file in configs/ survives the way to ConfigDict, JSON and back; wrong fields are named."""

import dataclasses
import importlib.util
import json
import pathlib
import re

import ml_collections
import pytest

from compactlm_jax.config import (
  AdaptConfig,
  Cell,
  DataConfig,
  DistillConfig,
  ElectraConfig,
  EncoderConfig,
  FinetuneConfig,
  MaskConfig,
  MeshConfig,
  OptimizerConfig,
  PruneConfig,
  RunConfig,
  SpanConfig,
  from_config_dict,
  to_config_dict,
  to_json,
)
from compactlm_jax.errors import ConfigError

FILES = sorted((pathlib.Path(__file__).parents[2] / 'configs').glob('*.py'))


def load(path):
  spec = importlib.util.spec_from_file_location(f'configs_{path.stem}', path)
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  return module


def all_configs():
  for path in FILES:
    module = load(path)
    for variant in getattr(module, 'VARIANTS', [None]):
      yield f'{path.stem}:{variant}', module.get_config(*([variant] if variant else []))


@pytest.mark.parametrize(('name', 'config'), list(all_configs()), ids=lambda x: x if isinstance(x, str) else '')
def test_every_configuration_survives_the_round_trip(name, config):
  """Mutation: leave tuples as they are in `to_config_dict`, or forget to coerce them back."""
  assert isinstance(config, ml_collections.ConfigDict) and config.is_locked
  run = from_config_dict(RunConfig, config)
  assert from_config_dict(RunConfig, to_config_dict(run)) == run
  assert from_config_dict(RunConfig, json.loads(json.dumps(to_json(run)))) == run
  assert to_config_dict(run) == config
  assert hash(run) == hash(from_config_dict(RunConfig, config))


def test_every_field_is_documented():
  """Mutation: add a field without a line in the docstring."""
  for kind in (
    RunConfig,
    DataConfig,
    OptimizerConfig,
    MeshConfig,
    DistillConfig,
    FinetuneConfig,
    SpanConfig,
    PruneConfig,
    AdaptConfig,
    Cell,
    EncoderConfig,
    MaskConfig,
    ElectraConfig,
  ):
    for field in dataclasses.fields(kind):
      sections = ('data', 'optimizer', 'mesh', 'distill', 'finetune', 'span', 'prune', 'adapt', 'mask', 'electra')
      if kind is RunConfig and field.name in sections:
        continue
      listed = re.search(rf'^ +(\w+, )*{field.name}(, \w+)*( and \w+)?: ', kind.__doc__, re.MULTILINE)
      assert listed, f'{kind.__name__}.{field.name}'


@pytest.mark.parametrize('file', FILES, ids=lambda p: p.stem)
def test_unknown_variants_are_refused_with_the_known_ones(file):
  with pytest.raises(ConfigError, match=f'configs/{file.stem}.py has no variant .nothing.; use'):
    load(file).get_config('nothing')


def base(**changes):
  return {'task': 'distill', 'steps': 3, **changes}


@pytest.mark.parametrize(
  ('given', 'expected'),
  [
    ('qq,kk,vv', ('qq', 'kk', 'vv')),
    (' qq , vv ', ('qq', 'vv')),
    (['qk'], ('qk',)),
    (('qk', 'vv'), ('qk', 'vv')),
  ],
)
def test_lists_are_comma_separated(given, expected):
  """Mutation: do not strip the parts."""
  assert from_config_dict(RunConfig, base(distill={'relations': given})).distill.relations == expected


def test_lists_of_integers():
  run = from_config_dict(RunConfig, base(distill={'init_layers': '2, 4,6', 'student_init': 'teacher_layers'}))
  assert run.distill.init_layers == (2, 4, 6) and to_json(run)['distill']['init_layers'] == '2,4,6'
  assert from_config_dict(RunConfig, base(distill={'init_layers': ''})).distill.init_layers == ()


def test_integers_serve_as_floats_and_not_the_other_way():
  """Mutation: drop the conversion, or accept True as 1."""
  run = from_config_dict(RunConfig, base(epochs=2, optimizer={'learning_rate': 1}))
  assert isinstance(run.epochs, float) and isinstance(run.optimizer.learning_rate, float)


def test_missing_sections_take_their_defaults():
  run = from_config_dict(RunConfig, base())
  assert run.optimizer == OptimizerConfig() and run.encoder == EncoderConfig() and run.mesh == MeshConfig()


@pytest.mark.parametrize(
  ('config', 'message'),
  [
    ({'steps': 3}, 'config.task: is missing'),
    (base(task='distil'), "config.task: 'distil' is unknown; did you mean distill?"),
    (base(task='train'), "config.task: 'train' is unknown; use one of electra, mlm, lm, distill, finetune"),
    (base(stepz=1), 'config.stepz: unknown field; known fields are adapt, batch_size, '),
    (base(optimizer={'lr': 1.0}), 'config.optimizer.lr: unknown field; known fields are accumulate, '),
    (base(optimizer=3), 'config.optimizer: expected a section, got 3'),
    (3, 'config: expected a section, got 3'),
    (base(seed='1'), "config.seed: '1' is not of type int"),
    (base(seed=1.0), 'config.seed: 1.0 is not of type int'),
    (base(seed=True), 'config.seed: True is not of type int'),
    (base(epochs=True), 'config.epochs: True is not of type float'),
    (base(encoder={'pooler': 1}), 'config.encoder.pooler: 1 is not of type bool'),
    (base(model=None), 'config.model: None is not of type str'),
    (base(distill={'init_layers': 'a'}), "config.distill.init_layers: 'a' is not a comma-separated list of int"),
    (base(distill={'init_layers': 3}), 'config.distill.init_layers: 3 is not a comma-separated list of int'),
    (base(distill={'relations': 'qv'}), "config.distill.relations: ('qv',) must be some of qk, vv, qq, kk"),
    (base(distill={'relations': 'qk,qk'}), "config.distill.relations: ('qk', 'qk') repeats a relation"),
    (base(steps=0), 'config.steps: set steps or epochs to a positive number'),
    (base(steps=-1), 'config.steps: set steps'),
    (base(epochs=float('nan')), 'config.steps: set steps'),
    (base(epochs=float('inf')), 'config.epochs: inf must be at most a million'),
    (base(steps=2**31), 'config.steps: 2147483648 must be less than 2^31'),
    (base(batch_size=0), 'config.batch_size: 0 must be at least 1'),
    (base(seed=-1), 'config.seed: -1 must be in [0, 2^31)'),
    (base(eval_every=-1), 'config.eval_every: -1 must not be negative'),
    (base(batch_size=6, optimizer={'accumulate': 4}), 'config.optimizer.accumulate: batch_size 6 is not divisible'),
    (base(optimizer={'learning_rate': 1e30}), 'config.optimizer.learning_rate: 1e+30 must be in [0, 10]'),
    (base(optimizer={'learning_rate': float('nan')}), 'config.optimizer.learning_rate: nan must be in [0, 10]'),
    (base(optimizer={'beta2': 1.0}), 'config.optimizer.beta2: 1.0 must be in [0, 0.99999]'),
    (base(optimizer={'epsilon': 0.0}), 'config.optimizer.epsilon: 0.0 must be at least'),
    (base(optimizer={'no_decay': '('}), "config.optimizer.no_decay: '(' is not a regular expression"),
    (base(optimizer={'decay': 'cosine'}), "config.optimizer.decay: 'cosine'; use 'linear' or 'constant'"),
    (base(optimizer={'decay_from': 'end'}), "config.optimizer.decay_from: 'end'; use 'start' or 'warmup'"),
    (base(mesh={'data': 0}), 'config.mesh: (0, 1, 1) must be positive'),
    (base(mesh={'data': -1, 'fsdp': -1}), 'config.mesh: (-1, -1, 1) must be positive, with at most one -1'),
    (base(data={'text_columns': 'a,b,c'}), "config.data.text_columns: ('a', 'b', 'c') must name one or two"),
    (base(data={'bad_record_budget': 0.5}), 'config.data.bad_record_budget: must be a fraction'),
    (base(finetune={'dropout': 1.0}), 'config.finetune.dropout: 1.0 must be in [0, 1)'),
    (base(encoder={'num_heads': 7}), 'config.encoder.num_heads: hidden_size 768 is not divisible by num_heads 7'),
    (base(encoder={'num_groups': 5}), 'config.encoder.num_groups: hidden_size 768 is not divisible'),
    (base(encoder={'conv_kernel_size': 4}), 'config.encoder.conv_kernel_size: 4 must be odd'),
    (base(encoder={'dtype': 'float16'}), "config.encoder.dtype: 'float16'; use 'float32' or 'bfloat16'"),
    (base(encoder={'num_layers': 0}), 'config.encoder.num_layers: 0 must be at least 1'),
    (base(encoder={'hidden_dropout': 1.0}), 'config.encoder.hidden_dropout: 1.0 must be in [0, 1)'),
    (base(encoder={'conv_kind': 'static'}), "config.encoder.conv_kind: 'static'; use 'span' or 'dynamic'"),
    (base(encoder={'self_attention': False}), 'config.encoder.self_attention: False leaves nothing that mixes'),
    (base(mask={'probability': 1.5}), 'config.mask.probability: 1.5 must be between 0 and 1'),
    (base(mask={'probability': 0.0}), 'config.mask.probability: 0.0 must be between 0 and 1'),
    (base(mask={'mask_rate': -0.1}), 'config.mask.mask_rate: -0.1 must be in [0, 1]'),
    (base(mask={'mask_rate': 0.8, 'random_rate': 0.3}), 'config.mask.random_rate: and mask.mask_rate add up'),
    (base(electra={'generator_size': 0.0}), 'config.electra.generator_size: 0.0 must be in (0, 1]'),
    (base(electra={'sharing': 'some'}), "config.electra.sharing: 'some'; use 'embeddings', 'none' or 'all'"),
    (base(electra={'sharing': 'all'}), "config.electra.sharing: 'all' needs generator_size"),
    (
      base(electra={'sharing': 'all', 'generator_size': 1.0, 'generator_layers': 1.0, 'generator_heads': 2}),
      "config.electra.generator_heads: 2: with sharing='all'",
    ),
    (base(electra={'temperature': 0.0}), 'config.electra.temperature: 0.0 must be positive'),
  ],
  ids=lambda x: x if isinstance(x, str) else '',
)
def test_what_is_wrong_is_named_by_its_path(config, message):
  """Mutation: drop the prefix of nested sections, or any one check."""
  with pytest.raises(ConfigError) as refused:
    from_config_dict(RunConfig, config)
  assert str(refused.value).startswith(message) and refused.value.exit_code == 78


def test_derived_sizes_are_kept_through_the_round_trip():
  """A small ConvBERT has fewer heads than width / head size. Mutation: derive head_size again."""
  encoder = EncoderConfig.mixed(heads=12, head_ratio=2, hidden_size=768)
  assert (encoder.num_heads, encoder.head_size, encoder.conv_kernel_size) == (6, 64, 9)
  assert from_config_dict(EncoderConfig, to_json(encoder), 'encoder.') == encoder


def test_a_head_ratio_that_does_not_divide_is_refused():
  """Mutation: round down, as the original does."""
  with pytest.raises(
    ConfigError, match='config.encoder.num_heads: 8 configured heads do not divide by the head ratio 3'
  ):
    EncoderConfig.mixed(heads=8, head_ratio=3, hidden_size=48)
  assert EncoderConfig.mixed(heads=1, head_ratio=2, hidden_size=64).num_heads == 1  # the original's way out


def test_warmup_of_a_run():
  """Mutation: round the fraction up."""
  assert OptimizerConfig(warmup_steps=7).warmup(1000) == 7
  assert OptimizerConfig(warmup_fraction=0.1).warmup(155) == 15
  assert OptimizerConfig().warmup(155) == 0
