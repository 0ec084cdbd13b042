"""Several runs in one place: scores over seeds with their spread, beside published ones; tables and plots.

Runs are directories that `compactlm train` has written; nothing is trained or evaluated here.
"""

from compactlm_jax.report.files import check_output, write_report
from compactlm_jax.report.runs import Group, Report, Run, collect
from compactlm_jax.report.summary import Summary, summarize
from compactlm_jax.report.tables import as_csv, as_json, as_markdown

__all__ = [
  'Group',
  'Report',
  'Run',
  'Summary',
  'as_csv',
  'as_json',
  'as_markdown',
  'check_output',
  'collect',
  'summarize',
  'write_report',
]
