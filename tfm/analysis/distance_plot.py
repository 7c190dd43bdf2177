"""Lines over distance, one for each family of models."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
  from matplotlib.figure import Figure

MARKERS = 'osD^vX*P'


def plot_by_distance(title: str, lines: Mapping[str, tuple[Sequence, Sequence]], ylabel: str, *,
                     xlabel: str = 'distance in tokens', level: tuple[str, float] | None = None, log_x: bool = True,
                     log_y: bool = False) -> Figure:
  """A line for each (x, y) of `lines`. Zeros have no place on a logarithmic axis and are left out there.

  Args:
    level: name and height of a dotted line, such as chance.

  Raises:
    ModuleNotFoundError: matplotlib is missing; it comes with the extra `plot`.
  """
  from matplotlib.figure import Figure
  from matplotlib.ticker import NullLocator
  figure = Figure(figsize=(7.2, 4.2), layout='constrained')
  axes = figure.subplots()
  for marker, (name, (x, y)) in zip(MARKERS * (1 + len(lines) // len(MARKERS)), lines.items()):
    kept = [(a, b) for a, b in zip(x, y) if b > 0 or not log_y]
    axes.plot([a for a, _ in kept], [b for _, b in kept], marker=marker if len(kept) < 20 else '', label=name)
  if level:
    axes.axhline(level[1], color='gray', linestyle=':', label=level[0])
  if log_x:
    axes.set_xscale('log', base=2)
    ticks = sorted({a for x, _ in lines.values() for a in x})
    if len(ticks) < 12:
      axes.set_xticks(ticks, map(str, ticks))
      axes.xaxis.set_minor_locator(NullLocator())
  if log_y:
    axes.set_yscale('log')
  else:
    axes.set_ylim(-0.02, 1.02)
  axes.set(xlabel=xlabel, ylabel=ylabel, title=title)
  axes.grid(alpha=0.3)
  axes.legend(fontsize=8)
  return figure
