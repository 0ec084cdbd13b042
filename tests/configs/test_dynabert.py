"""configs/dynabert.py: what the published recipe and papers.md 5.3 and 0a say."""

import importlib.util
import pathlib

import pytest

from compactlm_jax.compress.subnet import subnet_config
from compactlm_jax.config import EncoderConfig, RunConfig, cells, from_config_dict
from compactlm_jax.errors import ConfigError
from compactlm_jax.tasks.distill import check_distill

_PATH = pathlib.Path(__file__).parents[2] / 'configs' / 'dynabert.py'
_SPEC = importlib.util.spec_from_file_location('configs_dynabert', _PATH)
module = importlib.util.module_from_spec(_SPEC)
_SPEC.loader.exec_module(module)


def run(variant):
  return from_config_dict(RunConfig, module.get_config(variant))


@pytest.mark.parametrize('variant', ['table', *module.TASKS])
def test_the_published_recipe(variant):
  """Mutations: the optimiser's own weight decay or epsilon; a warm-up; another weight of the hidden states."""
  found = run(variant)
  assert found.task == 'adapt' and found.labelled and found.finetune.benchmark == variant.replace('table', '')
  assert (found.epochs, found.steps, found.batch_size, found.data.seq_len) == (3.0, 0, 32, 128)
  optimizer, adapt = found.optimizer, found.adapt
  assert (optimizer.learning_rate, optimizer.weight_decay, optimizer.epsilon) == (2e-5, 0.0, 1e-8)
  assert (optimizer.warmup_steps, optimizer.warmup_fraction, optimizer.decay) == (0, 0.0, 'linear')
  assert optimizer.clip_norm == 1.0 and optimizer.bias_correction
  assert adapt.stages == ('width', 'depth', 'final')
  assert (adapt.widths, adapt.depths) == ((0.25, 0.5, 0.75, 1.0), (0.5, 0.75, 1.0))
  assert (adapt.logit_weight, adapt.hidden_weight, adapt.depth_hidden_weight) == (1.0, 0.1, 1.0)
  assert (adapt.combine, adapt.sampling, adapt.importance_rows, adapt.keep_best) == ('sum', 'all', 'dev', True)
  assert found.eval_every in (50, 500, 2000) and found.finetune.pooled == (variant != 'table')


@pytest.mark.parametrize('base', ['mlm', 'electra', 'distill'])
def test_pre_training_covers_the_published_sizes(base):
  """(layers, hidden size) of small BERTs: heads of 64, four times as many neurons. Mutation: depth .75."""
  found = run(f'pretrain-{"minilm" if base == "distill" else base}')
  assert found.adapt.base == base and not found.labelled and found.steps
  sizes = [subnet_config(found.encoder, cell) for cell in cells(found.adapt, found.encoder)]
  assert {(s.num_layers, s.hidden_size) for s in sizes} == {(n, h) for n in (4, 6) for h in (128, 256, 512, 768)}
  for size in sizes:
    assert size.num_heads * 64 == size.hidden_size and size.intermediate_size == 4 * size.hidden_size
    assert size.embedding_size == size.hidden_size
    if base == 'distill':
      check_distill(size, EncoderConfig(), found.distill)


def test_pre_training_is_that_of_the_originals():
  """Mutations: correct the bias of the moments, as AdamW; decay after the warm-up; other projections."""
  spec = importlib.util.spec_from_file_location('configs_electra', _PATH.with_name('electra.py'))
  electra = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(electra)
  published, found = from_config_dict(RunConfig, electra.get_config('base')), run('pretrain-electra')
  for name in ('optimizer', 'mask', 'electra', 'batch_size', 'steps'):
    assert getattr(found, name) == getattr(published, name)
  assert found.encoder.glorot_projections and published.encoder.glorot_projections
  bert = run('pretrain-mlm').optimizer
  assert (bert.bias_correction, bert.decay_from, bert.learning_rate) == (False, 'start', 1e-4)
  assert run('pretrain-minilm').optimizer.bias_correction


def test_unknown_variants_are_refused_and_known_ones_named():
  with pytest.raises(ConfigError, match='pretrain-minilm'):
    module.get_config('nothing')
  assert all(variant in module.__doc__ for variant in module.VARIANTS)
