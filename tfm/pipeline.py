"""From a run folder, a release or a Hugging Face model to something to use: `tfm.load(folder)`."""

from __future__ import annotations

import os
from typing import Any, Literal

from tfm.config import Config
from tfm.encoder import Encoder, Filling
from tfm.generator import Generation, Generator, Score
from tfm.interop.release import Release, ReleaseError, is_release, read_release
from tfm.models.build import Model, build_model, with_layout
from tfm.special_ids import BOS, OURS, SpecialIds
from tfm.text.tokenizer import Tokenizers
from tfm.training.run_folder import RunFolder
from tfm.translator import Hypothesis, Translation, Translator

__all__ = ['Encoder', 'Filling', 'Generation', 'Generator', 'Hypothesis', 'Score', 'Translation', 'Translator', 'load']

Loaded = Translator | Generator | Encoder


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
  hugging_face = os.fspath(run).startswith('hf:')
  if step is not None and (hugging_face or is_release(run)):
    raise ReleaseError(f'{run} has one set of weights; leave out step={step!r}.')
  if hugging_face:
    from tfm.interop.huggingface import load_release
    return _of_release(load_release(os.fspath(run).removeprefix('hf:')), run)
  if is_release(run):
    return _of_release(read_release(run), run)
  from tfm.training.average import run_checkpoints  # Orbax, which the others do without
  folder = RunFolder(run)
  config, tokenizers = folder.read_config(), folder.read_tokenizers()
  params, meta = run_checkpoints(folder, config).restore_params(step)
  model = build_model(config.model, tokenizers.source.vocab_size, tokenizers.target.vocab_size)
  return assemble(config, with_layout(model, meta['layout'] == 'scanned'), params, tokenizers, framing(config))


def _of_release(release: Release, name: str | os.PathLike[str]) -> Loaded:
  if release.tokenizers is None:
    raise ReleaseError(f'{name} has no tokenizer; read its weights with tfm.interop.release.read_release.')
  return assemble(release.config, release.model, release.params, release.tokenizers, release.special)


def assemble(config: Config, model: Model, params: Any, tokenizers: Tokenizers, special: SpecialIds) -> Loaded:
  """What uses a model of this shape."""
  if config.model.shape == 'encoder_decoder':
    return Translator(model, params, tokenizers, config.decoding, special)
  return (Generator if config.model.shape == 'decoder_only' else Encoder)(model, params, tokenizers, special)


def framing(config: Config) -> SpecialIds:
  """How texts were framed in the training of this config."""
  if config.model.shape == 'encoder_decoder':
    return OURS
  if config.model.shape == 'encoder_only':
    return SpecialIds(source_prefix=(BOS,))
  # A stream that was cut into blocks anywhere has no beginning.
  stream = config.data.packing == 'blocks' and config.data.documents == 'file'
  return SpecialIds(source_prefix=() if stream else (BOS,), source_suffix=())
