"""The training loop: feed the step, look up now and then, save, and stop cleanly."""

from __future__ import annotations

import contextlib
import io
import logging
import math
from dataclasses import dataclass
from pathlib import Path

import jax
import jax.numpy as jnp

from tfm.config import Config
from tfm.errors import UserError
from tfm.loaded import assemble
from tfm.models.layout import layout_of
from tfm.parallel.compile import jit_step, place_batch, pmap_step, share_of_rows
from tfm.text.batches import prefetch
from tfm.text.corpora import build_corpus
from tfm.training.host_memory import reuse_freed_memory
from tfm.training.interrupt import Interrupt
from tfm.training.metrics import MetricsLog, Progress, Throughput
from tfm.training.named_arrays import snapshot
from tfm.training.run_folder import write_whole
from tfm.training.samples import describe_rows, write_samples
from tfm.training.start import Start, start
from tfm.training.step import StepMetrics, TrainState
from tfm.training.validation import out_of_patience, validate, validation_figures

log = logging.getLogger('tfm')


class PeerLost(UserError):
  """Another process of the run ended without a word; what is left of this one cannot go on, nor end in order."""


class TrainingDiverged(FloatingPointError):
  """The loss or the gradient is NaN or infinite."""


@dataclass(frozen=True)
class Outcome:
  """How training ended."""

  folder: Path
  step: int
  reason: str
  """'finished', 'early stop', or the name of the signal."""
  reports: bool = True
  """Whether it falls to this process to speak of the result: one of several does."""


def train(config: Config, run: str, init_run: str | None = None) -> Outcome:
  """Train in the folder `run` until `training.steps`; resumes by itself where the folder is a run already.

  SIGTERM and SIGINT save a checkpoint and return. Dropout, order of the data and logged metrics depend on config and
  seed alone, so a run that was killed and resumed ends with the same bytes as one that was not.

  Args:
    config: what to train.
    run: the run folder.
    init_run: take the first weights from this run (weights only).

  Raises:
    ConfigError, DataError: bad settings or data; nothing was written.
    TrainingDiverged: names the step and the last good checkpoint.
  """
  if config.training.reuse_memory:
    kept = reuse_freed_memory()  # before the backend starts its threads, each of which would get a heap of its own
    if jax.default_backend() == 'cpu':
      log.info('On this CPU %s.', kept)
  corpus = build_corpus(config.data)
  begin = start(config, corpus, run, init_run)
  opening = [begin.sentence, f'{corpus.describe()}: {begin.batches.report()}']
  pairs = corpus.validation()[:config.training.validation_sentences] if config.objective == 'translation' else []
  return _Loop(config, begin, pairs).run(opening)


class _Loop:
  """One sitting of a run. Metrics are fetched a step behind, so that the device never waits for the host."""

  def __init__(self, config: Config, begin: Start, decoded_pairs):
    self.config, self.training, self.begin = config, config.training, begin
    self.state: TrainState = begin.state
    self.first_step = int(jax.device_get(begin.state.step))
    self.mesh = begin.mesh
    # The classic front moves the batch by itself, so only the other can be held to moving nothing.
    self.pmap = config.mesh.compiler == 'pmap'
    self.compiled = (pmap_step(config, begin.model, self.mesh) if self.pmap else
                     jit_step(config, begin.model, self.mesh, jax.eval_shape(lambda: begin.state)))
    self.share = share_of_rows(self.mesh)
    self.writes = jax.process_index() == 0
    self.user = assemble(config, begin.model, begin.state.params, begin.tokenizers)
    self.decoded_pairs = decoded_pairs
    self.pending: tuple[int, StepMetrics] | None = None

  def run(self, opening: list[str]) -> Outcome:
    """Say the opening sentences and train; they go where the progress goes, so that notebooks see them too."""
    total = self.training.steps
    self.metrics = MetricsLog(self.begin.folder.path, self.first_step, self.writes)
    self.throughput = Throughput(total, self.first_step)
    self.progress = Progress(total, self.first_step, None if self.writes else io.StringIO())
    for sentence in opening:
      self.progress.note(sentence)
    feed = prefetch(self.begin.batches, self.first_step, total)
    with Interrupt() as interrupt:  # around the end too: the last save is still being written there
      try:
        step, reason = self._updates(feed, interrupt)
      except jax.errors.JaxRuntimeError as error:
        if jax.process_count() == 1:
          raise
        raise self._lost(error) from error
      finally:
        feed.close()
        self.begin.checkpoints.close()
        self.metrics.close()
        self.progress.close()
    return Outcome(self.begin.folder.path, step, interrupt.requested or reason, self.writes)

  def _updates(self, feed, interrupt: Interrupt) -> tuple[int, str]:
    """Make all updates that are left; returns the step reached and the reason to end there."""
    total, step = self.training.steps, self.first_step
    if step != total and self._out_of_patience():
      return step, 'early stop'
    for index, batch in feed:
      self._dispatch(index, batch)
      step, saved = index + 1, True
      if step % self.training.validate_every == 0 or step == total:
        self._checkpoint(step, self._validate(step))
        if step != total and self._out_of_patience():
          return step, 'early stop'
      elif step % self.training.checkpoint_every == 0:
        self._checkpoint(step, None)
      else:
        saved = False
      if signal := interrupt.agree(step):
        if not saved:
          self._checkpoint(step, None, scheduled=False)
        self.progress.note(f'{signal}: saved step {step}; the same command resumes.')
        return step, signal
    return step, 'finished'

  def _dispatch(self, index: int, batch) -> None:
    """Start one update; meanwhile read what the one before left behind."""
    if not self.pmap:
      part, parts = self.share
      height = len(batch[0])
      batch = place_batch(batch, part * height, parts * height, self.mesh, self.config.model.shape)
    # Nothing may move between host and device unseen: that would stall every step.
    with contextlib.ExitStack() as around:
      if not self.pmap:
        around.enter_context(jax.set_mesh(self.mesh))
        around.enter_context(jax.transfer_guard('disallow'))
      self.state, metrics = self.compiled(self.state, batch)
    self._read_pending()
    self.pending = index + 1, metrics

  def _read_pending(self) -> None:
    if self.pending is None:
      return
    (step, metrics), self.pending = self.pending, None
    metrics = jax.device_get(metrics)
    tokens = float(metrics.sums.tokens)
    loss, nll = float(metrics.sums.loss) / tokens, float(metrics.sums.nll) / tokens
    if not (math.isfinite(loss) and math.isfinite(float(metrics.grad_norm))):
      raise self._diverged(step, f'loss {loss} and gradient norm {float(metrics.grad_norm)}')
    self.throughput.count(int(tokens))
    self.progress.advance(step)
    if step % self.training.log_every == 0 or step == self.training.steps:
      rate = self.throughput.measure(step)
      self.metrics.train(step, {
          'loss': loss, 'nll': nll, 'accuracy': float(metrics.sums.correct) / tokens,
          'grad_norm': float(metrics.grad_norm), 'learning_rate': float(metrics.learning_rate), 'tokens': int(tokens),
      }, {'tokens_per_second': rate.tokens_per_second})
      self.progress.report(step, loss, rate)

  def _diverged(self, step: int, what: str) -> TrainingDiverged:
    self.begin.checkpoints.wait()
    saved = self.begin.checkpoints.steps()
    good = f'The last good checkpoint is step {saved[-1]} in {self.begin.checkpoints.folder}' if saved else (
        'No checkpoint was saved yet')
    return TrainingDiverged(f'Step {step} gave {what}. {good}; lower optimizer.learning_rate, lengthen warmup_steps or '
                            'set clip_norm.')

  def _lost(self, error: Exception) -> PeerLost:
    saved = self.begin.checkpoints.steps()
    good = f'step {saved[-1]} is saved' if saved else 'no step was saved yet'
    reason = str(error).splitlines()[0]
    return PeerLost(f'Another process of this run has gone, or the network between them ({reason}); {good}. '
                    'Start the run again, with as many processes as there are now: it resumes.')

  def _figures(self, step: int, params) -> dict[str, float]:
    """Figures of the weights; some samples are written beside."""
    begin, path, count = self.begin, self.begin.folder.samples / f'{step:06d}.txt', self.training.samples
    if self.config.objective == 'translation':
      figures, hypotheses = validate(begin.model, params, begin.validation_batches, self.user, self.decoded_pairs)
      if self.writes:
        write_samples(path, self.decoded_pairs[:count], hypotheses)
      return figures
    if self.writes and count:
      write_whole(path, describe_rows(self.user.with_params(params), begin.validation_batches[0], count))
    return validation_figures(begin.model, params, begin.validation_batches)

  def _validate(self, step: int) -> dict[str, float]:
    self._read_pending()
    self.throughput.pause()
    params = self.state.served_params
    if self.mesh.size > 1:  # every process decodes by itself, on one device
      params = jax.tree.unflatten(jax.tree.structure(params), list(map(jax.device_put, snapshot(params).values())))
    figures = self._figures(step, params)
    if not math.isfinite(figures['nll']):
      raise self._diverged(step, f'a validation nll of {figures["nll"]}')
    self.metrics.validation(step, figures)
    self.throughput.go_on()
    shown = ', '.join(f'{name} {value:.4g}' for name, value in figures.items())
    self.progress.note(f'validation at step {step}: {shown} ({self.metrics.seconds:.0f} s)')
    return figures

  def _checkpoint(self, step: int, validation: dict[str, float] | None, scheduled: bool = True) -> None:
    self._read_pending()  # a state whose loss was NaN must not be saved,
    if not jax.device_get(_all_finite(self.state.params)):  # nor one that this update spoiled
      raise self._diverged(step, 'weights that are not finite')
    self.metrics.flush()  # records first: a run never resumes from a step whose records are missing
    self.begin.checkpoints.save(step, self.state, {'layout': layout_of(self.state.params)}, validation,
                                scheduled=scheduled)

  def _out_of_patience(self) -> bool:
    return out_of_patience(self.metrics.history('validation'), self.training.keep_best_by, self.training.patience)


@jax.jit
def _all_finite(params) -> jax.Array:
  return jnp.all(jnp.array([jnp.isfinite(leaf).all() for leaf in jax.tree.leaves(params)]))
