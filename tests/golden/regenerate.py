"""Writes tests/golden/*.json again: python tests/golden/regenerate.py [TASK ...]

Do this only when numbers are meant to change, in the commit that changes them, with the reason in its message.
"""

import json
import os
import pathlib

HERE = pathlib.Path(__file__).parent
TASKS = ('mlm', 'electra', 'convbert', 'lm', 'distill', 'finetune', 'prune', 'adapt')
STEPS = 50


def losses(task):
  """The first losses of configs/tiny.py, with dropout and seed 0, on one device."""
  import dataclasses

  import jax
  from tiny import configured, run_steps

  config = dataclasses.replace(configured(task), seed=0)
  if task == 'adapt':  # of its stages the one with everything: all cells, a teacher, hidden states
    config = dataclasses.replace(config, steps=STEPS, adapt=dataclasses.replace(config.adapt, stages=('depth',)))
  return run_steps(config, STEPS, jax.devices()[:1])[0]


def main(tasks):
  import jax

  for task in tasks or TASKS:
    record = {'config': f'configs/tiny.py:{task}', 'jax': jax.__version__, 'losses': [x.hex() for x in losses(task)]}
    (HERE / f'{task}.json').write_text(json.dumps(record, indent=1) + '\n')
    print(f'{task}: {float.fromhex(record["losses"][0]):.6g} -> {float.fromhex(record["losses"][-1]):.6g}')


if __name__ == '__main__':
  import sys

  sys.path[:0] = [str(HERE.parent), str(HERE.parents[1])]
  # As tests/conftest.py: bits depend on the optimiser and on how threads share the work.
  os.environ.update(JAX_PLATFORMS='cpu', JAX_NUM_CPU_DEVICES='8', XLA_FLAGS='--xla_backend_optimization_level=0')
  main(sys.argv[1:])
