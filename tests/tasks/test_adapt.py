"""DynaBERT's stages: parity with a PyTorch BERT that is sliced by hand, options, teachers, evaluation, refusals."""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny import STILL

from compactlm_jax.compress.subnet import subnet, subnet_config
from compactlm_jax.config import AdaptConfig, Cell, DistillConfig, FinetuneConfig
from compactlm_jax.data.batches import Batches
from compactlm_jax.data.synthetic import synthetic_table
from compactlm_jax.errors import ConfigError
from compactlm_jax.losses.minilm import relation_loss
from compactlm_jax.nn.encoder import encode
from compactlm_jax.tasks.adapt import make_adapt_task, terms
from compactlm_jax.tasks.finetune import make_finetune_task
from compactlm_jax.tree import map_named

ENCODER = dataclasses.replace(STILL, num_layers=4, num_heads=4, head_size=4)
PLAIN = FinetuneConfig(dropout=0.0)
SMALL = AdaptConfig(widths=(0.5, 1.0), depths=(0.5, 1.0))
DEEP = AdaptConfig(widths=(1.0,), depths=(0.5, 1.0))
ROWS = synthetic_table(rows=32, seq_len=16, vocab_size=64)
_FIRST = Batches(ROWS, 8, 0).batch(0)
LENGTHS = np.array([16, 9, 3, 12, 16, 5, 7, 10])
MASK = (np.arange(16)[None] < LENGTHS[:, None]).astype(np.int32)
BATCH = dataclasses.replace(_FIRST, attention_mask=MASK, weights=np.ones(8, np.float32))
KEY = jax.random.key(0)
MINILM = DistillConfig(relation_heads=4)


def fine_tuned(seed, encoder=ENCODER, classes=ROWS.classes):
  """Weights whose heads, layers and outputs differ, as training makes them; on the host."""
  shapes = jax.eval_shape(make_finetune_task(encoder, classes, PLAIN).init, KEY)
  rng = np.random.default_rng(seed)
  noise = jax.tree.map(lambda leaf: 0.2 * rng.normal(size=leaf.shape).astype(np.float32), shapes)
  return map_named(lambda name, leaf: leaf + np.float32('norm/scale' in name), noise)


START, TEACHER = fine_tuned(1), fine_tuned(2)


def make(stage, adapt=SMALL, teacher=(TEACHER, ENCODER), distill=MINILM, **fields):
  given = {'encoder': ENCODER, 'classes': ROWS.classes, 'finetune': PLAIN, 'start': START, **fields}
  encoder, classes, finetune = (given.pop(name) for name in ('encoder', 'classes', 'finetune'))
  return make_adapt_task(encoder, classes, finetune, adapt, stage, teacher=teacher, distill=distill, **given)


def value(task, *batches):
  """(loss, metrics), of each batch where some are given."""
  loss = jax.jit(lambda p, f, batch: task.loss(p, f, batch, KEY, jnp.int32(0)))
  found = [loss(task.init(KEY), task.frozen, batch) for batch in batches or (BATCH,)]
  return found if batches else found[0]


def torch_network(torch, tree, width, layers, batch):
  """(hidden states, logits) of leftmost heads and neurons of the given layers, of a BERT written out."""
  f, heads, neurons = torch.nn.functional, round(width * 4), round(width * 4) * 32 // 4
  encoder, kept = tree['encoder'], heads * 4

  def norm(x, p):
    return f.layer_norm(x, x.shape[-1:], p['scale'], p['bias'], 1e-12)

  def split(x):
    return x.reshape(*x.shape[:2], heads, 4).transpose(1, 2)

  tables = encoder['embeddings']
  ids, types = (torch.tensor(np.asarray(x)).long() for x in (batch.input_ids, batch.token_type_ids))
  x = tables['word']['embedding'][ids] + tables['position']['embedding'][: ids.shape[1]]
  hidden = [norm(x + tables['token_type']['embedding'][types], tables['norm'])]
  blocked = torch.tensor(batch.attention_mask)[:, None, None] == 0
  for i in layers:
    p = {name: {n: leaf[i] for n, leaf in part.items()} for name, part in encoder['layers'].items() if 'ffn' in name}
    a = encoder['layers']['attention']
    q, k, v = (
      split(hidden[-1] @ a[name]['kernel'][i][:, :kept] + a[name]['bias'][i][:kept])
      for name in ('query', 'key', 'value')
    )
    scores = (q @ k.transpose(-1, -2) / math.sqrt(4)).masked_fill(blocked, -1e9)
    context = (scores.softmax(-1) @ v).transpose(1, 2).reshape(*ids.shape, kept)
    attended = context @ a['output']['kernel'][i][:kept] + a['output']['bias'][i]
    between = {n: leaf[i] for n, leaf in encoder['layers']['attention_norm'].items()}
    x = norm(hidden[-1] + attended, between)
    inner = f.gelu(x @ p['ffn_in']['kernel'][:, :neurons] + p['ffn_in']['bias'][:neurons])
    hidden.append(norm(x + inner @ p['ffn_out']['kernel'][:neurons] + p['ffn_out']['bias'], p['ffn_norm']))
  return hidden, hidden[-1][:, 0] @ tree['classifier']['kernel'] + tree['classifier']['bias']


def torch_losses(torch, stage, depth_teacher, student, teacher):
  """The original's loop: one backward pass for each cell. Losses in its order, depths from the full one down."""
  f, losses = torch.nn.functional, []
  for depth in (1.0, 0.5) if stage == 'depth' else (1.0,):
    layers = [math.floor(i / depth) for i in range(round(depth * 4))]
    for width in (1.0, 0.5):
      with torch.no_grad():
        own = width if depth_teacher == 'same_width' and stage == 'depth' else 1.0
        states, target = torch_network(torch, teacher, own, range(4), BATCH)
      hidden, logits = torch_network(torch, student, width, layers, BATCH)
      soft = -(target.softmax(-1) * logits.log_softmax(-1)).sum(-1).mean()
      states = [states[i] for i in [*layers, 4]]
      errors = sum(f.mse_loss(mine, theirs) for mine, theirs in zip(hidden, states, strict=True))
      loss = 1.0 * soft + (0.1 if stage == 'width' else 1.0) * errors
      loss.backward()
      losses.append(loss.item())
  return losses


@pytest.mark.torch
@pytest.mark.parametrize('stage,depth_teacher', [('width', 'full'), ('depth', 'same_width')])
def test_losses_and_their_added_gradients_are_those_of_a_sliced_pytorch_bert(stage, depth_teacher):
  """Padding counts among hidden states. Mutation: shift the kept layers of the teacher by one; a cell left out."""
  torch = pytest.importorskip('torch')
  student = jax.tree.map(lambda leaf: torch.tensor(np.asarray(leaf), requires_grad=True), START)
  teacher = jax.tree.map(lambda leaf: torch.tensor(np.asarray(leaf)), TEACHER)
  losses = torch_losses(torch, stage, depth_teacher, student, teacher)
  task = make(stage, dataclasses.replace(SMALL, depth_teacher=depth_teacher))
  gradient = jax.jit(jax.value_and_grad(task.loss, has_aux=True))
  (found, metrics), grads = gradient(task.init(KEY), task.frozen, BATCH, KEY, jnp.int32(0))
  np.testing.assert_allclose(found, sum(losses), rtol=1e-5)
  np.testing.assert_allclose((metrics['loss_full'], metrics['loss_smallest']), (losses[0], losses[-1]), rtol=1e-5)
  wanted = jax.tree.map(lambda leaf: leaf.grad.numpy(), student)
  # The gradient of the key's bias is 0 but for rounding: what counts is the size of the others.
  noise = 1e-6 * max(np.abs(leaf).max() for leaf in jax.tree.leaves(wanted))
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=noise), grads, wanted)


@functools.partial(jax.jit, static_argnums=0)
def forward(config, params, batch):
  """What `encode` returns, of the last layer too, and logits."""
  rows = (batch.input_ids, batch.attention_mask, batch.token_type_ids)
  out = encode(params, config, *rows, all_hidden=True, qkv_layers=(config.num_layers,))
  return out, out.last_BTD[:, 0] @ params['classifier']['kernel'] + params['classifier']['bias'][None]


def soft_loss(teacher, student):
  """Of each row, in NumPy."""
  target = np.exp(teacher - np.logaddexp.reduce(teacher, axis=1, keepdims=True))
  return -(target * (student - np.logaddexp.reduce(student, axis=1, keepdims=True))).sum(1)


def label_loss(logits):
  log_probs = logits - np.logaddexp.reduce(logits, axis=1, keepdims=True)
  return -log_probs[np.arange(len(logits)), BATCH.labels].mean()


def state_loss(teacher, student, mask=None):
  """Of each row, in NumPy."""
  errors = ((np.asarray(teacher) - student) ** 2).mean(-1).sum(0)
  return np.average(errors, axis=1) if mask is None else (errors * mask).sum(1) / mask.sum(1)


def network(params, cell):
  return jax.device_get(forward(subnet_config(ENCODER, cell), subnet(params, ENCODER, cell), BATCH))


def test_options_of_the_hidden_states():
  """Real positions alone, and weights. Mutation: take another weight in 'depth', or count padding."""
  adapt = dataclasses.replace(DEEP, hidden_tokens='real', logit_weight=0.5, depth_hidden_weight=3.0)
  loss, metrics = value(make('depth', adapt))
  target, logits = network(TEACHER, Cell())
  wanted, soft, errors = 0.0, [], []
  for cell, layers in ((Cell(), (0, 1, 2, 3)), (Cell(1.0, 0.5), (0, 2))):
    out, own = network(START, cell)
    soft.append(soft_loss(logits, own).mean())
    errors.append(state_loss(target.hidden_NBTD[np.array([*layers, 4])], out.hidden_NBTD, MASK).mean())
    wanted += 0.5 * soft[-1] + 3.0 * errors[-1]
  np.testing.assert_allclose(loss, wanted, rtol=1e-5)
  np.testing.assert_allclose(metrics['distil_loss'], np.mean(soft), rtol=1e-5)
  np.testing.assert_allclose(metrics['hidden_loss'], np.mean(errors), rtol=1e-5)


def test_relations_are_the_term_and_the_teacher_may_be_of_another_size():
  """Mutation: compare another layer than the last kept one."""
  wide = dataclasses.replace(ENCODER, num_layers=2, num_heads=8, hidden_size=32)
  teacher = fine_tuned(3, wide)
  config = DistillConfig(relations=('qq', 'kk', 'vv'), relation_heads=2)
  task = make('width', dataclasses.replace(SMALL, term='relations', hidden_weight=2.0), (teacher, wide), config)
  loss, metrics = value(task)
  target, logits = jax.device_get(forward(wide, teacher, BATCH))
  soft, relations = [], []
  for width in (1.0, 0.5):
    out, own = network(START, Cell(width))
    parts, weights = jax.jit(lambda t, s: relation_loss(t, s, MASK, config))(target.qkv[0], out.qkv[0])
    relations.append(sum((part * weights).sum() / weights.sum() for part in parts.values()))
    soft.append(soft_loss(logits, own).mean())
  np.testing.assert_allclose(metrics['relation_loss'], np.mean(relations), rtol=1e-4)
  np.testing.assert_allclose(loss, np.sum(soft) + 2.0 * np.sum(relations), rtol=1e-4)


def test_labels_teach_the_last_stage_and_if_asked_for_the_first():
  """Mutation: distil in the stage 'final'."""
  full, narrow, shallow = (label_loss(network(START, cell)[1]) for cell in (Cell(), Cell(0.5), Cell(1.0, 0.5)))
  loss, metrics = value(make('width', dataclasses.replace(SMALL, width_loss='labels'), None))
  np.testing.assert_allclose(loss, full + narrow, rtol=1e-5)
  assert 'hidden_loss' not in metrics and make('width', dataclasses.replace(SMALL, width_loss='labels')).frozen is None
  loss, metrics = value(make('final', DEEP, None))
  np.testing.assert_allclose(loss, full + shallow, rtol=1e-5)
  np.testing.assert_allclose(metrics['task_loss'], (full + shallow) / 2, rtol=1e-5)
  final = make('final')
  assert final.model['cells'] == ['1x1', '0.5x1', '1x0.5', '0.5x0.5'] and final.model['stage'] == 'final'


@pytest.mark.parametrize('score_logits', ['mse', 'none'])
def test_scores_are_taught_or_not_and_keep_their_units(score_logits):
  """Mutation: forget that the head that is started from answers in units of the labels."""
  start, teacher = fine_tuned(4, classes=()), fine_tuned(5, classes=())
  finetune = dataclasses.replace(PLAIN, score_scale=5.0)
  fields = {'start': start, 'teacher': (teacher, ENCODER), 'classes': (), 'finetune': finetune}
  task = make('width', dataclasses.replace(SMALL, score_logits=score_logits, widths=(1.0,)), **fields)
  batch = dataclasses.replace(BATCH, labels=np.linspace(0, 5, 8).astype(np.float32))
  ((loss, metrics),) = value(task, batch)
  (out, mine), (target, theirs) = (network(p, Cell()) for p in (start, teacher))
  error = np.mean((np.asarray(mine - theirs) / 5) ** 2) if score_logits == 'mse' else 0.0
  states = state_loss(target.hidden_NBTD, out.hidden_NBTD).mean()
  np.testing.assert_allclose(loss, error + 0.1 * states, rtol=1e-4)
  assert ('distil_loss' in metrics) == (score_logits == 'mse') and 'accuracy' not in metrics
  found = jax.jit(task.evaluate)(task.init(KEY), task.frozen, batch)
  np.testing.assert_allclose(found['outputs'], mine, rtol=1e-4, atol=1e-5)
  wanted = np.mean((np.asarray(mine)[:, 0] - batch.labels) ** 2) / 25
  np.testing.assert_allclose(found['loss'][0] / found['loss'][1], wanted, rtol=1e-4)


def test_evaluation_gives_the_outputs_of_every_cell():
  """Of a stage of widths, those at full depth. Mutation: slice no layer."""
  found = jax.jit(make('final').evaluate)(START, None, BATCH)
  for cell in (Cell(), Cell(0.5), Cell(1.0, 0.5), Cell(0.5, 0.5)):
    np.testing.assert_allclose(found[f'outputs@{cell.name}'], network(START, cell)[1], rtol=1e-4, atol=1e-5)
  np.testing.assert_array_equal(found['outputs'], found['outputs@1x1'])
  np.testing.assert_array_equal(found['labels'], BATCH.labels)
  unlabelled = dataclasses.replace(BATCH, labels=None)
  assert set(jax.eval_shape(make('width').evaluate, START, None, unlabelled)) == {
    'outputs',
    'outputs@1x1',
    'outputs@0.5x1',
  }


def test_a_sandwich_with_teachers_of_its_own_width():
  """A cell that is not in every step runs its teacher itself. Mutation: give it the full one."""
  adapt = AdaptConfig(widths=(0.25, 0.5, 1.0), depths=(1.0,), depth_teacher='same_width', sampling='sandwich')
  found, metrics = value(make('depth', adapt))
  losses = []
  for cell in (Cell(), Cell(0.5), Cell(0.25)):
    (target, logits), (out, own) = network(TEACHER, cell), network(START, cell)
    states = state_loss(target.hidden_NBTD, out.hidden_NBTD)
    losses.append(float((soft_loss(logits, own) + states).mean()))
  np.testing.assert_allclose(found, sum(losses), rtol=1e-5)
  np.testing.assert_allclose((metrics['loss_full'], metrics['loss_smallest']), (losses[0], losses[2]), rtol=1e-5)


def test_terms_are_measured_without_their_weights():
  """And a weight that is given replaces the configuration's. Mutation: weigh the terms."""
  batches = [BATCH, dataclasses.replace(BATCH, input_ids=np.asarray(BATCH.input_ids)[::-1].copy())]
  task = make('width', dataclasses.replace(SMALL, logit_weight=7.0, widths=(1.0,)), term_weight=3.0)
  each = value(task, *batches)
  wanted = [np.mean([float(metrics[name]) for _, metrics in each]) for name in ('distil_loss', 'hidden_loss')]
  np.testing.assert_allclose(terms(task, task.init(KEY), batches), wanted, rtol=1e-5)
  loss, metrics = each[0]
  np.testing.assert_allclose(loss, 7 * metrics['distil_loss'] + 3 * metrics['hidden_loss'], rtol=1e-5)
  with pytest.raises(ConfigError, match="config.adapt.balance: 'auto' compares"):
    terms(make('final'), START, batches)


def test_what_does_not_fit_is_refused():
  """Before anything is computed."""
  shallow, narrow = dataclasses.replace(ENCODER, num_layers=3), dataclasses.replace(ENCODER, hidden_size=8)
  bare, three = {'encoder': TEACHER['encoder']}, {'classes': ('a', 'b', 'c')}
  relations = {'adapt': dataclasses.replace(SMALL, term='relations'), 'distill': DistillConfig()}
  for message, fields in (
    ("config.adapt.stages: 'all'", {'stage': 'all'}),
    ("config.teacher: the stage 'depth' learns from a fine-tuned model", {'stage': 'depth', 'teacher': None}),
    ('config.teacher: this model has no classifier; fine-tune it', {'teacher': (bare, ENCODER)}),
    ('config.teacher: its head has 2 output', {**three, 'start': fine_tuned(1, classes=('a', 'b', 'c'))}),
    ('config.model: this model has no classifier; fine-tune it', {'start': bare}),
    (r'config.model: its head has 2 output\(s\), the task needs 3', three),
    ('config.teacher: it has 3 layers and the network 4', {'teacher': (TEACHER, shallow)}),
    ('config.teacher: its hidden states have 8 channels', {'teacher': (TEACHER, narrow)}),
    ('config.adapt.widths: 0.1 of 4 heads is none', {'adapt': dataclasses.replace(SMALL, widths=(0.1, 1.0))}),
    ('config.distill.relation_heads', relations),
    ('config.finetune.keep_layers', {'finetune': dataclasses.replace(PLAIN, keep_layers=(1, 2))}),
    ('config.finetune.pooled', {'encoder': dataclasses.replace(ENCODER, pooler=True)}),
  ):  # fmt: skip
    with pytest.raises(ConfigError, match=message):
      make(**{'stage': 'width', **fields})
