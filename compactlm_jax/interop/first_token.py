"""Our classifier on the first token, as the two-layer heads that transformers has for sequences.

The head of ElectraFor- and ConvBertForSequenceClassification is `dense` to the hidden size, exact GELU, `out_proj` to
the classes. With Phi(z) + Phi(-z) = 1, gelu(z) - gelu(-z) = z * Phi(z) + z * Phi(-z) = z, so that one layer of C
outputs is exactly such a head: its C columns and their negatives in `dense`, +1 and -1 in `out_proj`, zeros elsewhere.
It needs 2 C neurons of the hidden size D.

BertForSequenceClassification reads BERT's pooler, a dense layer and tanh. With the pooler SMALL * I and a classifier
divided by SMALL that is x * (1 - (SMALL * x)^2 / 3 + ...): for |x| <= 20 within 5e-7 of x, relatively. SMALL is a power
of two, so that nothing is rounded on the way out and back, and a normal number of half precision.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from compactlm_jax.config import EncoderConfig
from compactlm_jax.errors import DataError

OURS = 'compactlm_classifier'
SMALL = 2.0**-14
_DENSE, _OUT = 'classifier.dense', 'classifier.out_proj'
_POOLER = 'pooler.dense'


def fits(config: EncoderConfig, num_classes: int) -> bool:
  """Whether transformers' two-layer head of this encoder can hold our classifier."""
  if config.pooler or not num_classes:
    return False
  return config.architecture == 'bert' or 2 * num_classes <= config.hidden_size


def widened(tensors: Mapping[str, np.ndarray], config: EncoderConfig) -> dict[str, np.ndarray]:
  """Tensors with our one layer [C, D] written as transformers' two.

  Args:
    tensors: what is exported, with `compactlm_classifier.weight` [C, D] and `.bias` [C].
    config: the encoder.

  Returns:
    The same with BERT's `pooler.dense.*` [D, D] and `classifier.*` [C, D] in their place, or `classifier.dense.*`
    [D, D] and `classifier.out_proj.*` [C, D].
  """
  weight_CD, bias_C = tensors[f'{OURS}.weight'], tensors[f'{OURS}.bias']
  (classes, hidden), out = weight_CD.shape, {n: t for n, t in tensors.items() if not n.startswith(f'{OURS}.')}
  if config.architecture == 'bert':
    return out | {
      f'bert.{_POOLER}.weight': _passing(hidden),
      f'bert.{_POOLER}.bias': np.zeros(hidden, np.float32),
      'classifier.weight': weight_CD / np.float32(SMALL),
      'classifier.bias': bias_C,
    }
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
  if config.architecture == 'bert':
    return _without_passing(tensors) if passes_first_token(tensors) else dict(tensors)
  head = {n: t for n, t in tensors.items() if n.startswith((f'{_DENSE}.', f'{_OUT}.'))}
  if not head:
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
    if all(np.array_equal(head[name], tensor) for name, tensor in widened(ours, config).items()):
      return {name: tensor for name, tensor in tensors.items() if name not in head} | ours
  raise DataError(
    f'tensor {min(head)}: unexpected: a classifier of two layers was trained here, ours has one; save the encoder '
    'without it (AutoModel.from_pretrained(folder).save_pretrained(new_folder)) and fine-tune again'
  )


def passes_first_token(tensors: Mapping[str, np.ndarray]) -> bool:
  """Whether the tensors of a BERT hold a classifier and the pooler that `widened` puts before it."""
  weight, bias = (tensors.get(f'bert.{_POOLER}.{part}') for part in ('weight', 'bias'))
  heads = [tensors.get(f'classifier.{part}') for part in ('weight', 'bias')]
  if weight is None or bias is None or any(head is None for head in heads) or weight.ndim != 2 or not weight.size:
    return False
  return bool(weight[0, 0] == SMALL) and np.array_equal(weight, _passing(len(weight))) and not bias.any()


def _passing(hidden: int) -> np.ndarray:
  return np.float32(SMALL) * np.eye(hidden, dtype=np.float32)


def _without_passing(tensors: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
  """`widened` of a BERT, undone; half precision becomes float32, in which the smaller weights are not rounded."""
  out = {name: tensor for name, tensor in tensors.items() if not name.startswith((f'bert.{_POOLER}.', 'classifier.'))}
  weight_CD = tensors['classifier.weight']
  if weight_CD.dtype.itemsize == 2:
    weight_CD = weight_CD.astype(np.float32)
  return out | {
    f'{OURS}.weight': weight_CD * weight_CD.dtype.type(SMALL),
    f'{OURS}.bias': tensors['classifier.bias'],
  }


def _signs(classes: int, hidden: int) -> np.ndarray:
  signs = np.zeros((classes, hidden), np.float32)
  signs[:, :classes], signs[:, classes : 2 * classes] = np.eye(classes), -np.eye(classes)
  return signs
