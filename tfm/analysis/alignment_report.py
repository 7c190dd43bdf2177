"""The results of the alignment experiment as JSON, as a table and as figures."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tfm.analysis.report import as_json
from tfm.analysis.result import Result
from tfm.errors import UserError

if TYPE_CHECKING:
  from matplotlib.figure import Figure


def write_report(result: Result, folder: Path) -> None:
  """Write FOLDER/results.json, results.md and alignment.png; needs matplotlib (extra `plot`)."""
  try:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / 'results.json').write_text(json.dumps(as_json(result), indent=1) + '\n', encoding='utf-8')
    (folder / 'results.md').write_text(markdown(result), encoding='utf-8')
    draw(result.measured).savefig(folder / 'alignment.png', dpi=120)
  except OSError as error:
    raise UserError(f'{folder} cannot be written to: {error.strerror}.') from error


def markdown(result: Result) -> str:
  """A table of all AERs, one of the models, and which part of the criterion holds."""
  m = result.measured
  lines = [f'# {result.name}: {result.verdict}', '', result.claim, '', f'Criterion: {result.criterion}', '',
           f'Control: {result.control}', '', '| links from | AER | 95 % | attention correctness |', '|---|---|---|---|']
  for name, found in m['attention'].items():
    for indexing, best in found.items():
      low, high = best['interval']
      lines.append(f'| {name}, by {indexing}, layer {best["layer"]} head {best["head"]} | {best["error"]:.3f} | '
                   f'{low:.3f} to {high:.3f} | {m["attention_correctness"][name][indexing]:.3f} |')
  lines += [f'| {name}, saliency | {error:.3f} | | |' for name, error in m['saliency'].items()]
  lines += [f'| {name} | {error:.3f} | | |' for name, error in m['controls'].items()]
  lines += ['', '| model | parameters | token accuracy | with an unweighted mean | slope, points a word | 95 % |',
            '|---|---|---|---|---|---|']
  for name, facts in m['models'].items():
    slope, ablation = m['accuracy_slope'][name], m['unweighted_mean'].get(name)
    low, high = slope['interval']
    lines.append(f'| {name} | {facts["parameters"]:,} | {facts["accuracy"]:.4f} | '
                 f'{format(ablation["unweighted"], ".4f") if ablation else "–"} | {100 * slope["slope"]:+.3f} | '
                 f'{100 * low:+.3f} to {100 * high:+.3f} |')
  lines += ['', *(f'- {"yes" if holds else "no"}: {check}' for check, holds in m['checks'].items()), '']
  return '\n'.join(lines)


def draw(measured: dict[str, Any]) -> Figure:
  """AER of every head of the Transformer by output and by input; AER of all ways; accuracy by length."""
  from matplotlib.figure import Figure
  figure = Figure(figsize=(11, 8), layout='constrained')
  top, bottom = figure.subfigures(2, 1, height_ratios=(1, 1.2))
  heat_maps, found = top.subplots(1, 2), measured['attention']['transformer']
  for axes, indexing, row in zip(heat_maps, ('output', 'input'), ('that predicts a word', 'that reads a word')):
    table = found[indexing]['table']
    image = axes.imshow(table, cmap='viridis_r', vmin=0, vmax=1, aspect='auto')
    axes.set_xticks(range(len(table[0])), [*map(str, range(1, len(table[0]))), 'mean'])
    axes.set_yticks(range(len(table)), map(str, range(1, len(table) + 1)))
    axes.set_xlabel('head')
    axes.set_ylabel('decoder layer')
    axes.set_title(f'Transformer: AER by {indexing}, the row {row}', fontsize=10)
    for n, errors in enumerate(table):
      for h, error in enumerate(errors):
        axes.text(h, n, f'{error:.2f}', ha='center', va='center', color='white' if error > 0.5 else 'black')
  top.colorbar(image, ax=heat_maps, label='alignment error rate')
  bars, lines = bottom.subplots(1, 2)
  errors = {f'{name}, by {indexing}': best['error'] for name, both in measured['attention'].items()
            for indexing, best in both.items()}
  errors |= {f'{name}, saliency': error for name, error in measured['saliency'].items()}
  colours = ['tab:blue'] * (len(errors) - len(measured['saliency'])) + ['tab:orange'] * len(measured['saliency'])
  errors |= measured['controls']
  drawn = bars.barh(list(errors)[::-1], list(errors.values())[::-1],
                    color=(colours + ['tab:gray'] * len(measured['controls']))[::-1])
  bars.bar_label(drawn, fmt='%.2f', padding=3)
  bars.set_xlim(0, 1.1)
  bars.set_title('AER: best head (blue), gradients (orange), controls (grey)', fontsize=10)
  for (name, points), marker in zip(measured['accuracy_by_length'].items(), 'osv'):
    lines.plot(*zip(*points), marker=marker, label=name)
  lines.set_xlabel('words of the source')
  lines.set_ylabel('token accuracy, teacher forced')
  lines.grid(alpha=0.3)
  lines.legend(frameon=False)
  lines.set_title('accuracy by length', fontsize=10)
  return figure
