"""Our classifier on the first token, as the two-layer head of ElectraFor- and ConvBertForSequenceClassification.

Their head is `dense` to the hidden size, exact GELU, `out_proj` to the classes. With Phi(z) + Phi(-z) = 1,
gelu(z) - gelu(-z) = z * Phi(z) + z * Phi(-z) = z, so that one layer of C outputs is exactly such a head: its C columns
and their negatives in `dense`, +1 and -1 in `out_proj`, zeros elsewhere. It needs 2 C neurons of the hidden size D.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from compactlm_jax.config import EncoderConfig
from compactlm_jax.errors import DataError

OURS = 'compactlm_classifier'
_DENSE, _OUT = 'classifier.dense', 'classifier.out_proj'


def fits(config: EncoderConfig, num_classes: int) -> bool:
  """Whether transformers' two-layer head of this encoder can hold our classifier."""
  return config.architecture != 'bert' and not config.pooler and 0 < 2 * num_classes <= config.hidden_size


def widened(tensors: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
  """Tensors with our one layer [C, D] written as transformers' two.

  Args:
    tensors: what is exported, with `compactlm_classifier.weight` [C, D] and `.bias` [C].

  Returns:
    The same with `classifier.dense.*` [D, D] and `classifier.out_proj.*` [C, D] in their place.
  """
  weight_CD, bias_C = tensors[f'{OURS}.weight'], tensors[f'{OURS}.bias']
  (classes, hidden), out = weight_CD.shape, {n: t for n, t in tensors.items() if not n.startswith(f'{OURS}.')}
  dense_DD, dense_D = np.zeros((hidden, hidden), np.float32), np.zeros(hidden, np.float32)
  dense_DD[:classes], dense_DD[classes : 2 * classes] = weight_CD, -weight_CD
  dense_D[:classes], dense_D[classes : 2 * classes] = bias_C, -bias_C
  return out | {
    f'{_DENSE}.weight': dense_DD,
    f'{_DENSE}.bias': dense_D,
    f'{_OUT}.weight': _signs(classes, hidden),
    f'{_OUT}.bias': np.zeros(classes, np.float32),
  }


def narrowed(tensors: Mapping[str, np.ndarray], config: EncoderConfig) -> dict[str, np.ndarray]:
  """The inverse of `widened`; tensors without such a head are returned as they are.

  Raises:
    DataError: a two-layer head that was trained as such: ours has one layer.
  """
  head = {n: t for n, t in tensors.items() if n.startswith((f'{_DENSE}.', f'{_OUT}.'))}
  if config.architecture == 'bert' or not head:
    return dict(tensors)
  shapes, hidden = {name: tensor.shape for name, tensor in head.items()}, config.hidden_size
  classes = (shapes.get(f'{_OUT}.weight') or (0,))[0]
  expected = {
    f'{_DENSE}.weight': (hidden, hidden),
    f'{_DENSE}.bias': (hidden,),
    f'{_OUT}.weight': (classes, hidden),
    f'{_OUT}.bias': (classes,),
  }
  if shapes == expected and fits(config, classes):
    dense_DD, dense_D = head[f'{_DENSE}.weight'], head[f'{_DENSE}.bias']
    ours = {f'{OURS}.weight': dense_DD[:classes], f'{OURS}.bias': dense_D[:classes]}
    if all(np.array_equal(head[name], tensor) for name, tensor in widened(ours).items()):
      return {name: tensor for name, tensor in tensors.items() if name not in head} | ours
  raise DataError(
    f'tensor {min(head)}: unexpected: a classifier of two layers was trained here, ours has one; save the encoder '
    'without it (AutoModel.from_pretrained(folder).save_pretrained(new_folder)) and fine-tune again'
  )


def _signs(classes: int, hidden: int) -> np.ndarray:
  signs = np.zeros((classes, hidden), np.float32)
  signs[:, :classes], signs[:, classes : 2 * classes] = np.eye(classes), -np.eye(classes)
  return signs
