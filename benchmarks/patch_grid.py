"""A grid of activation patching, tfm beside TransformerLens: the same weights, inputs and metric, in turn.

    pip install -e '.[huggingface]' torch transformer-lens
    python benchmarks/patch_grid.py [--widths 128 256 512] [--rounds 3] [--output FILE.json]

A GPT-2 of 8 layers of 8 heads with random weights, 64 tokens; every layer and position of the residual stream, of what
attention adds and of what the MLP adds: 1,536 patched passes. tfm makes one program of them, TransformerLens runs
`get_act_patch_block_every`, a pass each. Both use the threads they choose. What a grid's first call costs more (the
compilation) is shown apart; the largest difference of the grids says that both measured the same.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import statistics
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
import transformers
from side_by_side import RESULTS, write
from transformer_lens.model_bridge import TransformerBridge
from transformer_lens.patching import get_act_patch_block_every

from tfm.analysis.patching import activation_patching
from tfm.interop.huggingface import load_release

LAYERS, HEADS, TOKENS, VOCABULARY = 8, 8, 64, 1000
SITES = ('decoder.layers.resid_pre', 'decoder.layers.self_attention.output', 'decoder.layers.mlp')


def difference(logits):
  """The metric: one logit less another at the last position; of both packages' arrays."""
  return logits[0, -1, 1] - logits[0, -1, 2]


def prepare(width: int, folder: Path):
  """Two functions without arguments, each a whole grid 3xNxT: tfm's and TransformerLens'."""
  torch.manual_seed(0)
  torch.set_grad_enabled(False)
  config = transformers.GPT2Config(n_layer=LAYERS, n_head=HEADS, n_embd=width, n_positions=TOKENS,
                                   vocab_size=VOCABULARY, initializer_range=0.1)
  theirs = transformers.GPT2LMHeadModel(config).eval()
  theirs.save_pretrained(folder)
  clean, corrupt = torch.randint(0, VOCABULARY, (2, 1, TOKENS))
  bridge = TransformerBridge.boot_transformers(str(folder), hf_model=theirs)
  bridge.enable_compatibility_mode(no_processing=True, disable_warnings=True)
  _, cache = bridge.run_with_cache(clean)
  release = load_release(folder)
  inputs = (clean.numpy(),), (corrupt.numpy(),)

  def ours() -> np.ndarray:
    found = activation_patching(release.model, release.params, *inputs, SITES, difference)
    return np.stack([np.asarray(found[name]) for name in SITES])

  def peer() -> np.ndarray:
    with open(os.devnull, 'w') as nowhere, contextlib.redirect_stderr(nowhere):  # a progress bar
      return get_act_patch_block_every(bridge, corrupt, cache, difference).numpy()

  return ours, peer


def timed(function) -> tuple[np.ndarray, float]:
  began = time.perf_counter()
  return function(), time.perf_counter() - began


def measure(width: int, rounds: int) -> dict:
  with tempfile.TemporaryDirectory() as folder:
    ours, peer = prepare(width, Path(folder))
  grid, first = timed(ours)
  seconds: dict[str, list[float]] = {'tfm': [], 'transformer_lens': []}
  for _ in range(rounds):
    for name, function in (('tfm', ours), ('transformer_lens', peer)):
      found, each = timed(function)
      seconds[name].append(round(each, 3))
      error = float(np.abs(found - grid).max())
  medians = {name: statistics.median(several) for name, several in seconds.items()}
  return {'width': width, 'seconds': seconds, 'median_seconds': medians, 'first_call_seconds': round(first, 2),
          'ratio': round(medians['transformer_lens'] / medians['tfm'], 1),
          'largest_difference': error, 'largest_metric': float(np.abs(grid).max())}


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument('--widths', type=int, nargs='+', default=[128, 256, 512])
  parser.add_argument('--rounds', type=int, default=3)
  parser.add_argument('--output', type=Path, default=RESULTS / 'patch_grid.json')
  arguments = parser.parse_args()
  rows = []
  for width in arguments.widths:
    rows.append(row := measure(width, arguments.rounds))
    print(f'{width:4} wide: tfm {row["median_seconds"]["tfm"]:7.2f} s (first call {row["first_call_seconds"]:.1f} s), '
          f'TransformerLens {row["median_seconds"]["transformer_lens"]:7.2f} s, ratio {row["ratio"]:.1f}; '
          f'differences up to {row["largest_difference"]:.1e} of {row["largest_metric"]:.2f}', flush=True)
  write(arguments.output, layers=LAYERS, heads=HEADS, tokens=TOKENS, sites=SITES, rounds=arguments.rounds, rows=rows)


if __name__ == '__main__':
  main()
