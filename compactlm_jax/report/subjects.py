"""What runs were measured on, as titles of tables: the shortest ones that tell different held-out rows apart."""

from __future__ import annotations

from collections.abc import Sequence

from etils import epath

_DIGITS = 8
"""Digits of a fingerprint that a title shows."""


def subject_titles(subjects: Sequence[tuple[str, str, str]]) -> list[str]:
  """A title for each subject, no two the same.

  Args:
    subjects: (benchmark or task, path of its files or '', fingerprint of its held-out rows or ''), all different.

  Returns:
    The benchmark or task, with the end of the path that no other subject of this task has; a fingerprint where the
    rest is the same.
  """
  titles = []
  for what, file, _ in subjects:
    others = {path for task, path, _ in subjects if task == what and path != file}
    titles.append(f'{what} on {_ending(file, others)}' if file else what)
  return [
    f'{title} (rows {digest[:_DIGITS]})' if digest and titles.count(title) > 1 else title
    for title, (_, _, digest) in zip(titles, subjects, strict=True)
  ]


def _ending(file: str, others: set[str]) -> str:
  """The last parts of a path, as few as no other path ends in; all of it if there are none."""
  parts = epath.Path(file).parts
  for length in range(1, len(parts)):
    if not any(epath.Path(other).parts[-length:] == parts[-length:] for other in others):
      return '/'.join(parts[-length:])
  return file
