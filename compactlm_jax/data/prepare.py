"""Offline preparation: text in, a TFDS dataset of fixed-length rows of token ids out."""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import socket
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from etils import epath

from compactlm_jax.data import shards, text
from compactlm_jax.data.manifest import FILE, Manifest, read_manifest, verify_files, write_manifest
from compactlm_jax.data.parts import LOCAL, ONE_STREAM, Plan, Spread, Writer, finish, is_ours, plan_parts, write_here
from compactlm_jax.data.rows import Counts, make_examples
from compactlm_jax.data.tokenizer import Tokenizer, load_tokenizer
from compactlm_jax.errors import ConfigError, DataError, StorageError
from compactlm_jax.storage import SPARE_BYTES, children, is_remote, require_space, temporary_folder

MODES = ('packed', 'pairs', 'sentences')
PAIR_RULES = ('electra', 'convbert')

log = logging.getLogger(__name__)

_CHECK_ROWS = 2048
_SHARD_TOKENS = 1 << 25


def prepare(
  input: str,
  tokenizer: str | Tokenizer,
  output: Any,
  seq_len: int,
  mode: str = 'packed',
  *,
  workers: int = 0,
  seed: int = 0,
  pair_rule: str = 'electra',
  holdout_rows: int = 0,
  split: str = 'train',
  text_key: str = 'text',
  shard_rows: int = 0,
  overwrite: bool = False,
  spread: Spread = ONE_STREAM,
) -> Manifest:
  """Tokenises text into rows and writes them as a TFDS dataset of ArrayRecord shards.

  `tfds.builder_from_directory(output).as_data_source()` reads the result: `input_ids` uint16 [T] (int32 for more than
  65,536 tokens), `token_type_ids` uint8 [T], `length` int32 (real tokens). The same input and settings give the same
  bytes for any number of workers. The folder appears when it is complete; one that holds the same settings is reused.

  Args:
    input: comma-separated globs of UTF-8 text files (.gz is read), in which a blank line ends a document and each
      line is a sentence or paragraph; or `tfds:NAME`, a TFDS directory, `hf:NAME[:CONFIG]`.
    tokenizer: tokenizer folder, or a loaded tokenizer.
    output: folder to write.
    seq_len: row length T in tokens, special tokens included.
    mode: 'packed' fills each row with whole documents one after the other (`packing.pack_documents`), 'pairs' builds
      ELECTRA's two-segment examples (`packing.sentence_pairs`), 'sentences' puts one line in each row, cut at T.
    workers: threads that tokenise; 0 takes all cores.
    seed: of the pairs and of the held-out rows.
    pair_rule: 'electra', or 'convbert' for the condition before its fix (ConvBERT), in mode 'pairs'.
    holdout_rows: rows, drawn uniformly, that become a 'validation' split.
    split: split of a dataset input.
    text_key: text field of a dataset input.
    shard_rows: rows of one file; 0 takes about 32 million tokens.
    overwrite: replace a dataset with other settings.
    spread: whether the dataset is made in parts, and by whom; parts that are done are not made again after a kill.

  Returns:
    The manifest, also written to output/manifest.json.

  Raises:
    ConfigError: a setting is invalid, `output` holds something else, or Apache Beam is missing.
    DataError: no text, no file matches, not UTF-8.
    StorageError: the disk is full or not writable.
  """
  options: dict[str, Any] = {'mode': mode, 'seq_len': seq_len, 'seed': seed, 'pair_rule': pair_rule}
  options |= {'holdout_rows': holdout_rows, 'shard_rows': shard_rows}
  _check(options, workers, spread)
  tokenizer = tokenizer if isinstance(tokenizer, Tokenizer) else load_tokenizer(tokenizer)
  sources = text.open_text(input, split=split, text_key=text_key, digests=not spread.parts)
  settings = _settings(options, text_key, tokenizer, sources)
  target, workers = epath.Path(output), workers or os.cpu_count() or 1
  if spread.parts:
    return _write_parts(target, sources, tokenizer, settings, workers, overwrite, spread)
  return _write_once(target, sources, tokenizer, settings, workers, overwrite)


def _settings(
  options: dict[str, Any], text_key: str, tokenizer: Tokenizer, sources: Sequence[text.TextSource]
) -> dict[str, Any]:
  return {
    **options,
    'pair_rule': options['pair_rule'] if options['mode'] == 'pairs' else '',
    'shard_rows': options['shard_rows'] or max(1, _SHARD_TOKENS // options['seq_len']),
    'text_key': text_key if sources[0].name.startswith(('tfds:', 'hf:')) else '',
    'tokenizer': tokenizer.fingerprint(),
    'sources': [{'name': s.name, 'size': s.size, 'sha256': s.sha256} for s in sources],
  }


def _check(options: dict[str, Any], workers: int, spread: Spread) -> None:
  if options['seq_len'] < 8:
    raise ConfigError(f'seq_len {options["seq_len"]} must be at least 8')
  if options['mode'] not in MODES:
    raise ConfigError(f'mode {options["mode"]!r} is unknown; use one of {", ".join(MODES)}')
  if options['pair_rule'] not in PAIR_RULES:
    raise ConfigError(f'pair_rule {options["pair_rule"]!r} is unknown; use one of {", ".join(PAIR_RULES)}')
  numbers = {'workers': workers, 'parts': spread.parts}
  for name, value in {**numbers, **{k: options[k] for k in ('seed', 'holdout_rows', 'shard_rows')}}.items():
    if value < 0:
      raise ConfigError(f'{name} {value} must not be negative')
  if spread.runner != LOCAL and not spread.parts:
    raise ConfigError(f'--runner={spread.runner} writes parts of the files: give their number, for example --parts=16')
  if spread.parts and options['shard_rows']:
    raise ConfigError(
      f'shard_rows {options["shard_rows"]}: a part is one file of rows; leave it out, or take more parts'
    )


def _write_once(
  target: epath.Path,
  sources: Sequence[text.TextSource],
  tokenizer: Tokenizer,
  settings: dict[str, Any],
  workers: int,
  overwrite: bool,
) -> Manifest:
  if (existing := _existing(target, settings, overwrite)) is not None:
    return existing
  # At least this much is written: ids take about two bytes each, a token about four characters of (packed) text.
  _require_space(target.parent, sum(s.size for s in sources) // 2 + SPARE_BYTES)
  with (_bucket_folder if is_remote(target) else _atomic_folder)(target) as scratch:
    manifest = _write(scratch, sources, tokenizer, settings, workers)
  log.info('%s: %d rows of %d tokens', target, manifest.counts['rows'], manifest.seq_len)
  return manifest


def _write_parts(
  target: epath.Path,
  sources: Sequence[text.TextSource],
  tokenizer: Tokenizer,
  settings: dict[str, Any],
  workers: int,
  overwrite: bool,
  spread: Spread,
) -> Manifest:
  plan = plan_parts(sources, {**settings, 'parts': spread.parts, 'shard_rows': 0})
  if (existing := _existing(target, plan.settings, overwrite, plan)) is not None:
    return existing
  write = write_here if spread.runner == LOCAL else _beam(spread)
  with _parts_folder(target) as folder:
    plan = plan.into(folder, tokenizer)
    write(plan, tokenizer, workers)
    manifest = finish(plan, tokenizer)
  log.info('%s: %d rows of %d tokens', target, manifest.counts['rows'], manifest.seq_len)
  return manifest


def _beam(spread: Spread) -> Writer:
  try:
    from compactlm_jax.data import beam
  except ImportError as e:
    raise ConfigError(f"--runner={spread.runner} needs Apache Beam: pip install 'compactlm-jax[beam]'") from e
  return beam.writer(spread.runner, spread.beam_options)


def _existing(
  target: epath.Path, settings: Mapping[str, Any], overwrite: bool, plan: Plan | None = None
) -> Manifest | None:
  """The manifest of a dataset that can be reused; None if `target` may be written."""
  if not target.exists() or (target.is_dir() and not children(target)):
    return None
  if not (target / FILE).exists():
    if is_remote(target) and all(is_ours(child.name) for child in children(target)):
      return None  # what a stopped run left: in a bucket the manifest comes last
    raise ConfigError(f'{target} exists and is not a prepared dataset; choose another output')
  try:
    manifest = read_manifest(target)
    if manifest.settings == settings or (plan is not None and plan.describes(manifest.settings)):
      verify_files(target, manifest)
      log.info('%s already holds this dataset; it is reused', target)
      return manifest
  except DataError:
    if not overwrite:
      raise
    return None
  if overwrite:
    return None
  changed = sorted(k for k in settings if settings[k] != manifest.settings.get(k))
  raise ConfigError(
    f'{target} holds a dataset with other settings ({", ".join(changed)}); choose another output or set overwrite'
  )


def _require_space(folder: epath.Path, needed: int) -> None:
  # What goes to a bucket is on the disk of temporary files first, a shard at a time.
  disk, needed = (temporary_folder(), min(needed, SPARE_BYTES)) if is_remote(folder) else (folder, needed)
  require_space(disk, needed, str(folder), 'choose another output')


@contextlib.contextmanager
def _atomic_folder(target: epath.Path) -> Iterator[epath.Path]:
  """A folder beside `target` that takes its name at the end, or is removed."""
  host = socket.gethostname()
  scratch = target.parent / f'.{target.name}.tmp-{host}-{os.getpid()}'
  try:
    with _reporting(target):
      target.parent.mkdir(parents=True, exist_ok=True)
      for stale in target.parent.glob(f'.{target.name}.tmp-{host}-*'):
        if not _alive(stale.name.rsplit('-', 1)[-1]) or stale == scratch:
          stale.rmtree()
      scratch.mkdir()
      yield scratch
      _take_place(scratch, target)
  finally:
    if scratch.exists():
      scratch.rmtree()


def _take_place(scratch: epath.Path, target: epath.Path) -> None:
  if not target.exists():
    scratch.rename(target)
    return
  old = target.parent / f'{scratch.name}.old'
  target.rename(old)
  scratch.rename(target)
  old.rmtree()


@contextlib.contextmanager
def _reporting(target: epath.Path) -> Iterator[None]:
  try:
    yield
  except (OSError, RuntimeError) as e:
    # ArrayRecord reports a full disk as RuntimeError.
    if isinstance(e, OSError) or os.strerror(errno.ENOSPC) in str(e):
      raise StorageError(f'{target}: cannot be written ({e}); free some space or choose another output') from e
    raise


def _alive(pid: str) -> bool:
  try:
    os.kill(int(pid), 0)
  except (ValueError, ProcessLookupError):
    return False
  except PermissionError:
    pass
  return True


@contextlib.contextmanager
def _bucket_folder(target: epath.Path) -> Iterator[epath.Path]:
  """The folder itself, which counts when its manifest is there, written last: a bucket does not rename."""
  with _reporting(target):
    (target / FILE).unlink(missing_ok=True)
    for child in children(target):
      child.rmtree() if child.is_dir() else child.unlink()
    yield target


@contextlib.contextmanager
def _parts_folder(target: epath.Path) -> Iterator[epath.Path]:
  """Where parts are gathered. It stays if the work stops, and takes the name of `target` at the end."""
  with _reporting(target):
    if is_remote(target):
      (target / FILE).unlink(missing_ok=True)
      yield target
      return
    scratch = target.parent / f'.{target.name}.parts'
    scratch.mkdir(parents=True, exist_ok=True)
    yield scratch
    _take_place(scratch, target)


def _write(
  scratch: epath.Path, sources: Sequence[text.TextSource], tokenizer: Tokenizer, settings: dict[str, Any], workers: int
) -> Manifest:
  counts = Counts()
  contents: dict[str, dict[str, int]] = {}
  with text.progress(sources, 'prepare') as on_bytes:
    examples = make_examples(sources, tokenizer, settings, workers, on_bytes, counts, contents)
    splits = shards.write_dataset(
      scratch,
      _while_there_is_space(scratch, examples, settings['seq_len']),
      settings['seq_len'],
      settings['shard_rows'],
      tokenizer.vocab_size,
    )
  return write_manifest(scratch, settings, tokenizer, counts.totals(settings['seq_len']), splits, contents)


def _while_there_is_space(
  folder: epath.Path, examples: Iterable[tuple[str, dict[str, Any]]], seq_len: int
) -> Iterator[tuple[str, dict[str, Any]]]:
  """Passes examples on and looks at the free disk now and then."""
  for number, item in enumerate(examples):
    if number % _CHECK_ROWS == 0:
      _require_space(folder, _CHECK_ROWS * seq_len * 8 + SPARE_BYTES)
    yield item
