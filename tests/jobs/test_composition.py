"""Techniques on top of each other: ConvBERT, movement pruning, DynaBERT and MiniLM's relations in one chain."""

import jax
import numpy as np
import pytest
from labelled_files import VOCAB, write_files
from tiny import tiny_config

from compactlm_jax.compress.density import densities
from compactlm_jax.compress.subnet import subnet, subnet_config
from compactlm_jax.config import (
  AdaptConfig,
  Cell,
  DataConfig,
  DistillConfig,
  EncoderConfig,
  FinetuneConfig,
  OptimizerConfig,
  PruneConfig,
)
from compactlm_jax.interop.bundle import from_pretrained
from compactlm_jax.jobs import build_job, load_model, run_train
from compactlm_jax.metrics import read_metrics
from compactlm_jax.nn.encoder import encode

CONVBERT = EncoderConfig.mixed(
  heads=4, head_ratio=2, vocab_size=VOCAB, hidden_size=16, num_layers=2, intermediate_size=32, embedding_size=8,
  num_groups=2, max_positions=16, conv_kernel_size=3, initializer_range=0.2, scan_unroll=1,
)  # fmt: skip


def config_of(files, task, model, **changes):
  fields = {
    'model': str(model),
    'data': DataConfig(train=str(files / 'train.tsv'), dev=str(files / 'dev.tsv'), seq_len=12),
    'optimizer': OptimizerConfig(learning_rate=3e-3, weight_decay=0.0),
    'finetune': FinetuneConfig(dropout=0.0),
    'checkpoint_every': 100,
  }
  return tiny_config(task, **{**fields, **changes})


@pytest.fixture(scope='module', autouse=True)
def one_device():
  """Placement has tests of its own; the collectives of eight devices may wait for each other on a loaded machine."""
  devices = jax.devices()[:1]
  with pytest.MonkeyPatch.context() as m:
    m.setattr(jax, 'devices', lambda: devices)
    yield


@pytest.fixture(scope='module')
def files(tmp_path_factory):
  return write_files(tmp_path_factory.mktemp('files'), CONVBERT)


@pytest.fixture(scope='module')
def teacher(files, tmp_path_factory):
  """A ConvBERT whose weights were pruned by learned scores while it was fine-tuned."""
  folder = tmp_path_factory.mktemp('teacher')
  fields = {'scores_learning_rate': 0.1, 'freeze_embeddings': False}
  prune = PruneConfig(method='hard_movement', density=0.6, initial_warmup=0, final_warmup=0, **fields)
  optimizer = OptimizerConfig(learning_rate=1e-2, weight_decay=0.0)
  config = config_of(files, 'prune', files / 'model', steps=60, prune=prune, optimizer=optimizer)
  results = run_train(config, str(folder))
  assert results['density'] == pytest.approx(0.6, abs=0.01) and results['metrics']['accuracy'] > 0.8
  return folder


@pytest.fixture(scope='module')
def adaptive(files, teacher, tmp_path_factory):
  """It taught a ConvBERT of two widths and depths the relations of its last layer."""
  folder = tmp_path_factory.mktemp('adaptive')
  adapt = AdaptConfig(widths=(0.5, 1.0), depths=(0.5, 1.0), stages=('depth',), term='relations')
  relations = DistillConfig(relations=('qq', 'kk', 'vv'), relation_heads=2)
  config = config_of(files, 'adapt', '', teacher=str(teacher), adapt=adapt, distill=relations, steps=30)
  results = run_train(config, str(folder))
  assert [(row['width'], row['depth']) for row in results['grid']] == [(1, 1), (0.5, 1), (1, 0.5), (0.5, 0.5)]
  return config, folder


def test_a_pruned_teacher_and_relations_make_a_convbert_adaptive(adaptive, teacher):
  """The teacher's zeros teach; the network itself is dense again. Mutation: leave the masks out; hidden states."""
  config, folder = adaptive
  losses = {row['step']: row for row in read_metrics(folder) if 'relation_loss' in row}
  assert all('hidden_loss' not in row and 'distil_loss' in row for row in losses.values())
  for name in ('relation_loss', 'loss_smallest'):
    assert np.mean([losses[i][name] for i in range(26, 31)]) < np.mean([losses[i][name] for i in range(1, 6)])
  frozen = build_job(config).task.frozen
  taught, network = densities(frozen, CONVBERT), load_model(str(folder))
  assert taught['nonzero'] == pytest.approx(0.6 * taught['weights'], rel=0.02)
  assert taught['nonzero'] == densities(load_model(str(teacher)).params, CONVBERT)['nonzero']
  dense = densities(network.params, network.config)
  assert dense['nonzero'] == dense['weights']


def test_cells_of_a_convbert_lose_heads_of_both_branches(adaptive):
  """What is kept is what the view computes. Mutation: cut the branches at different heads."""
  _, folder = adaptive
  network, cell = load_model(str(folder / 'best')), from_pretrained(folder / 'best' / 'cells' / '0.5x0.5')
  assert (cell.config.num_heads, cell.config.intermediate_size, cell.config.num_layers) == (1, 16, 1)
  attention = cell.params['encoder']['layers']['attention']
  assert attention['conv']['value']['kernel'].shape == attention['value']['kernel'].shape == (1, 16, 4)
  assert attention['output']['kernel'].shape == (1, 8, 16)
  view = subnet(network.params, network.config, Cell(0.5, 0.5))
  ids = np.arange(5, 15, dtype=np.int32)[None]
  found = encode(cell.params, cell.config, ids).last_BTD
  np.testing.assert_allclose(
    found, encode(view, subnet_config(network.config, Cell(0.5, 0.5)), ids).last_BTD, atol=1e-5
  )
  assert not np.allclose(found, encode(network.params, network.config, ids).last_BTD, atol=1e-3)


def test_a_sub_network_is_pruned_like_any_model(files, adaptive, tmp_path):
  """Mutation: prune the full network's masks."""
  _, folder = adaptive
  small = folder / 'best' / 'cells' / '0.5x0.5'
  prune = PruneConfig(density=0.5, initial_warmup=0, final_warmup=0, scores_learning_rate=0.1)
  results = run_train(config_of(files, 'prune', small, steps=6, prune=prune), str(tmp_path / 'run'))
  pruned = load_model(str(tmp_path / 'run'))
  assert (pruned.config.num_heads, pruned.config.num_layers) == (1, 1)
  assert results['density'] == pytest.approx(0.5, abs=0.01)
  found = densities(pruned.params, pruned.config)
  assert found['weights'] == densities(from_pretrained(small).params, pruned.config)['weights']
