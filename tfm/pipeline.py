"""From a run folder to something that translates: `tfm.load(run)`."""

from __future__ import annotations

import os
from typing import Literal

from tfm.models.build import build_model, with_layout
from tfm.training.average import run_checkpoints
from tfm.training.run_folder import RunFolder
from tfm.translator import Hypothesis, Translation, Translator

__all__ = ['Hypothesis', 'Translation', 'Translator', 'load']


def load(run: str | os.PathLike[str], step: int | Literal['best'] | None = None) -> Translator:
  """A `Translator` with the weights, tokenizers and decoding settings of a run.

  Args:
    run: the folder that train.py --run wrote, or an average of its checkpoints.
    step: which checkpoint; 'best' is the best validated one, None the newest intact one.

  Raises:
    RunFolderError: the folder is not a run, or is of a newer format.
    CheckpointError: no such step, or none that is intact.
  """
  folder = RunFolder(run)
  config, tokenizers = folder.read_config(), folder.read_tokenizers()
  params, meta = run_checkpoints(folder, config).restore_params(step)
  model = build_model(config.model, tokenizers.source.vocab_size, tokenizers.target.vocab_size)
  return Translator(with_layout(model, meta['layout'] == 'scanned'), params, tokenizers, config.decoding)
