"""The command line: help, one-line complaints with their exit codes, and what a tiny run leaves behind."""

import dataclasses
import errno
import json
import logging
import pathlib
import re
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import compactlm_jax as clm
from compactlm_jax import cli, jobs
from compactlm_jax.jobs import finetune, load_model
from compactlm_jax.metrics import read_metrics
from compactlm_jax.tree import named_leaves

CONFIGS = pathlib.Path(__file__).parents[1] / 'configs'
TINY = f'--config={CONFIGS}/tiny.py:'
SMALL = [
  '--config.batch_size=8', '--config.checkpoint_every=2', '--config.log_every=1', '--config.data.seq_len=16',
  '--config.data.eval_rows=8', '--config.encoder.vocab_size=64', '--config.encoder.hidden_size=16',
  '--config.encoder.intermediate_size=32', '--config.encoder.embedding_size=16', '--config.encoder.head_size=4',
]  # fmt: skip


def train(variant, workdir, *changes):
  return ['train', TINY + variant, f'--workdir={workdir}', *SMALL, *changes]


@pytest.fixture(scope='module')
def run(tmp_path_factory):
  """A finished run of three steps."""
  workdir = tmp_path_factory.mktemp('cli') / 'run'
  assert cli.main(train('distill', workdir, '--config.steps=3')) == 0
  return workdir


def test_help_tells_commands_and_exit_codes(capsys):
  for argv, code in ((['--help'], 0), (['-h'], 0), (['help'], 0), ([], 78)):
    assert cli.main(argv) == code
    said = capsys.readouterr().out
    assert all(f'\n  {name} ' in said for name in cli.COMMANDS)
    assert all(re.search(rf'\b{code}\b', said) for code in (0, 65, 70, 74, 75, 77, 78))
    assert max(map(len, said.splitlines())) <= 100


@pytest.mark.parametrize('name', cli.COMMANDS)
def test_help_of_each_command_tells_its_flags(name, capsys):
  """Mutation: hand the flags of one command to another."""
  assert cli.main([name, '--help']) == 0
  said, command = capsys.readouterr().out, cli.COMMANDS[name]
  assert said.startswith(f'compactlm {name}: {command.summary}') and command.example in said
  assert all(f'  --{flag}\n' in said for flag in command.required) and said.count('[required]') == len(command.required)
  assert ('--config.FIELD=VALUE' in said) == (name in ('train', 'evaluate', 'plan'))
  assert max(map(len, said.splitlines())) <= 102
  example = command.example.split()[2:]
  assert {flag.split('=')[0] for flag in example} >= {f'--{flag}' for flag in command.required}


OK = TINY + 'distill'


@pytest.mark.parametrize(
  ('argv', 'code', 'message'),
  [
    (['trian'], 78, "there is no command 'trian'"),
    (['train', '--cofnig=x'], 78, "Unknown command line flag 'cofnig'. Did you mean: config?"),
    (['train', OK], 78, '--workdir is missing. For example: compactlm train'),
    (['train', '--workdir=W'], 78, '--config is missing. For example: compactlm train'),
    (['train', '--workdir=', OK], 78, '--workdir is missing. For example: compactlm train'),
    (['train', '--workdir=W', '--config.steps=3'], 78, '--config=FILE.py:VARIANT is missing'),
    (['export', '--checkpoint=W'], 78, '--output is missing. For example: compactlm export'),
    (['tokenizer', '--input=a', '--output=b'], 78, '--vocab_size is missing'),
    (['prepare', '--input=a', '--tokenizer=b', '--output=c'], 78, '--seq_len is missing'),
    (['prepare', '--seq_len=ten'], 78, "--seq_len=ten: invalid literal for int() with base 10: 'ten'"),
    (['tokenizer', '--vocab_size=-3'], 78, '--vocab_size=-3: -3 is not a non-negative integer'),
    (['export', '--format=pdf'], 78, '--format=pdf: value should be one of <hf|sparse|onnx>'),
    (['export', '--checkpoint=W', '--output=W', '--values=int8'], 78, '--values=int8: is for --format=sparse'),
    (
      ['export', '--checkpoint=W', '--output=W', '--format=onnx', '--layout=padded'],
      78,
      '--layout=padded: is for --format=hf',
    ),
    (['export', '--checkpoint=W', '--output=W', '--report=/none/r.json'], 78, '--report: the folder of /none/r.json'),
    (['train', OK, '--workdir=W', 'extra'], 78, "unexpected argument 'extra'; flags are written --name=value"),
    (['train', f'--config={CONFIGS}/none.py', '--workdir=W'], 78, f'--config: there is no file {CONFIGS}/none.py'),
    (['train', TINY + 'distil', '--workdir=W'], 78, "configs/tiny.py has no variant 'distil'; use one of"),
    (['train', OK, '--workdir=W', '--config.stepz=3'], 78, 'config.stepz: unknown field; did you mean steps?'),
    (
      ['train', OK, '--workdir=W', '--config.optimizer.learning_rat=3'],
      78,
      'config.optimizer.learning_rat: unknown field; did you mean learning_rate?',
    ),
    (['train', OK, '--workdir=W', '--config.optimiser.beta1=0'], 78, 'config.optimiser: unknown field; did you mean o'),
    (['train', OK, '--workdir=W', '--config.steps=many'], 78, "--config.steps=many: invalid literal for int()"),
    (['train', OK, '--workdir=W', '--config.steps=2.5'], 78, "--config.steps=2.5: invalid literal for int()"),
    (['train', OK, '--workdir=W', '--config.encoder=4'], 78, "--config.encoder=4: Failed to parse '4' as a ConfigDict"),
    (['train', OK, '--workdir=W', '--config.steps=0'], 78, 'config.steps: set steps or epochs to a positive number'),
    (['train', OK, '--workdir=W', '--config.batch_size=12'], 78, 'config.batch_size: 12 rows do not divide over 8'),
    (['train', OK, '--workdir=W', '--config.mesh.data=3'], 78, 'config.mesh: data=3, fsdp=1, model=1 do not multiply'),
    (
      ['train', OK, '--workdir=W', '--config.mesh.data=1', '--config.mesh.model=8',
       '--config.encoder.intermediate_size=20'],
      78,
      'parameter encoder/layers/ffn_in/kernel: a dimension of 20 does not divide over config.mesh.model=8',
    ),
    (['train', OK, '--workdir=W', '--config.data.path=/none'], 78, 'config.teacher: name a model folder or a run'),
    (['train', OK, '--workdir=W', '--config.teacher=/none'], 65, '/none: no such folder'),
    (['train', TINY + 'finetune', '--workdir=W', '--config.data.train=/n.tsv'], 78, 'config.model: name the model'),
    (['train', OK, '--workdir=W', '--allow_change=stepz'], 78, '--allow_change=stepz: there is no such field'),
    (['train', OK, '--workdir=W', '--config.model=/none'], 78, 'config.model: /none would not be read: config.teacher'),
    (['train', f'{TINY}mlm', '--workdir=W', '--config.teacher=/none'], 78, 'config.teacher: /none would not be read'),
    (['train', f'{TINY}finetune', '--workdir=W', '--config.data.seq_len=65'], 78, 'config.data.seq_len: 65 is more'),
    (['export', '--checkpoint=/none', '--output=W/x'], 65, '/none: no such folder'),
    (['tokenizer', '--input=/none/*.txt', '--vocab_size=99', '--output=W/x'], 65, "input '/none/*.txt': no file"),
  ],
  ids=lambda x: ' '.join(x[:4]).replace(str(CONFIGS), '') if isinstance(x, list) else '',
)  # fmt: skip
def test_complaints_are_one_line_that_names_the_culprit(argv, code, message, capsys, tmp_path):
  """And nothing is left. Mutations: let exceptions of absl or ml_collections through; open the run before the mesh."""
  assert cli.main([part.replace('W', str(tmp_path / 'w')) if '=W' in part else part for part in argv]) == code
  silent, said = capsys.readouterr()
  head = '' if argv[0] not in cli.COMMANDS else f' {argv[0]}'
  assert said.startswith(f'compactlm{head}: {message}') and not silent
  assert 'Traceback' not in said and (not head or said.count('\n') == 1), said
  assert not list((tmp_path / 'w').glob('*'))


@pytest.mark.parametrize(
  ('text', 'message'),
  [
    ('def get_config():\n  return nothing\n', ', line 2: NameError: name .nothing. is not defined'),
    ('def get_config(:\n', ': SyntaxError: invalid syntax'),
    ('import not_there\n', ', line 1: ModuleNotFoundError: No module named .not_there.'),
    ('def get_config():\n  raise ValueError("oh no")\n', ': ValueError: oh no'),
    ('def get_config():\n  return None\n', 'mine.py: get_config.. returns nothing'),
    ('def get_config():\n  return 3\n', 'config: expected a section, got 3'),
    (
      'import ml_collections\ndef get_config():\n  return ml_collections.ConfigDict({"steps": 3})\n',
      'config.task: is missing',
    ),
  ],
)
def test_faults_in_a_configuration_file_are_told_with_their_line(text, message, capsys, tmp_path):
  """Mutation: catch only what absl raises: the user's NameError would be called a bug of ours."""
  (tmp_path / 'mine.py').write_text(text)
  assert cli.main(['train', f'--config={tmp_path}/mine.py', f'--workdir={tmp_path}/w']) == 78
  said = capsys.readouterr().err
  assert 'Traceback' not in said and re.search(message, said.splitlines()[-1]), said


@pytest.mark.parametrize(
  ('error', 'code', 'message'),
  [
    (OSError(errno.ENOSPC, 'No space left on device', '/disk/x'), 74, 'No space left on device: /disk/x; free space'),
    (OSError(errno.ENOSPC, 'No space left on device'), 74, 'No space left on device; free space'),
    (PermissionError(errno.EACCES, 'Permission denied', '/disk/x'), 74, 'Permission denied: /disk/x'),
    (ZeroDivisionError('oops'), 70, 'this is a bug in compactlm-jax; the lines above say where'),
    *[
      (OSError(number, 'It hangs', '/x'), 74, 'It hangs: /x; the disk does not answer: look at its mount')
      for number in (errno.ESTALE, errno.ETIMEDOUT, errno.ENOTCONN)
    ],
    (OSError(errno.EMFILE, 'Too many open files', '/x'), 74, 'Too many open files: /x; raise the limit of open files'),
    (FileNotFoundError(errno.ENOENT, 'No such file', '/x'), 78, '/x: no such file or folder; check the path'),
    (FileNotFoundError('a lookup'), 70, 'this is a bug in compactlm-jax'),
    (MemoryError(), 78, 'out of memory (MemoryError); lower --batch'),
    (jax.errors.JaxRuntimeError('RESOURCE_EXHAUSTED: Out of memory'), 78, 'out of memory (RESOURCE_EXHAUSTED: '),
    (ValueError('RESOURCE_EXHAUSTED: Error reading gs://b/x: 429'), 70, 'this is a bug in compactlm-jax'),
    (KeyboardInterrupt(), 130, 'interrupted'),
  ],
)
def test_unexpected_errors_have_their_codes(error, code, message, capsys, monkeypatch):
  """Mutation: call every OSError a full disk, or hide the traceback of a bug."""

  def fail(*args, **options):
    raise error

  monkeypatch.setattr(jobs, 'run_export', fail)
  assert cli.main(['export', '--checkpoint=a', '--output=b']) == code
  said = capsys.readouterr().err
  assert f'compactlm export: {message}' in said and 'None' not in said
  assert ('Traceback' in said) == (code == 70)


@pytest.mark.parametrize(
  ('argv', 'message'),
  [
    (['tokenizer', '--input=F/t.txt', '--vocab_size=50', '--output=F/t.txt/x'], 'F/t.txt: is a file, and a folder'),
    (['tokenizer', '--input=F/t.txt', '--vocab_size=50', '--output=F/t.txt'], 'F/t.txt: is a file, and a folder is'),
    (['demo', '--workdir=F/t.txt'], 'F/t.txt: is a file, and a folder is wanted there; name another path'),
    (train('distill', 'F/t.txt'), 'F/t.txt: is a file, and a folder is wanted there; name another'),
    (train('distill', 'F/t.txt/x', '--seeds=2'), 'F/t.txt: is a file, and a folder is wanted there'),
    (['predict', '--model=F', '--input=F/d.tsv', '--output=F/o.tsv'], 'F/d.tsv: is a folder; name a file'),
    (['predict', '--model=F', '--input=F/t.txt', '--output=F/d.tsv'], '--output: F/d.tsv is a folder; name a file'),
    (['plan', f'{TINY}mlm', '--topology=v3-8', '--output=F/d.tsv'], '--output: F/d.tsv is a folder; name a file'),
  ],
)  # fmt: skip
def test_a_file_for_a_folder_and_a_folder_for_a_file(argv, message, capsys, monkeypatch, tmp_path):
  """Told in one line. Mutations: only look at errors that nothing wraps, or that are not of several seeds."""
  monkeypatch.setenv('JAX_PLATFORMS', 'cpu')
  (tmp_path / 't.txt').write_text('one two\n')
  (tmp_path / 'd.tsv').mkdir()
  assert cli.main([part.replace('=F', f'={tmp_path}') for part in argv]) == 78
  last = capsys.readouterr().err.splitlines()[-1]
  assert last.startswith(f'compactlm {argv[0]}: {message.replace("F/", f"{tmp_path}/")}')


def test_memory_of_a_run_has_remedies(capsys, monkeypatch, tmp_path):
  """Mutation: call it a bug."""

  def fail(*args, **options):
    raise jax.errors.JaxRuntimeError('RESOURCE_EXHAUSTED: Out of memory allocating 9 bytes.')

  monkeypatch.setattr(jobs, 'run_train', fail)
  assert cli.main(train('distill', tmp_path)) == 78
  said = capsys.readouterr().err
  assert said.endswith(
    'lower config.batch_size, raise config.optimizer.accumulate or set config.encoder.remat=True (with scan_unroll=1)\n'
  )
  assert 'Traceback' not in said and said.count('\n') == 1


def test_a_client_of_buckets_prints_no_traceback_beside_its_error(capsys, monkeypatch):
  """Mutation: leave its logger alone."""

  def fail(*args, **options):
    logging.getLogger('gcsfs').error('out of retries', exc_info=True)
    raise type('HttpError', (Exception,), {'__module__': 'gcsfs.retry'})('Cannot connect to host x:443')

  monkeypatch.setattr(jobs, 'run_export', fail)
  assert cli.main(['export', '--checkpoint=a', '--output=b']) == 74
  said = capsys.readouterr().err
  assert said.count('\n') == 1 and said.startswith('compactlm export: Cannot connect to host x:443: the bucket')


def test_a_run_leaves_what_the_architecture_says(run):
  """Mutation: skip config.json or results.json."""
  assert sorted(p.name for p in run.iterdir()) == ['checkpoints', 'config.json', 'metrics.jsonl', 'results.json']
  record, results = json.loads((run / 'config.json').read_text()), json.loads((run / 'results.json').read_text())
  assert {'config', 'config_hash', 'code', 'libraries'} <= set(record)
  assert record['config']['steps'] == 3 and record['config']['encoder']['hidden_size'] == 16
  assert set(results) == {'metrics', 'task', 'steps', 'seconds'} and results['task'] == 'distill'
  lines = read_metrics(run)
  assert [line['step'] for line in lines] == [1, 2, 3]
  wanted = {'loss', 'relation_qk', 'relation_vv', 'learning_rate', 'gradient_norm', 'bad_step', 'tokens_per_second'}
  assert all(wanted <= set(line) for line in lines)
  assert [line['learning_rate'] for line in lines] == [pytest.approx(rate) for rate in (1e-3, 2e-3 / 3, 1e-3 / 3)]
  assert sorted(p.name for p in (run / 'checkpoints').iterdir()) == ['2', '3']


def test_a_finished_run_keeps_its_results(run, capsys):
  """Mutation: evaluate again and write over results.json."""
  before = {p: p.read_bytes() for p in run.rglob('*') if p.is_file() and p.name != 'config.json'}
  started = time.monotonic()
  assert cli.main(train('distill', run, '--config.steps=3')) == 0
  assert time.monotonic() - started < 20
  assert {p: p.read_bytes() for p in run.rglob('*') if p.is_file() and p.name != 'config.json'} == before
  assert json.dumps(json.loads((run / 'results.json').read_text())['metrics']) in capsys.readouterr().out


@pytest.mark.parametrize('change', ['seed=1', 'batch_size=16', 'optimizer.learning_rate=0.1'])
def test_another_configuration_is_refused(run, change, capsys):
  """Mutation: compare nothing, or only the seed."""
  before = (run / 'config.json').read_bytes()
  assert cli.main(train('distill', run, '--config.steps=3', f'--config.{change}')) == 78
  said = capsys.readouterr().err
  assert f'config.{change.split("=")[0]}: was ' in said and '--allow_change' in said and 'Traceback' not in said
  assert (run / 'config.json').read_bytes() == before


def test_an_export_reads_back_to_the_same_outputs(run, tmp_path, capsys):
  """Mutation: export the parameters of another step."""
  assert cli.main(['export', f'--checkpoint={run}', f'--output={tmp_path}/hf']) == 0
  assert 'bert, 2 layers, 16 wide' in capsys.readouterr().out
  ours, theirs = load_model(run), clm.from_pretrained(tmp_path / 'hf')
  ids = np.random.default_rng(0).integers(5, 64, (3, 16))
  mask = (np.arange(16) < np.array([[16], [9], [1]])).astype(np.int32)
  a, b = (clm.encode(x.params, x.config, jnp.asarray(ids), jnp.asarray(mask)).last_BTD for x in (ours, theirs))
  np.testing.assert_array_equal(a, b)
  assert np.abs(a).max() > 0.1


def test_non_finite_updates_end_a_run(tmp_path, monkeypatch, capsys):
  """From step 3 on. Mutation: count bad steps that are not consecutive, save before the report, or catch nothing."""
  make = finetune.make_finetune_task

  def poisoned(*args, **kwargs):
    task = make(*args, **kwargs)

    def loss(params, frozen, batch, key, step):
      value, metrics = task.loss(params, frozen, batch, key, step)
      bad = (step == 0) | (step >= 2)  # steps 1, 3, 4, 5
      return value + jnp.where(bad, jnp.nan, 0.0) * params['classifier']['bias'][0], metrics

    return dataclasses.replace(task, loss=loss)

  monkeypatch.setattr(finetune, 'make_finetune_task', poisoned)
  assert cli.main(train('finetune', tmp_path, '--config.steps=9', '--config.checkpoint_every=1')) == 70
  said = capsys.readouterr().err
  (tmp_path / 'b' / 'failure.json').mkdir(parents=True)  # nothing can be written there
  assert cli.main(train('finetune', tmp_path / 'b', '--config.steps=9', '--config.checkpoint_every=1')) == 70
  told = capsys.readouterr().err
  assert 'failure.json cannot be written' in told and told.endswith(
    said.splitlines()[-1].replace(str(tmp_path), f'{tmp_path}/b') + '\n'
  )
  assert '3 non-finite updates in a row, the last at step 5 (first leaf: classifier/bias)' in said
  assert 'Traceback' not in said
  report = json.loads((tmp_path / 'failure.json').read_text())
  assert report['steps'] == [3, 4, 5] and report['bad_gradients'] == ['classifier/bias']
  assert report['metrics']['loss'] == 'nan'
  assert [(line['step'], line['bad_step']) for line in read_metrics(tmp_path)] == [
    (1, 1),
    (2, 0),
    (3, 1),
    (4, 1),
    (5, 1),
  ]
  assert all(np.isfinite(x).all() for x in jax.tree.leaves(named_leaves(load_model(tmp_path).params)))
  assert not (tmp_path / 'results.json').exists() and not (tmp_path / 'lock').exists()
  assert not (tmp_path / 'checkpoints' / '5').exists()
