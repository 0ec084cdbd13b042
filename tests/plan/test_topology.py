"""Names of TPU slices, and what one device can do."""

import pytest

from compactlm_jax.errors import ConfigError
from compactlm_jax.plan.topology import CHIPS, known_topologies, parse_topology


@pytest.mark.parametrize(
  ('name', 'devices', 'request_name', 'word'),
  [
    ('v2-8', 8, 'v2:2x2', 'core'),
    ('v3-8', 8, 'v3:2x2', 'core'),
    ('v3-32', 32, 'v3:4x4', 'core'),
    ('v3-128', 128, 'v3:8x8', 'core'),
    ('v4-8', 4, 'v4:2x2x1', 'chip'),
    ('v5p-8', 4, 'v5p:2x2x1', 'chip'),
    ('v5e-8', 8, 'v5e:2x4', 'chip'),
    ('v6e-8', 8, 'v6e:2x4', 'chip'),
    ('v5e-1', 1, 'v5e:1x1', 'chip'),
    ('v3:4x8', 64, 'v3:4x8', 'core'),
    ('V3-2x2', 8, 'v3:2x2', 'core'),
    ('v4:2x2x4', 16, 'v4:2x2x4', 'chip'),
    ('v5litepod-16', 16, 'v5e:4x4', 'chip'),
  ],
)
def test_names_give_devices(name, devices, request_name, word):
  """v2 to v4 and v5p count cores, v5e and v6e chips. Mutation: take the number for chips everywhere."""
  topology = parse_topology(name)
  assert (topology.devices, topology.request()[0], topology.device_word) == (devices, request_name, word)


def test_both_cores_of_a_v4_chip_are_one_device():
  """JAX on a v4 shows chips; its mesh of cores is refused. Mutation: leave the option out."""
  assert parse_topology('v4-8').request()[1] == {'chip_config_name': 'megacore'}
  assert parse_topology('v3-8').request()[1] == {}
  assert parse_topology('v5e-1').request()[1] == {'chips_per_host_bounds': [1, 1, 1]}


@pytest.mark.parametrize('name', ['v9-8', 'v3', '', 'v3-8-8', 'gpu-8', 'v7-8', 'v3-x', 'v3-8x'])
def test_unknown_kinds_list_the_known(name):
  with pytest.raises(ConfigError, match='--topology: .* is unknown; known are v2-8, .*v3-8, .*v6e-256'):
    parse_topology(name)


@pytest.mark.parametrize(
  ('name', 'message'),
  [
    ('v3-9', "there is no slice 'v3-9'; known are v3-8, v3-16, v3-32"),
    ('v3-12', 'there is no slice'),
    ('v5e-3', "there is no slice 'v5e-3'; known are v5e-1, v5e-4"),
    ('v3:3x4', 'even N and M'),
    ('v3:0x2', 'even N and M'),
    ('v3:2x2x2', 'v3:NxM'),
    ('v4:2x2', 'v4:NxMxK'),
  ],
)
def test_impossible_sizes_name_the_form(name, message):
  """Mutation: accept any shape (libtpu then complains, or plans for a slice that nobody rents)."""
  with pytest.raises(ConfigError, match=message):
    parse_topology(name)


def test_every_known_name_is_accepted():
  names = known_topologies()
  assert len(set(names)) == len(names) > 36
  assert {'v2-8', 'v3-8', 'v3-32', 'v3-128', 'v4-8', 'v5e-8', 'v5p-8', 'v6e-8'} <= set(names)
  for name in names:
    assert parse_topology(name).devices >= 1


def test_numbers_are_per_device():
  """A v3 chip has 123 TFLOP/s, 32 GiB and 900 GB/s in two devices. Mutation: forget to halve one of them."""
  chips = {chip.kind: chip for chip in CHIPS}
  v3 = chips['v3']
  assert (2 * v3.peak_flops, 2 * v3.hbm_bytes, 2 * v3.bandwidth) == (123e12, 32 * 2**30, 900e9)
  assert v3.peak_flops == pytest.approx(2 * 2 * 128 * 128 * v3.clock, rel=0.01)  # two matrix units of 128 x 128
  assert all(0.9 * chip.hbm_bytes < chip.usable_bytes <= chip.hbm_bytes for chip in CHIPS)
