"""The largest batch that fits."""

from __future__ import annotations

from collections.abc import Callable

FINENESS = 32
"""The search stops when the known bounds differ by less than 1 / FINENESS."""


def largest_batch(
  needs: Callable[[int], tuple[bool, float]], start: int, unit: int, fixed: float, usable: float, tries: int = 8
) -> tuple[int, int | None]:
  """Searches for the largest batch that fits; memory grows almost linearly with it.

  Each try costs a compilation, so the next batch is where the line through the last two known points meets the limit.

  Args:
    needs: batch size -> (does it fit, bytes that it needs on one device).
    start: the first batch to try.
    unit: batches are multiples of it.
    fixed: bytes on one device that do not depend on the batch (parameters, moments), a first guess.
    usable: bytes on one device that there are.
    tries: most calls of `needs`.

  Returns:
    (the largest batch known to fit, or 0; the smallest known not to, or None).
  """
  fits, fails = 0, None
  points = [(0.0, fixed)]
  batch = max(unit, start // unit * unit)
  for _ in range(tries):
    good, needed = needs(batch)
    fits, fails = (batch, fails) if good else (fits, batch)
    (x, y), origin = points[-1], (0.0, fixed)
    # Near the limit the compiler saves memory, so that more rows may need less; then the line starts at no rows.
    points = [(x, y) if (needed - y) * (batch - x) > 0 else origin, (float(batch), needed)]
    step = max(unit, fits // FINENESS // unit * unit)
    if fails is not None and fails - fits <= step:
      break
    batch = _next(points, usable, fits, fails, step, unit)
  return fits, fails


def _next(points: list[tuple[float, float]], usable: float, fits: int, fails: int | None, step: int, unit: int) -> int:
  """The batch where the line meets the limit, kept between the bounds; their middle if the line says nothing."""
  (x0, y0), (x1, y1) = points
  slope = (y1 - y0) / (x1 - x0) if x1 != x0 else 0.0
  if slope <= 0:
    guess = 2 * fits if fails is None else (fits + fails) // 2
  else:
    guess = int(x1 + (usable - y1) / slope)
  low, high = fits + step, 4 * max(fits, unit) if fails is None else fails - step
  return max(unit, min(max(guess // unit * unit, low), max(high, low) if fails is None else max(high, fits + unit)))
