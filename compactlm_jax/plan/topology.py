"""TPU slices by the names that Cloud TPU gives them, and what one device of each kind can do."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Mapping
from typing import Any

from compactlm_jax.errors import ConfigError


@dataclasses.dataclass(frozen=True)
class Chip:
  """One kind of TPU. Numbers are per device as JAX shows it: a core of v2 and v3, a chip of all others.

  Attributes:
    kind: 'v3'.
    cores_per_chip: tensor cores; Cloud TPU counts these in the names of v2, v3, v4 and v5p.
    devices_per_chip: 2 where each core is a device of its own.
    counts_cores: whether the number in 'v3-8' counts cores; it counts chips for v5e and v6e.
    dimensions: of the interconnect: 2 (x, y) or 3 (x, y, z).
    hbm_bytes: memory of one device.
    usable_bytes: what of it the compiler gives to programs.
    peak_flops: bfloat16 FLOP/s of one device.
    bandwidth: bytes/s between one device and its memory.
    link: bytes/s of one link between two chips, one way.
    clock: cycles per second; 0 where it is not published.
  """

  kind: str
  cores_per_chip: int
  devices_per_chip: int
  counts_cores: bool
  dimensions: int
  hbm_bytes: float
  usable_bytes: float
  peak_flops: float
  bandwidth: float
  link: float
  clock: float


_G, _T = 2.0**30, 1e12

# HBM, peak and bandwidth: cloud.google.com/tpu/docs, one page of system architecture per version (v2 to v6e), halved
# for the two devices of a v2 or v3 chip; v2's and v3's bandwidth, their links (496 and 656 Gbit/s) and the clocks of v2
# to v4: "Ten Lessons From Three Generations Shaped Google's TPUv4i" (ISCA 2021), table 1. Links of the others: the
# documented interconnect bandwidth of a chip over its 4 (2-D) or 6 (3-D) links. The clocks of v5e and v5p follow from
# the peak and the matrix units (4 of 128 x 128 per core). Usable memory: what libtpu 0.0.42's compiler says when a
# program is too large (GiB of one device).
CHIPS: tuple[Chip, ...] = (
  Chip('v2', 2, 2, True, 2, 8 * _G, 7.48 * _G, 46 * _T / 2, 700e9 / 2, 62e9, 700e6),
  Chip('v3', 2, 2, True, 2, 16 * _G, 15.48 * _G, 123 * _T / 2, 900e9 / 2, 82e9, 940e6),
  Chip('v4', 2, 1, True, 3, 32 * _G, 30.75 * _G, 275 * _T, 1228e9, 50e9, 1050e6),
  Chip('v5e', 1, 1, False, 2, 16 * _G, 15.75 * _G, 197 * _T, 819e9, 50e9, 1500e6),
  Chip('v5p', 2, 1, True, 3, 95.74 * _G, 95.74 * _G, 459 * _T, 2765e9, 100e9, 1750e6),
  Chip('v6e', 1, 1, False, 2, 32 * _G, 31.25 * _G, 918 * _T, 1640e9, 112e9, 0.0),
)

# Chips along each dimension of the slices that Cloud TPU offers (system architecture, "configurations"), up to 256.
_PLANES = {4: (2, 2), 8: (2, 4), 16: (4, 4), 32: (4, 8), 64: (8, 8), 128: (8, 16), 256: (16, 16)}
_CUBES = {4: (2, 2, 1), 8: (2, 2, 2), 16: (2, 2, 4), 32: (2, 4, 4), 64: (4, 4, 4), 128: (4, 4, 8), 256: (4, 8, 8)}


@dataclasses.dataclass(frozen=True)
class Topology:
  """A slice of TPU chips.

  Attributes:
    name: as given, 'v3-8' or 'v3:2x2'.
    chip: its kind.
    shape: chips along each dimension.
  """

  name: str
  chip: Chip
  shape: tuple[int, ...]

  @property
  def devices(self) -> int:
    """Devices that JAX shows."""
    return math.prod(self.shape) * self.chip.devices_per_chip

  @property
  def device_word(self) -> str:
    """What one device is: 'core' or 'chip'."""
    return 'core' if self.chip.devices_per_chip == self.chip.cores_per_chip > 1 else 'chip'

  def request(self) -> tuple[str, Mapping[str, Any]]:
    """(name, options) by which libtpu knows the slice."""
    shape = self.shape if self.chip.dimensions == len(self.shape) else (*self.shape, 1)
    options: dict[str, Any] = {}
    if self.chip.cores_per_chip > self.chip.devices_per_chip:
      options['chip_config_name'] = 'megacore'  # both cores of a chip are one device, as on a real v4
    if any(size % 2 for size in shape[:2]):
      options['chips_per_host_bounds'] = [1, 1, 1]
    return f'{self.chip.kind}:{"x".join(map(str, shape))}', options


def known_topologies() -> list[str]:
  """Names of the slices that can be planned for; 'KIND:NxM' and 'KIND:NxMxK' go beyond them."""
  names = []
  for chip in CHIPS:
    names += [f'{chip.kind}-{chips * (chip.cores_per_chip if chip.counts_cores else 1)}' for chips in _slices(chip)]
  return names


def parse_topology(name: str) -> Topology:
  """The slice of a name: 'v3-8' (cores for v2, v3, v4, v5p; chips for v5e, v6e), 'v3:4x4' or 'v3-4x4' (chips).

  Raises:
    ConfigError: unknown; the message lists the known.
  """
  match = re.fullmatch(r'(v\d+\w*?)[-:](\d+(?:x\d+)*)', name.strip().lower())
  chips = {chip.kind: chip for chip in CHIPS}
  kind = {'v5litepod': 'v5e'}.get(match[1], match[1]) if match else ''
  if match is None or kind not in chips:
    raise ConfigError(f'--topology: {name!r} is unknown; {_known()}')
  chip, sizes = chips[kind], tuple(int(size) for size in match[2].split('x'))
  if len(sizes) == 1:
    cores = chip.cores_per_chip if chip.counts_cores else 1
    shape = _slices(chip).get(sizes[0] // cores) if sizes[0] % cores == 0 else None
    if shape is None:
      raise ConfigError(f'--topology: there is no slice {name!r}; {_known(chip)}')
    return Topology(name, chip, shape)
  whole = min(sizes) > 0 and (math.prod(sizes) == 1 or all(size % 2 == 0 for size in sizes[:2]))
  if len(sizes) != chip.dimensions or not whole:
    form = 'x'.join('NMK'[: chip.dimensions])
    raise ConfigError(
      f'--topology: {name!r}: chips of {kind} are given as {kind}:{form} with even N and M '
      f'(hosts have 2x2 chips); {_known(chip)}'
    )
  return Topology(name, chip, sizes)


def _slices(chip: Chip) -> Mapping[int, tuple[int, ...]]:
  """Chips -> shape; single chips are offered where they are counted."""
  table: Mapping[int, tuple[int, ...]] = _PLANES if chip.dimensions == 2 else _CUBES
  return table if chip.counts_cores else {1: (1,) * chip.dimensions, **table}


def _known(chip: Chip | None = None) -> str:
  names = [name for name in known_topologies() if chip is None or name.startswith(chip.kind + '-')]
  return f'known are {", ".join(names)}, and chips as v3:NxM or v4:NxMxK'
