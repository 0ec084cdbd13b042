"""The causal language models: both of a pair have equal parameters, steps and data, and the sizes that are claimed."""

import dataclasses
import importlib.util
import math
import pathlib

import jax
import pytest

from compactlm_jax.config import RunConfig, from_config_dict
from compactlm_jax.errors import ConfigError
from compactlm_jax.tasks.lm import make_lm_task

_SPEC = importlib.util.spec_from_file_location(
  'wikitext_configs', pathlib.Path(__file__).parents[2] / 'configs' / 'wikitext.py'
)
wikitext = importlib.util.module_from_spec(_SPEC)
_SPEC.loader.exec_module(wikitext)


def load(variant):
  return from_config_dict(RunConfig, wikitext.get_config(variant))


def parameters(config):
  shapes = jax.eval_shape(make_lm_task(config.encoder).init, jax.random.key(0))
  return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(shapes))


@pytest.mark.parametrize('prefix', ['', 'wt2-'])
def test_pairs_differ_in_the_attention_only(prefix):
  """Mutation: mixed attention with the Transformer's feed-forward size (2.5 % fewer parameters)."""
  plain, mixed = load(f'{prefix}transformer'), load(f'{prefix}mixed')
  counts = parameters(plain), parameters(mixed)
  assert abs(counts[1] / counts[0] - 1) < 0.01
  assert all(f'{count:,} ' in wikitext.__doc__ for count in counts)
  assert dataclasses.replace(plain, encoder=mixed.encoder) == mixed
  assert plain.encoder.conv_kernel_size == 0 and mixed.encoder.conv_kernel_size == 9
  assert plain.encoder.causal and mixed.encoder.causal


def test_an_unknown_variant_lists_the_known_ones():
  with pytest.raises(ConfigError, match="no variant 'wt3'; use one of transformer, mixed, "):
    wikitext.get_config('wt3')
