"""Whole pruning runs beside an independent PyTorch version of the published semantics (papers.md, section 4).

Written from the description of emmental/modules/{binarizer,masked_nn}.py and masked_run_glue.py of
huggingface/transformers `research_projects/movement-pruning`: sorted scores, autograd functions, torch.optim.AdamW;
RPP from Guo et al. 2019, section 3.
"""

import dataclasses

import jax
import numpy as np
import pytest
from tiny import STILL

from compactlm_jax.config import FinetuneConfig, OptimizerConfig, PruneConfig
from compactlm_jax.nn.encoder import init_encoder
from compactlm_jax.ops.dropout import site_words
from compactlm_jax.ops.masks import uniform_noise
from compactlm_jax.tasks.finetune import make_finetune_task
from compactlm_jax.tasks.prune import make_prune_task
from compactlm_jax.train.optimizer import learning_rate_schedule, make_optimizer
from compactlm_jax.train.step import make_train_step
from compactlm_jax.tree import named_leaves
from compactlm_jax.types import Batch, TrainState

torch = pytest.importorskip('torch')
pytestmark = pytest.mark.torch
torch.set_num_threads(1)

STEPS, WARMUP, ROWS, LENGTH, SEED = 30, 4, 8, 12, 5
# Wide weights give gradients far above float32's noise, and a large epsilon keeps Adam from dividing noise by noise.
ENCODER = dataclasses.replace(STILL, initializer_range=0.2)
OPTIMIZER = OptimizerConfig(learning_rate=2e-3, warmup_steps=WARMUP, weight_decay=0.01, epsilon=1e-3)
MATRICES = ('attention/query', 'attention/key', 'attention/value', 'attention/output', 'ffn_in', 'ffn_out')
KERNELS = tuple(f'encoder/layers/{name}/kernel' for name in MATRICES)
SCORED = {'scores_init': 'uniform', 'scores_scale': 0.02, 'scores_learning_rate': 2e-2}
SOFT = {'method': 'soft_movement', 'regularization': 5.0, **SCORED}
METHODS = {
  'hard, local': {'method': 'hard_movement', **SCORED},
  'hard, global, threshold of 5 steps': {'method': 'hard_movement', 'scope': 'global', 'threshold_every': 5, **SCORED},
  'soft, sigmoid': {**SOFT, 'threshold': 0.45, 'first_step': 1},
  'soft, floor': {**SOFT, 'threshold': 0.9, 'floor': 0.05, 'penalty': 'sum', 'regularization': 1e-3},
  'soft, scores': {**SOFT, 'threshold': 0.02, 'threshold_on': 'scores', 'initial_threshold': -0.1},
  'magnitude': {'method': 'magnitude', 'freeze_embeddings': False},
  'l0': {'method': 'l0', 'regularization': 3.0, **SCORED, 'scores_scale': 0.3, 'scores_learning_rate': 0.2},
  'post hoc': {'method': 'post_hoc_magnitude'},
  'random': {'method': 'random'},
  'rpp': {'method': 'rpp', 'regularization': 0.3},
}
TAUGHT = ('hard, local', 'soft, sigmoid', 'l0')


def batches():
  random = np.random.default_rng(0)
  for _ in range(STEPS):
    ids = random.integers(5, ENCODER.vocab_size, (ROWS, LENGTH))
    mask = (np.arange(LENGTH)[None] < random.integers(4, LENGTH + 1, (ROWS, 1))).astype(np.int32)
    labels = (ids[:, 1:4].sum(1) % 2).astype(np.int32)
    yield Batch(ids.astype(np.int32), mask, random.integers(0, 2, (ROWS, LENGTH)).astype(np.int32), labels)


def ours(config, finetune, teacher):
  """Per step: state before, metrics, weights that were read; and the task and the last state."""
  base = make_finetune_task(ENCODER, ('no', 'yes'), finetune, teacher=teacher)
  schedule = learning_rate_schedule(OPTIMIZER, STEPS)
  task = make_prune_task(base, ENCODER, config, total_steps=STEPS, warmup=WARMUP, learning_rate=schedule)
  tx = make_optimizer(OPTIMIZER, STEPS, task.trainable, task.groups)
  params = jax.jit(task.init)(jax.random.key(SEED))
  state = TrainState(np.int32(0), params, jax.jit(tx.init)(params))
  train_step = make_train_step(task, tx, SEED)

  @jax.jit
  def step(state, frozen, batch):
    key = jax.random.fold_in(jax.random.fold_in(jax.random.key(SEED), state.step), 2**31 - 1)
    return train_step(state, frozen, batch), task.view(state.params, key, state.step, lambda tree: tree)[0]

  record = []
  for batch in batches():
    (after, metrics), read = step(state, task.frozen, batch)
    record.append((state, after, metrics, named_leaves(read)))
    state = after
  return task, record, state


def key_of(step):
  return jax.random.fold_in(jax.random.key(SEED), step)


class Straight(torch.autograd.Function):
  """A mask whose gradient goes to the scores as it is."""

  @staticmethod
  def forward(ctx, scores, mask):
    return mask.clone()

  @staticmethod
  def backward(ctx, grad):
    return grad, None


class Reference:
  """A BERT classifier in PyTorch with masked matrices, and its training loop."""

  def __init__(self, params, config, finetune, teacher):
    self.config, self.finetune, self.teacher = config, finetune, teacher
    self.p = {name: torch.tensor(np.array(leaf)) for name, leaf in named_leaves(params).items()}
    self.p = {name: leaf for name, leaf in self.p.items() if not name.startswith('control/')}
    trained, memory = {}, config.method in ('hard_movement', 'soft_movement', 'l0')
    for name, leaf in self.p.items():
      own = name.startswith('scores/')
      frozen = name.startswith('encoder/embeddings') and config.freeze_embeddings
      if (own and memory) or not (own or frozen):
        trained[name] = leaf.requires_grad_()
    plain = ('bias', 'scale')
    rated = {
      'scores': ([n for n in trained if n.startswith('scores/')], config.scores_learning_rate, 0.0),
      'decayed': ([n for n in trained if not n.startswith('scores/') and not n.endswith(plain)], 2e-3, 0.01),
      'others': ([n for n in trained if not n.startswith('scores/') and n.endswith(plain)], 2e-3, 0.0),
    }
    groups = [{'params': [trained[n] for n in ns], 'lr': lr, 'weight_decay': wd} for ns, lr, wd in rated.values() if ns]
    self.trained, self.threshold = trained, None
    self.adam = torch.optim.AdamW(groups, eps=1e-3, betas=(0.9, 0.999))
    self.rate = torch.optim.lr_scheduler.LambdaLR(
      self.adam, lambda t: t / WARMUP if t < WARMUP else (STEPS - t) / (STEPS - WARMUP)
    )

  def schedule(self, step, first, last):
    """The cubic schedule, and the weight of the penalty that follows it."""
    c = self.config
    if step <= c.initial_warmup * WARMUP:
      return first
    if step > STEPS - c.final_warmup * WARMUP:
      return last
    done = (step - c.initial_warmup * WARMUP) / (STEPS - (c.initial_warmup + c.final_warmup) * WARMUP)
    return last + (first - last) * (1 - done) ** 3

  def masks(self, step, training=True):
    """Kernel name -> [a mask per layer]; and the threshold."""
    c = self.config
    number = step + c.first_step if training else 10**9
    density = self.schedule(number, c.initial_density, c.density)
    tau = self.schedule(number, c.initial_threshold, c.threshold)
    if c.method == 'post_hoc_magnitude' and training:
      return {}, None
    if c.method == 'rpp':  # its zeros are in the weights, whose gradients are whole
      return {} if training else {name: (self.p[name] != 0).float() for name in KERNELS}, None
    if c.threshold_every > 1:
      tau = self.global_tau(number, density, training)
    found = {}
    for index, name in enumerate(sorted(KERNELS)):
      values = self.p[name if 'magnitude' in c.method else f'scores/{name}']
      if c.method == 'l0':
        found[name] = self.gate(values, noise(step, index, values.shape) if training else None)
      elif c.method == 'soft_movement' or c.threshold_every > 1:
        found[name] = torch.stack([self.above(v, tau) for v in values])
      else:
        ranked = values.detach().abs() if 'magnitude' in c.method else values.detach()
        found[name] = torch.stack([self.top(v, density) for v in ranked])
      if c.method in ('hard_movement', 'soft_movement'):
        found[name] = Straight.apply(values, found[name])
    return found, tau

  def global_tau(self, number, density, training):
    if density == 1:
      return -100.0
    if self.threshold is None or number % self.config.threshold_every == 0 or not training:
      every = torch.cat([self.p[f'scores/{name}'].detach().flatten() for name in KERNELS])
      k = max(len(every) - (int(len(every) * density) + 1), 1)
      found = every.kthvalue(k).values.item()
      if not training:
        return found
      self.threshold = found
    return self.threshold

  @staticmethod
  def top(values, density):
    order = values.flatten().sort(descending=True, stable=True).indices
    mask = torch.zeros(values.numel())
    mask[order[: int(density * values.numel())]] = 1
    return mask.reshape(values.shape)

  def above(self, scores, tau):
    scores, c = scores.detach(), self.config
    sigmoid = c.method == 'soft_movement' and c.threshold_on == 'sigmoid'
    mask = (torch.sigmoid(scores) if sigmoid else scores) > tau
    least = int(c.floor * scores.numel()) + 1
    if mask.sum() < least:
      mask = scores > scores.flatten().kthvalue(max(scores.numel() - least, 1)).values
    return mask.float()

  @staticmethod
  def gate(scores, u):
    s = torch.sigmoid(scores if u is None else (u.log() - (1 - u).log() + scores) / (2 / 3))
    return (s * 1.2 - 0.1).clamp(0, 1)

  def logits(self, masks, batch, params=None):
    p = dict(params or self.p)
    p |= {name: p[name] * mask for name, mask in masks.items()}
    ids, mask, types = (
      torch.tensor(np.array(x)).long() for x in (batch.input_ids, batch.attention_mask, batch.token_type_ids)
    )
    table = 'encoder/embeddings/'
    x = (
      p[table + 'word/embedding'][ids]
      + p[table + 'position/embedding'][:LENGTH]
      + p[table + 'token_type/embedding'][types]
    )
    x = norm(x, p[table + 'norm/scale'], p[table + 'norm/bias'])
    for n in range(ENCODER.num_layers):
      layer = {k.removeprefix('encoder/layers/'): v[n] for k, v in p.items() if k.startswith('encoder/layers/')}

      def linear(x, name, layer=layer):
        return x @ layer[f'{name}/kernel'] + layer[f'{name}/bias']

      def heads(name, x=x, linear=linear):
        return linear(x, name).reshape(ROWS, LENGTH, ENCODER.num_heads, -1).transpose(1, 2)

      q, k, v = (heads(f'attention/{name}') for name in ('query', 'key', 'value'))
      scores = q @ k.transpose(2, 3) / q.shape[-1] ** 0.5 + (1 - mask[:, None, None].float()) * -1e9
      context = (scores.softmax(-1) @ v).transpose(1, 2).reshape(ROWS, LENGTH, -1)
      x = norm(x + linear(context, 'attention/output'), *(layer[f'attention_norm/{k}'] for k in ('scale', 'bias')))
      inner = torch.nn.functional.gelu(linear(x, 'ffn_in'))
      x = norm(x + linear(inner, 'ffn_out'), *(layer[f'ffn_norm/{k}'] for k in ('scale', 'bias')))
    return x[:, 0] @ p['classifier/kernel'] + p['classifier/bias']

  def penalty(self):
    shift = {'soft_movement': 0.0, 'l0': -2 / 3 * np.log(0.1 / 1.1)}.get(self.config.method)
    if shift is None:
      return 0.0
    parts = [torch.sigmoid(m + shift) for name in KERNELS for m in self.p[f'scores/{name}']]
    if self.config.penalty == 'sum':
      return sum(part.sum() for part in parts)
    return sum(part.mean() for part in parts) / len(parts)

  def step(self, index, batch):
    """One update: (masks, threshold, lambda, penalty, loss, clipped gradients)."""
    f, c = self.finetune, self.config
    masks, tau = self.masks(index)
    logits = self.logits(masks, batch)
    loss = torch.nn.functional.cross_entropy(logits, torch.tensor(np.array(batch.labels)).long())
    if self.teacher is not None:
      with torch.no_grad():
        wanted = self.logits({}, batch, self.teacher)
      t = f.temperature
      soft = torch.nn.functional.kl_div(
        (logits / t).log_softmax(-1), (wanted / t).softmax(-1), reduction='batchmean'
      ) * t * t  # fmt: skip
      loss = f.ce_weight * loss + f.distil_weight * soft
    weight = c.regularization
    if c.method == 'soft_movement':
      weight *= tau / c.threshold
    penalty = self.penalty()
    task_loss = loss
    loss = loss + weight * penalty
    self.adam.zero_grad()
    loss.backward()
    torch.nn.utils.clip_grad_norm_(self.trained.values(), 1.0)
    grads = {name: leaf.grad.clone().numpy() for name, leaf in self.trained.items()}
    if c.method == 'rpp':
      masks = self.masks(index, training=False)[0]
    old, rate = {name: self.p[name].detach().clone() for name in KERNELS}, self.adam.param_groups[-1]['lr']
    self.adam.step()
    if c.method == 'rpp':
      self.shrink(old, rate)
    self.rate.step()
    return (
      {n: m.detach().numpy() for n, m in masks.items()},
      tau,
      weight,
      float((loss - task_loss).detach()),
      float(loss.detach()),
      grads,
    )

  @torch.no_grad()
  def shrink(self, old, rate):
    """The proximal step of the reweighted l1 norm, whose weights are made from what was there before the update."""
    for name, before in old.items():
      least = rate * self.config.regularization / (before.abs() + self.config.rpp_epsilon)
      leaf = self.p[name]
      leaf.copy_(leaf.sign() * torch.relu(leaf.abs() - least))


def norm(x, scale, bias):
  return torch.nn.functional.layer_norm(x, x.shape[-1:], scale, bias, ENCODER.layer_norm_epsilon)


def noise(step, index, shape):
  """What the gates of the leaf draw at a step."""
  key = jax.random.fold_in(jax.random.fold_in(key_of(step), 2**31 - 1), index)
  return torch.tensor(np.array(uniform_noise(site_words(key, 0), tuple(shape))))


def gradients(before, after):
  """Clipped gradients of the update between two states, from Adam's first moments."""
  old, new = (named_leaves(s.opt_state) for s in (before, after))
  found = {name.partition('/mu/')[2]: (new[name] - 0.9 * old[name]) / 0.1 for name in new if '/mu/' in name}
  return {name: np.asarray(leaf) for name, leaf in found.items()}


def teacher_of():
  params = init_encoder(ENCODER, jax.random.key(9))
  head = {'kernel': jax.random.normal(jax.random.key(1), (16, 2)), 'bias': np.zeros(2, np.float32)}
  return {'encoder': params['encoder'], 'classifier': head}


# Compiling takes most of the time: what a taught run covers, and forms of one mask, run with -m slow.
LONGER = (*TAUGHT, 'soft, scores', 'post hoc', 'random')
CASES = [
  *(pytest.param(name, False, id=name, marks=[pytest.mark.slow] if name in LONGER else []) for name in METHODS),
  *(pytest.param(name, True, id=f'{name}, taught') for name in TAUGHT),
]


@pytest.mark.parametrize(('name', 'taught'), CASES)
def test_a_whole_run_equals_the_published_one(name, taught):
  """Masks, threshold, lambda, penalty, loss and gradients of every step, final weights, evaluation at mid-training.

  Mutations: |S| in place of S; a factor sigma'(S) in the gradient of scores; g * M * W for it; lambda that does not
  follow tau; evaluation at the threshold of the step; gates divided by b in evaluation; decay of scores; a norm for
  each group; the threshold found anew every 4 steps; RPP's weights from what the update left, or the rate of the next
  step.
  """
  config = PruneConfig(**{'density': 0.15, 'initial_warmup': 1.0, 'final_warmup': 1.5, **METHODS[name]})
  finetune = FinetuneConfig(dropout=0.0, ce_weight=0.1, distil_weight=0.9)
  teacher = teacher_of() if taught else None
  task, record, last = ours(config, finetune, (teacher, ENCODER) if taught else None)
  frozen = {n: torch.tensor(np.array(leaf)) for n, leaf in named_leaves(teacher).items()} if taught else None
  reference = Reference(record[0][0].params, config, finetune, frozen)

  @jax.jit
  def evaluated(params, batch):
    finished = task.finished(params)
    return finished, task.evaluate(finished, None, batch)['outputs']

  for index, (batch, (before, after, metrics, read)) in enumerate(zip(batches(), record)):
    if index == STEPS // 2:
      check_evaluation(evaluated, reference, before.params, batch)
    masks, tau, weight, penalty, loss, grads = reference.step(index, batch)
    np.testing.assert_allclose(metrics['loss'], loss, rtol=2e-5, err_msg=f'step {index}')
    weights = named_leaves(before.params)
    for kernel, mask in masks.items():
      np.testing.assert_allclose(read[kernel], weights[kernel] * mask, atol=2e-5, err_msg=f'{kernel}, step {index}')
      if config.method not in ('l0', 'soft_movement'):
        assert int((read[kernel] != 0).sum()) == int(mask.sum())
    if config.method == 'soft_movement':
      np.testing.assert_allclose(metrics['threshold'], tau, rtol=1e-6)
    if config.regularization:
      np.testing.assert_allclose(metrics['regularization'], weight, rtol=1e-6)
    if config.penalised and config.method != 'rpp':
      np.testing.assert_allclose(metrics['penalty'], penalty, rtol=1e-5)
    if masks:
      if config.method == 'l0':  # what evaluation would keep, not what was drawn
        scores = named_leaves(before.params['scores'])
        masks = {name: reference.gate(torch.tensor(np.array(leaf)), None).numpy() for name, leaf in scores.items()}
      density = np.mean(np.concatenate([m.ravel() for m in masks.values()]) != 0)
      np.testing.assert_allclose(metrics['density'], density, atol=1e-6)
    found = gradients(before, after)
    assert set(found) == set(grads)
    for leaf, grad in grads.items():
      np.testing.assert_allclose(found[leaf], grad, atol=2e-6, rtol=1e-3, err_msg=f'{leaf}, step {index}')
  for leaf, array in reference.p.items():
    np.testing.assert_allclose(named_leaves(last.params)[leaf], array.detach(), atol=2e-5, err_msg=leaf)
  check_evaluation(evaluated, reference, last.params, batch)


def check_evaluation(evaluated, reference, params, batch):
  """Finished weights have the masks of the end of the schedule, whatever the step."""
  with torch.no_grad():
    masks, _ = reference.masks(0, training=False)
    expected = reference.logits(masks, batch)
  finished, outputs = evaluated(params, batch)
  assert set(finished) == {'encoder', 'classifier'}
  np.testing.assert_allclose(outputs, expected, atol=2e-4)
  for kernel, mask in masks.items():
    np.testing.assert_allclose(named_leaves(finished)[kernel] != 0, mask.numpy() != 0)
