"""Reports over finished runs."""

from __future__ import annotations

from collections.abc import Sequence

from compactlm_jax.report import Report, check_output, collect, write_report
from compactlm_jax.train.rundir import FREE_FIELDS, read_run


def run_report(folders: Sequence[str], output: str, curves: bool = False) -> tuple[Report, tuple[str, ...]]:
  """Collects runs and writes a report; see `report.files.write_report`.

  Returns:
    The report and the files written.
  """
  check_output(output)
  report = collect(folders, read_run, FREE_FIELDS)
  return report, write_report(report, output, curves)
