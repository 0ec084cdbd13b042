"""A process that dies in the middle of writing files."""

import contextlib
import pathlib

from etils import epath


class Kill(BaseException):
  """Stands for SIGKILL: nothing catches it."""


@contextlib.contextmanager
def killed_at(monkeypatch, call):
  """Within, file operation number `call` (1-based) of write_bytes, rename, rmtree and mkdir raises `Kill`."""
  cls, count = type(epath.Path(pathlib.Path.cwd())), 0

  def dying(real):
    def wrapped(*args, **kwargs):
      nonlocal count
      count += 1
      if count == call:
        raise Kill
      return real(*args, **kwargs)

    return wrapped

  with monkeypatch.context() as m:
    for name in ('write_bytes', 'rename', 'rmtree', 'mkdir'):
      m.setattr(cls, name, dying(getattr(cls, name)))
    yield
