"""Fills the tables of docs/speed.md from benchmarks/results/; what stands around them is written by hand.

    python benchmarks/report.py [--check]

A table stands between `<!-- name -->` and `<!-- end -->`. With --check nothing is written and an outdated page is an
error.
"""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Iterable
from pathlib import Path

ROOT = Path(__file__).parents[1]
PAGE, RESULTS = ROOT / 'docs' / 'speed.md', ROOT / 'benchmarks' / 'results'


def markdown(head: Iterable[str], rows: Iterable[Iterable]) -> str:
  head = list(head)
  lines = [head, ['---'] * len(head), *rows]
  return '\n'.join('| ' + ' | '.join(str(cell) for cell in line) + ' |' for line in lines)


def span(row: dict, scale: float = 1e3, digits: int = 0) -> str:
  """Median and range of the seconds."""
  low, high = row['range']
  return f'{scale * row["seconds"]:.{digits}f} [{scale * low:.{digits}f}, {scale * high:.{digits}f}]'


def ratio(row: dict) -> str:
  if 'ratio' not in row:
    return ''
  low, high = row['ratio_range']
  return f'{row["ratio"]:.2f} [{low:.2f}, {high:.2f}]'


def training(found: dict) -> str:
  return markdown(('shape', 'dropout', 'engine', 'ms a step', 'target tokens/s', 'GFLOP/s', 'of the limit', 'ratio'), (
      (row['shape'] + ', padded' * row['padded'], row['dropout'], row['engine'], span(row),
       f'{row["tokens_per_second"]:,.0f}', f'{row["flops_per_second"] / 1e9:.0f}', f'{row["share_of_limit"]:.0%}',
       ratio(row)) for row in found['rows']))


def decoding(found: dict) -> str:
  def line(row):
    latency = row.get('latency_seconds', {})
    return (row['batch'], row['beam'], row['engine'], f'{row["tokens_per_second"]:,.0f}', ratio(row),
            f'{row["same_as_tfm"]:.0%}', ', '.join(f'{1e3 * latency[p]:.0f}' for p in latency),
            f'{row["share_of_limit"]:.0%}' if 'share_of_limit' in row else '')

  return markdown(('batch', 'beam', 'engine', 'tokens/s', 'ratio', 'same as tfm', 'ms: p50, p90, p99',
                   'of the memory limit'), map(line, found['rows']))


def start(found: dict) -> str:
  return markdown(('what', 'seconds', 'ratio', 'to'), (
      (row['name'], span(row, 1, 2), ratio(row), row.get('baseline', '')) for row in found['rows']))


def data(found: dict) -> str:
  return markdown(('corpus', 'tokens/s', 'times what a step consumes', 'padding', 'shapes', 'seconds beforehand'), (
      (row['corpus'], f'{row["tokens_per_second"]:,.0f}', f'{row["times_consumption"]:.0f}', f'{row["padding"]:.1%}',
       len(row['shapes']), f'{sum(row["preparation_seconds"].values()):.1f}') for row in found['rows']))


def growth(found: dict) -> str:
  def exponents(fit: dict) -> tuple:
    return tuple(f'{fit[name]["exponent"]:.2f} ({fit[name]["last_exponent"]:.2f})'
                 for name in ('seconds', 'flops', 'temporary_bytes', 'state_bytes'))

  def sizes(of: str) -> str:
    every = [row['size'] for row in found['rows'] if row['of'] == of]
    return f'{of}, {min(every):,} to {max(every):,}'

  return markdown(('of', 'time', 'FLOPs', 'temporary memory', 'state'), (
      (sizes(of), *exponents(fit)) for of, fit in found['fits'].items()))


def attention(found: dict) -> str:
  speeds: dict[tuple, dict[str, str]] = {}
  for row in found['rows']:
    cell = f'{row["flops_per_second"] / 1e9:.0f}' if 'seconds' in row else '–'
    speeds.setdefault((row['pass'], 'yes' if row['causal'] else 'no', row['tokens']), {})[row['backend']] = cell
  names = list(next(iter(speeds.values())))
  return markdown(('pass', 'causal', 'T', *names), ((*key, *(cells[name] for name in names))
                                                    for key, cells in speeds.items()))


def patching(found: dict) -> str:
  return markdown(('width', 'tfm, s', 'first call, s', 'TransformerLens, s', 'ratio', 'largest difference'), (
      (row['width'], f'{row["median_seconds"]["tfm"]:.1f}', f'{row["first_call_seconds"]:.1f}',
       f'{row["median_seconds"]["transformer_lens"]:.1f}', f'{row["ratio"]:.1f}', f'{row["largest_difference"]:.0e}')
      for row in found['rows']))


def limits(found: dict) -> str:
  units = {'matmul': 'GFLOP/s', 'copy': 'GB/s', 'read': 'GB/s'}
  return markdown(('limit', 'rate'), (
      (row['limit'], f'{(row.get("flops_per_second") or row.get("bytes_per_second")) / 1e9:.1f} {units[row["limit"]]}')
      for row in found['rows']))


TABLES = {'training_step': training, 'decoding': decoding, 'start': start, 'data_pipeline': data, 'growth': growth,
          'attention_cpu': attention, 'patch_grid': patching, 'limits': limits}


def made_of(found: dict) -> str:
  """One line: command, day, machine, versions."""
  versions = ', '.join(f'{name} {version}' for name, version in found['versions'].items())
  machine = found['machine']
  return (f'`{found["command"]}`, {found["date"]}, {machine["cores"]} x {machine["cpu"]} '
          f'(load at the start {machine["load_at_start"]}); {versions}.')


def filled(page: str) -> str:
  """The page with its tables as the results have them; `ValueError` for a name that has none."""

  def table(match: re.Match) -> str:
    name = match[1]
    kind = next((kind for kind in TABLES if name.startswith(kind)), None)
    if kind is None:
      raise ValueError(f'docs/speed.md asks for a table "{name}"; there are {", ".join(TABLES)}.')
    found = json.loads((RESULTS / f'{name}.json').read_text())
    return f'<!-- {name} -->\n{TABLES[kind](found)}\n\n{made_of(found)}\n<!-- end -->'

  return re.sub(r'<!-- (\w+) -->\n.*?<!-- end -->', table, page, flags=re.DOTALL)


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument('--check', action='store_true', help='only say whether the page is what the results say')
  arguments = parser.parse_args()
  old = PAGE.read_text()
  new = filled(old)
  if arguments.check and new != old:
    raise SystemExit('docs/speed.md is not what benchmarks/results/ says; run python benchmarks/report.py.')
  PAGE.write_text(new)


if __name__ == '__main__':
  main()
