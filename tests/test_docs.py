"""The pages say what is there: links lead somewhere, commands parse, scripts and their flags exist."""

import itertools
import pathlib
import re
import shlex

import pytest

from compactlm_jax.cli import COMMANDS
from compactlm_jax.cli.main import _parse

ROOT = pathlib.Path(__file__).parents[1]
PAGES = [*ROOT.glob('*.md'), *ROOT.glob('docs/*.md'), *ROOT.glob('launch/*.md')]
LINK = re.compile(r'\]\(([^)#:]+)(?:#[^)]*)?\)')
SCRIPT = re.compile(r'(benchmarks/\w+\.py)((?:\s+--[\w.]+(?:=(?:\'[^\']*\'|[^\s`)]*))?)*)')
CODE = re.compile(r'```\w*\n(.*?)```|`([^`]+)`', re.DOTALL)


def commands(page):
  """Every `compactlm COMMAND --...`: its name, its words, and whether parts of it may be left out."""
  for block, span in CODE.findall(page.read_text()):
    joined = block.replace('\\\n', ' ') if block else span.replace('\n', ' ')
    for line in joined.splitlines():
      found = re.match(r'(?:\S*/)?compactlm\s+(\w+)\s+(.*--.*)', line.strip())
      if found and found[1] in COMMANDS and '--help' not in line:
        words = shlex.split(line.strip(), comments=True)
        yield words[1], [word for word in words[2:] if word != '...'], '...' in line or not block


def test_links_lead_somewhere():
  """Mutation: rename docs/measurements.md."""
  broken = [
    f'{page.relative_to(ROOT)}: {target}'
    for page in PAGES
    for target in LINK.findall(page.read_text())
    if not (page.parent / target).exists()
  ]
  assert not broken


@pytest.mark.parametrize('page', PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_scripts_and_their_flags_exist(page):
  """Mutation: rename --workdir of benchmarks/prune.py."""
  for script, flags in SCRIPT.findall(page.read_text()):
    assert (ROOT / script).exists(), script
    # A script hands some flags to a module beside it.
    known = ''.join(path.read_text() for path in ROOT.glob('benchmarks/*.py')) if 'faults' in script else ''
    known += (ROOT / script).read_text()
    for flag in re.findall(r'--([\w.]+)', flags):
      assert re.search(rf"'(--)?{flag}'", known), f'{page.name}: {script} has no --{flag}'


def test_commands_parse(monkeypatch):
  """Mutation: rename --beam_options, or the field prune.density."""
  monkeypatch.chdir(ROOT)
  counted = 0
  for name, words, elided in itertools.chain.from_iterable(map(commands, PAGES)):
    # VARIANT and FILE stand for any; fields are those of the task that the line is about.
    given = [word.replace('configs/FILE.py:VARIANT', 'configs/tiny.py:mlm') for word in words]
    given = [word.replace(':VARIANT', ':l6-h384') for word in given]
    given = [word for word in given if not word.endswith('=...')]
    given = given if not elided else [*given, *required(name, given)]
    _parse(name, given)
    counted += 1
  assert counted > 20, 'the pages hold more commands than that'


def required(name, given):
  """Flags that a line with an ellipsis leaves out."""
  absent = [flag for flag in COMMANDS[name].required if not any(f'--{flag}' in word for word in given)]
  return [f'--{flag}={"configs/tiny.py:mlm" if flag == "config" else 1}' for flag in absent]
