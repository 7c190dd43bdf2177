"""What an experiment finds: figures, the criterion they are held to, and a verdict."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

if TYPE_CHECKING:
  from matplotlib.axes import Axes
  from matplotlib.figure import Figure

Verdict = Literal['holds', 'fails', 'not supported at this scale']


@dataclass(frozen=True)
class Result:
  """Of one experiment. The numbers are those of `docs/` and of the paper that makes the claim (E1 to E14)."""

  name: str
  """For example 'E7a'."""
  claim: str
  """One sentence."""
  criterion: str
  """What had to be found, in figures."""
  measured: dict[str, Any]
  """JSON values: numbers, strings, lists and dicts of them."""
  verdict: Verdict
  control: str
  """The control, and that it failed as it must."""
  draw: Callable[[], Figure] | None = None
  """Draws the figure; needs matplotlib (extra `plot`)."""


def _figure(plot: Callable[[Axes], None], title: str) -> Figure:
  from matplotlib.figure import Figure
  figure = Figure(figsize=(6, 4), layout='constrained')
  axes = figure.subplots()
  plot(axes)
  axes.set_title(title, fontsize=10, wrap=True)
  return figure


def as_result(name: str, claim: str, criterion: str, control: str, measured: dict[str, Any], verdict: Verdict,
              plot: Callable[[Axes], None]) -> Result:
  """With a figure of one plot. `(mean, (low, high))` in `measured` is a mean with its 95 % bootstrap interval."""
  return Result(name, claim, criterion, measured, verdict, control, partial(_figure, plot, f'{claim}: {verdict}'))


def interval(values, draws: int = 2000) -> tuple[float, tuple[float, float]]:
  """Mean over seeds and its 95 % bootstrap interval."""
  values = np.asarray(values, np.float64)
  picks = np.random.default_rng(0).integers(len(values), size=(draws, len(values)))
  low, high = np.quantile(values[picks].mean(axis=1), (0.025, 0.975))
  return float(values.mean()), (float(low), float(high))
