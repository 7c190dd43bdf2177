"""`tfm inspect`: a page that shows who looks at whom."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import tyro

from tfm.errors import UserError


def inspect(
    run: tyro.conf.Positional[str],
    text: tyro.conf.Positional[str],
    /,
    output: Path = Path('attention.html'),
    target: str | None = None,
    step: int | Literal['best'] | None = None,
    top_k: int = 5,
) -> None:
  """Write a page, to open in any browser, of what a model does with a sentence: every attention by layer and head, the
  alignment of source and target, and the most probable tokens by layer.

  Args:
    run: Run folder, release, or 'hf:' and the name or folder of a Hugging Face model.
    text: What the model reads.
    output: File to write.
    target: Translators: the translation to look at; the one that the model writes if left out.
    step: Which checkpoint: a number, 'best' (of the validated ones), or the newest if left out.
    top_k: How many tokens to show of each prediction.
  """
  if output.is_dir():
    raise UserError(f'--output {output} is a folder; give the name of a file in it.')
  if not output.absolute().parent.is_dir():
    raise UserError(f'There is no folder {output.parent} for --output {output}; make it first.')
  if not text.strip():
    raise UserError('The text is empty, so there is nothing to show; give a sentence.')
  from tfm.analysis.inspection import inspect_page
  from tfm.pipeline import open_run
  print(inspect_page(open_run(run, step), text, target, top_k=top_k).write(output))
