"""The command `augment`."""

from __future__ import annotations

from absl import flags

from compactlm_jax.cli.flags import Command, all_of, choice, comma_list, number, switch, text


def _augment(values: flags.FlagValues) -> str:
  from compactlm_jax.cpu import keep_memory
  from compactlm_jax.jobs.augment import Options, as_text, run_augment

  keep_memory()
  options = Options(
    text_columns=comma_list(values.text_columns),
    task=values.task,
    copies=values.copies,
    candidates=values.candidates,
    probability=values.probability,
    pairs=values.pairs,
    context=values.context,
    vectors=values.vectors,
    stop_words=values.stop_words,
    seed=values.seed,
    batch_size=values.batch_size,
    seq_len=values.seq_len,
  )
  done = run_augment(values.input, values.model, values.output, options, values.overwrite)
  return as_text(values.output, done)


AUGMENT = Command(
  'Copy labelled texts with other words, which a masked language model guesses.',
  'compactlm augment --input=train.tsv --model=MODEL --output=train_augmented.tsv',
  all_of(
    text('input', None, 'Table: .tsv with a header or .jsonl, perhaps with .gz. With --task: the folder of GLUE too.'),
    text('model', None, 'Folder or run with a head that guesses hidden words, or with a generator.'),
    text('output', None, '.tsv or .jsonl to write; the same command continues after a kill.'),
    text('text_columns', '', 'Column of the texts, or two for pairs: a,b. The column text if absent.'),
    text('task', '', 'GLUE task: its columns, and its published number of copies.'),
    number('copies', 0, 'Copies of each text; 0 is 30, or the published number of --task.'),
    number('candidates', 15, 'Candidates of a word.'),
    lambda values: flags.DEFINE_float('probability', 0.4, 'Of replacing a word.', flag_values=values),
    text(
      'vectors',
      '',
      "File of word vectors in GloVe's format, .gz or not, for words of several pieces; the model's own token "
      'embeddings if absent.',
    ),
    choice(
      'pairs',
      ['clean', 'published'],
      "'clean': copies of one text stand beside the other text as written; 'published': beside its last copy.",
    ),
    choice(
      'context',
      ['published', 'sentence'],
      "What the model reads: 'published' the text with the gap and the text without it, 'sentence' the gap alone, "
      'which is faster.',
    ),
    text('stop_words', '', 'File with a word on each line, which are never replaced; English ones if absent.'),
    number('seed', 0, 'Of what is replaced.'),
    number('batch_size', 128, 'Gaps that are guessed together.'),
    number('seq_len', 0, 'Most tokens that the model reads; 0 is all it can.'),
    switch('overwrite', 'Replace an output that was made in another way.'),
  ),
  ('input', 'model', 'output'),
  _augment,
  alone=True,
)
