"""Configuration: ConfigDicts at the command line, frozen and validated dataclasses inside.

`to_config_dict` turns a dataclass into the ConfigDict that a file in `configs/` returns, `from_config_dict` turns it
back and validates it once. Nothing below `cli` and this package sees a ConfigDict. Lists are comma-separated
strings at the command line and tuples inside.
"""

from compactlm_jax.config.adapt import AdaptConfig, Cell, cells
from compactlm_jax.config.convert import from_config_dict, to_config_dict, to_json
from compactlm_jax.config.encoder import LAYER_FIELDS, TABLE_FIELDS, EncoderConfig, runs, stack_names
from compactlm_jax.config.finetune import GLUE, SQUAD, FinetuneConfig, SpanConfig
from compactlm_jax.config.pretrain import SHARED_EMBEDDINGS, ElectraConfig, MaskConfig
from compactlm_jax.config.prune import PruneConfig
from compactlm_jax.config.run import LABELLED, DataConfig, DistillConfig, MeshConfig, OptimizerConfig, RunConfig

__all__ = [
  'GLUE',
  'LABELLED',
  'LAYER_FIELDS',
  'SHARED_EMBEDDINGS',
  'SQUAD',
  'TABLE_FIELDS',
  'AdaptConfig',
  'Cell',
  'DataConfig',
  'DistillConfig',
  'ElectraConfig',
  'EncoderConfig',
  'FinetuneConfig',
  'MaskConfig',
  'MeshConfig',
  'OptimizerConfig',
  'PruneConfig',
  'RunConfig',
  'SpanConfig',
  'cells',
  'from_config_dict',
  'runs',
  'stack_names',
  'to_config_dict',
  'to_json',
]
