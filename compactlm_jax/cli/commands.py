"""The sub-commands: their flags, and what each calls. Heavy modules are imported when a command runs."""

from __future__ import annotations

import dataclasses
import json
import os
import pathlib
from typing import TYPE_CHECKING, Any

from absl import flags

from compactlm_jax.cli.augment import AUGMENT
from compactlm_jax.cli.flags import Command, all_of, choice, comma_list, fraction, number, several, switch, text
from compactlm_jax.cli.worker import define_processes
from compactlm_jax.errors import ConfigError
from compactlm_jax.storage import require_file_place

if TYPE_CHECKING:
  from compactlm_jax.config import RunConfig


def _demo(values: flags.FlagValues) -> str:
  from compactlm_jax.cpu import keep_memory
  from compactlm_jax.demo.main import run_demo

  keep_memory()
  return run_demo(values.workdir)


def _prepare(values: flags.FlagValues) -> str:
  from compactlm_jax.data.parts import Spread
  from compactlm_jax.data.prepare import prepare
  from compactlm_jax.jobs.models import tokenizer_folder

  manifest = prepare(
    values.input,
    str(tokenizer_folder(values.tokenizer)),
    values.output,
    values.seq_len,
    values.mode,
    workers=values.workers,
    seed=values.seed,
    pair_rule=values.pair_rule,
    holdout_rows=values.holdout_rows,
    split=values.split,
    text_key=values.text_key,
    overwrite=values.overwrite,
    spread=Spread(values.parts, values.runner, values.beam_options),
  )
  counts = ', '.join(f'{name} {value:,}' for name, value in sorted(manifest.counts.items()))
  return f'{values.output}: {counts}'


def _tokenizer(values: flags.FlagValues) -> str:
  from compactlm_jax.data.wordpiece import train_wordpiece

  made = train_wordpiece(values.input, values.vocab_size, values.output, values.lowercase, overwrite=values.overwrite)
  return f'{values.output}: {made.vocab_size:,} word pieces'


def _train(values: flags.FlagValues) -> str:
  from compactlm_jax.config import RunConfig, from_config_dict
  from compactlm_jax.cpu import keep_memory
  from compactlm_jax.jobs import run_train
  from compactlm_jax.train.agree import agree_on_start

  keep_memory()
  config = from_config_dict(RunConfig, values.config)
  flags_of_run = ('workdir', 'allow_change', 'seeds', 'seed_shard', 'steal_lock', 'profile')
  agree_on_start(config, {name: values[name].value for name in flags_of_run})
  allowed = comma_list(values.allow_change)
  options = {'allow_change': allowed, 'steal_lock': values.steal_lock, 'profile': values.profile}
  if values.seeds is not None:
    return _train_seeds(config, values, options)
  if values.seed_shard:
    raise ConfigError('--seed_shard: name the seeds of the whole series, --seeds=9')
  results = run_train(config, values.workdir, **options)
  return f'{values.workdir}/results.json: {json.dumps(results["metrics"])}'


def _train_seeds(config: RunConfig, values: flags.FlagValues, options: dict[str, Any]) -> str:
  from compactlm_jax.jobs.seeds import parse_seeds, raise_first, run_seeds
  from compactlm_jax.report import as_markdown

  series = run_seeds(config, values.workdir, parse_seeds(values.seeds), values.seed_shard, **options)
  table = as_markdown(series.report, runs=False) if series.report else ''
  if series.failures:
    print(table)
    raise_first(series)
  return f'{table}\n{values.workdir}: {len(series.results)} runs are done. More: compactlm report {values.workdir}'


def _report(values: flags.FlagValues) -> str:
  os.environ.setdefault('JAX_PLATFORMS', 'cpu')  # nothing is computed, and an accelerator may be in use
  from compactlm_jax.jobs.report import run_report
  from compactlm_jax.report import as_markdown

  report, written = run_report(values.runs, values.output, values.curves)
  return '\n'.join([as_markdown(report, runs=not written), *(f'written: {file}' for file in written)]).rstrip()


def _export(values: flags.FlagValues) -> str:
  from compactlm_jax.cpu import keep_memory
  from compactlm_jax.jobs import run_export
  from compactlm_jax.jobs.export_cell import CellExport, Wanted, run_export_cell
  from compactlm_jax.jobs.export_tables import as_text, write_report

  keep_memory()
  require_file_place('report', values.report, name='a file as export.json')
  options: dict[str, Any] = {name: values[name].value for name in ('format', 'layout', 'values', 'latency')}
  fields: dict[str, Any] = {field.name: values[field.name].value for field in dataclasses.fields(Wanted)}
  wanted = Wanted(**fields)
  if not wanted.anything:
    done = run_export(values.checkpoint, values.output, **options)
  else:
    cut = run_export_cell(values.checkpoint, values.output, wanted, **options)
    if isinstance(cut, CellExport):
      write_report(cut.export, values.report, cut.report())
      return cut.text()
    done = cut
  write_report(done, values.report)
  return as_text(done)


def _plan(values: flags.FlagValues) -> str:
  os.environ['JAX_PLATFORMS'] = 'cpu'  # nothing is computed, and a TPU that is here may be in use
  from compactlm_jax.config import RunConfig, from_config_dict
  from compactlm_jax.plan.main import plan_run, too_large
  from compactlm_jax.plan.report import as_json, as_table

  for flag in ('output', 'hlo'):  # before the compiler takes its minutes
    require_file_place(flag, str(values[flag].value), buckets=False)
  config = from_config_dict(RunConfig, values.config)
  name = str(getattr(values['config'], 'config_filename', ''))
  report = plan_run(config, name, values.topology, sweep=bool(values.sweep), thorough=values.thorough)
  _write(values.output, json.dumps(as_json(report), indent=2) + '\n')
  _write(values.hlo, getattr(report.program, 'hlo', ''))
  if problem := too_large(report):
    print(as_table(report))
    raise ConfigError(problem)
  return as_table(report)


def _evaluate(values: flags.FlagValues) -> str:
  from compactlm_jax.config import RunConfig, from_config_dict
  from compactlm_jax.cpu import keep_memory
  from compactlm_jax.jobs.evaluate import run_evaluate
  from compactlm_jax.jobs.grid import Timed, as_text

  keep_memory()
  config = from_config_dict(RunConfig, values.config)
  timing = Timed(values.batch, values.seq_len) if values.latency else None
  results = run_evaluate(config, values.checkpoint, values.split, values.output, timing=timing)
  if 'grid' in results:
    print(as_text(results))
  found = json.dumps(results['metrics']) if results['metrics'] else 'predictions of unlabelled rows'
  return f'{values.output or values.checkpoint}: {found}'


def _predict(values: flags.FlagValues) -> str:
  from compactlm_jax.cpu import keep_memory
  from compactlm_jax.jobs.predict_files import predict_file

  keep_memory()
  return predict_file(
    values.model,
    values.input,
    values.output,
    text_columns=comma_list(values.text_columns),
    question=values.question,
    context=values.context,
    batch_size=values.batch_size,
    seq_len=values.seq_len,
    null_threshold=values.null_threshold,
  )


def _analyze(values: flags.FlagValues) -> str:
  from compactlm_jax.cpu import keep_memory
  from compactlm_jax.jobs.analyze import run_analyze

  keep_memory()
  found = run_analyze(
    values.model,
    values.text,
    values.output,
    compare=values.compare,
    rows=values.rows,
    seq_len=values.seq_len,
    sentence=values.sentence,
  )
  text = found['text']
  counts = f'{text["rows"]:,} rows, {text["tokens"]:,} tokens, {text["cut_rows"]:,} rows cut'
  return f'{values.output}/report.md: {counts}, {len(found["pictures"])} pictures'


def _write(path: str, text: str) -> None:
  if path and text:
    pathlib.Path(path).write_text(text, encoding='utf-8')


COMMANDS = {
  'demo': Command(
    'Distil a real encoder on real text, and show what was gained.',
    'compactlm demo --workdir=demo_run',
    text('workdir', 'demo_run', 'Where assets, data and models are kept; a second run reuses them.'),
    (),
    _demo,
    alone=True,
  ),
  'prepare': Command(
    'Tokenise text into rows of equal length: a TFDS dataset of ArrayRecord shards.',
    "compactlm prepare --input='text/*.txt.gz' --tokenizer=MODEL --output=data/rows --seq_len=128",
    all_of(
      text('input', None, 'Comma-separated globs of text files (.gz is read), tfds:NAME, or hf:NAME[:CONFIG].'),
      text('tokenizer', None, 'Folder with the tokenizer, for example a model folder.'),
      text('output', None, 'Folder to write.'),
      number('seq_len', None, 'Row length in tokens, special tokens included.'),
      choice(
        'mode',
        ['packed', 'pairs', 'sentences'],
        "'packed' fills rows with whole documents, 'pairs' builds two segments as ELECTRA does, 'sentences' puts one "
        'line in a row.',
      ),
      number('holdout_rows', 0, "Rows that become a 'validation' split."),
      number('workers', 0, 'Threads that tokenise; 0 takes all cores. The output does not depend on it.'),
      number('seed', 0, 'Of pairs and held-out rows.'),
      choice('pair_rule', ['electra', 'convbert'], "'convbert' builds pairs with the bug that ConvBERT trained with."),
      text('split', 'train', 'Split of a tfds: or hf: input.'),
      text('text_key', 'text', 'Text field of a tfds: or hf: input.'),
      switch('overwrite', 'Replace an output that was made with other settings.'),
      number('parts', 0, 'Parts that the files are shared out to, a file of rows each; a kill costs one part; or 0.'),
      choice(
        'runner',
        ['local', 'DirectRunner', 'DataflowRunner', 'FlinkRunner'],
        'Who writes the parts: this process, or workers of Apache Beam (extra beam). The output does not depend on it.',
      ),
      text('beam_options', '', "Of the pipeline: '--project=P --region=R --temp_location=gs://B/tmp'."),
    ),
    ('input', 'tokenizer', 'output', 'seq_len'),
    _prepare,
  ),
  'tokenizer': Command(
    'Train a WordPiece vocabulary.',
    "compactlm tokenizer --input='text/*.txt' --vocab_size=30522 --output=tokenizer",
    all_of(
      text('input', None, 'Comma-separated globs of text files (.gz is read).'),
      number('vocab_size', None, 'Word pieces, special tokens included.'),
      text('output', None, 'Folder to write.'),
      lambda values: flags.DEFINE_bool('lowercase', True, 'Lower-case and strip accents.', flag_values=values),
      switch('overwrite', 'Replace another tokenizer.'),
    ),
    ('input', 'vocab_size', 'output'),
    _tokenizer,
  ),
  'augment': AUGMENT,
  'train': Command(
    'Pre-train, distil or fine-tune; the same command resumes after a kill.',
    'compactlm train --config=configs/tiny.py:distill --workdir=runs/tiny --config.steps=100',
    all_of(
      text('workdir', None, 'Run directory: config.json, metrics.jsonl, checkpoints/, results.json.'),
      text('allow_change', '', 'Comma-separated fields that may differ from the run that is resumed.'),
      text(
        'seeds', None, 'How many seeds (9) or which (0,3,7): runs in WORKDIR/seed-0, ..., and their median and spread.'
      ),
      text('seed_shard', '', 'I/N runs every N-th of the seeds from the I-th on, I from 0 to N-1: one machine of N.'),
      switch('steal_lock', 'Take the directory over from a run on another host that is known to be dead.'),
      text('profile', '', 'START:STOP traces these steps into WORKDIR/profile, for xprof or TensorBoard.'),
      define_processes,
    ),
    ('config', 'workdir'),
    _train,
    configured=True,
  ),
  'evaluate': Command(
    'Evaluate a run or a model folder; write prediction files and GLUE submissions.',
    'compactlm evaluate --checkpoint=runs/rte --config=configs/glue.py:electra-small-rte --output=rte_dev',
    all_of(
      text('checkpoint', None, 'Run directory or model folder.'),
      choice('split', ['dev', 'test'], "'dev': the held-out rows of --config; 'test': GLUE's test sets, to submit."),
      text('output', '', 'Folder for results.json, files to submit, answers of SQuAD, grids of adaptive networks.'),
      lambda values: flags.DEFINE_bool(
        'latency', True, 'Time the sub-networks of an adaptive network here, in turns.', flag_values=values
      ),
      number('batch', 1, 'Rows of text of a latency.'),
      number('seq_len', 0, 'Tokens of each of them; 0 is what --config says.'),
    ),
    ('config', 'checkpoint'),
    _evaluate,
    configured=True,
    alone=True,
  ),
  'predict': Command(
    'Predict classes, scores or answers for the rows of a file, with a fine-tuned model.',
    'compactlm predict --model=runs/sst2 --input=reviews.txt.gz --output=predictions.tsv',
    all_of(
      text('model', None, 'Run directory or model folder.'),
      text('input', None, 'File: .tsv with a header, .jsonl, or .txt with one text per line; each perhaps with .gz.'),
      text('output', None, 'File to write, .tsv or .jsonl: one row for each row of the input, in its order.'),
      text('text_columns', 'text', 'Column of the texts, or two for pairs: a,b.'),
      text('question', '', 'Column of the questions, for a model that finds answers.'),
      text('context', '', 'Column of the texts that hold the answers.'),
      lambda values: flags.DEFINE_float(
        'null_threshold',
        None,
        'No answer where the null odds exceed this; always answers if absent.',
        flag_values=values,
      ),
      number('batch_size', 32, 'Rows that are computed together.'),
      number('seq_len', 0, 'Longest text in tokens; longer ones are cut and counted. 0 is what the model has.'),
    ),
    ('model', 'input', 'output'),
    _predict,
    alone=True,
  ),
  'plan': Command(
    'Compile the training step for a TPU that is not here: memory, step time, hours.',
    'compactlm plan --config=configs/convbert.py:base --topology=v3-8',
    all_of(
      text('topology', None, 'TPU slice: v2-8, v3-8, v3-32, v3-128, v4-8, v5e-8, v5p-8, v6e-8, or chips as v3:4x4.'),
      choice('sweep', ['', 'batch'], "'batch' looks for the largest batch that fits; each try is a compilation."),
      switch('thorough', 'Compile with the effort of a run; takes three times as long.'),
      text('output', '', 'JSON file to write.'),
      text('hlo', '', 'File for the optimised program of one core, as text.'),
    ),
    ('config', 'topology'),
    _plan,
    configured=True,
  ),
  'report': Command(
    'Scores of finished runs over seeds: median, mean, spread, beside published ones.',
    'compactlm report runs/sst2 runs/other --output=report',
    all_of(
      several('runs', 'Run directories, or parents that hold seed-*; runs that differ in the seed alone are grouped.'),
      text('output', '', 'FILE.md, .csv, .json or .png to write; without an ending, all of them and learning curves.'),
      switch('curves', 'FILE.png shows the training loss over steps instead of the scores.'),
    ),
    (),
    _report,
    arguments='runs',
  ),
  'export': Command(
    'Write a trained model, or a sub-network of it, for transformers, packed, or as ONNX.',
    'compactlm export --checkpoint=runs/tiny --output=exported',
    all_of(
      text('checkpoint', None, 'Run directory or model folder.'),
      text('output', None, 'Folder to write.'),
      choice(
        'format',
        ['hf', 'sparse', 'onnx'],
        "'hf': config.json, model.safetensors and tokenizer for transformers, without heads and neurons that pruning "
        "removed; 'sparse': zeros take next to no room, for from_pretrained; 'onnx': model.onnx for onnxruntime.",
      ),
      choice(
        'layout',
        ['auto', 'shrunk', 'padded'],
        "'padded' keeps the sizes of the dense model, with zeros, 'shrunk' none that can go; for --format=hf.",
      ),
      choice(
        'values',
        ['float32', 'bfloat16', 'int8'],
        "How --format=sparse stores weights: 'float32' exactly, 'bfloat16' rounded, 'int8' with a scale for each row.",
      ),
      fraction('width', 'Of an adaptive network: share of heads and neurons of the sub-network to write.'),
      fraction('depth', 'Share of its layers.'),
      number('hidden', 0, 'Its hidden size, of a network that was trained at several.'),
      text('budget', '', "Its best sub-network within, measured here: 'latency<5ms', 'params<20e6,flops<3e9', ..."),
      number('batch', 1, 'Rows of text of a latency in --budget.'),
      number('seq_len', 0, 'Tokens of each of them; 0 is what it was trained on.'),
      switch('best', 'What scored best during training in place of the last checkpoint.'),
      lambda values: flags.DEFINE_bool(
        'latency',
        True,
        'Time a pruned model or a sub-network here, beside the dense or full one; takes up to two minutes.',
        flag_values=values,
      ),
      text('report', '', 'JSON file for what is printed.'),
    ),
    ('checkpoint', 'output'),
    _export,
    alone=True,
  ),
  'analyze': Command(
    'Look inside one or two models: attention, similarity of layers, cost of the parts.',
    'compactlm analyze --model=student --compare=teacher --text=sentences.txt --output=analysis',
    all_of(
      text('model', None, 'Model folder or run directory.'),
      text('compare', '', 'Second model with the same tokenizer, for example the teacher.'),
      text('text', None, 'File with one sentence per line (.gz is read).'),
      text('output', None, 'Folder to write: report.md, analysis.json and pictures. An earlier analysis is replaced.'),
      number('rows', 1000, 'Lines to read; 0 reads all.'),
      number('seq_len', 0, 'Longest row in tokens; longer lines are cut and counted. 0 is 128, or what the model has.'),
      number('sentence', 0, 'Number of the line that is drawn; 0 takes the first one of 8 to 24 tokens.'),
    ),
    ('model', 'text', 'output'),
    _analyze,
    alone=True,
  ),
}
