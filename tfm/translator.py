"""Text in, text out: the one path that the command line, Python, notebooks and validation share."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from tfm.analysis.cross_attention import cross_attention
from tfm.config import DecodingConfig
from tfm.decoding.beam import beam_search
from tfm.decoding.sampling import sample, sentence_keys
from tfm.errors import UserError
from tfm.models.build import Model, with_layout
from tfm.models.layout import to_layout
from tfm.special_ids import OURS, SpecialIds
from tfm.text.tokenizer import Tokenizers


class TranslationError(UserError):
  """A sentence or an argument that cannot be honoured."""


@dataclass(frozen=True)
class Hypothesis:
  """One translation of a sentence."""

  text: str
  tokens: list[str]
  """Its subwords, </s> included if it ended by itself."""
  score: float
  """Log-probability over length penalty, by which hypotheses are ranked; for samples the log-probability. Nats."""
  log_prob: float
  """Of all tokens, in nats."""
  finished: bool
  """False: cut at the length limit."""
  attention: np.ndarray | None = None
  """NxHxTxS: cross-attention; row t is the step that produced `tokens[t]`, column s is `source_tokens[s]`."""


@dataclass(frozen=True)
class Translation:
  """A sentence and its hypotheses, best first."""

  source: str
  source_tokens: list[str]
  hypotheses: list[Hypothesis]

  @property
  def text(self) -> str:
    return self.hypotheses[0].text

  @property
  def score(self) -> float:
    return self.hypotheses[0].score

  @property
  def tokens(self) -> list[str]:
    return self.hypotheses[0].tokens

  @property
  def attention(self) -> np.ndarray | None:
    return self.hypotheses[0].attention


def one_line(text: str) -> str:
  """One line out for one line in: a model may write a line end that it was taught."""
  return text.replace('\r', ' ').replace('\n', ' ')


@dataclass(frozen=True)
class _Job:
  """A sentence on its way through the decoder."""

  index: int  # in the whole text, from 0
  source: list[int]
  prefix: list[int]


@dataclass(frozen=True)
class _Search:
  """Static arguments of a compiled search."""

  beam_size: int
  num_hypotheses: int
  length_penalty: float
  length_penalty_form: str
  stop: str
  temperature: float | None
  top_k: int
  top_p: float


class Translator:
  """A trained model with its tokenizers.

  Args:
    model, params: the model and its parameters, in either layout; decoding unrolls the layers.
    tokenizers: of source and target.
    decoding: the defaults of `translate`.
    special: how the model wants its sequences framed.
  """

  def __init__(self, model: Model, params: Any, tokenizers: Tokenizers, decoding: DecodingConfig,
               special: SpecialIds = OURS):
    self.model = with_layout(model, False)
    self.params = jax.tree.map(jnp.asarray, to_layout(params, 'unrolled'))
    self.tokenizers = tokenizers
    self.decoding, self.special = decoding, special

  def translate(
      self,
      sentences: Sequence[str],
      *,
      beam_size: int | None = None,
      num_hypotheses: int = 1,
      length_penalty: float | None = None,
      target_prefix: Sequence[str] | None = None,
      return_attention: bool = False,
      sampling_temperature: float | None = None,
      sampling_topk: int = 0,
      sampling_topp: float = 1.0,
      seed: int = 0,
      offset: int = 0,
      progress: Callable[[int], None] | None = None,
  ) -> list[Translation]:
    """Translate sentences: one `Translation` each, in order. A sentence without text gets an empty translation.

    Args:
      sentences: raw text.
      beam_size: hypotheses kept while searching; None is the run's setting, 1 is greedy.
      num_hypotheses: how many to return, at most `beam_size` (any number when sampling).
      length_penalty: alpha; None is the run's setting.
      target_prefix: for each sentence how its translation must begin ('' leaves it free).
      return_attention: also give every hypothesis its cross-attention (NxHx0x0 where there is no text).
      sampling_temperature: draw from the model's distribution at this temperature instead of searching.
      sampling_topk, sampling_topp: draw from the k most probable tokens, or from those that make up probability p.
      seed: of the draws; a sentence's draws depend on its place in the text but not on how it is batched.
      offset: how many sentences of the text came before these, where it is translated in pieces: sentences are numbered
        from there, in draws and in errors.
      progress: called with the number of sentences done, after each batch.

    Raises:
      TranslationError: a sentence is too long for the model or the configured limit, or arguments contradict.
    """
    search = self._search(beam_size, num_hypotheses, length_penalty, sampling_temperature, sampling_topk, sampling_topp)
    if not -2**63 <= seed < 2**63:
      raise TranslationError(f'seed is {seed}; give a number of 64 bits.')
    if return_attention and self.model.config.cross_attention_shape is None:
      raise TranslationError('return_attention is set, but this model has no attention to its source; leave it out.')
    jobs = self._jobs(sentences, target_prefix, offset)
    empty = Hypothesis('', [], 0.0, 0.0, True, self._no_attention() if return_attention else None)
    found: list[list[Hypothesis]] = [[empty] * num_hypotheses for _ in sentences]
    done = len(sentences) - len(jobs)
    for batch in self._batches(jobs, search):
      for job, hypotheses in zip(batch, self._decode(batch, search, seed, return_attention)):
        found[job.index - offset] = hypotheses
      done += len(batch)
      if progress is not None:
        progress(done)
    sources = {job.index: job.source for job in jobs}
    return [Translation(sentence, self.tokenizers.source.tokens(sources.get(offset + i, [])), found[i])
            for i, sentence in enumerate(sentences)]

  def write(self, sources: Sequence[list[int]]) -> list[list[int]]:
    """What greedy search writes for sources that are ids already, framed: a list of ids each, the end included."""
    search = self._search(1, 1, None, None, 0, 1.0)
    jobs = [_Job(index, list(source), list(self.special.forced)) for index, source in enumerate(sources)]
    found: list[list[int]] = [[]] * len(jobs)
    for batch in self._batches(jobs, search):
      tokens_BxMxL, lengths_BxM, *_ = self._found(batch, search, 0)[1]
      for b, job in enumerate(batch):
        found[job.index] = tokens_BxMxL[b, 0, :lengths_BxM[b, 0]].tolist()
    return found

  def _search(self, beam_size, num_hypotheses, length_penalty, temperature, top_k, top_p) -> _Search:
    d = self.decoding
    if num_hypotheses < 1:
      raise TranslationError(f'num_hypotheses is {num_hypotheses}; give 1 or more.')
    if temperature is None:
      if top_k or top_p != 1.0:
        raise TranslationError('sampling_topk and sampling_topp need sampling_temperature (1.0: as the model says).')
      beam_size = d.beam_size if beam_size is None else beam_size
      if beam_size < 1:
        raise TranslationError(f'beam_size is {beam_size}; give 1 or more.')
      if beam_size < num_hypotheses:
        raise TranslationError(f'num_hypotheses {num_hypotheses} exceeds beam_size {beam_size}; raise beam_size.')
    else:
      if beam_size is not None or length_penalty is not None:
        raise TranslationError('sampling_temperature draws and does not search; leave out beam_size, length_penalty.')
      if not (temperature > 0 and top_k >= 0 and 0 < top_p <= 1):
        raise TranslationError(f'sampling_temperature is {temperature}, sampling_topk {top_k}, sampling_topp {top_p}; '
                               'give a temperature above 0, k of 0 (all) or more, and 0 < p <= 1.')
      beam_size = num_hypotheses
    alpha = d.length_penalty if length_penalty is None else length_penalty
    if not alpha >= 0:
      raise TranslationError(f'length_penalty is {alpha}; give 0 or more.')
    return _Search(beam_size, num_hypotheses, alpha, d.length_penalty_form, d.stop, temperature, top_k, top_p)

  def _jobs(self, sentences: Sequence[str], target_prefix: Sequence[str] | None, offset: int) -> list[_Job]:
    """The sentences that hold text, encoded and checked."""
    if isinstance(sentences, str) or isinstance(target_prefix, str):
      raise TranslationError('translate takes a list of sentences and a list of prefixes; put a single one in a list.')
    if target_prefix is not None and len(target_prefix) != len(sentences):
      raise TranslationError(f'{len(target_prefix)} target prefixes for {len(sentences)} sentences; give one each.')
    indices = [i for i, sentence in enumerate(sentences) if sentence.strip()]
    for number, (sentence, prefix) in enumerate(zip(sentences, target_prefix or []), offset + 1):
      if prefix and not sentence.strip():
        raise TranslationError(f'Sentence {number} is empty and its translation will be, so it cannot begin with '
                               f"{prefix!r}; give it the prefix ''.")
    sources = self.tokenizers.source.encode_batch([sentences[i] for i in indices])
    prefixes = self.tokenizers.target.encode_batch([target_prefix[i] for i in indices]) if target_prefix else (
        [[]] * len(indices))
    s = self.special
    jobs = [_Job(offset + i, [*s.source_prefix, *source, *s.source_suffix], [*s.forced, *prefix])
            for i, source, prefix in zip(indices, sources, prefixes)]
    table, refused = self.model.config.longest, self.decoding.max_source_length
    for job in jobs:
      length = len(job.source)
      if refused is not None and length > refused:
        raise TranslationError(f'Sentence {job.index + 1} has {length} tokens, above '
                               f'decoding.max_source_length={refused}; split it or raise the limit.')
      if table is not None and length > table:
        raise TranslationError(f'Sentence {job.index + 1} has {length} tokens, but the model learned only {table} '
                               'positions (model.max_positions); split it.')
      if len(job.prefix) >= self._limit(job):
        raise TranslationError(f'The target prefix of sentence {job.index + 1} has {len(job.prefix)} tokens and leaves '
                               f'no room below the limit of {self._limit(job)}; shorten it or raise extra_length.')
    return jobs

  def _no_attention(self) -> np.ndarray:
    return np.zeros((*self.model.config.cross_attention_shape, 0, 0), np.float32)

  def _limit(self, job: _Job) -> int:
    """Most tokens of a translation, </s> included (section 6.1 of the paper: input length + 50)."""
    limit = len(job.source) + self.decoding.extra_length
    return min(limit, self.model.config.longest or limit)

  def _batches(self, jobs: list[_Job], search: _Search) -> Iterator[list[_Job]]:
    """Sentences of about one length together, so that a batch is little padding and shapes are few."""
    groups: dict[int, list[_Job]] = {}
    for job in sorted(jobs, key=lambda job: len(job.source)):
      groups.setdefault(_rounded(len(job.source)), []).append(job)
    for width, group in groups.items():
      rows = max(1, self.decoding.batch_tokens // (search.beam_size * width))
      for start in range(0, len(group), rows):
        yield group[start:start + rows]

  def _found(self, batch: list[_Job], search: _Search, seed: int) -> tuple[np.ndarray, Any]:
    """The sources as they were read, and what `_run_search` gives."""
    width = _rounded(max(len(job.source) for job in batch))
    table = self.model.config.longest
    width = min(width, table or width)
    rows = 1 << (len(batch) - 1).bit_length()  # a power of two: few shapes to compile
    source_BxS = _padded([job.source for job in batch], rows, width, self.special.pad)
    limits_B = np.zeros(rows, np.int32)
    limits_B[:len(batch)] = [self._limit(job) for job in batch]
    longest = width + self.decoding.extra_length
    prefix = None
    if any(job.prefix for job in batch):
      lengths_B = np.zeros(rows, np.int32)
      lengths_B[:len(batch)] = [len(job.prefix) for job in batch]
      prefix = _padded([job.prefix for job in batch], rows, _rounded(int(lengths_B.max())), self.special.pad), lengths_B
    indices_B = np.zeros(rows, np.int32)
    indices_B[:len(batch)] = [job.index for job in batch]
    length = min(longest, table or longest)
    read = _read_source(self.model, self.params, source_BxS)
    return source_BxS, jax.device_get(_run_search(self.model, search, length, self.special, self.params, *read,
                                                  limits_B, prefix, jax.random.key(seed), indices_B))

  def _decode(self, batch: list[_Job], search: _Search, seed: int, with_attention: bool) -> list[list[Hypothesis]]:
    source_BxS, found = self._found(batch, search, seed)
    tokens_BxMxL, lengths_BxM, log_prob_BxM, scores_BxM, finished_BxM = found
    attention = None
    if with_attention:
      inputs = [_shifted(tokens_BxMxL[:, m], self.special.start) for m in range(search.num_hypotheses)]
      attention = [jax.device_get(cross_attention(self.model, self.params, source_BxS, ids_BxT)) for ids_BxT in inputs]
    target = self.tokenizers.target
    results = []
    for b, job in enumerate(batch):
      hypotheses = []
      for m in range(search.num_hypotheses):
        length = int(lengths_BxM[b, m])
        ids = tokens_BxMxL[b, m, :length].tolist()
        pattern = attention[m][b, :, :, :length, :len(job.source)] if attention is not None else None
        hypotheses.append(Hypothesis(target.decode(ids), target.tokens(ids), float(scores_BxM[b, m]),
                                     float(log_prob_BxM[b, m]), bool(finished_BxM[b, m]), pattern))
      results.append(hypotheses)
    return results

  def with_params(self, params: Any) -> Translator:
    """The same translator with other weights (compiled searches are shared)."""
    return Translator(self.model, params, self.tokenizers, self.decoding, self.special)

  def with_decoding(self, **changes: Any) -> Translator:
    """The same translator with other decoding settings, by field name of `DecodingConfig`."""
    return Translator(self.model, self.params, self.tokenizers, replace(self.decoding, **changes),
                      self.special)


@partial(jax.jit, static_argnames='model')
def _read_source(model, params, source_BxS):
  """The memory, and what a cache keeps of it. A program of its own, because arrays between programs lie in memory as
  they are written down: inside the search XLA leaves them as the encoder had them, and every step transposes them."""
  memory = model.apply({'params': params}, source_BxS, method='encode')
  return memory, model.apply({'params': params}, memory, 1, method='init_cache').source


@partial(jax.jit, static_argnames=('model', 'search', 'length', 'special'))
def _run_search(model, search: _Search, length: int, special: SpecialIds, params, memory, source, limits_B, prefix, key,
                indices_B):
  """tokens_BxMxL, lengths_BxM, log_prob_BxM, scores_BxM, finished_BxM of the `num_hypotheses` best."""
  variables = {'params': params}
  B, M = limits_B.shape[0], search.beam_size
  cache = model.apply(variables, memory, length, M, method='init_cache').replace(source=source)

  def step(tokens_RxT, cache):
    return model.apply(variables, tokens_RxT, memory, cache, method='step')

  prefix_BxP, prefix_lengths_B = (None, None) if prefix is None else prefix
  if search.temperature is None:
    found = beam_search(step, cache, limits_B, length, M, search.num_hypotheses, search.length_penalty,
                        search.length_penalty_form, search.stop, prefix_BxP, prefix_lengths_B, special)
    return (found.tokens_BxMxL, found.lengths_BxM, found.log_prob_BxM, found.scores_BxM, found.finished_BxM)
  keys_R = sentence_keys(key, indices_B, M)
  repeat = partial(jax.tree.map, lambda rows: jnp.repeat(rows, M, axis=0))
  found = sample(step, cache, repeat(limits_B), length, keys_R, search.temperature, search.top_k, search.top_p,
                 repeat(prefix_BxP), repeat(prefix_lengths_B), special)
  tokens, lengths, log_prob, finished = jax.tree.map(
      lambda x: x.reshape((B, M) + x.shape[1:]),
      (found.tokens_BxL, found.lengths_B, found.log_prob_B, found.finished_B))
  best_first_BxM = jnp.argsort(-log_prob, axis=1)
  return tuple(jnp.take_along_axis(x, best_first_BxM.reshape((B, M) + (1,) * (x.ndim - 2)), axis=1)
               for x in (tokens, lengths, log_prob, log_prob, finished))


def _rounded(length: int) -> int:
  """The next multiple of 8, above 64 of 32: few shapes, little padding."""
  step = 8 if length <= 64 else 32
  return max(step, -(-length // step) * step)


def _padded(rows_of_ids: list[list[int]], rows: int, width: int, pad: int) -> np.ndarray:
  array = np.full((rows, width), pad, np.int32)
  for row, ids in enumerate(rows_of_ids):
    array[row, :len(ids)] = ids
  return array


def _shifted(tokens_BxL: np.ndarray, start: int) -> np.ndarray:
  """The decoder's inputs that produced these tokens: shifted right behind the first."""
  return np.concatenate([np.full_like(tokens_BxL[:, :1], start), tokens_BxL[:, :-1]], axis=1)
