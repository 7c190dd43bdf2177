"""One door to every attention kernel: `attend` describes the request, asks the backends and calls one.

`reference` holds scores and pattern, so it can do everything, in memory T x S. The others never hold them; each says
in `supports` what else it cannot do, and then `auto` passes on to the next and an explicit choice is an error.
"""

from __future__ import annotations

import contextlib
import contextvars
import functools
import importlib
import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import jax
import numpy as np

from tfm.attention import dot_product
from tfm.attention.masks import AttentionMask
from tfm.errors import UserError

log = logging.getLogger('tfm')

SHORT, LONG = 512 * 512, 1024 * 1024
"""T x S below SHORT: `auto` takes the reference everywhere. From LONG: blockwise, if nothing faster fits."""

_platform: contextvars.ContextVar[str | None] = contextvars.ContextVar('platform', default=None)


class AttentionError(UserError):
  """The chosen backend cannot do what is asked; the message says why and what to do."""


@contextlib.contextmanager
def for_platform(platform: str) -> Iterator[None]:
  """Choose kernels for another platform ('cpu', 'gpu', 'tpu') than this machine's, to lower ahead of time.

  The choice is made while tracing, and `jax.jit` does not know of it: trace a function that was not traced before.
  """
  token = _platform.set(platform)
  try:
    yield
  finally:
    _platform.reset(token)


@dataclass(frozen=True)
class Request:
  """What a backend must know to answer. The mask counts by which of its conditions are set, not by their values."""

  batch: int
  query_length: int
  key_length: int
  heads: int
  key_heads: int
  width: int
  value_width: int
  dtype: str
  """Of queries, keys and values; 'bfloat16/float32' if they differ."""
  mask: AttentionMask
  bias: bool
  softcap: bool
  sinks: bool
  dropout: bool
  needs_pattern: bool
  platform: str
  """'cpu', 'gpu' or 'tpu'."""
  context: int
  """Devices that share out the sequence: the size of the mesh axis `context`."""
  partitioned: bool
  """Whether the compiler is to partition the program over a mesh of several devices."""

  @classmethod
  def of(cls, q_BxTxHxC, k_BxSxKxC, v_BxSxKxC, mask: AttentionMask | None = None, *, bias: bool = False,
         softcap: bool = False, sinks: bool = False, dropout: bool = False, needs_pattern: bool = False) -> Request:
    """For arrays, or anything else with shape and dtype, on the platform and mesh of the moment."""
    (B, T, H, C), (S, K) = q_BxTxHxC.shape, k_BxSxKxC.shape[1:3]
    mesh = jax.sharding.get_abstract_mesh()
    shared = {name: size for name, size in mesh.shape.items() if size > 1 and name not in mesh.manual_axes}
    return cls(
        batch=B, query_length=T, key_length=S, heads=H, key_heads=K, width=C, value_width=v_BxSxKxC.shape[-1],
        dtype='/'.join(dict.fromkeys(x.dtype.name for x in (q_BxTxHxC, k_BxSxKxC, v_BxSxKxC))),
        mask=AttentionMask() if mask is None else mask, bias=bias, softcap=softcap, sinks=sinks, dropout=dropout,
        needs_pattern=needs_pattern, platform=_platform.get() or jax.default_backend(),
        context=shared.get('context', 1), partitioned=bool(shared))

  @property
  def offset(self) -> int | None:
    """Position of query 0 on the key axis; None if it is known only when the program runs."""
    offset = self.mask.shift
    return int(offset) if isinstance(offset, (int, np.integer)) else None

  @property
  def needs_whole_pattern(self) -> str | None:
    """Why no kernel that never holds the pattern can do it; None if one can."""
    if self.needs_pattern:
      return 'it never holds the scores and the pattern that are to be read'
    if self.dropout:
      return 'it has no dropout on the pattern'
    if self.bias:
      return 'it has no gradient for a bias'
    return None

  @property
  def needs_own_softmax(self) -> str | None:
    """Why no kernel that has the plain softmax only can do it; None if one can."""
    if self.softcap:
      return 'it has no cap on the scores'
    if self.sinks:
      return 'it has no sinks in its softmax'
    return None

  def __str__(self) -> str:
    mask, parts = self.mask, []
    for name, is_set in (('causal', mask.causal), ('window', mask.window), ('prefix', mask.prefix_B is not None),
                         ('lengths', mask.lengths_B is not None), ('segments', mask.query_segments_BxT is not None),
                         ('dense', mask.dense is not None), ('offset', mask.positional and self.offset != 0),
                         ('bias', self.bias), ('softcap', self.softcap), ('sinks', self.sinks),
                         ('dropout', self.dropout), ('the pattern', self.needs_pattern)):
      parts += [name] if is_set else []
    return f'{" + ".join(parts) or "no mask"} in {self.dtype} on {self.platform}'


@dataclass(frozen=True)
class Backend:
  """A module with `supports(request)` and `attend(q, k, v, mask, *, scale)`, imported when it is first asked.

  `attend` also takes `softcap` and `sinks_H` if `supports` accepts them.
  """

  module: str

  def supports(self, request: Request) -> str | None:
    """None, or why not, as the end of a sentence."""
    return importlib.import_module(self.module).supports(request)

  def attend(self, *arguments, **options) -> jax.Array:
    return importlib.import_module(self.module).attend(*arguments, **options)


class Reference:
  """`dot_product.attend`, which is exact and does everything."""

  attend = staticmethod(dot_product.attend)

  @staticmethod
  def supports(request: Request) -> str | None:
    del request
    return None


BACKENDS = {'reference': Reference} | {
    name: Backend(f'tfm.attention.{name}') for name in ('blockwise', 'cudnn', 'pallas', 'ring', 'ulysses')}


def attend(
    q_BxTxHxC: jax.Array,
    k_BxSxKxC: jax.Array,
    v_BxSxKxC: jax.Array,
    mask: AttentionMask | None = None,
    *,
    bias: jax.Array | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    sinks_H: jax.Array | None = None,
    dropout: Callable[[jax.Array], jax.Array] | None = None,
    tap: Callable[[str, jax.Array], jax.Array] | None = None,
    needs_pattern: bool = False,
    backend: str = 'auto',
) -> jax.Array:
  """softmax(Q K^T * scale + bias) V by the backend that fits; arguments as in `dot_product.attend`.

  Args:
    scale, softcap: Python numbers (1 / sqrt(C) and no cap if None); only the reference takes traced ones.
    tap: sees `z`, and from the reference also `scores` and `pattern`.
    needs_pattern: the tap's `scores` and `pattern` will be read or replaced, so they must exist.
    backend: 'auto' or a name in BACKENDS.

  Returns:
    BxTxHxC in the type of the values; exactly 0, with zero gradients, where a query may attend to nothing.

  Raises:
    AttentionError: if an explicit backend cannot do it, or H is not a multiple of K.
  """
  H, K = q_BxTxHxC.shape[2], k_BxSxKxC.shape[2]
  if H % K:
    raise AttentionError(f'{H} query heads cannot share {K} key/value heads; make the first a multiple of the second.')
  tap = (lambda name, value: value) if tap is None else tap
  request = Request.of(q_BxTxHxC, k_BxSxKxC, v_BxSxKxC, mask, bias=bias is not None, softcap=softcap is not None,
                       sinks=sinks_H is not None, dropout=dropout is not None, needs_pattern=needs_pattern)
  name = choose(request, backend)
  if name == 'reference':
    return dot_product.attend(q_BxTxHxC, k_BxSxKxC, v_BxSxKxC, mask, bias=bias, scale=scale, softcap=softcap,
                              sinks_H=sinks_H, dropout=dropout, tap=tap)
  given = {key: value for key, value in (('softcap', softcap), ('sinks_H', sinks_H)) if value is not None}
  return tap('z', BACKENDS[name].attend(q_BxTxHxC, k_BxSxKxC, v_BxSxKxC, mask, scale=scale, **given))


def choose(request: Request, backend: str = 'auto') -> str:
  """The name of the backend that `attend` would call."""
  if backend == 'auto':
    return _first_that_fits(request)
  if backend not in BACKENDS:
    raise AttentionError(f"There is no attention backend '{backend}'; choose 'auto' or one of {', '.join(BACKENDS)}.")
  reason = BACKENDS[backend].supports(request)
  if reason is not None:
    raise AttentionError(f"Attention backend '{backend}' cannot do {request}: {reason}; choose 'auto' or 'reference'.")
  return backend


def _first_that_fits(request: Request) -> str:
  passed_over = []
  for name in _preference(request):
    reason = BACKENDS[name].supports(request)
    if reason is None:
      break
    passed_over.append(f'; not {name}: {reason}')
  # Right all the same, since the compiler gathers the sequence; but that is not what a context axis was asked for.
  level = (logging.WARNING if name == 'reference' and request.context > 1 else
           logging.DEBUG if name == 'reference' and not passed_over else logging.INFO)
  _say_once(level, f'attention: {name} for {request}{"".join(passed_over)}')
  return name


def _preference(request: Request) -> list[str]:
  """Backends in the order in which `auto` asks them; the last one can do everything."""
  if request.context > 1:
    return ['ring', 'reference']
  size, names = request.query_length * request.key_length, []
  if size >= SHORT:
    names += {'gpu': ['cudnn'], 'tpu': ['pallas']}.get(request.platform, [])
  if size >= LONG:
    names.append('blockwise')
  return [*names, 'reference']


@functools.cache
def _say_once(level: int, sentence: str) -> None:
  log.log(level, sentence)
