"""Prediction: batches of rows of similar length, each padded to the smallest of a few lengths."""

from __future__ import annotations

import dataclasses
import functools
import logging
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from compactlm_jax.config import EncoderConfig
from compactlm_jax.data.source import RowSource
from compactlm_jax.data.table import join_ids
from compactlm_jax.data.tokenizer import Tokenizer, load_tokenizer
from compactlm_jax.errors import ConfigError, DataError, NumericsError
from compactlm_jax.interop.bundle import Bundle
from compactlm_jax.interop.hf_config import default_labels
from compactlm_jax.interop.tokenizer_files import TokenizerFiles
from compactlm_jax.tasks.finetune import classify
from compactlm_jax.types import Batch, Params

BUCKETS = (16, 32, 64, 128, 256, 512)
"""Lengths that rows are padded to: each is compiled once."""

CHUNK = 4096
"""Texts that are tokenised and sorted by length together."""

Forward = Callable[[Params, Batch], Mapping[str, jax.Array]]
"""(parameters, batch) -> outputs with a leading row axis, which do not depend on the length of the batch."""

log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Usage:
  """What was computed.

  Attributes:
    rows: texts or pairs.
    truncated: rows that were longer than the limit and were cut.
    tokens: tokens that were read.
    computed: tokens with padding.
  """

  rows: int = 0
  truncated: int = 0
  tokens: int = 0
  computed: int = 0

  @property
  def padding(self) -> float:
    """The share of padding in what was computed."""
    return 1 - self.tokens / self.computed if self.computed else 0.0

  def __add__(self, other: Usage) -> Usage:
    return Usage(*(a + b for a, b in zip(dataclasses.astuple(self), dataclasses.astuple(other), strict=True)))


@dataclasses.dataclass(frozen=True)
class Predictions:
  """What a model says about texts, in the order of the texts.

  Attributes:
    outputs: float32 [n, C]: logits of the classes, or one score.
    classes: names of the C classes ('LABEL_0', ... if the model has none); () if the model predicts a score.
    usage: rows, tokens, padding, and how many texts were cut.
  """

  outputs: np.ndarray
  classes: tuple[str, ...]
  usage: Usage

  @property
  def labels(self) -> tuple[str, ...]:
    """The name of the likeliest class of each text; () if the model predicts a score."""
    return tuple(self.classes[i] for i in self.outputs.argmax(1)) if self.classes else ()

  @property
  def probabilities(self) -> np.ndarray:
    """Softmax of the logits, float32 [n, C]; not defined for scores."""
    shifted = np.exp(self.outputs - self.outputs.max(1, keepdims=True))
    return shifted / shifted.sum(1, keepdims=True)

  @property
  def scores(self) -> np.ndarray:
    """The score of each text in the unit of the labels, float32 [n]; not defined for classes."""
    return self.outputs[:, 0]

  @property
  def truncated(self) -> int:
    """How many texts were cut."""
    return self.usage.truncated


def predict(
  bundle: Bundle,
  texts: Sequence[str],
  *,
  pairs: Sequence[str] | None = None,
  batch_size: int = 32,
  buckets: Sequence[int] = BUCKETS,
  seq_len: int | None = None,
) -> Predictions:
  """Classes or scores of texts, by the classifier of a fine-tuned model.

  Texts of similar length share batches, which are padded to the next of `buckets` only; what is predicted for a text
  depends neither on the others nor on the buckets. A ConvBERT whose convolution reads padding (`conv_sees_padding`,
  every import from transformers) gets so much more padding that its predictions are those of rows padded to `seq_len`:
  give the length that it was fine-tuned with. An empty text is read as [CLS] [SEP].

  Args:
    bundle: with a 'classifier' and a tokenizer.
    texts: what to read.
    pairs: second texts of pairs, as many.
    batch_size: rows computed together; the last batch of a call is padded to a power of two.
    buckets: lengths in tokens; those above `seq_len` are left out, `seq_len` is added.
    seq_len: texts are cut to so many tokens, which is counted and logged; None takes the positions of the model.

  Returns:
    The predictions.

  Raises:
    ConfigError: no classifier or no tokenizer in the bundle, columns of unequal length, or a length that the model
      cannot read.
    DataError: something that is no text.
  """
  columns = [texts] if pairs is None else [texts, pairs]
  if isinstance(texts, str) or isinstance(pairs, str):
    raise ConfigError('texts: expected a list of texts, not one text; put it in a list')
  if pairs is not None and len(pairs) != len(texts):
    raise ConfigError(f'pairs: {len(pairs)} second texts for {len(texts)} first texts')
  require_classifier(bundle)
  reader = Reader.of(bundle, ('classifier',), batch_size, buckets, seq_len)
  parts = [
    classify_texts(reader, [column[start : start + CHUNK] for column in columns])
    for start in range(0, max(len(texts), 1), CHUNK)
  ]
  usage = sum((part.usage for part in parts), Usage())
  if usage.truncated:
    log.warning('%d of %d texts are longer than %d tokens and were cut', usage.truncated, usage.rows, reader.seq_len)
  return Predictions(np.concatenate([part.outputs for part in parts]), parts[0].classes, usage)


def require_classifier(bundle: Bundle) -> None:
  """Raises ConfigError for a model that cannot classify, with what to do about it."""
  if 'classifier' in bundle.params:
    return
  if 'span' in bundle.params:
    raise ConfigError('model: it finds answers in a context; predict with a question and a context column')
  heads = ', '.join(sorted(set(bundle.params) - {'encoder'})) or 'none'
  raise ConfigError(f'model: its classifier was never trained (heads: {heads}); fine-tune it first (compactlm train)')


def class_names(bundle: Bundle) -> tuple[str, ...]:
  """Names of the outputs of a classifier, LABEL_i where it has none; () for a regression."""
  classes = bundle.params['classifier']['bias'].shape[-1]
  return () if classes == 1 else bundle.labels or default_labels(classes)


def classify_texts(reader: Reader, columns: Sequence[Sequence[str]]) -> Predictions:
  """Predictions of one chunk of texts (one or two columns), which is sorted by length as a whole."""
  names = class_names(reader.bundle)
  if not len(columns[0]):
    return Predictions(np.zeros((0, max(1, len(names))), np.float32), names, Usage())
  source, truncated = _rows(columns, reader.tokenizer, reader.seq_len)
  outputs, usage = reader.run(source, functools.partial(_classify, reader.bundle.config))
  return Predictions(outputs['outputs'], names, dataclasses.replace(usage, truncated=truncated))


@functools.partial(jax.jit, static_argnums=0)
def _classify(config: EncoderConfig, params: Params, batch: Batch) -> dict[str, jax.Array]:
  return {'outputs': classify(params, config, batch)}


@dataclasses.dataclass(frozen=True)
class Reader:
  """A model that is ready to read rows on the devices of this host.

  Attributes:
    bundle: the model.
    params: its encoder and the wanted heads, on every device.
    tokenizer: the tokenizer.
    seq_len: longest row.
    lengths: what rows are padded to, ascending; the last is `seq_len`.
    batch_size: most rows of a batch, a multiple of the devices.
    mesh: the devices.
  """

  bundle: Bundle
  params: Params
  tokenizer: Tokenizer
  seq_len: int
  lengths: tuple[int, ...]
  batch_size: int
  mesh: Mesh

  @property
  def margin(self) -> int:
    """Padded tokens that can reach the last real one: of a ConvBERT that reads padding, half a kernel per layer."""
    config = self.bundle.config
    return config.num_layers * (config.conv_kernel_size // 2) if config.conv_sees_padding else 0

  @classmethod
  def of(
    cls,
    bundle: Bundle,
    heads: Sequence[str],
    batch_size: int = 32,
    buckets: Sequence[int] = BUCKETS,
    seq_len: int | None = None,
  ) -> Reader:
    """Checks the arguments of `predict` and places the parameters."""
    config, limit = bundle.config, bundle.config.max_positions if seq_len is None else seq_len
    if bundle.tokenizer is None:
      raise ConfigError('model: it has no tokenizer; put tokenizer.json or vocab.txt in its folder')
    if not 4 <= limit <= config.max_positions:
      raise ConfigError(f'seq_len: {limit} must be between 4 and the {config.max_positions} positions of the model')
    if batch_size < 1 or min(buckets, default=1) < 1:
      raise ConfigError(f'batch_size, buckets: {batch_size} and {tuple(buckets)} must be positive')
    lengths = tuple(sorted({length for length in buckets if length < limit} | {limit}))
    mesh = Mesh(np.asarray(jax.local_devices()), ('data',))
    params = {name: bundle.params[name] for name in ('encoder', *heads)}
    if mesh.size > 1:
      params = jax.device_put(params, NamedSharding(mesh, P()))
    files = tuple(sorted(bundle.tokenizer.files.items()))
    rounded = -(-batch_size // mesh.size) * mesh.size
    return cls(bundle, params, _tokenizer(files), limit, lengths, rounded, mesh)

  def run(self, source: RowSource, forward: Forward) -> tuple[dict[str, np.ndarray], Usage]:
    """Outputs of all rows of a source in its order; rows are computed from short to long.

    Args:
      source: rows with known `lengths`; at least one.
      forward: the computation; compiled once for each shape of batch.
    """
    assert source.lengths is not None
    order, found, computed = np.argsort(source.lengths, kind='stable'), [], 0
    for indices in (order[i : i + self.batch_size] for i in range(0, len(order), self.batch_size)):
      batch = self._batch(source, indices)
      computed += batch.input_ids.size
      found.append((forward(self.params, batch), len(indices)))
    parts = [{name: value[:kept] for name, value in jax.device_get(part).items()} for part, kept in found]
    inverse = np.argsort(order)
    outputs = {name: np.concatenate([part[name] for part in parts])[inverse] for name in parts[0]}
    for name, value in outputs.items():
      if np.issubdtype(value.dtype, np.floating) and not np.isfinite(value).all():
        raise NumericsError(
          f'model: its {name} are not finite, of row {int(np.argwhere(~np.isfinite(value))[0, 0])} (from 0) first; its '
          'weights are damaged, or too large for config.encoder.dtype'
        )
    return outputs, Usage(rows=len(order), tokens=int(source.lengths.sum()), computed=computed)

  def _batch(self, source: RowSource, indices: np.ndarray) -> Batch:
    """These rows and copies of the last one, up to a power of two: few shapes to compile, little to waste."""
    assert source.lengths is not None
    longest = int(source.lengths[indices].max())
    length = next(n for n in self.lengths if n >= min(longest + self.margin, self.seq_len))
    size = min(self.batch_size, max(self.mesh.size, 1 << (len(indices) - 1).bit_length()))
    size = -(-size // self.mesh.size) * self.mesh.size
    rows = source.fetch(np.pad(indices, (0, size - len(indices)), mode='edge'))
    mask: Any = (np.arange(length) < rows['length'][:, None]).astype(np.int32)
    fields: dict[str, Any] = {key: rows[key][:, :length] for key in ('input_ids', 'token_type_ids')}
    batch = Batch(attention_mask=mask, **fields)
    return batch if self.mesh.size == 1 else jax.device_put(batch, NamedSharding(self.mesh, P('data')))


@functools.lru_cache(maxsize=4)
def _tokenizer(files: tuple[tuple[str, bytes], ...]) -> Tokenizer:
  with tempfile.TemporaryDirectory() as folder:
    TokenizerFiles(dict(files)).write(folder)
    try:
      return load_tokenizer(folder)
    except ConfigError as e:
      raise ConfigError(str(e).replace(folder, "the model's folder")) from e


def _rows(columns: Sequence[Sequence[str]], tokenizer: Tokenizer, seq_len: int) -> tuple[RowSource, int]:
  """(rows of tokenised texts, how many were cut)."""
  for column in columns:
    for number, text in enumerate(column):
      if not isinstance(text, str):
        raise DataError(f'texts: number {number} (from 0) is {text!r:.60} instead of text')
  ids = [tokenizer.encode(list(column)) for column in columns]
  joined = [join_ids(texts, tokenizer, seq_len) for texts in zip(*ids, strict=True)]
  lengths = np.asarray([len(row) for row, _, _ in joined], np.int32)

  def fetch(indices: np.ndarray) -> dict[str, np.ndarray]:
    taken = [joined[i] for i in indices]
    return {
      'input_ids': _padded((row for row, _, _ in taken), len(taken), seq_len, tokenizer.pad_id),
      'token_type_ids': _padded((segments for _, segments, _ in taken), len(taken), seq_len, 0),
      'length': lengths[indices],
    }

  source = RowSource(fetch, len(joined), tokenizer.vocab_size, seq_len, '', lengths=lengths)
  return source, sum(cut for _, _, cut in joined)


def _padded(rows: Iterator[Any], count: int, seq_len: int, fill: int) -> np.ndarray:
  out = np.full((count, seq_len), fill, np.int32)
  for place, row in enumerate(rows):
    out[place, : len(row)] = row
  return out
