"""Probes: what can be read from a layer by a linear map, and whether that says something about the layer.

A probe is ridge regression onto one-hot labels, in closed form: seconds for all layers, no learning rate, the same
answer every time. What it reads may be the probe's own doing: the control task (Hewitt & Liang 2019) asks it for labels
that were drawn for each word type at random, and selectivity is the difference. Where in the network a property arises
is the centre of gravity of what each further layer adds (Tenney et al. 2019).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

PENALTIES = tuple(10.0**power for power in range(-4, 4))


@dataclass(frozen=True)
class Probe:
  """A linear map onto classes."""

  weights_DxK: np.ndarray
  shift_K: np.ndarray
  penalty: float
  """The one of the candidates that was best on held-out rows."""

  def predict(self, x_MxD: np.ndarray) -> np.ndarray:
    """The class of every row, int."""
    return np.argmax(x_MxD @ self.weights_DxK + self.shift_K, axis=1)

  def accuracy(self, x_MxD: np.ndarray, labels_M: np.ndarray) -> float:
    return float(np.mean(self.predict(x_MxD) == labels_M))


def fit(x_MxD: np.ndarray, labels_M: np.ndarray, held_out: float = 0.2,
        penalties: Sequence[float] = PENALTIES) -> Probe:
  """Ridge regression onto one-hot labels; the penalty is chosen on the last `held_out` part of the rows, and the probe
  is fitted again on all of them.

  Args:
    x_MxD: one state a row, in random order.
    labels_M: int, from 0.
    penalties: times the mean square of the states.

  Raises:
    ValueError: as many labels as rows are needed, and rows on both sides of the split.
  """
  x_MxD, labels_M = np.asarray(x_MxD, np.float64), np.asarray(labels_M)
  M = len(x_MxD)
  split = M - int(round(held_out * M))
  if labels_M.shape != (M,):
    raise ValueError(f'There are {M} states and labels of shape {labels_M.shape}; give one label for each.')
  if not 0 < split < M:
    raise ValueError(f'{M} states leave none to fit or none to choose the penalty on; give more.')
  one_hot_MxK = np.eye(labels_M.max() + 1)[labels_M]
  solve = _solver(x_MxD[:split], one_hot_MxK[:split])
  scores = [float(np.mean(np.argmax(x_MxD[split:] @ w + b, axis=1) == labels_M[split:]))
            for w, b in map(solve, penalties)]
  best = penalties[int(np.argmax(scores))]
  return Probe(*_solver(x_MxD, one_hot_MxK)(best), best)


def control_labels(types_M: np.ndarray, classes: int, rng: np.random.Generator) -> np.ndarray:
  """A label for every word type, drawn once (Hewitt & Liang 2019, section 2): int, from 0.

  Args:
    types_M: the type of each row's word, any values.
  """
  _, number_M = np.unique(types_M, return_inverse=True)
  return rng.integers(classes, size=number_M.max() + 1)[number_M]


@dataclass(frozen=True)
class LayerScores:
  """Accuracies on rows that no probe has seen."""

  accuracy_N: np.ndarray
  control_N: np.ndarray

  @property
  def selectivity_N(self) -> np.ndarray:
    return self.accuracy_N - self.control_N


def probe_layers(states_NxMxD: np.ndarray, labels_M: np.ndarray, types_M: np.ndarray, test: np.ndarray,
                 rng: np.random.Generator) -> LayerScores:
  """A probe and its control on every layer.

  Args:
    types_M: word type of each row, for the control task.
    test: bool M, the rows that are kept for measuring.
  """
  controls_M = control_labels(types_M, int(labels_M.max()) + 1, rng)
  accuracies = [[fit(x_MxD[~test], y[~test]).accuracy(x_MxD[test], y[test]) for y in (labels_M, controls_M)]
                for x_MxD in states_NxMxD]
  return LayerScores(*np.array(accuracies).T)


def cumulative_scores(states_NxMxD: np.ndarray, labels_M: np.ndarray, test: np.ndarray) -> np.ndarray:
  """Accuracy with layers 0 to l together, for each l: what `centre_of_gravity` takes. The layers stand side by side,
  where Tenney et al. mix them with trained weights."""
  x = [np.concatenate(states_NxMxD[:l + 1], axis=1) for l in range(len(states_NxMxD))]
  return np.array([fit(each[~test], labels_M[~test]).accuracy(each[test], labels_M[test]) for each in x])


def centre_of_gravity(scores_N: np.ndarray) -> float:
  """E = sum_l l d_l / sum_l d_l with d_l what layer l added to the score (Tenney et al. 2019, equation 4); the first
  entry is layer 0, the embedding. nan where nothing was added."""
  added = np.diff(scores_N)
  total = added.sum()
  return float(np.arange(1, len(scores_N)) @ added / total) if total > 0 else float('nan')


def _solver(x_MxD: np.ndarray, y_MxK: np.ndarray):
  """penalty -> (weights, shift) of ridge regression; one eigendecomposition serves all penalties."""
  mean_D, mean_K = x_MxD.mean(0), y_MxK.mean(0)
  x, y = x_MxD - mean_D, y_MxK - mean_K
  values, vectors = np.linalg.eigh(x.T @ x)
  target, scale = vectors.T @ (x.T @ y), max(float(np.mean(x**2)) * len(x), 1e-30)

  def solve(penalty: float) -> tuple[np.ndarray, np.ndarray]:
    weights_DxK = vectors @ (target / (np.maximum(values, 0) + penalty * scale)[:, None])
    return weights_DxK, mean_K - mean_D @ weights_DxK

  return solve
