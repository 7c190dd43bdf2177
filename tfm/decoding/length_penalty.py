"""The length penalty of beam search: without one, short translations win because every token costs probability."""

from __future__ import annotations

from typing import Literal

import jax
import jax.numpy as jnp

LengthPenalty = Literal['gnmt', 'power']


def length_penalty(length: jax.Array | int, alpha: float, form: LengthPenalty = 'gnmt') -> jax.Array:
  """What the log-probability of a hypothesis is divided by to give its score; float32, shape of `length`.

  'gnmt':   ((5 + n) / 6) ** alpha   Wu et al. 2016, equation 14; "Attention Is All You Need" section 6.1, alpha 0.6
  'power':  n ** alpha               fairseq, Marian, CTranslate2, Hugging Face; alpha 1 is the mean log-probability

  Args:
    length: n, the generated tokens, EOS included, BOS not. Forced ones count. 0 (an empty output) counts as 1.
    alpha: the strength; 0 switches the penalty off, more favours longer outputs. The two forms need different values.
    form: which of the two.

  Raises:
    ValueError: for another form.
  """
  n = jnp.maximum(jnp.asarray(length, jnp.float32), 1.0)
  if form == 'gnmt':
    return ((5.0 + n) / 6.0) ** alpha
  if form == 'power':
    return n**alpha
  raise ValueError(f"length penalty form is {form!r}; choose 'gnmt' or 'power'.")
