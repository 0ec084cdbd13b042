"""How fast text becomes rows, and in how much memory, here and by Apache Beam's DirectRunner.

The text is generated: sentences of words drawn by Zipf's law, in files of equal size, from a seed. Each way runs in a
process of its own, which reads the same files with the same settings; the shards must be the same bytes. 'MB per CPU
second' is what one core does (user and system time of the process and its children), and does not depend on what else
the machine is doing, unlike MB/s. Memory is the largest resident set of that process (Linux).

Command: python benchmarks/prepare.py [--megabytes=100,1000] [--ways=local,parts,beam] [--folder=FOLDER]
"""

from __future__ import annotations

import argparse
import json
import pathlib
import resource
import shutil
import subprocess
import sys
import tempfile
import time

import numpy as np

WORDS, SENTENCES, FILES, SEQ_LEN = 30_000, 100_000, 8, 128
OPTIONS = {
  'local': {},
  'parts': {'parts': FILES},
  'beam': {'parts': FILES, 'runner': 'DirectRunner', 'beam_options': '--direct_running_mode=in_memory'},
}


def generate(folder: pathlib.Path, megabytes: int, seed: int = 0) -> None:
  """Writes FILES files of documents of 1 to 40 sentences."""
  rng = np.random.default_rng(seed)
  letters = np.array(list('etaoinshrdlucmfwypvbgk'))
  words = [''.join(rng.choice(letters, n)) for n in rng.integers(2, 11, WORDS)]
  odds = 1 / np.arange(1, WORDS + 1)
  drawn = np.split(rng.choice(words, 18 * SENTENCES, p=odds / odds.sum()), SENTENCES)
  cuts = rng.integers(5, 19, SENTENCES)
  sentences = [(' '.join(line[:cut]).capitalize() + '.\n') for line, cut in zip(drawn, cuts, strict=True)]
  folder.mkdir(parents=True)
  for number in range(FILES):
    left = megabytes * 1_000_000 // FILES
    with (folder / f'{number}.txt').open('w') as file:
      while left > 0:
        text = ''.join(sentences[i] for i in rng.integers(0, SENTENCES, rng.integers(1, 41))) + '\n'
        file.write(text)
        left -= len(text)


def measure(way: str, texts: str, tokenizer: str, output: str, workers: int) -> None:
  """Prints what one way takes; in a process of its own."""
  from compactlm_jax.data.parts import Spread
  from compactlm_jax.data.prepare import prepare

  started = time.monotonic()
  prepare(texts, tokenizer, output, SEQ_LEN, workers=workers, spread=Spread(**OPTIONS[way]))
  seconds = time.monotonic() - started
  used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
  cpu = sum(u.ru_utime + u.ru_stime for u in used)
  # Not ru_maxrss, which begins with that of the process that started this one.
  status = pathlib.Path('/proc/self/status').read_text()
  peak = next(int(line.split()[1]) for line in status.splitlines() if line.startswith('VmHWM'))
  print(json.dumps({'seconds': seconds, 'cpu': cpu, 'peak': peak / 1024}))


def main() -> None:
  parser = argparse.ArgumentParser()
  parser.add_argument('--megabytes', default='100,1000')
  parser.add_argument('--ways', default='local,parts,beam')
  parser.add_argument('--workers', type=int, default=1)
  parser.add_argument('--folder', default='')
  parser.add_argument('--one', nargs=4, help=argparse.SUPPRESS)
  args = parser.parse_args()
  if args.one:
    measure(*args.one, args.workers)
    return
  from compactlm_jax.data.text import file_sha256
  from compactlm_jax.data.wordpiece import train_wordpiece

  root = pathlib.Path(tempfile.mkdtemp(dir=args.folder or None))
  try:
    for megabytes in (int(n) for n in args.megabytes.split(',')):
      texts = root / f'text-{megabytes}'
      generate(texts, megabytes)
      size = sum(file.stat().st_size for file in texts.iterdir()) / 1e6
      if not (root / 'tokenizer').exists():
        generate(root / 'sample', 4, seed=1)
        train_wordpiece(f'{root}/sample/*.txt', 8000, root / 'tokenizer')
      seen = {}
      for way in args.ways.split(','):
        output = root / 'rows'
        command = [sys.executable, __file__, f'--workers={args.workers}']
        command += ['--one', way, f'{texts}/*.txt', str(root / 'tokenizer'), str(output)]
        done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
        found = json.loads(done.stdout.splitlines()[-1])
        digests = tuple(file_sha256(path) for path in sorted(output.glob('compactlm_rows-*')))
        seen.setdefault(bool(OPTIONS[way]), set()).add(digests)
        print(
          f'{size:7.0f} MB  {way:6}  {size / found["cpu"]:6.2f} MB per CPU second  '
          f'{size / found["seconds"]:6.2f} MB/s  {found["peak"]:6.0f} MiB at most',
          flush=True,
        )
        shutil.rmtree(output)
      assert all(len(each) == 1 for each in seen.values()), 'the shards differ'
      shutil.rmtree(texts)
  finally:
    shutil.rmtree(root)


if __name__ == '__main__':
  main()
