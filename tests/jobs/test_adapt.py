"""Runs of task 'adapt': stages as runs of their own, continued to the same bits; what is measured before they start."""

import dataclasses
import json
import logging
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from labelled_files import VOCAB, write_files
from tiny import ENCODER, tiny_config

from compactlm_jax.checkpoint import load_params
from compactlm_jax.compress.subnet import subnet
from compactlm_jax.config import AdaptConfig, Cell, DataConfig, FinetuneConfig, OptimizerConfig
from compactlm_jax.errors import ConfigError
from compactlm_jax.interop.bundle import Bundle, from_pretrained, save_pretrained
from compactlm_jax.jobs import adapt as adapt_module
from compactlm_jax.jobs import adapt_importance, build_job, load_model, params_digest, run_train
from compactlm_jax.jobs import stages as stages_module
from compactlm_jax.jobs.finetune import generated_labelled
from compactlm_jax.jobs.finished import finished_results
from compactlm_jax.metrics import read_metrics
from compactlm_jax.tasks.adapt import terms
from compactlm_jax.train.rundir import read_run
from compactlm_jax.tree import named_leaves

SMALL = dataclasses.replace(ENCODER, num_layers=1, initializer_range=0.2)
ADAPT = AdaptConfig(widths=(0.5, 1.0), depths=(1.0,))
NAMES = ['1x1', '0.5x1']


def config_of(teacher='', adapt=None, **changes):
  fields = {
    'encoder': SMALL, 'teacher': str(teacher), 'adapt': dataclasses.replace(ADAPT, **(adapt or {})), 'steps': 4,
    'checkpoint_every': 2, 'eval_every': 2,
  }  # fmt: skip
  return tiny_config('adapt', **{**fields, **changes})


@pytest.fixture(scope='module')
def teacher(tmp_path_factory):
  """A fine-tuned model that knows its generated task."""
  folder = tmp_path_factory.mktemp('teacher')
  config = tiny_config('finetune', encoder=SMALL, steps=60, optimizer=OptimizerConfig(learning_rate=1e-2))
  assert run_train(config, str(folder))['metrics']['accuracy'] > 0.8
  return folder


@pytest.fixture(scope='module')
def whole(teacher, tmp_path_factory):
  """(results, directory) of an uninterrupted run of all stages."""
  folder = tmp_path_factory.mktemp('whole')
  return run_train(config_of(teacher), str(folder)), folder


def record(folder):
  return json.loads((folder / 'best.json').read_text())


def test_each_stage_is_a_run_that_starts_from_the_one_before(whole, teacher):
  """Mutations: start every stage from the teacher; record the stage alone in WORKDIR; leave the grid out."""
  results, folder = whole
  runs = {'width': folder / 'stages' / 'width', 'depth': folder / 'stages' / 'depth', 'final': folder}
  for stage, run in runs.items():
    model = load_params(run)[1]['model']
    assert model['stage'] == stage and model['cells'] == NAMES
    assert read_run(run)[0].adapt.stages == (ADAPT.stages if stage == 'final' else (stage,))
  starts = [read_run(run)[1]['identity']['start'] for run in runs.values()]
  before = [load_model(str(path)).params for path in (teacher, runs['width'] / 'best', runs['depth'] / 'best')]
  assert starts == [params_digest(params) for params in before]
  assert read_run(runs['width'])[1]['identity']['teacher'] == starts[0]
  assert read_run(runs['depth'])[1]['identity']['teacher'] == starts[1] != starts[0]
  assert 'teacher' not in read_run(folder)[1]['identity']
  assert set(results['metrics']) == {'loss', 'accuracy', 'f1'} and finished_results(config_of(teacher), str(folder))
  full, half = results['grid']
  assert (full['width'], full['depth'], half['width'], half['depth']) == (1.0, 1.0, 0.5, 1.0)
  assert full['metrics'] == results['metrics'] and set(half['metrics']) == {'accuracy', 'f1'}
  bundle = load_model(str(folder))
  assert full['params'] == sum(leaf.size for leaf in jax.tree.leaves(bundle.params)) > half['params']
  assert full['flops'] == 2 * half['flops'] and full['latency_ms'] is half['latency_ms'] is None


def test_the_best_network_and_each_cell_at_its_best_are_kept(whole):
  """Of the stages so far. Mutations: keep the last; compare the loss; export the full network for every cell."""
  results, folder = whole
  assert results['best'] == record(folder)
  before = {}
  for run in (folder / 'stages' / 'width', folder / 'stages' / 'depth', folder):
    last = json.loads((run / 'results.json').read_text())
    scores = {row['step']: row for row in read_metrics(run) if 'eval_accuracy' in row}
    scores = {step: (row['eval_accuracy'], row['eval_accuracy@0.5x1']) for step, row in scores.items()}
    scores[4] = tuple(row['metrics']['accuracy'] for row in last['grid'])
    assert set(scores) == {2, 4}
    best = record(run)
    for name, value in (('all', sum), ('1x1', lambda s: s[0]), ('0.5x1', lambda s: s[1])):
      step = max(scores, key=lambda step, value=value: (value(scores[step]), -step))
      own = {'value': value(scores[step]), 'step': step}
      assert best[name] == (before[name] if before and before[name]['value'] >= own['value'] else own)
    assert load_params(run / 'best')[1]['step'] == (0 if 'stage' in best['all'] else best['all']['step'])
    before = {name: {'stage': run.name, **entry} for name, entry in best.items()}
    cells = {name: from_pretrained(run / 'best' / 'cells' / name) for name in NAMES}
    assert {name: cell.config.num_heads for name, cell in cells.items()} == {'1x1': 2, '0.5x1': 1}
    for name, cell in zip(NAMES, (Cell(), Cell(0.5))):
      if all(best[name].get(key) == best['all'].get(key) for key in ('step', 'stage')):
        network = load_model(str(run / 'best'))
        expected = named_leaves(subnet(network.params, network.config, cell))
        found = named_leaves(cells[name].params)
        assert set(found) == set(expected)
        assert all(np.array_equal(found[leaf], expected[leaf]) for leaf in expected)


def test_a_last_stage_that_hurts_leaves_the_best_of_the_one_before(whole, teacher, tmp_path, monkeypatch):
  """Here it starts from zeros. Mutations: start each stage with nothing; tell its keeper of no stage before."""
  _, folder = whole
  hurt = tmp_path / 'hurt'
  shutil.copytree(folder / 'stages', hurt / 'stages')
  real = stages_module.train

  def train(job, workdir, **options):
    init = job.task.init
    task = dataclasses.replace(job.task, init=lambda key: jax.tree.map(jnp.zeros_like, init(key)))
    return real(dataclasses.replace(job, task=task), workdir, **options)

  monkeypatch.setattr(stages_module, 'train', train)
  results, depth = run_train(config_of(teacher), str(hurt)), record(folder / 'stages' / 'depth')
  assert all(row['metrics']['accuracy'] < depth[name]['value'] for name, row in zip(NAMES, results['grid']))
  assert results['best'] == record(hurt) == {name: {'stage': 'depth', **entry} for name, entry in depth.items()}
  networks = [load_model(str(path / 'best')).params for path in (hurt, folder / 'stages' / 'depth')]
  assert params_digest(networks[0]) == params_digest(networks[1])
  for name in NAMES:
    cells = [from_pretrained(path / 'best' / 'cells' / name) for path in (hurt, folder / 'stages' / 'depth')]
    assert params_digest(cells[0].params) == params_digest(cells[1].params)


def test_an_interrupted_stage_resumes_and_finished_ones_are_kept(whole, teacher, tmp_path, caplog):
  """Killed after a save, in a directory that has moved since; best.json may be ahead. Same bits in the end.

  Mutations: run finished stages again; record the paths of stages; forget what was kept.
  """
  results, folder = whole
  cut = tmp_path / 'moved'
  shutil.copytree(folder, cut)
  shutil.rmtree(cut / 'checkpoints' / '4')
  (cut / 'results.json').unlink()
  before = {path: path.stat().st_mtime_ns for path in (cut / 'stages').rglob('*')}
  with caplog.at_level(logging.INFO):
    again = run_train(config_of(teacher), str(cut))
  assert 'stages/width is finished and kept' in caplog.text and 'resuming at step 2 of 4' in caplog.text
  assert {path: path.stat().st_mtime_ns for path in (cut / 'stages').rglob('*')} == before
  for name in ('metrics', 'grid', 'best'):
    assert again[name] == results[name]
  assert record(cut) == record(folder)
  for part in ('', 'best'):
    assert params_digest(load_model(str(cut / part)).params) == params_digest(load_model(str(folder / part)).params)


def test_a_stage_of_another_configuration_is_not_continued(whole, teacher, tmp_path, monkeypatch):
  """Nor are finished ones built again. Mutation: compare nothing."""
  _, folder = whole
  built = []
  monkeypatch.setattr(stages_module, 'train', lambda job, workdir, **options: built.append((job, workdir)) or {})
  stages_module.run_stages(config_of(teacher), str(folder), lambda config: built.append(config) or _Job(config))
  (job, workdir) = built[-1]
  assert len(built) == 2 and built[0].adapt.stages == ADAPT.stages and workdir == str(folder)
  assert built[0].model == f'{folder}/stages/depth/best' and job.config == config_of(teacher)
  built.clear()
  stages_module.run_stages(
    config_of(teacher, steps=5), str(folder), lambda config: built.append(config) or _Job(config)
  )
  assert [x[1] for x in built if isinstance(x, tuple)] == [f'{folder}/stages/{n}' for n in ('width', 'depth')] + [
    str(folder)
  ]


@dataclasses.dataclass(frozen=True)
class _Job:
  config: object
  keeper: object = None


def test_heads_and_neurons_are_sorted_before_widths_are_trained(teacher, monkeypatch):
  """By the sum over held-out batches of the absolute slope of the loss along each head, here by finite differences.

  Mutations: sort ascending; measure the training rows for both; add up slopes before the absolute value.
  """
  seen = {}
  rewire, measured = adapt_importance.rewire, adapt_importance._measured

  def recorded(params, encoder, heads_NH, neurons_NF):
    seen.update(heads=heads_NH, neurons=neurons_NF)
    return rewire(params, encoder, heads_NH, neurons_NF)

  def listed(params, model, batches, importance_sum):
    seen.update(model=model, batches=list(batches))
    return measured(params, model, iter(seen['batches']), importance_sum)

  monkeypatch.setattr(adapt_importance, 'rewire', recorded)
  monkeypatch.setattr(adapt_importance, '_measured', listed)
  adapt = {'stages': ('width',), 'importance_batches': 2}
  found, start = build_job(config_of(teacher, adapt)).task.init(jax.random.key(0)), load_model(str(teacher)).params
  dev = seen.copy()
  model, layers = dev['model'], start['encoder']['layers']

  @jax.jit
  def loss(scale_H, batch):
    output = {**layers['attention']['output']}
    output['kernel'] = output['kernel'] * jnp.repeat(scale_H, SMALL.head_size)[None, :, None]
    encoder = {**start['encoder'], 'layers': {**layers, 'attention': {**layers['attention'], 'output': output}}}
    return model.losses(model.outputs({**start, 'encoder': encoder}, batch, None), batch).mean()

  step = 0.02
  for head in range(2):
    slopes = []
    for batch in dev['batches']:
      ends = [float(loss(jnp.ones(2).at[head].add(sign * step), batch)) for sign in (1, -1)]
      slopes.append(abs(ends[0] - ends[1]) / (2 * step))
    assert dev['heads'][0, head] == pytest.approx(sum(slopes), rel=0.05, abs=1e-4)
  order = np.argsort(-dev['neurons'][0], kind='stable')
  kernel = np.asarray(layers['ffn_in']['kernel'])[0]
  assert (dev['neurons'] >= 0).all() and not np.array_equal(order, np.arange(32))
  np.testing.assert_array_equal(np.asarray(found['encoder']['layers']['ffn_in']['kernel'])[0], kernel[:, order])
  assert len(dev['batches']) == 2
  build_job(config_of(teacher, {**adapt, 'importance_rows': 'train'}))
  assert not np.array_equal(seen['batches'][0].input_ids, dev['batches'][0].input_ids)
  plain = build_job(config_of(teacher, {**adapt, 'rewire': False})).task.init(jax.random.key(0))
  np.testing.assert_array_equal(plain['encoder']['layers']['ffn_in']['kernel'][0], kernel)


def test_importance_is_measured_on_each_held_out_set():
  """MNLI has two. Mutations: the first set alone; the whole number of each."""
  held = [generated_labelled(config_of(seed=seed)).job.evals[0] for seed in (1, 2)]
  rows = generated_labelled(config_of())
  rows = dataclasses.replace(rows, job=dataclasses.replace(rows.job, evals=tuple(held)))
  for count, shares in ((1, (1, 0)), (3, (2, 1)), (0, (32, 32))):
    found = list(adapt_importance._batches(rows, config_of(adapt={'importance_batches': count})))
    firsts = [np.linspace(0, 511, 16 * share).astype(int)[::16] for share in shares]
    expected = [each.rows.fetch(places)['input_ids'] for each, places in zip(held, firsts) if len(places)]
    np.testing.assert_array_equal([np.asarray(batch.input_ids)[0] for batch in found], np.concatenate(expected))


def test_generated_rows_fit_the_positions_of_the_model(teacher):
  """Whatever those of the configuration are. Mutations: compare with `config.encoder`; only where a model is named."""
  longer, labels = dataclasses.replace(SMALL, max_positions=32), {'width_loss': 'labels', 'stages': ('width',)}
  with pytest.raises(ConfigError, match=r'data\.seq_len: 17 is more than the 16 positions of the encoder; lower it'):
    build_job(config_of('', labels, data=DataConfig(seq_len=17)))
  config = config_of(teacher, encoder=longer, data=DataConfig(seq_len=17))
  with pytest.raises(ConfigError, match=r'data\.seq_len: 17 is more than the 16 positions of the teacher; lower it$'):
    build_job(config)


def test_balanced_terms_have_equal_scale(teacher):
  """Mutations: the inverse of the ratio; forget the given weight."""
  adapt = {'stages': ('depth',), 'depth_hidden_weight': 2.0, 'balance_batches': 2}
  given = build_job(config_of(teacher, adapt))
  job = build_job(config_of(teacher, {**adapt, 'balance': 'auto'}))
  outputs, other = terms(given.task, given.task.init(jax.random.key(0)), [given.batches.batch(i) for i in range(2)])
  assert job.task.model['term_weight'] == pytest.approx(2.0 * outputs / other, rel=6e-3)
  assert 'term_weight' not in given.task.model


def test_the_published_weight_of_widths_makes_balanced_terms_equal(teacher, monkeypatch):
  """It is one of terms that are not balanced. Mutations: a tenth all the same; ignore another that is given."""
  monkeypatch.setattr(adapt_module, 'terms', lambda *args: (2.0, 4.0))
  adapt = {'stages': ('width',), 'balance': 'auto', 'rewire': False}
  for given, expected in (({}, 0.5), ({'hidden_weight': 0.2}, 0.1)):
    assert build_job(config_of(teacher, {**adapt, **given})).task.model['term_weight'] == expected


def test_bad_input_is_refused_before_anything_is_computed(teacher, tmp_path):
  """Mutations: look at the teacher only; take a random teacher on trust, in any first stage."""
  for changes, message in (
    ({'adapt': {'widths': (0.1, 1.0)}}, r'config.adapt.widths: 0.1 of 2 heads is none'),
    ({'adapt': {'depths': (0.4, 1.0)}}, r'config.adapt.depths: 0.4 of 1 layers is none'),
    (
      {'adapt': {'widths': (0.5, 0.6, 1.0)}},
      r'config.adapt.widths: 0.6x1 and 0.5x1 are the same network \(1 heads, 1 layers\); leave one out',
    ),
    ({'adapt': {'depths': (0.75, 1.0)}}, 'config.adapt.depths: 1x1 and 1x0.75 are the same network'),
    ({'adapt': {'hidden_sizes': (8, 32), 'widths': (1.0,)}}, 'must end with 16, the hidden size'),
    ({'teacher': ''}, 'config.teacher: the stage of widths distils from a fine-tuned model'),
    ({'finetune': FinetuneConfig(benchmark='squad1')}, 'config.finetune.benchmark: squad1'),
    ({'adapt': {'augmented': 'x.tsv'}}, 'config.adapt.augmented'),
    ({'data': DataConfig(train='x.tsv', seq_len=16), 'teacher': ''}, 'config.teacher: name the fine-tuned model'),
    ({'encoder': dataclasses.replace(SMALL, vocab_size=70)}, 'config.encoder.vocab_size: generated rows have 70'),
  ):
    adapt = {'stages': ('width',), **changes.pop('adapt', {})}
    with pytest.raises(ConfigError, match=message):
      build_job(config_of(**{'teacher': teacher, 'adapt': adapt, **changes}))
  with pytest.raises(ConfigError, match=r'ascending shares in \(0, 1\]'):
    AdaptConfig(depths=(0.5, 1.0, 1.5))
  encoder = load_model(str(teacher)).params['encoder']
  head = {'kernel': np.zeros((16, 2), np.float32), 'bias': np.zeros(2, np.float32)}
  for name, params in (('bare', {}), ('fresh', {'classifier': head})):
    save_pretrained(Bundle(SMALL, {'encoder': encoder, **params}), tmp_path / name)
  with pytest.raises(ConfigError, match='config.teacher: this model has no classifier; fine-tune it'):
    build_job(config_of(tmp_path / 'bare'))
  for stage, field in (('width', 'teacher'), ('depth', 'teacher'), ('depth', 'model')):
    with pytest.raises(ConfigError, match=rf'config.{field}: the head of .*fresh predicts .* not fine-tuned for this'):
      build_job(config_of(adapt={'stages': (stage,)}, **{field: str(tmp_path / 'fresh')}))
  build_job(config_of(tmp_path / 'fresh', {'stages': ('width', 'depth')}))
  save_pretrained(
    Bundle(SMALL, {'encoder': encoder, 'classifier': {'kernel': head['kernel'][:, :1], 'bias': head['bias'][:1]}}),
    tmp_path / 'score',
  )
  with pytest.raises(ConfigError, match=r'config.teacher: its head has 1 output\(s\), the task needs 2'):
    build_job(config_of(teacher=str(tmp_path / 'score'), adapt={'stages': ('width',), 'width_loss': 'labels'}))


def test_what_no_stage_reads_is_refused(teacher, tmp_path):
  """Before anything is trained. Mutations: look at the last stage; refuse the teacher of all stages."""
  for stages, width_loss, field in (
    (('depth',), 'distil', 'teacher'),
    (('depth', 'final'), 'distil', 'teacher'),
    (('width',), 'labels', 'teacher'),
    (('final',), 'distil', 'adapt.augmented'),
  ):
    named = teacher if field == 'teacher' else ''
    adapt = {'stages': stages, 'width_loss': width_loss, 'augmented': '' if named else 'x.tsv'}
    with pytest.raises(ConfigError, match=f'config.{field}: .* would not be read'):
      run_train(config_of(named, adapt, model=str(teacher)), str(tmp_path / 'run'))
  assert not (tmp_path / 'run').exists()
  with pytest.raises(ConfigError, match='config.adapt.augmented: x.tsv would not be read'):
    build_job(config_of(adapt={'stages': (), 'base': 'mlm', 'augmented': 'x.tsv'}))


def test_other_stages_are_refused_before_one_is_trained(whole, teacher, monkeypatch):
  """Mutation: let the last stage's run directory notice."""
  monkeypatch.setattr(stages_module, 'train', None)
  with pytest.raises(ConfigError, match=r"was begun with 'width,depth,final', now 'width,depth'; to go on from it"):
    run_train(config_of(teacher=str(teacher), adapt={'stages': ('width', 'depth')}), str(whole[1]))


def test_augmented_rows_are_trained_on_until_the_last_stage(tmp_path):
  """Labels by their names, whatever their order in the file; of a benchmark as its files write them.

  Mutations: augmented rows in every stage; number the labels anew.
  """
  files = write_files(tmp_path, dataclasses.replace(SMALL, vocab_size=VOCAB))
  bundle = from_pretrained(files / 'model')
  head = {'kernel': np.zeros((16, 2), np.float32), 'bias': np.zeros(2, np.float32)}
  tuned = dataclasses.replace(bundle, params={**bundle.params, 'classifier': head}, labels=('no', 'yes'))
  save_pretrained(tuned, files / 'tuned')
  (files / 'aug.tsv').write_text('label\ttext\n' + 'yes\tcold river\n' * 3)
  data = DataConfig(train=str(files / 'train.tsv'), dev=str(files / 'dev.tsv'), seq_len=12)
  augmented = {'augmented': str(files / 'aug.tsv'), 'rewire': False, 'balance_batches': 1}
  jobs = {
    stages[-1]: build_job(config_of(files / 'tuned', {**augmented, 'stages': stages}, data=data, steps=0, epochs=8.0))
    for stages in (('width', 'depth'), ('final',))
  }
  assert [job.total_steps for job in jobs.values()] == [2, 40]
  assert set(np.asarray(jobs['depth'].batches.batch(0).labels)) == {1}
  assert jobs['depth'].identity['data'] != jobs['final'].identity['data']
  assert jobs['depth'].files.keys() == jobs['final'].files.keys() and len(jobs['depth'].evals) == 1
  (files / 'aug.tsv').write_text('label\ttext\nmaybe\tcold river\n')
  with pytest.raises(ConfigError, match="aug.tsv has the label 'maybe'; the task has no, yes"):
    build_job(config_of(files / 'tuned', {**augmented, 'stages': ('width', 'depth')}, data=data))
  (files / 'glue' / 'RTE').mkdir(parents=True)
  for name in ('train', 'dev'):
    (files / 'glue' / 'RTE' / f'{name}.tsv').write_text(
      'index\tsentence1\tsentence2\tlabel\n0\tcold river\twarm tree\tentailment\n1\ta\tb\tnot_entailment\n'
    )
  (files / 'aug.tsv').write_text('sentence1\tsentence2\tlabel\n' + 'cold river\twarm tree\tnot_entailment\n' * 16)
  save_pretrained(dataclasses.replace(tuned, labels=('entailment', 'not_entailment')), files / 'rte')
  job = build_job(
    config_of(
      files / 'rte', {**augmented, 'stages': ('width', 'depth')}, data=DataConfig(path=str(files / 'glue'), seq_len=12),
      finetune=FinetuneConfig(benchmark='rte'),
    )
  )  # fmt: skip
  batch = job.batches.batch(0)
  assert set(np.asarray(batch.labels)) == {1} and np.asarray(batch.token_type_ids).max() == 1


def test_the_objectives_of_pre_training(tmp_path):
  """Cells of a masked model are compared by their loss, and load. Mutation: the highest loss is the best."""
  adapt = {'base': 'mlm', 'widths': (1.0,), 'depths': (1.0,), 'hidden_sizes': (8, 16), 'combine': 'mean'}
  results = run_train(config_of('', adapt, steps=2, eval_every=1), str(tmp_path))
  full, small = results['grid']
  assert (full['hidden'], small['hidden']) == (16, 8) and full['metrics'] == results['metrics']
  losses = [row['eval_loss'] for row in read_metrics(tmp_path) if 'eval_loss' in row] + [full['metrics']['loss']]
  assert results['best']['1x1-h16']['value'] == min(losses)
  cell = from_pretrained(tmp_path / 'best' / 'cells' / '0.5x1-h8')
  assert (cell.config.hidden_size, cell.config.num_heads, cell.config.embedding_size) == (8, 1, 8)
  assert 'mlm_head' in cell.params


def test_relations_over_tokens_do_not_add_up_over_parts_of_a_batch():
  """Mutation: drop the check of `adapt_job`."""
  config = tiny_config('adapt', adapt=AdaptConfig(term='relations'), optimizer=OptimizerConfig(accumulate=2))
  with pytest.raises(ConfigError, match="config.distill.normalize: .* set it to 'examples'"):
    build_job(config)
