"""Starting from the weights of another run (`--init-from RUN`): weights only, embedding rows matched by token."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np

from tfm.training.average import run_checkpoints
from tfm.training.checkpoints import CheckpointError
from tfm.training.named_arrays import named_leaves
from tfm.training.run_folder import RunFolder

if TYPE_CHECKING:
  from tfm.text.tokenizer import Tokenizers

Params = dict[str, Any]

SIDE = {'source_embedding': 'source', 'target_embedding': 'target', 'output': 'target'}
"""Modules with one row per token, and whose vocabulary the rows belong to (with one for both, either side is it)."""


def init_from(run: str | os.PathLike[str] | RunFolder, params: Params, tokenizers: Tokenizers,
              vocab_multiple: int = 1) -> tuple[Params, str]:
  """Take the weights of the newest checkpoint of another run; optimizer, step and random key start afresh.

  Args:
    run: the run to take from (an averaged one will do).
    params: freshly initialised parameters of the new model, in either layout.
    tokenizers: those of the new run.
    vocab_multiple: of the new model; its tables are padded to it.

  Returns:
    The parameters, in the layout of `params`, and a sentence on what was taken. A leaf is taken where path and shape
    agree. In embedding and output tables a row is taken where both vocabularies have its token; the rows of new
    tokens stay as they were initialised.

  Raises:
    CheckpointError: a leaf exists in both models with different shapes (all are listed), or nothing could be taken.
  """
  from tfm.models.layout import layout_of, to_layout
  folder = run if isinstance(run, RunFolder) else RunFolder(run)
  config = folder.read_config()
  stored, meta = run_checkpoints(folder, config).restore_params()
  old_tokenizers = folder.read_tokenizers()
  fresh = to_layout(params, 'unrolled')
  old = named_leaves(to_layout(stored, 'unrolled'))

  taken: dict[str, jax.Array] = {}
  rows: list[str] = []
  missing: list[str] = []
  misshapen: list[str] = []
  for name, leaf in named_leaves(fresh).items():
    side = SIDE.get(name.split('/')[0])  # of the top: every attention layer has an `output` too
    if name not in old:
      missing.append(name)
    elif side is not None and old[name].shape[1:] == leaf.shape[1:]:
      words, old_words = (getattr(t, side).vocabulary() for t in (tokenizers, old_tokenizers))
      _require_rows(name, leaf, words, vocab_multiple, 'the new model')
      _require_rows(name, old[name], old_words, config.model.vocab_multiple, str(folder.path))
      taken[name], count = _map_rows(leaf, words, old[name], old_words)
      rows.append(f'{count} of {len(words)} rows of {name}')
    elif old[name].shape == leaf.shape:
      taken[name] = jnp.asarray(old[name], leaf.dtype)
    else:
      misshapen.append(f'{name} is {tuple(old[name].shape)} there and {tuple(leaf.shape)} here')
  if misshapen:
    raise CheckpointError(f'The weights of {folder.path} do not fit this model: {"; ".join(misshapen)}. '
                          'Give the model the same sizes, or start without --init-from.')
  if not taken:
    raise CheckpointError(f'{folder.path} has no parameter in common with this model; start without --init-from.')

  merged = jax.tree.unflatten(jax.tree.structure(fresh),
                              [taken.get(name, leaf) for name, leaf in named_leaves(fresh).items()])
  whole = len(taken) - len(rows)
  report = f'Took {whole} arrays'
  report += f' and, by token, {", ".join(rows)}' if rows else ''
  report += f' from step {meta["step"]} of {folder.path}.'
  if missing:
    report += f' Freshly initialised, because that run does not have them: {", ".join(missing)}.'
  unused = [name for name in old if name not in taken]
  if unused:
    report += f' Not used, because this model does not have them: {", ".join(unused)}.'
  return to_layout(merged, layout_of(params)), report


def _map_rows(fresh: jax.Array, words: list[str], old: np.ndarray, old_words: list[str]) -> tuple[jax.Array, int]:
  """`fresh` with the rows of all tokens that `old_words` knows, and their number."""
  row_of = {word: row for row, word in enumerate(old_words)}
  known = [row for row, word in enumerate(words) if word in row_of]
  table = np.array(fresh)
  table[known] = np.asarray(old)[[row_of[words[row]] for row in known]]
  return jnp.asarray(table), len(known)


def _require_rows(name: str, table: Any, words: list[str], multiple: int, where: str) -> None:
  if table.shape[0] != -(-len(words) // multiple) * multiple:
    raise CheckpointError(f'{name} of {where} has {table.shape[0]} rows, but its vocabulary has {len(words)} tokens; '
                          'model and tokenizer do not belong together.')
