"""Prompt in, continuation out: a language model with its tokenizer."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from tfm.decoding.greedy import most_probable
from tfm.decoding.loop import autoregress
from tfm.decoding.sampling import drawing, sentence_keys
from tfm.errors import UserError
from tfm.models.build import with_layout
from tfm.models.decoder_only import DecoderOnly
from tfm.models.layout import to_layout
from tfm.special_ids import SpecialIds
from tfm.text.tokenizer import Tokenizers

log = logging.getLogger('tfm')

PIECE = 16
"""Tokens written between two looks at them: for stop strings, and for whoever watches."""


class GenerationError(UserError):
  """A prompt or an argument that cannot be honoured."""


@dataclass(frozen=True)
class Generation:
  """A prompt and what the model wrote after it."""

  prompt: str
  text: str
  """The continuation alone, up to a stop string and without it."""
  tokens: list[str]
  """All that was written; may go on for some tokens behind a stop string."""
  log_prob: float
  """Of `tokens`, in nats."""
  finished: bool
  """Ended by an end token or a stop string; False: cut at `max_new_tokens`."""


@dataclass(frozen=True)
class Score:
  """How probable a text is."""

  log_prob: float
  """Of its tokens after the first, or after the start token where the model has one; nats."""
  tokens: int
  """How many that are."""

  @property
  def perplexity(self) -> float:
    """exp(-log_prob / tokens)."""
    return float(np.exp(-self.log_prob / max(self.tokens, 1)))


@dataclass
class _Row:
  """A text in the making."""

  index: int
  ids: list[int]  # prompt and continuation
  prompt: int  # tokens of the prompt
  log_prob: float = 0.0
  text: str = ''
  said: int = 0  # characters of `text` that were handed out
  finished: bool = False
  done: bool = False

  @property
  def new(self) -> list[int]:
    return self.ids[self.prompt:]


class Generator:
  """A trained language model with its tokenizer.

  Args:
    model, params: a `DecoderOnly` and its parameters, in either layout; decoding unrolls the layers.
    tokenizers: of both sides, of which a decoder has the target's.
    special: `source_prefix` stands before every prompt; where it is empty a prompt must not be.
  """

  def __init__(self, model: DecoderOnly, params: Any, tokenizers: Tokenizers, special: SpecialIds):
    self.model = with_layout(model, False)
    self.params = jax.tree.map(jnp.asarray, to_layout(params, 'unrolled'))
    self.tokenizers, self.special = tokenizers, special
    self._tokenizer = tokenizers.target

  def with_params(self, params: Any) -> Generator:
    """The same generator with other weights (compiled programs are shared)."""
    return Generator(self.model, params, self.tokenizers, self.special)

  def generate(self, prompts: Sequence[str], *, max_new_tokens: int = 128, sampling_temperature: float | None = None,
               sampling_topk: int = 0, sampling_topp: float = 1.0, stop: Sequence[str] = (), seed: int = 0,
               batch_rows: int = 32) -> list[Generation]:
    """Continue every prompt; greedily, or by sampling where a temperature is given.

    A text that outgrows the model's table of positions goes on from its second half (the only case in which the
    beginning is forgotten).

    Args:
      prompts: raw text.
      max_new_tokens: most tokens to write.
      sampling_temperature, sampling_topk, sampling_topp: as in `Translator.translate`.
      stop: end before the first of these strings.
      seed: of the draws; those of a prompt depend on its place in `prompts`, not on how prompts are batched.
      batch_rows: prompts decoded together.

    Raises:
      GenerationError: an argument out of range, or an empty prompt for a model without a start token.
    """
    rows = self._rows(prompts)
    choice = _Choice.of(sampling_temperature, sampling_topk, sampling_topp)
    _check(max_new_tokens, stop, batch_rows)
    ordered = sorted(rows, key=lambda row: len(row.ids))
    for begin in range(0, len(rows), batch_rows):
      for _ in self._write(ordered[begin:begin + batch_rows], max_new_tokens, choice, stop, seed):
        pass
    return [Generation(prompt, row.text, self._tokenizer.tokens(row.new), row.log_prob, row.finished)
            for prompt, row in zip(prompts, rows)]

  def stream(self, prompt: str, *, max_new_tokens: int = 128, sampling_temperature: float | None = None,
             sampling_topk: int = 0, sampling_topp: float = 1.0, stop: Sequence[str] = (),
             seed: int = 0) -> Iterator[str]:
    """The text that `generate([prompt], ...)` gives, in pieces, as they are written."""
    row, = self._rows([prompt])
    choice = _Choice.of(sampling_temperature, sampling_topk, sampling_topp)
    _check(max_new_tokens, stop, 1)
    held = max(map(len, stop), default=0)  # so many characters may yet turn out to begin a stop string
    for _ in self._write([row], max_new_tokens, choice, stop, seed):
      # A replacement character at the end is most often half of a letter whose bytes are not all there.
      sure = len(row.text) if row.done else max(len(row.text.rstrip('\ufffd')) - held, row.said)
      piece, row.said = row.text[row.said:sure], sure
      if piece:
        yield piece

  def score(self, texts: Sequence[str], *, window: int | None = None,
            progress: Callable[[int], None] | None = None) -> list[Score]:
    """The probability of every text, an end token not included.

    Args:
      window: a longer text is scored in windows of so many tokens that overlap by a half, so that every token sees half
        a window before it; None: the model's table of positions, or the whole text where it has none.
      progress: called with the number of texts done.

    Raises:
      GenerationError: a text without any token to score.
    """
    found = []
    for row in self._rows(texts):
      if len(row.ids) < 2:
        raise GenerationError(f'Text {row.index + 1} has {len(row.ids)} tokens; at least 2 are needed for a score.')
      found.append(Score(self._log_prob(row.ids, window), len(row.ids) - 1))
      if progress is not None:
        progress(len(found))
    return found

  def _rows(self, prompts: Sequence[str]) -> list[_Row]:
    if isinstance(prompts, str):
      raise GenerationError('a list of texts is needed; put a single one in a list.')
    rows = []
    for index, ids in enumerate(self._tokenizer.encode_batch(list(prompts))):
      ids = [*self.special.source_prefix, *ids]
      if not ids:
        raise GenerationError(f'Prompt {index + 1} is empty, and this model has no start token; give it some text.')
      rows.append(_Row(index, ids, len(ids)))
    return rows

  # -- writing --------------------------------------------------------------------------------------------------------

  def _write(self, rows: list[_Row], max_new_tokens: int, choice: _Choice, stop: Sequence[str],
             seed: int) -> Iterator[None]:
    """Write until all rows are done; yields after every piece."""
    keys_B = sentence_keys(jax.random.key(seed), np.array([row.index for row in rows]))
    limit = self.model.config.longest
    if limit is not None and max(row.prompt for row in rows) + max_new_tokens > limit:
      log.info('A text that outgrows the %d positions of the model goes on from its last %d tokens.', limit, limit // 2)
    session = None
    while not all(row.done for row in rows):
      if session is None or session.room < 1:
        session = _Session(self, rows, max_new_tokens)
      session.write(rows, max_new_tokens, choice, keys_B)
      for row in rows:
        self._look(row, max_new_tokens, stop)
      yield

  def _look(self, row: _Row, max_new_tokens: int, stop: Sequence[str]) -> None:
    """See whether a row is done, and what its text is."""
    if row.done:
      return
    ended = bool(row.new) and row.ids[-1] in self.special.ends
    row.text = self._tokenizer.decode(row.new[:-1] if ended else row.new)
    hits = [place for string in stop if (place := row.text.find(string)) >= 0]
    if hits:
      row.text = row.text[:min(hits)]
    row.finished = ended or bool(hits)
    row.done = row.finished or len(row.new) >= max_new_tokens

  def _log_prob(self, ids: list[int], window: int | None) -> float:
    limit = self.model.config.longest
    width = min(_rounded(len(ids) - 1), window or 1 << 30, limit or 1 << 30)
    total, scored = 0.0, 1  # the first token is given
    while scored < len(ids):
      begin = 0 if scored == 1 else scored - max(width // 2, 1)
      part = ids[begin:begin + width + 1]
      padded = np.zeros((1, width + 1), np.int32)
      padded[0, :len(part)] = part
      log_probs = np.asarray(_token_log_probs(self.model, self.params, padded))[0, :len(part) - 1]
      total += float(log_probs[scored - begin - 1:].sum())
      scored = begin + len(part)
    return total


class _Session:
  """A cache that has read the rows up to where they are level, and room for more."""

  def __init__(self, owner: Generator, rows: list[_Row], max_new_tokens: int):
    limit = owner.model.config.longest
    longest = max(len(row.ids) for row in rows)
    wanted = max(row.prompt for row in rows) + max_new_tokens
    self.owner, self.size = owner, _rounded(wanted) if limit is None else min(_rounded(wanted), limit)
    self.begin = 0  # how much of every row is forgotten
    if longest >= self.size:
      self.begin = longest - self.size // 2
    level = min(len(row.ids) for row in rows) - self.begin
    if level < 1:
      raise GenerationError('Prompts of very different lengths outgrow the positions of the model together; give them '
                            'one by one.')
    self.at = (level - 1) // 32 * 32  # tokens read; a multiple, so that few shapes are compiled
    ids_BxT = np.array([row.ids[self.begin:self.begin + self.at] for row in rows], np.int32)
    self.cache = _prefill(owner.model, self.size, owner.params, ids_BxT)

  @property
  def room(self) -> int:
    return self.size - self.at - 1

  def write(self, rows: list[_Row], max_new_tokens: int, choice: _Choice, keys_B) -> None:
    """One piece: tokens of rows that go further than the cache are read, then new ones are written."""
    own = [row.ids[self.begin + self.at:] for row in rows]
    first_B = np.array([ids[0] if ids else 0 for ids in own], np.int32)
    length = min(max(len(ids) for ids in own) - 1 + PIECE, self.room)
    length = min(-(-length // PIECE) * PIECE, self.room)
    forced_B = np.array([0 if row.done else min(len(ids) - 1, length) for row, ids in zip(rows, own)], np.int32)
    forced_BxP = np.zeros((len(rows), max(length, 1)), np.int32)
    for b, count in enumerate(forced_B):
      forced_BxP[b, :count] = own[b][1:1 + count]
    limits_B = np.array([0 if row.done else min(length, len(ids) - 1 + max_new_tokens - len(row.new))
                         for row, ids in zip(rows, own)], np.int32)
    # Draws are numbered from the first new token, as if there had been no prompt and no pieces.
    first_number_B = np.array([len(row.new) - (len(ids) - 1) for row, ids in zip(rows, own)], np.int32)
    out, self.cache = _piece(self.owner.model, choice, length, self.owner.special, self.owner.params, self.cache,
                             first_B, limits_B, forced_BxP, forced_B, keys_B, first_number_B)
    tokens_BxL, lengths_B, log_probs_BxL = jax.device_get((out.tokens_BxL, out.lengths_B, out.token_log_probs_BxL))
    for b, row in enumerate(rows):
      fresh = slice(forced_B[b], lengths_B[b])
      row.ids += tokens_BxL[b, fresh].tolist()
      row.log_prob += float(log_probs_BxL[b, fresh].sum())
    self.at += int(max(lengths_B))


@dataclass(frozen=True)
class _Choice:
  """How the next token is chosen; static."""

  temperature: float | None
  top_k: int
  top_p: float

  @classmethod
  def of(cls, temperature, top_k, top_p) -> _Choice:
    if temperature is None and (top_k or top_p != 1.0):
      raise GenerationError('sampling_topk and sampling_topp need sampling_temperature (1.0: as the model says).')
    if temperature is not None and not (temperature > 0 and top_k >= 0 and 0 < top_p <= 1):
      raise GenerationError(f'sampling_temperature is {temperature}, sampling_topk {top_k}, sampling_topp {top_p}; '
                            'give a temperature above 0, k of 0 (all) or more, and 0 < p <= 1.')
    return cls(temperature, top_k, top_p)


def _check(max_new_tokens: int, stop: Sequence[str], batch_rows: int) -> None:
  if max_new_tokens < 1 or batch_rows < 1:
    raise GenerationError(f'max_new_tokens is {max_new_tokens} and batch_rows {batch_rows}; give 1 or more.')
  if isinstance(stop, str) or '' in stop:
    raise GenerationError('stop is a list of strings that are not empty; put a single one in a list.')


@partial(jax.jit, static_argnames=('model', 'size'))
def _prefill(model, size: int, params, ids_BxT):
  variables = {'params': params}
  cache = model.apply(variables, ids_BxT.shape[0], size, method='init_cache')
  return model.apply(variables, ids_BxT, cache, method='step')[1] if ids_BxT.shape[1] else cache


@partial(jax.jit, static_argnames=('model', 'choice', 'length', 'special'), donate_argnames='cache')
def _piece(model, choice: _Choice, length: int, special: SpecialIds, params, cache, first_B, limits_B, forced_BxP,
           forced_B, keys_B, first_number_B):
  def step(tokens_RxT, cache):
    return model.apply({'params': params}, tokens_RxT, cache, method='step')

  if choice.temperature is None:
    choose = most_probable
  else:
    choose = drawing(keys_B, choice.temperature, choice.top_k, choice.top_p, first_number_B)
  return autoregress(step, cache, choose, limits_B, length, forced_BxP, forced_B, special, first_B)


@partial(jax.jit, static_argnames='model')
def _token_log_probs(model, params, ids_BxT):
  """log p of every token after the first, BxT-1."""
  logits_BxTxV = model.apply({'params': params}, ids_BxT[:, :-1])
  log_probs_BxTxV = jax.nn.log_softmax(logits_BxTxV.astype(jnp.float32))
  return jnp.take_along_axis(log_probs_BxTxV, ids_BxT[:, 1:, None], axis=-1)[..., 0]


def _rounded(length: int) -> int:
  """The next power of two, at least 64: few shapes."""
  return max(64, 1 << (length - 1).bit_length())
