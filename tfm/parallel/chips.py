"""What an accelerator can do, as its maker publishes it: arithmetic, memory, links."""

from __future__ import annotations

import difflib
from dataclasses import dataclass

from tfm.errors import UserError

GB, GIB = 1e9, 2.0**30


@dataclass(frozen=True)
class Chip:
  """Peaks of one chip. Bandwidths are bytes a second; of links, in one direction (data sheets add up both)."""

  name: str
  bf16_flops: float
  """Dense matrix products a second, 2 FLOPs a multiplication and addition; no structured sparsity."""
  float32_flops: float
  """The same for float32 operands at JAX's default precision: one bf16 pass on a TPU, TF32 on these GPUs."""
  memory: float
  """HBM, bytes."""
  bandwidth: float
  """Of the HBM."""
  link: float
  """All links of a chip inside its domain together: ICI or NVLink."""
  network: float
  """A chip's share of the network beyond the domain: DCN or InfiniBand."""
  domain: int
  """Chips that the fast links join: a TPU slice, a GPU server."""

  def flops(self, dtype: str) -> float:
    return self.bf16_flops if dtype == 'bfloat16' else self.float32_flops


CHIPS = {chip.name: chip for chip in (
    # cloud.google.com/tpu/docs/v5p: 459 TFLOPs bf16, 95 GiB, 2765 GBps, ICI 1200 GBps bidirectional, DCN 50 Gbps a
    # chip; largest slice 6144 chips.
    Chip('v5p', 459e12, 459e12, 95 * GIB, 2765 * GB, 600 * GB, 6.25 * GB, 6144),
    # cloud.google.com/tpu/docs/v6e: 918 TFLOPs bf16, 32 GB, 1600 GBps, ICI 800 GBps bidirectional; DCN 25.6 Tbps for
    # the pod of 256. (Older versions of the page say 1640 GBps and 3584 Gbps.)
    Chip('v6e', 918e12, 918e12, 32 * GB, 1600 * GB, 400 * GB, 12.5 * GB, 256),
    # nvidia.com/en-us/data-center/h100, SXM: 1979 TFLOPS bf16 and 989 TF32 with sparsity, hence half of each; 80 GB,
    # 3.35 TB/s, NVLink 900 GB/s. DGX H100 user guide: 8 GPUs, one 400 Gb/s ConnectX-7 each.
    Chip('h100', 989e12, 494.5e12, 80 * GB, 3350 * GB, 450 * GB, 50 * GB, 8),
    # nvidia.com/en-us/data-center/h200, SXM: an H100 with 141 GB at 4.8 TB/s.
    Chip('h200', 989e12, 494.5e12, 141 * GB, 4800 * GB, 450 * GB, 50 * GB, 8),
    # NVIDIA Blackwell architecture brief, HGX B200: 4.5 PFLOPS bf16 and 2.2 TF32 with sparsity; DGX B200 data sheet:
    # 8 GPUs with 1440 GB at 64 TB/s together, NVLink 14.4 TB/s together, one 400 Gb/s ConnectX-7 each.
    Chip('b200', 2250e12, 1100e12, 180 * GB, 8000 * GB, 900 * GB, 50 * GB, 8),
)}


def chip_named(name: str) -> Chip:
  """Raises UserError for a name that is not in the table."""
  if name.lower() in CHIPS:
    return CHIPS[name.lower()]
  near = difflib.get_close_matches(name.lower(), CHIPS, n=2, cutoff=0.4)
  guess = f' did you mean {" or ".join(near)}?' if near else ''
  raise UserError(f"There is no chip '{name}' in the table;{guess} Choose one of {', '.join(CHIPS)}, or add yours to "
                  'tfm/parallel/chips.py.')
