"""What devices say to each other: read off an optimised HLO, and how long it takes."""

from __future__ import annotations

import math
import re
from collections import Counter
from dataclasses import dataclass

import numpy as np

from tfm.parallel.chips import Chip

KINDS = ('all-reduce', 'all-gather', 'reduce-scatter', 'all-to-all', 'collective-permute')


@dataclass(frozen=True)
class Collective:
  """One kind of exchange, `count` times a step."""

  kind: str
  bytes: float
  """The whole array that a device has after it (all-reduce, all-gather, all-to-all, collective-permute) or before it
  (reduce-scatter)."""
  group: int
  """Devices that take part together."""
  stride: int
  """Distance of neighbours in a group, in the order of the mesh's devices."""
  count: int = 1

  @property
  def sent(self) -> float:
    """Bytes that a device sends in a step, by the usual ring algorithms."""
    n = self.group
    share = {'all-reduce': 2 * (n - 1) / n, 'collective-permute': float(n > 1)}.get(self.kind, (n - 1) / n)
    return share * self.bytes * self.count

  def seconds(self, chip: Chip) -> float:
    """At full bandwidth, without latency. What leaves the domain goes through the network: reductions and gathers are
    done inside first, so that each chip carries its share outside; the others wait for their slowest hop."""
    inside = min(self.group, max(1, chip.domain // self.stride))
    outside = self.group / inside
    if self.kind in ('all-to-all', 'collective-permute'):
      return self.sent / (chip.link if outside <= 1 else chip.network)
    passes = 2 if self.kind == 'all-reduce' else 1
    near = (inside - 1) / inside * self.bytes / chip.link
    far = (outside - 1) / outside * self.bytes / inside / chip.network
    return passes * self.count * (near + far)


def collectives(hlo: str) -> list[Collective]:
  """All exchanges of a compiled step (`compiled.as_text()`), those in a loop times its trips, the largest first.

  Every branch of a conditional counts. A device alone exchanges nothing: groups of one are left out.

  Raises:
    ValueError: a loop with an exchange in it has no known number of trips, or the text is not an HLO module.
  """
  computations, entry = _computations(hlo)
  found: Counter[Collective] = Counter()
  holds = {}  # computation -> whether there is an exchange in it

  def holds_any(name: str) -> bool:
    if name not in holds:
      holds[name] = any(_OPERATION.search(line) or any(map(holds_any, _callees(line))) for line in computations[name])
    return holds[name]

  def visit(name: str, times: int) -> None:
    for line in computations[name]:
      if operation := _OPERATION.search(line):
        one = _collective(line, operation)
        if one.group > 1:
          found[one] += times
      inner = [callee for callee in _callees(line) if holds_any(callee)]
      for callee in inner:
        visit(callee, times * (_trips(line) if ' while(' in line else 1))

  visit(entry, 1)
  total = [Collective(one.kind, one.bytes, one.group, one.stride, count) for one, count in found.items()]
  return sorted(total, key=lambda one: -one.sent)


# -- reading HLO ------------------------------------------------------------------------------------------------------

_HEADER = re.compile(r'^(ENTRY )?%?([\w.-]+) \(.*\{$')
_OPERATION = re.compile(rf' = (.*?) ({"|".join(KINDS)})(-start)?\(')
_CALLEE = re.compile(r'(?:body|condition|calls|to_apply)=%?([\w.-]+)')
_BRANCHES = re.compile(r'branch_computations=\{([^}]*)\}')
_SHAPE = re.compile(r'\b([a-z]+)(\d*)[a-z\d]*\[([\d,]*)\]')
_PERMUTED = re.compile(r'\{(\d+),(\d+)\}')


def _computations(hlo: str) -> tuple[dict[str, list[str]], str]:
  computations, entry, lines = {}, None, []
  for line in hlo.splitlines():
    if header := _HEADER.match(line):
      lines = computations[header[2]] = []
      entry = header[2] if header[1] else entry
    elif ' = ' in line:
      lines.append(line)
  if entry is None:
    raise ValueError('This text has no ENTRY computation; give the text of a compiled HLO module.')
  return computations, entry


def _callees(line: str) -> list[str]:
  branches = _BRANCHES.search(line)
  return _CALLEE.findall(line) + (re.findall(r'[\w.-]+', branches[1]) if branches else [])


def _trips(line: str) -> int:
  known = re.search(r'known_trip_count":\{"n":"(\d+)"', line)
  if known is None:
    raise ValueError(f'The trips of the loop are not known, so its exchanges cannot be counted: {line.strip()[:200]}')
  return int(known[1])


def _collective(line: str, operation: re.Match) -> Collective:
  result, kind, start = operation.groups()
  sizes = [_bytes(*shape) for shape in _SHAPE.findall(result)]
  if start and kind != 'all-reduce':
    # Asynchronous: the operands come first, then the results; a permute also has two counters.
    sizes = sizes[1:2] if kind == 'collective-permute' else sizes[len(sizes) // 2:]
  if kind == 'collective-permute':
    pairs = [(int(a), int(b)) for a, b in _PERMUTED.findall(line.split('source_target_pairs=')[1].split('}}')[0] + '}')]
    hops = [abs(a - b) for a, b in pairs if a != b] or [0]
    stride = max(min(hops), 1)
    return Collective(kind, sum(sizes), max(hops) // stride + 1, stride)
  group = _first_group(line)
  stride = int(group[1] - group[0]) if len(group) > 1 else 1
  return Collective(kind, sum(sizes) * (len(group) if kind == 'reduce-scatter' else 1), len(group), stride)


def _bytes(letters: str, bits: str, dimensions: str) -> float:
  """Of an array: f32[8,4] is ('f', '32', '8,4'); pred has no number and takes a byte."""
  return max(int(bits or 8) // 8, 1) * math.prod(int(size) for size in dimensions.split(',') if size)


def _first_group(line: str) -> np.ndarray:
  """Device numbers of the first group, in the three ways in which HLO writes `replica_groups`."""
  text = line.split('replica_groups=')[1]
  if listed := re.match(r'\{\{([\d,]+)\}', text):
    return np.array([int(number) for number in listed[1].split(',')])
  if iota := re.match(r'\[([\d,]+)\](<=\S+)', text):  # [groups,size]<=[dimensions]T(permutation)
    return _iota(iota[2]).reshape(_numbers(iota[1]))[0]
  # mesh['a'=4,'b'=2], device_ids=([2,4]T(1,0)) {'b'}; an axis of a group may be a part, 'a':(before)size.
  mesh = re.match(r"mesh\[([^\]]*)\](?:, device_ids=\(([^ ]*)\))? \{([^}]*)\}", text)
  if mesh is None:
    raise ValueError(f'These replica groups are written in a way not known here: {text[:200]}')
  sizes = {name: int(size) for name, size in re.findall(r"'(\w+)'=(\d+)", mesh[1])}
  devices = (_iota(mesh[2]) if mesh[2] else np.arange(math.prod(sizes.values()))).reshape(tuple(sizes.values()))
  index = [0] * len(sizes)
  for name, before, size in re.findall(r"'(\w+)'(?::\((\d+)\)(\d+))?", mesh[3]):
    after = sizes[name] // (int(before) * int(size)) if before else 1
    taken = np.arange(int(size) if before else sizes[name]) * after
    index[list(sizes).index(name)] = taken
  return np.sort(devices[np.ix_(*[np.atleast_1d(each) for each in index])].reshape(-1))


def _iota(text: str) -> np.ndarray:
  """[2,4]T(1,0): 0 ... 7 as 2 x 4, transposed."""
  dimensions, permutation = re.search(r'\[([\d,]+)\](?:T\(([\d,]+)\))?', text).groups()
  numbers = np.arange(math.prod(_numbers(dimensions))).reshape(_numbers(dimensions))
  return numbers.transpose(_numbers(permutation)) if permutation else numbers


def _numbers(text: str) -> tuple[int, ...]:
  return tuple(int(number) for number in text.split(','))
