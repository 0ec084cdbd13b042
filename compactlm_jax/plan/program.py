"""What the compiler says of a program: memory, FLOPs, bytes, its own time estimate, and the optimised HLO read."""

from __future__ import annotations

import dataclasses
import math
import re
from collections import defaultdict
from typing import Any

KINDS = ('all-reduce', 'all-gather', 'reduce-scatter', 'all-to-all', 'collective-permute')
"""Operations by which devices exchange arrays."""

_BYTES = {
  'pred': 1, 's8': 1, 'u8': 1, 's16': 2, 'u16': 2, 'bf16': 2, 'f16': 2, 's32': 4, 'u32': 4, 'f32': 4, 's64': 8,
  'u64': 8, 'f64': 8,
}  # fmt: skip
_COLLECTIVE = re.compile(rf'= (.*?) ({"|".join(KINDS)})(-start)?\(')
_SHAPE = re.compile(r'\b([a-z]+\d*)\[([\d,]*)\]')
_CYCLES = re.compile(r'"estimated_cycles":"(\d+)"')
_SCOPE = re.compile(r'op_name="([^"]*)"')
_NOISE = re.compile(r'closed_call|Encoder\._run|layers\.(body|scan)|while|body|remat|checkpoint|cond|branch_\d+_fun')


@dataclasses.dataclass(frozen=True)
class Collective:
  """One exchange between devices.

  Attributes:
    kind: one of `KINDS`.
    shapes: (dtype, dimensions) of each array that a device has afterwards.
  """

  kind: str
  shapes: tuple[tuple[str, tuple[int, ...]], ...]

  @property
  def bytes(self) -> int:
    """Bytes of those arrays."""
    return sum(_BYTES.get(dtype, 4) * math.prod(dims) for dtype, dims in self.shapes)


@dataclasses.dataclass(frozen=True)
class Program:
  """The program of one device.

  Attributes:
    memory: bytes of 'arguments', 'outputs', 'aliased' (outputs that reuse arguments), 'temporaries' and 'code'.
    flops, bytes_accessed: per step, by the compiler's count.
    optimal_seconds: the compiler's own estimate; negative or zero where it has none.
    cycles: sum of the estimated cycles of the instructions that have such an estimate.
    collectives: exchanges with other devices.
    costly: (part of the model, instructions, estimated cycles), the most expensive first.
    hlo: the optimised program; '' if it was not kept.
  """

  memory: dict[str, int]
  flops: float
  bytes_accessed: float
  optimal_seconds: float
  cycles: int
  collectives: tuple[Collective, ...]
  costly: tuple[tuple[str, int, int], ...]
  hlo: str = dataclasses.field(default='', repr=False)

  @property
  def peak_bytes(self) -> int:
    """Most memory that the program holds at a time."""
    m = self.memory
    return m['arguments'] + m['outputs'] - m['aliased'] + m['temporaries'] + m['code']


@dataclasses.dataclass(frozen=True)
class Overflow:
  """A program that was refused: it needs more memory than there is (bytes of one device)."""

  needed: int
  available: int


def overflow_of(message: str) -> Overflow | None:
  """The compiler's complaint about memory, in the two forms that it has; None for another message."""
  number = r'([\d.]+)([KMGT]?)'
  for pattern in (
    rf'total memory required for HLO temporaries \({number}\) exceeds available HBM \({number}\)',
    rf'Used {number} of {number} hbm',
  ):
    if found := re.search(pattern, message):
      needed, available = (
        int(float(value) * 1024 ** ' KMGT'.index(unit or ' ')) for value, unit in (found.group(1, 2), found.group(3, 4))
      )
      return Overflow(needed, available)
  return None


def read_program(compiled: Any) -> Program:
  """Reads a compiled program.

  Args:
    compiled: of `jax.jit(...).lower(...).compile()`.
  """
  memory, costs, hlo = compiled.memory_analysis(), compiled.cost_analysis(), compiled.as_text()
  parts = costly_parts(hlo)
  return Program(
    memory={
      'arguments': int(memory.argument_size_in_bytes),
      'outputs': int(memory.output_size_in_bytes),
      'aliased': int(memory.alias_size_in_bytes),
      'temporaries': int(memory.temp_size_in_bytes),
      'code': int(memory.generated_code_size_in_bytes),
    },
    flops=float(costs.get('flops', 0.0)),
    bytes_accessed=float(costs.get('bytes accessed', 0.0)),
    optimal_seconds=float(costs.get('optimal_seconds', 0.0)),
    cycles=sum(cycles for _, _, cycles in parts),
    collectives=tuple(read_collectives(hlo)),
    costly=tuple(parts),
    hlo=hlo,
  )


def read_collectives(hlo: str) -> list[Collective]:
  """The exchanges in the text of an optimised program.

  Started and finished exchanges count once. The started form of a gather or permute also lists what is sent; only the
  received half counts.
  """
  found = []
  for line in hlo.splitlines():
    if match := _COLLECTIVE.search(line):
      shapes = [
        (dtype, tuple(int(size) for size in dims.split(',') if size)) for dtype, dims in _SHAPE.findall(match[1])
      ]
      if match[3] and match[2] in ('all-gather', 'collective-permute'):
        data = [shape for shape in shapes if shape[0] != 'u32' or shape[1]]  # permutes carry two scalar contexts
        shapes = data[len(data) // 2 :]
      found.append(Collective(match[2], tuple(shapes)))
  return found


def costly_parts(hlo: str) -> list[tuple[str, int, int]]:
  """(part of the model, instructions, estimated cycles) in the text of an optimised program, most expensive first.

  Parts are the names that JAX gives to operations; layers of an unrolled stack share theirs.
  """
  cycles: dict[str, list[int]] = defaultdict(list)
  for line in hlo.splitlines():
    if count := _CYCLES.search(line):
      scope = _SCOPE.search(line)
      cycles[_part(scope[1]) if scope else '(no name)'].append(int(count[1]))
  parts = [(name, len(each), sum(each)) for name, each in cycles.items()]
  return sorted(parts, key=lambda part: (-part[2], part[0]))


def _part(op_name: str) -> str:
  """'jit(step)/transpose(jvp(Encoder))/.../layers/ffn_in/dot_general' -> 'backward: layers/ffn_in/dot_general'."""
  names = [name for name in op_name.split('/') if not re.match(r'(jit|jvp|transpose|checkpoint|vmap)\(', name)]
  names = [name for name in names if not _NOISE.fullmatch(name)]
  phase = 'backward: ' if 'transpose(' in op_name else 'forward: ' if 'jvp(' in op_name else 'update: '
  return phase + '/'.join(names)
