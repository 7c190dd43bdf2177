from __future__ import annotations

import pytest

from tfm.errors import UserError
from tfm.parallel.chips import CHIPS, chip_named


@pytest.mark.parametrize('chip', CHIPS.values(), ids=lambda chip: chip.name)
def test_figures_are_in_the_units_they_claim(chip):
  assert 1e14 < chip.float32_flops <= chip.bf16_flops < 1e16
  assert 16e9 < chip.memory < 1e12
  # Each step outwards is slower, by less than three orders of magnitude.
  assert chip.bandwidth > chip.link > chip.network > chip.bandwidth / 1000
  assert chip.domain % 8 == 0


def test_a_name_in_any_case():
  assert chip_named('H100') is CHIPS['h100']
  assert CHIPS['h100'].flops('float32') == CHIPS['h100'].flops('bfloat16') / 2
  assert CHIPS['v5p'].flops('float32') == CHIPS['v5p'].flops('bfloat16')


def test_an_unknown_name_is_answered_with_its_neighbours():
  with pytest.raises(UserError, match=r"no chip 'h10' in the table; did you mean h100 or h200\?.*v5p, v6e"):
    chip_named('h10')
