"""Tensors of Hugging Face: read from their files, named alike, and reshaped into parameters of ours and back."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import ml_dtypes
import numpy as np

from tfm.config import TransformerConfig
from tfm.interop.huggingface_config import HuggingFaceError
from tfm.interop.huggingface_families import Family

SAFETENSORS, TORCH = 'model.safetensors', 'pytorch_model.bin'
_HEADS = re.compile(r'(lm_head|cls|classifier|final_logits_bias)\b')


def read_tensors(folder: Path) -> dict[str, np.ndarray]:
  """Every tensor by its name, in one file or in several that an index lists; `HuggingFaceError` if there are none."""
  for name, read in ((SAFETENSORS, _read_safetensors), (TORCH, _read_torch)):
    index = folder / f'{name}.index.json'
    if (folder / name).is_file():
      return read(folder / name)
    if index.is_file():
      files = sorted(set(json.loads(index.read_text(encoding='utf-8'))['weight_map'].values()))
      absent = [file for file in files if not (folder / file).is_file()]
      if absent:
        raise HuggingFaceError(f'{index} lists {", ".join(absent)}, which {folder} has not; copy the whole folder.')
      return {name: array for file in files for name, array in read(folder / file).items()}
  raise HuggingFaceError(f'{folder} has neither {SAFETENSORS} nor {TORCH}; give the folder of a whole model.')


def _read_safetensors(file: Path) -> dict[str, np.ndarray]:
  try:
    from safetensors import SafetensorError, safe_open
  except ModuleNotFoundError as error:
    raise ModuleNotFoundError("Reading weights needs safetensors: pip install 'tfm[huggingface]'.") from error
  try:
    with safe_open(file, framework='numpy') as tensors:
      return {name: tensors.get_tensor(name) for name in tensors.keys()}
  except SafetensorError as error:
    raise HuggingFaceError(f'{file} is damaged ({error}); restore it from a copy.') from error


def _read_torch(file: Path) -> dict[str, np.ndarray]:
  try:
    import torch
  except ModuleNotFoundError as error:
    raise ModuleNotFoundError(f'{file} can only be read with PyTorch; install torch, or convert the file to '
                              f'{SAFETENSORS}.') from error

  def array(tensor):
    if tensor.dtype == torch.bfloat16:
      return tensor.contiguous().view(torch.uint16).numpy().view(ml_dtypes.bfloat16)
    return tensor.numpy()

  return {name: array(tensor) for name, tensor in torch.load(file, map_location='cpu', weights_only=True).items()}


def first_names(names: Iterable[str], family: Family) -> dict[str, str]:
  """The name in the family's table of each name in a file: with its prefix, and `LayerNorm.gamma` as weight."""
  names = list(names)
  bare = not any(name.startswith(family.prefix) for name in names)

  def first(name):
    name = name if not bare or _HEADS.match(name) else family.prefix + name
    return name.replace('LayerNorm.gamma', 'LayerNorm.weight').replace('LayerNorm.beta', 'LayerNorm.bias')

  return {name: first(name) for name in names}


def grouped(paths: Iterable[str], family: Family, config: TransformerConfig) -> dict[str | None, list[str]]:
  """Our parameters in each of their tensors, in order; under None those that have no place."""
  modules = family.modules(config)
  order = {module: i for i, module in enumerate(modules)}
  found: list[tuple[int, str | None, str]] = []
  for path in paths:
    module, _, leaf = path.rpartition('/')
    pattern = re.sub(r'layers_\d+', 'layers_{i}', module) or path
    if pattern not in modules:
      found.append((0, None, path))
      continue
    number = re.search(r'layers_(\d+)', module)
    name = modules[pattern].format(i=number and number[1])
    found.append((order[pattern], name if not module else f'{name}.{"bias" if leaf == "bias" else "weight"}', path))
  groups: dict[str | None, list[str]] = {}
  for _, name, path in sorted(found, key=lambda each: each[0]):
    groups.setdefault(name, []).append(path)
  return groups


def _flat(path: str, shape: Sequence[int]) -> tuple[int, ...]:
  """A kernel as a matrix, input x output; a bias as a vector."""
  if path.endswith('/kernel'):
    inputs = 2 if path.endswith('/output/kernel') else 1  # of heads x width
    return math.prod(shape[:inputs]), math.prod(shape[inputs:])
  return (math.prod(shape),) if path.endswith('/bias') else tuple(shape)


def _transposed(name: str, paths: Sequence[str], family: Family) -> bool:
  return paths[0].endswith('/kernel') and (family.transposed or _HEADS.match(name) is not None)


def their_shape(name: str, shapes: dict[str, Sequence[int]], family: Family) -> tuple[int, ...]:
  """Of the tensor that holds our parameters of these paths and shapes."""
  flat = [_flat(path, shape) for path, shape in shapes.items()]
  shape = (*flat[0][:-1], sum(each[-1] for each in flat))
  if name == 'final_logits_bias':
    return 1, *shape
  return shape[::-1] if _transposed(name, list(shapes), family) else shape


def to_theirs(name: str, leaves: dict[str, np.ndarray], family: Family) -> np.ndarray:
  """Their tensor of our parameters."""
  array = np.concatenate([leaf.reshape(_flat(path, leaf.shape)) for path, leaf in leaves.items()], axis=-1)
  if name == 'final_logits_bias':
    return array[None]
  return np.ascontiguousarray(array.T) if _transposed(name, list(leaves), family) else array


def to_ours(name: str, array: np.ndarray, shapes: dict[str, Sequence[int]], family: Family) -> dict[str, np.ndarray]:
  """Our parameters, float32, of their tensor."""
  array = array[0] if name == 'final_logits_bias' else array.T if _transposed(name, list(shapes), family) else array
  ends = np.cumsum([_flat(path, shape)[-1] for path, shape in shapes.items()])
  parts = np.split(array, ends[:-1], axis=-1)
  return {path: np.ascontiguousarray(part, np.float32).reshape(shape)
          for (path, shape), part in zip(shapes.items(), parts)}


# -- tensors that are no parameters ------------------------------------------------------------------------------------


def _is_causal_mask(mask: np.ndarray, config: TransformerConfig) -> bool:
  return np.array_equal(mask.astype(bool), np.tril(np.ones(mask.shape, bool)))


def _is_frequencies(frequency: np.ndarray, config: TransformerConfig) -> bool:
  expected = config.rope_base ** (-np.arange(0, config.key_width, 2) / config.key_width)
  return frequency.shape == expected.shape and np.allclose(frequency.astype(np.float64), expected, rtol=1e-2)


def _is_sinusoid(table: np.ndarray, config: TransformerConfig) -> bool:
  frequency = 10000.0 ** (-np.arange(0, config.d_model, 2) / config.d_model)
  angles = np.arange(len(table))[:, None] * frequency
  expected = np.concatenate([np.sin(angles), np.cos(angles)], axis=1)
  return table.shape == expected.shape and np.allclose(table.astype(np.float64), expected, atol=1e-2)


_BUFFERS: dict[str, Callable[[np.ndarray, TransformerConfig], bool]] = {
    r'.*\.position_ids': lambda ids, c: np.array_equal(ids.ravel(), np.arange(ids.size)),
    r'.*\.token_type_ids': lambda ids, c: not ids.any(),
    r'.*\.attn\.bias': _is_causal_mask,
    r'.*\.attn\.masked_bias': lambda value, c: bool(np.all(value <= -1e4)),
    r'.*\.rotary_emb\.inv_freq': _is_frequencies,
    r'model\.(encoder|decoder)\.embed_positions\.weight': _is_sinusoid,
}
"""What some files hold beside parameters, and what it must be."""


def buffer_problem(name: str, array: np.ndarray, family: Family, config: TransformerConfig) -> str | None:
  """Why a tensor without a place cannot be left aside; None if it can."""
  if any(re.fullmatch(pattern, name) for pattern in family.kept):
    return None
  for pattern, is_right in _BUFFERS.items():
    if re.fullmatch(pattern, name):
      return None if is_right(array, config) else f'{name} is not what this model computes by itself'
  return f'{name} is not of this model'
