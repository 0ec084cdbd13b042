"""docs/reliability.md names a test for every row of the fault matrix; this holds the page to what there is."""

import ast
import functools
import re

from every_task import ROOT

PAGE = (ROOT / 'docs' / 'reliability.md').read_text()


@functools.cache
def functions(path):
  """Name -> docstring of the tests of a file."""
  body = ast.parse((ROOT / path).read_text()).body
  return {node.name: ast.get_docstring(node) or '' for node in body if isinstance(node, ast.FunctionDef)}


def test_every_row_names_tests_that_exist_and_say_what_makes_them_fail():
  """Mutation: rename one of the tests, or take the mutation out of its docstring."""
  rows = {int(line.split('|')[1]): line for line in PAGE.splitlines() if re.match(r'\| \d+ \|', line)}
  assert list(rows) == list(range(1, 21))
  for row, line in rows.items():
    assert re.search(r'`(tests|python benchmarks)/', line), row
  for path, name in re.findall(r'`(tests/[\w/]+\.py)::(\w+)`', PAGE):
    assert name.startswith('test_') and re.search(r'Mutations?: ', functions(path).get(name, '')), (path, name)
  for path in re.findall(r'`(?:python )?((?:tests|benchmarks|docs)/[\w/]+\.py)', PAGE):
    assert (ROOT / path).exists(), path


def test_the_figures_name_the_parts_of_the_script_that_print_them():
  """Mutation: rename one."""
  source = ast.parse((ROOT / 'benchmarks' / 'fault_damage.py').read_text())
  (table,) = re.findall(r'## Figures\n(.*?)\n## ', PAGE, re.DOTALL)
  named = {line.split('|')[-2].strip() for line in table.splitlines()[2:] if re.match(r'\| [^|]+ \| [^|]*\d', line)}
  assert len(named) == 7 and named <= {node.name for node in source.body if isinstance(node, ast.FunctionDef)}
