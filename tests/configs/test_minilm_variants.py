"""The published MiniLM runs: each validates against its teacher, and the students have the published sizes."""

import dataclasses
import importlib.util
import math
import pathlib

import jax
import pytest

from compactlm_jax.config import EncoderConfig, RunConfig, from_config_dict
from compactlm_jax.errors import ConfigError
from compactlm_jax.nn.encoder import encoder_shapes
from compactlm_jax.tasks.distill import check_distill

_SPEC = importlib.util.spec_from_file_location(
  'minilm_configs', pathlib.Path(__file__).parents[2] / 'configs' / 'minilm.py'
)
minilm = importlib.util.module_from_spec(_SPEC)
_SPEC.loader.exec_module(minilm)

BASE = EncoderConfig()
LARGE = EncoderConfig(hidden_size=1024, num_layers=24, num_heads=16)
ASSISTANT = EncoderConfig(hidden_size=384)


def load(variant):
  return from_config_dict(RunConfig, minilm.get_config(variant))


def teacher_of(variant, vocab_size):
  teacher = LARGE if 'large' in variant else ASSISTANT if 'from-assistant' in variant else BASE
  return dataclasses.replace(teacher, vocab_size=vocab_size)


@pytest.mark.parametrize('variant', minilm.VARIANTS)
def test_every_variant_fits_its_teacher(variant):
  config = load(variant)
  assert config.task == 'distill' and config.data.seq_len == 512 and config.optimizer.warmup_steps == 4000
  check_distill(config.encoder, teacher_of(variant, config.encoder.vocab_size), config.distill)


@pytest.mark.parametrize(
  ('variant', 'count'),
  [
    ('l12-h384', 33_360_000),
    ('l6-h384', 22_713_216),
    ('l6-h768', 66_955_008),
    ('l4-h384', 19_164_288),
    ('l3-h384', 17_389_824),
    ('v2-l6-h384', 22_713_216),
    ('v2-l6-h768', 66_955_008),
  ],
)
def test_students_have_the_published_sizes(variant, count):
  assert parameters(load(variant).encoder) == count


def test_the_factorised_student_has_the_published_size():
  encoder = load('l12-h384-e128').encoder
  assert parameters(encoder) == 4_022_400 + 21_293_568
  assert parameters(dataclasses.replace(encoder, pooler=True)) == 25_463_808


def test_published_settings():
  settings = {
    name: (c.optimizer.learning_rate, c.batch_size, c.steps, c.optimizer.beta2, c.distill.relation_heads)
    for name, c in ((name, load(name)) for name in minilm.VARIANTS)
  }
  assert settings['l6-h768'] == (5e-4, 1024, 400_000, 0.999, 0)
  assert settings['l6-h384'] == settings['from-assistant-l6-h384'] == (3e-4, 256, 400_000, 0.999, 0)
  assert settings['inhouse-l12-h384'] == (6e-4, 2048, 400_000, 0.98, 0)
  assert settings['xlmr-l12-h384'] == (3e-4, 256, 1_000_000, 0.999, 0)
  assert settings['v2-bert-large-l6-h384'] == (6e-4, 256, 400_000, 0.999, 64)
  assert load('v2-bert-large-l6-h384').distill.teacher_layer == 21
  assert load('v2-roberta-large-l6-h384').distill.teacher_layer == 19


def test_an_unknown_variant_lists_the_known_ones():
  with pytest.raises(ConfigError, match="no variant 'l5'; use one of l6-h768, "):
    minilm.get_config('l5')


def parameters(encoder):
  return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(encoder_shapes(encoder)))
