"""From a run folder, a release or a Hugging Face model to something to use: `tfm.load(folder)`."""

from __future__ import annotations

import os
from typing import Literal

from tfm.encoder import Encoder, Filling
from tfm.generator import Generation, Generator, Score
from tfm.interop.release import Release, ReleaseError, is_release, read_release
from tfm.loaded import Loaded, assemble, framing
from tfm.training.run_folder import RunFolder
from tfm.translator import Hypothesis, Translation, Translator

__all__ = ['Encoder', 'Filling', 'Generation', 'Generator', 'Hypothesis', 'Score', 'Translation', 'Translator', 'load']


def load(run: str | os.PathLike[str], step: int | Literal['best'] | None = None) -> Loaded:
  """A `Translator` (encoder-decoder), `Generator` (decoder-only) or `Encoder` (encoder-only), ready to use.

  Args:
    run: the folder that train.py --run wrote, an average of its checkpoints, a release (`tfm export`), or 'hf:' and the
      name or folder of a Hugging Face model.
    step: which checkpoint; 'best' is the best validated one, None the newest intact one. Only a run has several.

  Raises:
    RunFolderError: the folder is not a run, or is of a newer format.
    CheckpointError: no such step, or none that is intact.
    ReleaseError: the release is damaged, has no steps to choose from, or no tokenizers.
    HuggingFaceError: the model is of a family that is not known, or does not fit its config.
  """
  release = read(run, step)
  if release.tokenizers is None:
    raise ReleaseError(f'{run} has no tokenizer; read its weights with tfm.interop.release.read_release.')
  return assemble(release.config, release.model, release.params, release.tokenizers, release.special)


def read(run: str | os.PathLike[str], step: int | Literal['best'] | None = None) -> Release:
  """What `load` puts together and `tfm export` writes; arguments and errors are those of `load`."""
  hugging_face = os.fspath(run).startswith('hf:')
  if step is not None and (hugging_face or is_release(run)):
    raise ReleaseError(f'{run} has one set of weights; leave out step={step!r}.')
  if hugging_face:
    from tfm.interop.huggingface import load_release
    return load_release(os.fspath(run).removeprefix('hf:'))
  if is_release(run):
    return read_release(run)
  from tfm.training.average import run_checkpoints  # Orbax, which the others do without
  folder = RunFolder(run)
  config, tokenizers = folder.read_config(), folder.read_tokenizers()
  params, _ = run_checkpoints(folder, config).restore_params(step)
  return Release(config, params, tokenizers, (tokenizers.source.vocab_size, tokenizers.target.vocab_size),
                 framing(config))


def open_run(run: str | os.PathLike[str], step: int | Literal['best'] | None = None) -> Loaded:
  """`load` for a program of its own, whose compiled programs are kept for the next time."""
  from tfm.training.compilation_cache import use_compilation_cache
  use_compilation_cache()
  return load(run, step)
