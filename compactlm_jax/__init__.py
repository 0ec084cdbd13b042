"""Train, distil and compress BERT-like encoders on TPUs.

import compactlm_jax as clm
bundle = clm.from_pretrained('folder')
out = clm.encode(bundle.params, bundle.config, input_ids, attention_mask)
clm.save_pretrained(bundle, 'other_folder')
clm.predict(fine_tuned, ['a text', 'another']).labels
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
  from compactlm_jax.config import EncoderConfig as EncoderConfig
  from compactlm_jax.interop.bundle import Bundle as Bundle
  from compactlm_jax.interop.bundle import from_pretrained as from_pretrained
  from compactlm_jax.interop.bundle import save_pretrained as save_pretrained
  from compactlm_jax.jobs.predict import Predictions as Predictions
  from compactlm_jax.jobs.predict import predict as predict
  from compactlm_jax.nn.encoder import encode as encode
  from compactlm_jax.nn.encoder import init_encoder as init_encoder
  from compactlm_jax.types import EncoderOutput as EncoderOutput

_HOMES = {
  'EncoderConfig': 'compactlm_jax.config',
  'Bundle': 'compactlm_jax.interop.bundle',
  'from_pretrained': 'compactlm_jax.interop.bundle',
  'save_pretrained': 'compactlm_jax.interop.bundle',
  'Predictions': 'compactlm_jax.jobs.predict',
  'predict': 'compactlm_jax.jobs.predict',
  'encode': 'compactlm_jax.nn.encoder',
  'init_encoder': 'compactlm_jax.nn.encoder',
  'EncoderOutput': 'compactlm_jax.types',
}
__all__ = sorted(_HOMES)


def __getattr__(name: str) -> Any:
  """Imports a public name on first use, so that `import compactlm_jax` stays light."""
  if name not in _HOMES:
    raise AttributeError(f'compactlm_jax has no attribute {name!r}')
  return getattr(importlib.import_module(_HOMES[name]), name)
