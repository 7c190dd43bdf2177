"""What several tests share."""

import os
from pathlib import Path

import jax
import pytest

# Parity tests compare to 1e-5, so matrix products must not be rounded to TF32 where a GPU is found.
jax.config.update('jax_default_matmul_precision', 'highest')

DATA = Path(os.environ.get('TFM_DATA', Path(__file__).parents[2] / 'shared' / 'data'))


@pytest.fixture
def multi30k() -> Path:
  """The folder of the Multi30k files; the test is skipped where they are not."""
  folder = DATA / 'multi30k'
  if not folder.is_dir():
    pytest.skip(f'needs real data: there is no {folder} (set TFM_DATA)')
  return folder
