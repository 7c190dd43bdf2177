"""What an experiment finds: figures, the criterion they are held to, and a verdict."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
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
