"""Markdown tables that can be read as text too."""

from __future__ import annotations

from collections.abc import Sequence


def aligned(lines: Sequence[Sequence[str]], left: int = 0) -> str:
  """A markdown table with columns of equal width.

  Args:
    lines: cells; the first line is the head.
    left: so many columns, from the first on, stand to the left; the others, numbers, to the right.
  """
  widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
  texts = [
    '| ' + ' | '.join(c.ljust(w) if i < left else c.rjust(w) for i, (c, w) in enumerate(zip(line, widths))) + ' |'
    for line in lines
  ]
  rule = '|' + '|'.join('-' * (w + 2) if i < left else '-' * (w + 1) + ':' for i, w in enumerate(widths)) + '|'
  return '\n'.join([texts[0], rule, *texts[1:]])
