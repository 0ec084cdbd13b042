"""`compactlm analyze`: one or two models on a text file, as pictures, JSON and a report."""

from __future__ import annotations

import dataclasses
import itertools
import json
from collections.abc import Iterator
from typing import Any

import numpy as np
from etils import epath

from compactlm_jax.analysis.components import components
from compactlm_jax.analysis.maps import sentence_maps
from compactlm_jax.analysis.plots import require_matplotlib
from compactlm_jax.analysis.report import FORMAT, INDEX, SUMMARY, Analysis, Subject, as_json, files_of
from compactlm_jax.analysis.sparsity import sparsities
from compactlm_jax.analysis.statistics import Model, Rows, analysed, examine
from compactlm_jax.data.text import open_text, progress
from compactlm_jax.data.tokenizer import Tokenizer
from compactlm_jax.errors import ConfigError, DataError
from compactlm_jax.jobs.models import load_model, tokenizer_of
from compactlm_jax.parse import parse_json
from compactlm_jax.storage import absolute

_TOKENS = 2048  # of a batch
_WINDOW = 8  # batches whose rows are sorted by length together
_READABLE = range(8, 25)  # tokens of a sentence that is drawn unless one is asked for


def run_analyze(
  model: str, text: str, output: str, *, compare: str = '', rows: int = 1000, seq_len: int = 0, sentence: int = 0
) -> dict[str, Any]:
  """Analyses a model, or two, and writes pictures, analysis.json and report.md.

  Args:
    model: model folder or run.
    text: file with a sentence per line; .gz is read.
    output: folder to write; an earlier analysis there is replaced, other files are never touched.
    compare: second model (a teacher, say) with the same tokenizer; '' compares the layers of the first one.
    rows: lines that are read; 0 reads all.
    seq_len: tokens of a row, special tokens included; longer lines are cut and counted. 0 is 128, or the models'
      positions if they have fewer.
    sentence: number of the line that is drawn, from 1, blank lines not counted; 0 takes the first of 8 to 24 tokens.

  Returns:
    The object of analysis.json.

  Raises:
    ConfigError: a model without self-attention, models with different tokenizers, a row length that they do not have,
      a foreign output folder, or matplotlib is missing.
    DataError: a missing file, no text, or no line of that number.
  """
  require_matplotlib()
  _require_own(output)
  sources = open_text(text)
  paths = {'model': model, **({'compare': compare} if compare else {})}
  models = {role: _load(path) for role, path in paths.items()}
  tokenizer = _one_tokenizer(paths)
  length = _row_length(seq_len, models)
  reading = _Reading(tokenizer, rows, length, sentence)
  batch = max(1, _TOKENS // length)
  with progress(sources, 'analyze') as on_bytes:
    lines = (line for source in sources for line in source.lines(on_bytes) if line)
    findings = examine(models['model'], models.get('compare'), reading.batches(lines, batch))
  line, ids = reading.chosen(text)
  subjects = tuple(
    Subject(role, name, path, one, components(one, batch, length), sentence_maps(one, ids))
    for (role, path), name, one in zip(paths.items(), _names(paths), models.values())
  )
  tokens = tuple(tokenizer.backend.id_to_token(i) or str(i) for i in ids)
  about = {'path': text, 'rows': reading.rows, 'tokens': findings.tokens, 'cut_rows': reading.cut, 'seq_len': length}
  left = sparsities(models)
  files = files_of(Analysis(subjects, findings, about, line, tokens, (batch, length), left))
  _write(files, output)
  found: dict[str, Any] = json.loads(files[INDEX])
  return found


def _load(path: str) -> Model:
  bundle = load_model(path)
  try:
    return analysed(bundle.params, bundle.config)
  except ConfigError as e:
    raise ConfigError(f'{path}: {e}') from e


def _one_tokenizer(paths: dict[str, str]) -> Tokenizer:
  tokenizers = {role: tokenizer_of(path) for role, path in paths.items()}
  first, last = tokenizers['model'], list(tokenizers.values())[-1]
  if first.fingerprint() != last.fingerprint():
    raise ConfigError(
      f'--compare={paths["compare"]}: its tokenizer is not that of {paths["model"]} (fingerprints '
      f'{last.fingerprint()[:12]}... and {first.fingerprint()[:12]}...); layers can be compared on equal tokens only, '
      'so name two models of one vocabulary'
    )
  return first


def _row_length(seq_len: int, models: dict[str, Model]) -> int:
  most = min(model.config.max_positions for model in models.values())
  if seq_len > most:
    raise ConfigError(f'--seq_len: {seq_len} is more than the {most} positions of the model')
  if seq_len and seq_len < 3:
    raise ConfigError(f'--seq_len: {seq_len} leaves no room between the special tokens; use at least 3')
  return seq_len or min(128, most)


def _names(paths: dict[str, str]) -> list[str]:
  """Short names for pictures: the folders', made different if they are equal."""
  names = [absolute(path).name for path in paths.values()]
  return [f'{n} ({role})' for n, role in zip(names, paths)] if len(set(names)) < len(names) else names


@dataclasses.dataclass
class _Reading:
  """Turns lines into batches, and counts what it has seen."""

  tokenizer: Tokenizer
  limit: int
  length: int
  wanted: int
  rows: int = 0
  cut: int = 0
  first: tuple[int, list[int]] | None = None
  found: tuple[int, list[int]] | None = None

  def batches(self, lines: Iterator[str], size: int) -> Iterator[Rows]:
    """Batches of `size` rows in at most three lengths; rows of padding fill up the last."""
    lengths = sorted({min(self.length, -(-self.length // n // 8) * 8) for n in (4, 2)} | {self.length})
    lines = itertools.islice(lines, self.limit or None)
    while texts := list(itertools.islice(lines, _WINDOW * size)):
      rows = sorted(self._encode(texts), key=len)
      for start in range(0, len(rows), size):
        part = rows[start : start + size]
        yield _padded(part, size, next(n for n in lengths if n >= len(part[-1])), self.tokenizer.pad_id)

  def _encode(self, texts: list[str]) -> list[list[int]]:
    out = []
    for tokens in self.tokenizer.encode(texts):
      self.rows += 1
      if not tokens:
        continue  # control characters only
      ids = [self.tokenizer.cls_id, *tokens[: self.length - 2], self.tokenizer.sep_id]
      self.first = self.first or (self.rows, ids)
      whole = len(ids) == len(tokens) + 2
      self.cut += not whole
      if self.found is None and (self.rows == self.wanted if self.wanted else whole and len(ids) in _READABLE):
        self.found = (self.rows, ids)
      out.append(ids)
    return out

  def chosen(self, text: str) -> tuple[int, list[int]]:
    """(number, ids) of the line that is drawn."""
    if self.wanted and self.found is None:
      raise DataError(
        f'--sentence: {text} has {self.rows} lines that were read, none with tokens of number {self.wanted}'
      )
    chosen = self.found or self.first
    assert chosen is not None  # `examine` refuses a text without tokens
    return chosen


def _padded(rows: list[list[int]], size: int, length: int, pad_id: int) -> Rows:
  ids, mask = np.full((size, length), pad_id, np.int32), np.zeros((size, length), np.int32)
  for i, tokens in enumerate(rows):
    ids[i, : len(tokens)], mask[i, : len(tokens)] = tokens, 1
  return ids, mask


def _own_files(folder: epath.Path) -> set[str]:
  """Names of the files of an earlier analysis, if there is one."""
  try:
    found = parse_json((folder / INDEX).read_bytes())
  except (OSError, ValueError):
    return set()
  if not isinstance(found, dict) or found.get('format') != FORMAT or not isinstance(found.get('pictures'), dict):
    return set()
  # Only plain names of pictures: the file is not trusted to name others.
  return {name for name in found['pictures'] if name.endswith('.png') and '/' not in name} | {INDEX, SUMMARY}


def _require_own(output: str) -> None:
  folder = epath.Path(output)
  if not folder.exists():
    return
  if not folder.is_dir():
    raise ConfigError(f'--output={output}: is a file; name a folder')
  if foreign := {p.name for p in folder.iterdir()} - _own_files(folder):
    raise ConfigError(
      f'--output={output}: holds {min(foreign)!r}, which no analysis wrote; choose another folder or empty it'
    )


def _write(files: dict[str, bytes], output: str) -> None:
  folder = epath.Path(output)
  folder.mkdir(parents=True, exist_ok=True)
  old, pictures = _own_files(folder), [name for name in files if name.endswith('.png')]
  # First what is about to be here, so that the next run knows the files of a killed one as ours.
  started = {
    'format': FORMAT,
    'version': 1,
    'complete': False,
    'pictures': dict.fromkeys([*sorted(old), *pictures], ''),
  }
  (folder / INDEX).write_bytes(as_json(started))
  for name in old - set(files):
    (folder / name).unlink(missing_ok=True)
  for name, content in files.items():
    (folder / name).write_bytes(content)
