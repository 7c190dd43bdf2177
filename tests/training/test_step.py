from __future__ import annotations

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import tfm.training.loss
import tfm.training.step
from tfm.config import Config, OptimizerConfig, TokenizerConfig, TrainingConfig, TransformerConfig
from tfm.models.build import build_model, initialize
from tfm.models.layout import layout_of, to_layout
from tfm.special_ids import BOS, EOS
from tfm.training.step import TrainState, build_step, new_state

V = 23
# Adam with so large an epsilon moves weights by their gradient and does not blow up the rounding errors of small ones.
DESCENT = dict(schedule='constant', learning_rate=1.0, warmup_steps=0, epsilon=1.0)


def config_of(optimizer: dict, accumulate: int = 1, **model) -> Config:
  return Config(
      model=TransformerConfig(**{**dict(encoder_layers=1, decoder_layers=1, d_model=8, d_ff=12, num_heads=2,
                                        dropout=0.0), **model}),
      tokenizer=TokenizerConfig(kind='byte', vocab_size=None), optimizer=OptimizerConfig(**optimizer),
      training=TrainingConfig(steps=50, accumulate=accumulate))


@functools.cache
def fresh_params():
  """Random values everywhere, norms and biases included, in the unrolled layout."""
  model = build_model(config_of(DESCENT).model, V, V)
  shapes = jax.eval_shape(lambda: initialize(model, jax.random.key(0)))
  random = np.random.default_rng(0)
  return jax.tree_util.tree_map_with_path(
      lambda path, leaf: jnp.asarray((path[-1].key == 'scale') + 0.3 * random.normal(size=leaf.shape), jnp.float32),
      shapes)


def fresh_state(config: Config) -> TrainState:
  model = build_model(config.model, V, V)
  return new_state(config, model, to_layout(fresh_params(), 'scanned' if config.model.scan_layers else 'unrolled'))


def compiled_step(config: Config):
  return jax.jit(build_step(config, build_model(config.model, V, V)))


@pytest.fixture(scope='module')
def make():
  """`make(DESCENT, dropout=0.5, ...)` -> (initial state, compiled step)."""
  step = functools.cache(compiled_step)
  return lambda *arguments, **model: (fresh_state(config := config_of(*arguments, **model)), step(config))


def batch_of(lengths: list[int], seed: int = 0):
  """Rows with so many source and target tokens before </s>; -1 is an empty row."""
  random = np.random.default_rng(seed)
  width = max(lengths) + 2
  source, target = np.zeros((2, len(lengths), width), np.int32)
  for row, length in enumerate(lengths):
    if length >= 0:
      source[row, :length + 1] = [*random.integers(4, V, length), EOS]
      target[row, :length + 2] = [BOS, *random.integers(4, V, length), EOS]
  return jnp.asarray(source[:, :-1]), jnp.asarray(target)


# Cut in four, the slices have 13, 12, 3 and no target tokens.
UNEQUAL = batch_of([6, 5, 6, 4, 0, 1, -1, -1])
EVEN = batch_of([5, 3, 4, 5, 2, 5, 1, 5])


def assert_close(a, b, atol: float, rtol: float = 0.0):
  jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=atol, rtol=rtol), a, b)


def bits(tree) -> list[bytes]:
  leaves = [jax.random.key_data(leaf) if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key) else leaf
            for leaf in jax.tree.leaves(tree)]
  return [np.asarray(leaf).tobytes() for leaf in leaves]


def test_micro_batches_are_one_batch(make, monkeypatch):
  state, step = make(DESCENT)
  whole, metrics = step(state, UNEQUAL)
  # The loss of every micro-batch is computed in chunks besides, of one row each.
  monkeypatch.setattr(tfm.training.loss, 'most_logits', lambda params: (UNEQUAL[1].shape[1] - 1) * V)
  cut, cut_metrics = compiled_step(config_of(DESCENT, accumulate=4))(state, UNEQUAL)
  assert float(optax.tree.norm(jax.tree.map(jnp.subtract, whole.params, state.params))) > 0.1
  assert_close(cut.params, whole.params, atol=1e-6)
  assert_close(cut.opt_state, whole.opt_state, atol=1e-6)
  assert_close(cut_metrics, metrics, atol=0, rtol=1e-5)
  assert float(cut_metrics.sums.tokens) == float(metrics.sums.tokens) == 28  # of six rows, each with its </s>
  assert float(cut_metrics.sums.correct) == float(metrics.sums.correct)


def test_the_update_is_that_of_the_mean_over_tokens(make):
  """Neither of the sum nor of the mean over rows: the same sentences twice, or beside empty rows, change nothing."""
  state, step = make(DESCENT)
  rows = jax.tree.map(lambda ids: ids[:4], EVEN)
  once, _ = step(state, jax.tree.map(lambda ids: jnp.concatenate([ids, jnp.zeros_like(ids)]), rows))
  twice, _ = step(state, jax.tree.map(lambda ids: jnp.concatenate([ids, ids]), rows))
  assert_close(once.params, twice.params, atol=1e-6)


def test_is_pure(make):
  state, step = make(DESCENT, dropout=0.2)
  before = bits(state)
  one, other = step(state, EVEN), step(state, EVEN)
  assert bits(one) == bits(other)
  assert bits(state) == before
  assert int(one[0].step) == int(state.step) + 1
  assert bits(one[0].key) == bits(state.key)


def test_every_step_draws_its_own_dropout_and_a_repeated_one_the_same(make):
  state, step = make(DESCENT, dropout=0.2)

  def loss(state):
    return float(step(state, EVEN)[1].sums.loss)

  losses = [loss(state.replace(step=jnp.int32(i))) for i in (0, 1, 2, 0)]
  assert len(set(losses)) == 3 and losses[0] == losses[3]
  assert loss(state.replace(key=jax.random.key(99))) not in losses


def test_without_dropout_neither_step_nor_key_matters(make):
  state, step = make(DESCENT)
  one = step(state, EVEN)[0]
  other = step(state.replace(step=jnp.int32(7), key=jax.random.key(99)), EVEN)[0]
  assert bits(one.params) == bits(other.params)


def test_every_micro_batch_draws_its_own_dropout(make):
  state, step = make(DESCENT, 2, dropout=0.2)
  sentences = jax.tree.map(lambda ids: ids[:4], EVEN)
  nothing = jax.tree.map(jnp.zeros_like, sentences)

  def loss(first, second):
    state_after, metrics = step(state, jax.tree.map(lambda *halves: jnp.concatenate(halves), first, second))
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(state_after.params))
    return float(metrics.sums.loss)

  first, second = loss(sentences, nothing), loss(nothing, sentences)
  assert first != second
  assert loss(sentences, sentences) == pytest.approx(first + second, rel=1e-6)


def test_donated_buffers_give_the_same_bits_and_the_loss_of_a_fixed_batch_falls(make):
  state, _ = make(DESCENT, dropout=0.2)
  config = config_of(DESCENT, dropout=0.2)
  # As training compiles it: with the switches of tests/conftest.py XLA fuses other operations where buffers are reused.
  compiled = functools.partial(jax.jit, build_step(config, build_model(config.model, V, V)),
                               compiler_options={'xla_backend_optimization_level': 3,
                                                 'xla_cpu_use_fusion_emitters': True})
  expected, donating = bits(compiled()(state, EVEN)), compiled(donate_argnums=0)
  state = given = jax.tree.map(jnp.copy, state)
  losses = []
  for i in range(30):
    state, metrics = donating(state, EVEN)
    if i == 0:
      assert bits((state, metrics)) == expected
      assert all(leaf.is_deleted() for leaf in jax.tree.leaves(given.params))
    losses.append(float(metrics.sums.loss / metrics.sums.tokens))
    assert float(metrics.learning_rate) == 1.0
  assert np.mean(losses[-5:]) < 0.8 * np.mean(losses[:5])
  assert int(state.step) == 30


def test_bfloat16_computes_but_float32_stays(make):
  state, step = make(DESCENT)
  exact, exact_metrics = step(state, EVEN)
  state, step = make(DESCENT, dtype='bfloat16')
  rough, metrics = step(state, EVEN)
  assert jax.tree.map(lambda x: x.dtype, rough) == jax.tree.map(lambda x: x.dtype, state)
  for leaf in jax.tree.leaves((rough.params, rough.opt_state, metrics)):
    assert leaf.dtype in (jnp.float32, jnp.int32)
  assert float(metrics.sums.loss) != float(exact_metrics.sums.loss)
  assert float(metrics.sums.loss) == pytest.approx(float(exact_metrics.sums.loss), rel=0.02)
  moved, apart = (float(optax.tree.norm(jax.tree.map(jnp.subtract, exact.params, other.params)))
                  for other in (state, rough))
  assert apart < 0.1 * moved


def test_a_batch_of_padding_moves_weights_by_momentum_alone(make):
  padding = jax.tree.map(jnp.zeros_like, EVEN)
  state, step = make(DESCENT)
  after, metrics = step(state, padding)
  assert bits(after.params) == bits(state.params)
  assert [float(x) for x in jax.tree.leaves((metrics.sums, metrics.grad_norm))] == [0.0] * 5

  state, _ = step(state, EVEN)
  after, _ = step(state, padding)
  adam, b1, b2 = state.opt_state[0], 0.9, 0.98  # after one update; this is the second

  def moved(p, m, v):
    return p - (b1 * m / (1 - b1**2)) / (np.sqrt(b2 * v / (1 - b2**2)) + 1.0)

  assert_close(after.params, jax.tree.map(moved, state.params, adam.mu, adam.nu), atol=1e-6)


@pytest.mark.parametrize('variant', [{'remat': 'full'}, {'scan_layers': True, 'remat': 'dots'}])
def test_rematerialised_and_scanned_layers_give_the_same_update(make, variant):
  state, step = make(DESCENT, dropout=0.2)
  expected, metrics = step(state, EVEN)
  state, step = make(DESCENT, dropout=0.2, **variant)
  found, found_metrics = step(state, EVEN)
  assert layout_of(found.params) == ('scanned' if 'scan_layers' in variant else 'unrolled')
  assert_close(to_layout(found.params, 'unrolled'), expected.params, atol=1e-5)
  assert_close(found_metrics, metrics, atol=0, rtol=1e-5)


@pytest.mark.parametrize('shapes', [[(7,), (2, 3), (150, 130)], [(150, 130), (2, 100, 90)], [(7,), ()], [(5,)]])
def test_the_norm_is_over_all_gradients_large_and_small(shapes):
  gradients = {str(i): jax.random.normal(jax.random.key(i), shape) for i, shape in enumerate(shapes)}
  expected = np.sqrt(sum((np.asarray(leaf, np.float64)**2).sum() for leaf in gradients.values()))
  np.testing.assert_allclose(tfm.training.step._norm(gradients), expected, rtol=1e-5)


@pytest.mark.skipif(jax.default_backend() != 'cpu', reason='only a CPU takes the programs of a step in any order')
def test_no_weight_is_copied_before_it_is_overwritten():
  config = config_of(DESCENT)
  step = jax.jit(build_step(config, build_model(config.model, V, V)), donate_argnums=0)
  program = step.lower(fresh_state(config), EVEN).compile().as_text()
  entry = program[program.index('\nENTRY'):]
  assert 'state_params' in entry and not re.findall(r'copy\(%\w*state_params\w*', entry)
