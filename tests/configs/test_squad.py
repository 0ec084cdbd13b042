"""SQuAD's recipes: every variant is valid, and has the published settings."""

import importlib.util
import pathlib

import pytest

from compactlm_jax.config import RunConfig, from_config_dict
from compactlm_jax.errors import ConfigError

_SPEC = importlib.util.spec_from_file_location(
  'squad_configs', pathlib.Path(__file__).parents[2] / 'configs' / 'squad.py'
)
squad = importlib.util.module_from_spec(_SPEC)
_SPEC.loader.exec_module(squad)


def load(variant):
  return from_config_dict(RunConfig, squad.get_config(variant))


@pytest.mark.parametrize('recipe', squad.RECIPES)
@pytest.mark.parametrize('version', [1, 2])
def test_every_variant_is_valid(recipe, version):
  """Mutation: 'squad2' for both versions."""
  config = load(f'{recipe}-v{version}')
  assert config.task == 'finetune' and config.finetune.benchmark == f'squad{version}'
  assert (config.span.doc_stride, config.span.max_query_length, config.span.max_answer_length) == (128, 64, 30)
  assert (config.span.n_best, config.optimizer.warmup_fraction, config.optimizer.weight_decay) == (20, 0.1, 0.01)
  assert recipe in squad.__doc__


@pytest.mark.parametrize(
  ('variant', 'learning_rate', 'batch_size', 'epochs', 'seq_len', 'layer_decay'),
  [
    ('electra-small-v1', 3e-4, 32, 2, 512, 0.8),
    ('electra-base-v2', 1e-4, 32, 2, 512, 0.8),
    ('electra-large-v2', 5e-5, 32, 2, 512, 0.9),
    ('convbert-small-v2', 3e-4, 32, 2, 512, 0.8),
    ('convbert-medium-small-v1', 3e-4, 32, 2, 512, 0.8),
    ('convbert-base-v2', 1e-4, 32, 2, 512, 0.8),
    ('bert-v1', 5e-5, 32, 3, 384, 1.0),
    ('bert-v2', 5e-5, 48, 2, 384, 1.0),
    ('minilm-v2', 6e-5, 32, 3, 384, 1.0),
    ('minilm-12-v2', 4e-5, 48, 3, 384, 1.0),
  ],
)
def test_published_settings(variant, learning_rate, batch_size, epochs, seq_len, layer_decay):
  """Mutation: one learning rate for all sizes."""
  config = load(variant)
  assert (config.optimizer.learning_rate, config.batch_size, config.epochs) == (learning_rate, batch_size, epochs)
  assert (config.data.seq_len, config.optimizer.layer_decay) == (seq_len, layer_decay)
  joint = variant.startswith(('electra', 'convbert'))
  assert (config.span.head, config.span.null_threshold) == (('joint', -2.75) if joint else ('independent', 0.0))
  if joint:
    assert (config.span.beam, config.span.answerable_weight) == (20, 0.5)
    assert (config.optimizer.layer_decay_rule, config.optimizer.bias_correction) == ('published', False)


def test_unknown_variants():
  with pytest.raises(ConfigError, match="no variant 'minilm-v3'; did you mean minilm-v[12]?"):
    load('minilm-v3')
  with pytest.raises(ConfigError, match='use RECIPE-v1 or RECIPE-v2 with one of electra-small'):
    load('xyz')
