"""To StableHLO, through jax.export: programs that run wherever JAX or another StableHLO runtime does, without tfm.

The folder is a release (tfm/interop/release.py) and beside it

    encode.bin      (weights, source) -> memory                                 not where there is no encoder
    step.bin        (weights, tokens, index, memory, past) -> (logits, past)    one token further for every row
    manifest.json   inputs and outputs by name with shapes and types, special ids, platforms, versions

Weights are an argument and not constants: the two programs share one copy, stay below a megabyte, and run with any
weights of this model. Batch, source length and room of the cache are symbolic, so one program serves all shapes.
"""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from flax.traverse_util import unflatten_dict
from jax import export

import tfm
from tfm.attention.attend import SHORT, for_platform
from tfm.attention.masks import AttentionMask
from tfm.decoding.cache import Cache
from tfm.errors import UserError
from tfm.interop.plain_tokenizer import write_plain_tokenizers
from tfm.interop.release import Release, fill, new_folder, require_transformer
from tfm.models.build import Model
from tfm.models.multihead import CachedKeysValues
from tfm.models.transformer import Memory, empty_cache

FORMAT = 1
"""Version of the folder; raised when the programs are called in another way."""
PLATFORMS = ('cpu', 'cuda', 'tpu')

Named = dict[str, jax.Array]


class StableHLOError(UserError):
  """A model that has no such programs."""


def write_stablehlo(release: Release, folder: str | os.PathLike[str], platforms: Sequence[str] = PLATFORMS,
                    batch: int | None = None) -> Path:
  """Write a new folder with the programs; docs/export.md calls them.

  Args:
    release: encoder-decoder or decoder-only.
    folder: to write.
    platforms: that the programs are lowered for.
    batch: rows, the same in every call; None: any number.

  Raises:
    StableHLOError: the model is encoder-only or has experts that need a fixed batch, or a platform is unknown.
    ReleaseError: the folder exists, or the weights are not the model's.
    ModuleNotFoundError: flatbuffers is missing; it comes with the extra `stablehlo`.
  """
  require_transformer(release.config.model, StableHLOError, 'The export to StableHLO')
  if release.config.model.shape == 'encoder_only':
    raise StableHLOError('An encoder-only model writes no tokens, so it has no step to export; export it to '
                         'safetensors.')
  if release.config.model.experts and (batch is None or release.config.model.encoder_layers):
    raise StableHLOError('Experts sort the tokens of a batch, so their number must be known: model.experts needs a '
                         'fixed batch (--batch) and a decoder-only model; export it to safetensors.')
  if unknown := sorted(set(platforms) - {*PLATFORMS, 'rocm'}):
    raise StableHLOError(f'There is no platform {", ".join(unknown)}; choose from {", ".join(PLATFORMS)} and rocm.')
  try:
    import flatbuffers  # noqa: F401
  except ModuleNotFoundError as error:
    raise ModuleNotFoundError("jax.export writes with flatbuffers: pip install 'tfm[stablehlo]'.") from error
  programs = build_programs(release, tuple(platforms), batch)
  with new_folder(folder) as building:
    fill(release, building)
    for name, program in programs.items():
      (building / f'{name}.bin').write_bytes(program.serialize())
    (building / 'manifest.json').write_text(json.dumps(_manifest(release, programs), indent=2) + '\n')
    if release.tokenizers is not None:
      write_plain_tokenizers(release.tokenizers, building)
  return Path(folder)


def build_programs(release: Release, platforms: tuple[str, ...],
                   batch: int | None = None) -> dict[str, export.Exported]:
  """'encode', where there is an encoder, and 'step'."""
  config = dataclasses.replace(release.config.model, attention_backend='reference', scan_layers=False)
  model = release.model.clone(config=config)
  most = min(config.longest or SHORT, SHORT - 1)  # with fewer keys than SHORT, a step takes the reference
  weights = {name: jax.ShapeDtypeStruct(array.shape, array.dtype) for name, array in release.named().items()}
  memory, programs = {}, {}

  def sizes(*names):  # every program has its own
    known = [bound for name in names for bound in (f'{name} <= {most}', f'2*{name}^2 >= {name}')]
    return export.symbolic_shape(', '.join([str(batch or 'B'), *names]), constraints=known)

  def exported(function, *arguments):
    # Kernels of one platform alone would be chosen while tracing; the reference runs on all.
    with for_platform('cpu'):
      return export.export(jax.jit(partial(function, model)), platforms=platforms)(weights, *arguments)

  if config.encoder_layers:
    programs['encode'] = exported(_encode, jax.ShapeDtypeStruct(sizes('S'), jnp.int32))
    B, S, L = sizes('S', 'L')
    memory = jax.eval_shape(partial(_encode, model), weights, jax.ShapeDtypeStruct((B, S), jnp.int32))
  else:
    B, L = sizes('L')
  past = jax.eval_shape(lambda: _named(empty_cache(config, B, L)))
  programs['step'] = exported(_step, jax.ShapeDtypeStruct((B,), jnp.int32), jax.ShapeDtypeStruct((), jnp.int32),
                              memory, past)
  return programs


def _encode(model: Model, weights: Named, source_BxS: jax.Array) -> Named:
  variables = {'params': unflatten_dict(weights, sep='/')}
  memory = model.apply(variables, source_BxS, method='encode')
  lengths_B = memory.mask.lengths_B
  if lengths_B is None:  # no id is padding
    lengths_B = jnp.full(source_BxS.shape[:1], source_BxS.shape[1], jnp.int32)
  return {'lengths': lengths_B, **_named(model.apply(variables, memory, 1, method='init_cache').source)}


def _step(model: Model, weights: Named, tokens_B: jax.Array, index: jax.Array, memory: Named,
          past: Named) -> tuple[jax.Array, Named]:
  variables = {'params': unflatten_dict(weights, sep='/')}
  cache = Cache(index=index, source=_layers(memory), steps=_layers(past))
  more = ()
  if memory:
    more = (Memory(None, AttentionMask(lengths_B=memory['lengths'])),)
  else:
    cache = cache.replace(source=(None,) * model.config.decoder_layers)
  logits_Bx1xV, cache = model.apply(variables, tokens_B[:, None], *more, cache, method='step')
  return logits_Bx1xV[:, 0], _named(cache.steps)


def _named(layers: tuple[CachedKeysValues, ...]) -> Named:
  return {f'layers_{i}/{name}': array for i, layer in enumerate(layers)
          for name, array in (('keys', layer.keys_BxKxSxC), ('values', layer.values_BxKxSxC))}


def _layers(named: Named) -> tuple[CachedKeysValues, ...]:
  count = sum(name.endswith('/keys') for name in named)
  return tuple(CachedKeysValues(named[f'layers_{i}/keys'], named[f'layers_{i}/values']) for i in range(count))


def _manifest(release: Release, programs: dict[str, export.Exported]) -> dict[str, Any]:
  names = {'encode': ('source',), 'step': ('tokens', 'index', 'memory', 'past')}
  results = {'encode': lambda memory: {'memory': memory}, 'step': lambda out: {'logits': out[0], 'past': out[1]}}

  def described(avals):
    return jax.tree.map(lambda aval: {'shape': [size if isinstance(size, int) else str(size) for size in aval.shape],
                                      'dtype': aval.dtype.name}, avals)

  described_programs = {}
  for name, program in programs.items():
    (_, *inputs), _ = jax.tree.unflatten(program.in_tree, program.in_avals)
    outputs = jax.tree.unflatten(program.out_tree, program.out_avals)
    described_programs[name] = {'file': f'{name}.bin',
                                'inputs': {'weights': 'model.safetensors', **dict(zip(names[name], described(inputs)))},
                                'outputs': described(results[name](outputs))}
  return {'format': FORMAT, 'tfm': tfm.__version__, 'jax': jax.__version__,
          'platforms': list(programs['step'].platforms), 'special': dataclasses.asdict(release.special),
          'vocab_sizes': release.vocab_sizes, 'longest': release.config.model.longest, 'programs': described_programs}
