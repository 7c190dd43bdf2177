import numpy as np
import pytest

from tfm.decoding.length_penalty import length_penalty


@pytest.mark.parametrize('alpha', [0.0, 0.6, 1.0])
def test_forms_follow_their_formulas(alpha):
  n = np.arange(1, 50)
  np.testing.assert_allclose(length_penalty(n, alpha, 'gnmt'), ((5 + n) / 6) ** alpha, rtol=1e-6)
  np.testing.assert_allclose(length_penalty(n, alpha, 'power'), n ** alpha, rtol=1e-6)


@pytest.mark.parametrize('form', ['gnmt', 'power'])
def test_one_token_costs_nothing_alpha_0_is_off_and_longer_is_favoured(form):
  n = np.arange(1, 50)
  assert length_penalty(1, 0.7, form) == 1
  np.testing.assert_array_equal(length_penalty(n, 0.0, form), np.ones(49))
  assert (np.diff(length_penalty(n, 0.7, form)) > 0).all()
  assert np.isfinite(-1 / length_penalty(0, 1.0, form))


def test_unknown_form_is_refused():
  with pytest.raises(ValueError, match="'gnmt' or 'power'"):
    length_penalty(3, 0.6, 'wu')
