from __future__ import annotations

import math

import pytest

from tfm.config import OptimizerConfig
from tfm.training.schedule import learning_rate

PEAK, WARMUP, TOTAL = 0.3, 10, 110


def rates(schedule: str, warmup: int = WARMUP, total: int = TOTAL, peak: float = PEAK, **fields):
  """The rate of update 1, 2, ... as a Python float."""
  fields = {**({'decay_fraction': 0.1} if schedule == 'wsd' else {}), **fields}
  config = OptimizerConfig(schedule=schedule, learning_rate=peak, warmup_steps=warmup, **fields)
  rate = learning_rate(config, 64, total)
  return lambda step: float(rate(step - 1))


@pytest.mark.parametrize('d_model, warmup, factor', [(512, 4000, 1.0), (64, 10, 2.5)])
def test_noam_is_equation_3(d_model, warmup, factor):
  rate = learning_rate(OptimizerConfig(schedule='noam', learning_rate=factor, warmup_steps=warmup), d_model, 100_000)
  for step in (1, 2, warmup - 1, warmup, warmup + 1, 3 * warmup, 100_000):
    expected = factor * d_model**-0.5 * min(step**-0.5, step * warmup**-1.5)
    assert float(rate(step - 1)) == pytest.approx(expected, rel=1e-5), step


def test_noam_peaks_at_the_end_of_the_warm_up():
  rate = rates('noam')
  assert max(range(1, TOTAL), key=rate) == WARMUP


@pytest.mark.parametrize('schedule', ['constant', 'linear', 'cosine', 'rsqrt', 'wsd'])
def test_warms_up_linearly_to_the_peak_and_leaves_it_without_a_jump(schedule):
  rate = rates(schedule)
  for step in range(1, WARMUP + 1):
    assert rate(step) == pytest.approx(PEAK * step / WARMUP, rel=1e-5)
  after = [rate(step) for step in range(WARMUP, TOTAL + 1)]
  assert after == sorted(after, reverse=True)
  assert PEAK - after[1] < PEAK / WARMUP  # no steeper down than up


def test_halfway_and_last_step():
  middle = (WARMUP + TOTAL) // 2
  for schedule, half in (('linear', 0.5), ('cosine', 0.5)):
    rate = rates(schedule)
    assert rate(middle) == pytest.approx(half * PEAK, rel=1e-5)
    assert rate(TOTAL) == pytest.approx(0.0, abs=1e-7) and rate(TOTAL - 1) > 1e-6
    assert rate(TOTAL + 50) == pytest.approx(0.0, abs=1e-7)
  quarter = WARMUP + (TOTAL - WARMUP) // 4
  assert rates('linear')(quarter) == pytest.approx(0.75 * PEAK, rel=1e-5)
  assert rates('cosine')(quarter) == pytest.approx((0.5 + 0.5 * math.cos(math.pi / 4)) * PEAK, rel=1e-5)


def test_rsqrt_halves_when_the_steps_quadruple_and_constant_stays():
  rate = rates('rsqrt')
  assert rate(4 * WARMUP) == pytest.approx(PEAK / 2, rel=1e-5)
  assert rate(16 * WARMUP) == pytest.approx(PEAK / 4, rel=1e-5)
  assert {rates('constant')(step) for step in range(WARMUP, TOTAL + 50)} == {rates('constant')(WARMUP)}


@pytest.mark.parametrize('schedule', ['constant', 'linear', 'cosine', 'wsd'])
def test_without_warm_up_it_begins_at_the_peak(schedule):
  rate = rates(schedule, warmup=0)
  assert rate(1) == pytest.approx(PEAK, rel=0.02) and rate(1) > 0.98 * PEAK
  assert rate(TOTAL) == pytest.approx(PEAK if schedule == 'constant' else 0.0, abs=1e-7)


@pytest.mark.parametrize('schedule', ['constant', 'linear', 'cosine', 'rsqrt', 'noam', 'wsd'])
def test_a_run_shorter_than_its_warm_up_only_warms_up(schedule):
  rate = rates(schedule, warmup=50, total=20)
  assert all(0 < rate(step) < rate(step + 1) < math.inf for step in range(1, 20))


@pytest.mark.parametrize('schedule', ['linear', 'cosine', 'wsd'])
def test_ends_at_the_final_fraction_of_the_peak(schedule):
  rate, to_zero = rates(schedule, final_fraction=0.1), rates(schedule)
  for step in range(WARMUP, TOTAL + 20):
    assert rate(step) == pytest.approx(0.1 * PEAK + 0.9 * to_zero(step), rel=1e-5), step
  assert rate(TOTAL) == rate(TOTAL + 50) == pytest.approx(0.1 * PEAK, rel=1e-5)
  assert rate(WARMUP // 2) == pytest.approx(PEAK / 2, rel=1e-5)


@pytest.mark.parametrize('fraction', [0.1, 0.5])
def test_wsd_stays_and_falls_linearly_in_the_last_fraction_of_all_steps(fraction):
  rate, length = rates('wsd', decay_fraction=fraction), fraction * TOTAL
  for step in range(WARMUP, TOTAL + 1):
    assert rate(step) == pytest.approx(PEAK * min(1.0, (TOTAL - step) / length), rel=1e-5, abs=1e-8), step


def test_wsd_that_is_all_decay_begins_to_fall_when_it_is_warm():
  rate = rates('wsd', decay_fraction=1.0)
  assert rate(WARMUP) == pytest.approx(PEAK) and rate((WARMUP + TOTAL) // 2) == pytest.approx(PEAK / 2, rel=1e-5)
