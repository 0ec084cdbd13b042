"""Importance of heads and neurons: against loops, against derivatives by real masks, and the sums over batches."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ragged import ENCODERS, IDS, MASK, random_tree, run

from compactlm_jax.compress.importance import add_importance, no_importance
from compactlm_jax.config import EncoderConfig
from compactlm_jax.errors import ConfigError


def host(config, seed):
  return jax.tree.map(np.asarray, random_tree(config, seed))


def by_loops(params, grads, config):
  """(heads, neurons into, neurons onto), signed, one number at a time."""
  layers, size, groups = config.num_layers, config.head_size, config.num_groups
  w, g = params['encoder']['layers'], grads['encoder']['layers']
  heads, into, onto = (
    np.zeros((layers, n)) for n in (config.num_heads, config.intermediate_size, config.intermediate_size)
  )
  per_group = config.intermediate_size // groups
  for n in range(layers):
    out = (w['attention']['output']['kernel'][n] * g['attention']['output']['kernel'][n]).astype(np.float64)
    for h in range(config.num_heads):
      for branch in range(config.branches):
        first = (branch * config.num_heads + h) * size
        heads[n, h] += out[first : first + size].sum()
    for f in range(config.intermediate_size):
      at = (n, f // per_group, slice(None), f % per_group) if groups > 1 else (n, slice(None), f)
      back = (n, f // per_group, f % per_group) if groups > 1 else (n, f)
      into[n, f] = (w['ffn_in']['kernel'][at] * g['ffn_in']['kernel'][at]).sum()
      into[n, f] += w['ffn_in']['bias'][n, f] * g['ffn_in']['bias'][n, f]
      onto[n, f] = (w['ffn_out']['kernel'][back] * g['ffn_out']['kernel'][back]).sum()
  return heads, into, onto


@pytest.mark.parametrize('name', ENCODERS)
def test_importance_is_that_of_loops(name):
  """Mutation: one branch of ConvBERT alone; one absolute value around both terms of a neuron; no bias."""
  config = ENCODERS[name]
  params, grads = host(config, 0), host(config, 1)
  heads, into, onto = by_loops(params, grads, config)
  found = add_importance(no_importance(config), params, grads, config)
  np.testing.assert_allclose(found.heads_NH, abs(heads), rtol=1e-4, atol=1e-4)
  np.testing.assert_allclose(found.neurons_NF, abs(into) + abs(onto), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize('importance_sum', ['cleared', 'published'])
def test_sums_over_batches(importance_sum):
  """The published sum adds, for batch i, the importance by the gradient of batches 1 to i.

  Mutation: exchange the two; start the running sum anew with each batch.
  """
  config = ENCODERS['convbert grouped']
  params, batches = host(config, 0), [host(config, seed) for seed in (1, 2, 3)]
  total = no_importance(config)
  add = jax.jit(add_importance, static_argnums=(3, 4))
  heads, neurons, summed = 0, 0, None
  for grads in batches:
    total = add(total, params, grads, config, importance_sum)
    summed = grads if summed is None else jax.tree.map(np.add, summed, grads)
    one, into, onto = by_loops(params, summed if importance_sum == 'published' else grads, config)
    heads, neurons = heads + abs(one), neurons + abs(into) + abs(onto)
  np.testing.assert_allclose(total.heads_NH, heads, rtol=1e-4, atol=1e-4)
  np.testing.assert_allclose(total.neurons_NF, neurons, rtol=1e-4, atol=1e-4)


def test_a_head_of_convbert_is_masked_in_both_branches():
  """The derivative by one mask on what both branches bring to the output projection.

  Mutation: add the absolute values of the branches.
  """
  config = dataclasses.replace(ENCODERS['convbert'], num_layers=1)
  params = random_tree(config)

  def loss(masks_NH, params):
    layers = params['encoder']['layers']
    rows = jnp.tile(jnp.repeat(masks_NH, config.head_size, axis=1), (1, 2))
    output = {**layers['attention']['output'], 'kernel': layers['attention']['output']['kernel'] * rows[:, :, None]}
    encoder = {**params['encoder'], 'layers': {**layers, 'attention': {**layers['attention'], 'output': output}}}
    last_BTD = run({'encoder': encoder}, config, IDS, MASK).last_BTD
    return jnp.sum(jnp.sin(3 * last_BTD))

  by_mask_NH, grads = jax.jit(jax.grad(loss, argnums=(0, 1)))(jnp.ones((1, 4)), params)
  found = add_importance(no_importance(config), params, grads, config)
  np.testing.assert_allclose(found.heads_NH, abs(by_mask_NH), rtol=1e-4, atol=1e-5)


def torch_loss(torch, weights, config, ids, mask, labels, head_mask):
  """Cross-entropy of BERT's first token, written out in PyTorch with the original's mask on attention probabilities."""
  embeddings, heads, size = weights['encoder']['embeddings'], config.num_heads, config.head_size

  def dense(x, p):
    return x @ p['kernel'] + p['bias']

  def norm(x, p):
    return torch.nn.functional.layer_norm(x, x.shape[-1:], p['scale'], p['bias'], config.layer_norm_epsilon)

  x = embeddings['word']['embedding'][ids] + embeddings['position']['embedding'][: ids.shape[1]]
  x = norm(x + embeddings['token_type']['embedding'][0], embeddings['norm'])
  blocked = (1.0 - mask)[:, None, None] * -1e9
  for layer, mask_H in zip(weights['layers'], head_mask):
    q, k, v = (dense(x, layer['attention'][n]).unflatten(-1, (heads, size)) for n in ('query', 'key', 'value'))
    probs = torch.softmax(torch.einsum('bthk,bshk->bhts', q, k) / size**0.5 + blocked, -1) * mask_H[:, None, None]
    mixed = torch.einsum('bhts,bshk->bthk', probs, v).flatten(2)
    x = norm(x + dense(mixed, layer['attention']['output']), layer['attention_norm'])
    inner = torch.nn.functional.gelu(dense(x, layer['ffn_in']))
    x = norm(x + dense(inner, layer['ffn_out']), layer['ffn_norm'])
  return torch.nn.functional.cross_entropy(x[:, 0], labels)


@pytest.mark.torch
def test_importance_is_that_of_the_original_in_torch():
  """Three batches with a real head mask and gradients that are never cleared, or are.

  Mutation: leave out the bias of a neuron; take the mean over batches.
  """
  torch = pytest.importorskip('torch')
  fields = {'vocab_size': 20, 'hidden_size': 8, 'num_layers': 2, 'num_heads': 4, 'intermediate_size': 6}
  config = EncoderConfig('bert', max_positions=8, scan_unroll=1, **fields)
  params = random_tree(config)
  rng = np.random.default_rng(5)
  batches = [(rng.integers(0, 20, (4, 7)), rng.integers(0, 8, 4)) for _ in range(3)]
  mask = (np.arange(7) < np.array([[7], [4], [6], [2]])).astype(np.int32)

  def loss(params, ids, labels):
    scores = jax.nn.log_softmax(run(params, config, ids, mask).last_BTD[:, 0])
    return -jnp.take_along_axis(scores, labels[:, None], axis=1).mean()

  leaf = jax.tree.map(lambda p: torch.tensor(np.array(p)), params)  # stacked: cut below into leaves of autograd
  layers = [jax.tree.map(lambda p, i=i: p[i].clone().requires_grad_(), leaf['encoder']['layers']) for i in range(2)]
  head_mask = torch.ones(2, 4, requires_grad=True)
  weights, slope = {**leaf, 'layers': layers}, jax.jit(jax.grad(loss))
  add = jax.jit(add_importance, static_argnums=(3, 4))
  for importance_sum in ('cleared', 'published'):
    total, heads, neurons = no_importance(config), 0, 0
    for p in (head_mask, *jax.tree.leaves(layers)):
      p.grad = None
    for ids, labels in batches:
      total = add(total, params, slope(params, ids, labels), config, importance_sum)
      if importance_sum == 'cleared':
        for p in (head_mask, *jax.tree.leaves(layers)):
          p.grad = None
      batch = (torch.tensor(ids), torch.tensor(mask, dtype=torch.float32), torch.tensor(labels))
      torch_loss(torch, weights, config, *batch, head_mask).backward()
      heads = heads + head_mask.grad.abs().numpy()
      wide, back = ([layer[n] for layer in layers] for n in ('ffn_in', 'ffn_out'))
      into = [(p['kernel'] * p['kernel'].grad).sum(0) + p['bias'] * p['bias'].grad for p in wide]
      onto = [(p['kernel'] * p['kernel'].grad).sum(1) for p in back]
      neurons = neurons + torch.stack([a.abs() + b.abs() for a, b in zip(into, onto)]).detach().numpy()
    np.testing.assert_allclose(total.heads_NH, heads, rtol=1e-3, atol=1e-5)
    np.testing.assert_allclose(total.neurons_NF, neurons, rtol=1e-3, atol=1e-5)


def test_what_has_no_importance():
  """Mutation: ignore the shapes of the gradient, or an unknown sum."""
  config = ENCODERS['bert']
  params = host(config, 0)
  with pytest.raises(ConfigError, match="importance_sum: 'mean'; use"):
    add_importance(no_importance(config), params, params, config, 'mean')
  with pytest.raises(ConfigError, match='query/kernel: found shape'):
    other = dataclasses.replace(config, num_heads=3)
    add_importance(no_importance(other), params, host(ENCODERS['bert without pooler'], 1), other)
  with pytest.raises(ConfigError, match='differ in size'):
    add_importance(no_importance(config), params, params, dataclasses.replace(config, heads_per_layer=(4, 2, 4)))
