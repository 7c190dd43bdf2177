"""E9: attention alone forgets which token is which; a skip connection keeps it, an MLP only delays (Dong et al. 2021).

What the reading notes say of skip connections *and* MLPs is three statements of that paper: without both, tokens become
equal doubly exponentially in depth (theorem 2.2); a skip connection can prevent it (claim 3.1); an MLP slows it by its
Lipschitz constant (corollary 3.2); LayerNorm plays no role (3.3). All are of random weights, in float64: the collapse
passes below what float32 can tell from 0 within four layers.
"""

from __future__ import annotations

from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np

from tfm.analysis.rank import rank_residual
from tfm.analysis.result import Result, as_result

ARMS = {'attention alone': dict(skip=0.0, mlp=None), 'with MLP': dict(skip=0.0, mlp=1.0),
        'with skip': dict(skip=1.0, mlp=None), 'both': dict(skip=1.0, mlp=1.0)}
"""As in the paper's code: an MLP has a skip connection of its own in every arm that has one."""
FLOOR = 1e3 * np.finfo(np.float64).eps
"""Below this a residual is rounding."""


def run_rank_collapse(layers: int = 12, length: int = 64, width: int = 128, heads: int = 8, seeds: int = 5,
                      gains: tuple[float, ...] = (0.0, 1.0, 3.0, 10.0, 30.0),
                      skips: tuple[float, ...] = (0.0, 0.1, 0.3, 1.0), seed: int = 0) -> Result:
  """r_l = ||res(X_l)|| / ||X_l|| of random stacks, layer by layer, for each arm, norm, MLP gain and skip strength."""
  with jax.enable_x64(True):
    curves = partial(_curves, layers=layers, length=length, width=width, heads=heads, seeds=range(seed, seed + seeds))
    arms = {(name, norm): curves(**arm, norm=norm) for name, arm in ARMS.items() for norm in (False, True)}
    by_gain = {gain: curves(skip=0.0, mlp=gain, norm=False) for gain in gains}
    by_skip = {skip: curves(skip=skip, mlp=None, norm=False) for skip in skips}
  alone, skipped = arms['attention alone', False], arms['with skip', False]
  rates = {norm: [rate(curve) for curve in arms['attention alone', norm]] for norm in (False, True)}
  depth = {gain: [_first_below(curve, 1e-3) for curve in found] for gain, found in by_gain.items()}

  def collapses(curves, rates):
    return (curves[:, 4] < 1e-6) & (np.array(rates) >= 2.5)

  conditions = {
      'P1: alone r_4 < 1e-6, and each layer takes at least 2.5 times the decades of the last, in every seed':
          bool(collapses(alone, rates[False]).all()),
      'P2: with skip r_12 > 1e-2, and no layer loses more than half a decade':
          bool((skipped[:, -1] > 1e-2).all() and (np.diff(np.log10(skipped), axis=1) > -0.5).all()),
      'P3: an MLP of gain 10 delays r < 1e-3 to twice the depth of gain 1 or more, but not for ever':
          bool(np.median(depth[10.0]) >= 2 * np.median(depth[1.0]) and (by_gain[10.0][:, -1] < 1e-3).all()),
      'P4: with LayerNorm P1 has the same answer in every seed':
          bool((collapses(arms['attention alone', True], rates[True]) == collapses(alone, rates[False])).all())}
  control = bool(not collapses(skipped, [rate(curve) for curve in skipped]).any())
  measured = {
      'conditions': conditions,
      'r by layer': {f'{name}{", LayerNorm" if norm else ""}': np.median(found, axis=0)
                     for (name, norm), found in arms.items()},
      'growth of decades per layer': {'no norm': rates[False], 'LayerNorm': rates[True]},
      'first layer with r < 1e-3, by gain of the MLP': {str(gain): found for gain, found in depth.items()},
      'r by layer, by strength of the skip': {str(skip): np.median(found, axis=0) for skip, found in by_skip.items()},
  }

  def plot(axes):
    for name, found in measured['r by layer'].items():
      axes.semilogy(np.maximum(found, 1e-17), '--' if 'LayerNorm' in name else '-', label=name)
    axes.set_xlabel('layer')
    axes.set_ylabel('rank residual r')
    axes.legend(fontsize=7)

  return as_result('E9', 'attention alone loses rank doubly exponentially with depth; skip connections prevent it',
                   '; '.join(conditions), 'P1 with a skip connection: fails' if control else
                   'P1 with a skip connection: HOLDS, as it must not', measured,
                   'holds' if all(conditions.values()) and control else 'fails', plot)


def rate(curve: np.ndarray) -> float:
  """Median over layers of log r_{l+1} / log r_l, where both are below 0.5 and above the floor: 3 in theory, but for a
  constant. nan where no two layers are."""
  logs = np.log(curve[(curve < 0.5) & (curve > FLOOR)])
  return float(np.median(logs[1:] / logs[:-1])) if len(logs) > 1 else float('nan')


def _first_below(curve: np.ndarray, level: float) -> int:
  """The first layer, or one more than there are."""
  below = np.flatnonzero(curve < level)
  return int(below[0]) if len(below) else len(curve)


def _curves(*, skip, mlp, norm, seeds, **shape) -> np.ndarray:
  """r of every layer, the input included: seeds x (layers + 1)."""
  return np.stack([_curve(*_drawn(seed, **shape), skip, 0.0 if mlp is None else mlp, norm=norm, has_mlp=mlp is not None)
                   for seed in seeds])


@cache
def _drawn(seed: int, *, layers, length, width, heads) -> tuple[jax.Array, dict[str, jax.Array]]:
  """The input, and the weights of all layers (LeCun et al. 1998): those of a seed are the same in every arm."""
  rng = np.random.default_rng(seed)

  def weights(*shape, inputs=width):
    return jnp.asarray(rng.standard_normal((layers, *shape)) / np.sqrt(inputs))

  x_TxD = jnp.asarray(rng.standard_normal((length, width)))
  return x_TxD, {'inputs': weights(3, width, heads, width // heads), 'output': weights(heads, width // heads, width),
                 'inner': weights(width, 4 * width), 'outer': weights(4 * width, width, inputs=4 * width)}


@partial(jax.jit, static_argnames=('norm', 'has_mlp'))
def _curve(x_TxD, weights, skip, gain, *, norm, has_mlp):

  def layer(x_TxD, w):
    query, key, value = jnp.einsum('td,pdhc->pthc', x_TxD, w['inputs'])
    pattern_HxTxT = jax.nn.softmax(jnp.einsum('thc,shc->hts', query, key) / np.sqrt(query.shape[-1]))
    y_TxD = skip * x_TxD + jnp.einsum('hts,shc,hcd->td', pattern_HxTxT, value, w['output'])
    y_TxD = _layer_norm(y_TxD) if norm else y_TxD
    if has_mlp:
      y_TxD = y_TxD + gain * (jax.nn.relu(y_TxD @ w['inner']) @ w['outer'])
      y_TxD = _layer_norm(y_TxD) if norm else y_TxD
    return y_TxD, rank_residual(y_TxD)

  _, found = jax.lax.scan(layer, x_TxD, weights)
  return jnp.concatenate([rank_residual(x_TxD)[None], found])


def _layer_norm(x_TxD):
  centred = x_TxD - x_TxD.mean(-1, keepdims=True)
  return centred * jax.lax.rsqrt(jnp.var(x_TxD, axis=-1, keepdims=True) + 1e-12)
