"""A bucket in memory behind gs://, for what goes through epath alone; tests/bucket.py has one for all clients."""

import contextlib
from collections.abc import Iterator

from etils import epath
from etils.epath import backend
from fsspec.implementations.memory import MemoryFileSystem
from fsspec.registry import _registry, register_implementation


class FakeBucket(MemoryFileSystem):
  """As gcsfs: no folders but those with files, and opening for 'a' truncates."""

  protocol = ('gs', 'gcs')
  store = {}
  pseudo_dirs = ['']
  refused = False

  @classmethod
  def _strip_protocol(cls, path):
    return '/' + path.removeprefix('gs://').strip('/')

  def open(self, path, mode='rb', **kwargs):
    if self.refused and 'r' not in mode:
      raise OSError(
        f'Forbidden: b/bucket/o/{path.partition("bucket/")[2].replace("/", "%2F")}\nno storage.objects.create'
      )
    return super().open(path, mode.replace('a', 'w'), **kwargs)

  def mkdir(self, path, create_parents=True, **kwargs):
    pass

  def makedirs(self, path, exist_ok=False):
    pass

  def ls(self, path, detail=True, **kwargs):
    if not self.exists(path):
      raise FileNotFoundError(path)
    return super().ls(path, detail, **kwargs)

  def exists(self, path, **kwargs):
    inside = self._strip_protocol(path)
    return any(name == inside or name.startswith(inside.rstrip('/') + '/') for name in self.store)

  def mv(self, *args, **kwargs):
    raise AssertionError('a bucket does not rename in one go')


@contextlib.contextmanager
def fake_bucket() -> Iterator[epath.Path]:
  """gs://bucket."""
  known = _registry.get('gcs')
  register_implementation('gcs', FakeBucket, clobber=True)
  backend.fsspec_backend._get_filesystem.cache_clear()
  FakeBucket.store.clear()
  try:
    yield epath.Path('gs://bucket')
  finally:
    FakeBucket.clear_instance_cache()
    backend.fsspec_backend._get_filesystem.cache_clear()
    if known is None:
      _registry.pop('gcs', None)
    else:
      register_implementation('gcs', known, clobber=True)
