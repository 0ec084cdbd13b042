"""A run goes on with the configuration that began it: row 14 of the fault matrix. (More: train/test_rundir.py.)"""

import dataclasses
import itertools

import pytest
from every_task import TASKS, config_of

from compactlm_jax.errors import ConfigError
from compactlm_jax.train.rundir import open_run, read_run

ALWAYS = {'seed': 4, 'batch_size': 32, 'optimizer.learning_rate': 3e-3, 'data.seq_len': 8, 'mask.probability': 0.3}
OWN = {
  'electra': {'electra.generator_size': 0.25},
  'lm': {'encoder.hidden_dropout': 0.2},
  'distill': {'distill.relations': ('qk',)},
  'finetune': {'finetune.dropout': 0.2},
  'prune': {'prune.density': 0.3},
  'adapt': {'adapt.widths': (0.25, 0.5, 1.0)},
}
CASES = list(itertools.chain(*([(task, f, v) for f, v in {**ALWAYS, **OWN[task]}.items()] for task in TASKS)))


def changed(config, field, value):
  name, _, rest = field.partition('.')
  return dataclasses.replace(config, **{name: changed(getattr(config, name), rest, value) if rest else value})


@pytest.mark.parametrize(('task', 'field', 'value'), CASES)
def test_drift_is_refused_unless_allowed_and_then_recorded(task, field, value, tmp_path):
  """With 78, field, old and new value. Mutation: add the field to FREE_FIELDS."""
  config = config_of(task)
  with open_run(tmp_path, config, {}):
    (tmp_path / 'checkpoints' / '5').mkdir(parents=True)
  new, before = changed(config, field, value), (tmp_path / 'config.json').read_bytes()
  with pytest.raises(ConfigError, match=rf'config\.{field}: was .*, now .*--allow_change={field}') as refused:
    with open_run(tmp_path, new, {}):
      pytest.fail('opened')
  assert refused.value.exit_code == 78 and (tmp_path / 'config.json').read_bytes() == before
  with open_run(tmp_path, new, {}, allow_change=(field,)):
    pass
  found, record = read_run(tmp_path)
  assert found == new and [change['field'] for change in record['changes']] == [field]
