"""Jobs that prune: a fine-tuning job whose task is wrapped."""

from __future__ import annotations

from compactlm_jax.config import EncoderConfig, RunConfig, from_config_dict
from compactlm_jax.tasks.prune import make_prune_task
from compactlm_jax.train.optimizer import learning_rate_schedule
from compactlm_jax.types import Task


def pruned(task: Task, config: RunConfig, total_steps: int) -> Task:
  """The task of `jobs.finetune.finetune_job` with the pruning that `config.prune` describes.

  Raises:
    ConfigError: see `tasks.prune.make_prune_task`.
  """
  return make_prune_task(
    task,
    from_config_dict(EncoderConfig, task.model['encoder'], 'encoder.'),
    config.prune,
    total_steps=total_steps,
    warmup=config.optimizer.warmup(total_steps),
    learning_rate=learning_rate_schedule(config.optimizer, total_steps),
  )
