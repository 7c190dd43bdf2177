"""Laws of all three shapes of model over the product of their parts: a dozen configs that hold every value of every
part, and with `-m slow` two hundred drawn at random."""

from __future__ import annotations

import dataclasses
import json
import random
from dataclasses import dataclass
from functools import cached_property, partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from tfm.config import ConfigError, TransformerConfig
from tfm.models.build import Model, build_model, initialize, with_layout
from tfm.models.layout import to_layout
from tfm.models.tap import Tap
from tfm.parallel.rules import logical_axes
from tfm.section import build
from tfm.training.named_arrays import named_leaves

D, V, T, S = 16, 11, 6, 5
SHAPES = (dict(encoder_layers=1, decoder_layers=2), dict(encoder_layers=0, decoder_layers=2),
          dict(encoder_layers=2, decoder_layers=0))


def each(name: str, *values) -> tuple[dict, ...]:
  return tuple({name: value} for value in values)


PARTS = {
    'heads': (dict(num_heads=2), dict(num_heads=2, num_kv_heads=1), dict(num_heads=4, num_kv_heads=2),
              dict(num_heads=3, d_k=6, d_v=5)),
    'norm': each('norm', 'post', 'pre', 'sandwich'),
    'norm_type': each('norm_type', 'layer', 'rms'),
    'norm_epsilon': each('norm_epsilon', 1e-6, 1e-2),
    'qk_norm': each('qk_norm', False, True),
    'embedding_norm': each('embedding_norm', False, True),
    'positions': (*each('positions', 'sinusoidal', 'sinusoidal_halves', 'rope', 'alibi', 'relative', 'none'),
                  dict(positions='learned', max_positions=9), dict(positions='learned', max_positions=9,
                                                                   position_offset=2),
                  dict(positions='rope', rope_base=100.0, rope_scaling='linear', rope_factor=2.0),
                  dict(positions='rope', rope_scaling='llama3', rope_factor=4.0, rope_original_length=20),
                  dict(positions='rope', rope_scaling='yarn', rope_factor=4.0, rope_original_length=20),
                  dict(positions='relative', relative_buckets=4, relative_max_distance=4)),
    'feed_forward': each('feed_forward', 'relu', 'gelu', 'gelu_tanh', 'silu', 'swiglu', 'geglu', 'geglu_tanh'),
    'biases': each('biases', 'mlp', 'qkv', 'all', 'none'),
    'experts': (*[dict()] * 4, dict(experts=3), dict(experts=3, experts_per_token=1, load_balance=0.1)),
    'convolution': (*[dict()] * 4, dict(convolution='conformer'), *(
        dict(convolution=kind, kernel_width=3) for kind in ('before', 'after', 'parallel'))),
    'window': each('window', None, 2),
    'attention_scale': each('attention_scale', None, 1.0),
    'attention_softcap': each('attention_softcap', None, 2.0),
    'attention_sinks': each('attention_sinks', False, True),
    'tying': each('tying', 'none', 'inputs', 'target', 'all'),
    'scale_embeddings': each('scale_embeddings', True, False),
    'scale_output': each('scale_output', False, True),
    'output_bias': each('output_bias', False, True),
    'logit_softcap': each('logit_softcap', None, 4.0),
    'dropout': each('dropout', 0.0, 0.2),
    'attention_dropout': each('attention_dropout', 0.0, 0.0, 0.3),
    'activation_dropout': each('activation_dropout', 0.0, 0.3),
    'attention_backend': each('attention_backend', *['auto'] * 4, 'blockwise'),
    'dtype': each('dtype', *['float32'] * 3, 'bfloat16'),
    'vocab_multiple': each('vocab_multiple', 1, 4),
    'pad_id': each('pad_id', 0, 3, None),
    'remat': each('remat', 'none', 'full', 'dots'),
}
"""What may be chosen freely; a value that stands several times is drawn as much more often."""
ENCODER_ONLY_PARTS = {
    'output_transform': each('output_transform', False, True), 'token_types': each('token_types', 0, 2),
    'pooling': each('pooling', 'mean', 'first'), 'pooler': each('pooler', False, True),
    'num_labels': each('num_labels', 0, 3),
}


def draw(seed: int) -> TransformerConfig:
  """A config with every part drawn; what the config refuses is drawn again."""
  chance = random.Random(seed)
  while True:
    shape = chance.choice(SHAPES)
    parts = PARTS | (ENCODER_ONLY_PARTS if shape['decoder_layers'] == 0 else {})
    fields = {name: value for options in parts.values() for name, value in chance.choice(options).items()}
    if fields['dtype'] == 'bfloat16' and 'experts' in fields:
      continue  # rounding may then choose another expert
    try:
      return TransformerConfig(**shape, **fields, d_model=D, d_ff=12)
    except ConfigError:
      continue


def values_of(config: TransformerConfig) -> set[tuple[str, int]]:
  """(part, number of its value) for every part that the config chooses."""
  found = set()
  for part, options in {'shape': SHAPES, **PARTS, **ENCODER_ONLY_PARTS}.items():
    names = {name for option in options for name in option}
    default = {name: getattr(TransformerConfig(), name) for name in names}
    chosen = {name: getattr(config, name) for name in names}
    found |= {(part, options.index(option)) for option in options if {**default, **option} == chosen}
  return found


SEEDS = (0, 41, 117, 33, 149, 94, 134, 120, 10, 25, 140, 42)
"""Of the configs that hold every value of every part, each adds as many pairs of values as one in 150 can."""


def test_the_default_cases_have_every_value_of_every_part():
  wanted = {(part, options.index(option)) for part, options in {'shape': SHAPES, **PARTS, **ENCODER_ONLY_PARTS}.items()
            for option in options}
  assert set().union(*(values_of(draw(seed)) for seed in SEEDS)) == wanted


def test_every_field_is_a_part():
  sizes = {'encoder_layers', 'decoder_layers', 'd_model', 'd_ff', 'scan_layers'}
  parts = {name for options in (PARTS | ENCODER_ONLY_PARTS).values() for option in options for name in option}
  assert parts | sizes == {field.name for field in dataclasses.fields(TransformerConfig)}


# -- a case -----------------------------------------------------------------------------------------------------------

KEY = jax.random.key(7)


def nudged(nudges: dict):
  """Adds a value to what the taps of these names pass on."""
  def intercept(call, args, kwargs, context):
    value, module = call(*args, **kwargs), context.module
    if isinstance(module, Tap) and context.method_name == '__call__' and module.name in nudges:
      return value + nudges[module.name].astype(value.dtype)
    return value

  return intercept


@dataclass(frozen=True)
class Case:
  """A model with random parameters."""

  config: TransformerConfig
  many: bool
  """Whether it is one of two hundred: then only some are scanned backwards."""

  @cached_property
  def model(self) -> Model:
    return build_model(dataclasses.replace(self.config, remat='none'), V, V)

  @cached_property
  def params(self):
    numbers = np.random.default_rng(0)

    def fill(path, leaf):
      return jnp.asarray((path[-1].key == 'scale') + 0.3 * numbers.standard_normal(leaf.shape), jnp.float32)

    shapes = jax.eval_shape(partial(initialize, self.model), jax.random.key(0))
    return jax.tree_util.tree_map_with_path(fill, shapes)

  @property
  def sides(self) -> tuple[str, ...]:
    return {'encoder_decoder': ('source', 'target'), 'decoder_only': ('target',),
            'encoder_only': ('source',)}[self.config.shape]

  def run(self, function, *arguments):
    return jax.jit(function)(*arguments)

  def apply(self, params, *arguments, **more):
    return self.model.apply({'params': params}, *arguments, **more)

  def ids(self, lengths_B, width: int, seed: int = 0):
    """BxT, words that are not padding up to each length, and then padding (or any word, if there is none)."""
    words = [word for word in range(V) if word != self.config.pad_id]
    ids_BxT = np.random.default_rng(seed).choice(words, (len(lengths_B), width))
    pad = 1 if self.config.pad_id is None else self.config.pad_id
    return np.where(np.arange(width) < np.asarray(lengths_B)[:, None], ids_BxT, pad)

  @cached_property
  def batch(self):
    """T rows, all alike."""
    lengths = dict(source=S if self.config.pad_id is None else S - 2, target=T)
    return [np.tile(self.ids([lengths[side]], dict(source=S, target=T)[side]), (T, 1)) for side in self.sides]

  @cached_property
  def more(self) -> dict:
    """Arguments besides ids: two texts in each row, or two types of token."""
    if self.config.shape == 'decoder_only':
      return dict(segments_BxT=np.tile([0, 0, 0, 0, 1, 1], (T, 1)))
    if self.config.token_types:
      return dict(types_BxT=np.tile([0, 1, 1, 0, 0], (T, 1)))
    return {}

  def loss(self, model: Model, params, nudges, key=KEY):
    """Row r counts what the model says at position r alone, so one gradient holds what each position looks at."""
    weights_V = jnp.asarray(np.random.default_rng(1).standard_normal(V), jnp.float32)
    with nn.intercept_methods(nudged(nudges)):
      logits_BxTxV = model.apply({'params': params}, *self.batch, **self.more, dropout_key=key)
    value = jnp.einsum('ttv,v', logits_BxTxV[:logits_BxTxV.shape[1], :, :V], weights_V)
    if self.config.num_labels:
      value += model.apply({'params': params}, *self.batch, **self.more, dropout_key=key, method='classify')[0, 1]
    elif self.config.pooler:
      value += model.apply({'params': params}, *self.batch, **self.more, method='embed')[0, 1]
    return value

  @cached_property
  def loss_and_gradients(self):
    """(loss, (of parameters, of what enters the layers))."""
    nudges = {f'{side}_embed': jnp.zeros((*ids_BxT.shape, D)) for side, ids_BxT in zip(self.sides, self.batch)}
    return self.run(jax.value_and_grad(partial(self.loss, self.model), argnums=(0, 1)), self.params, nudges)

  def assert_close(self, actual, expected, tolerance=2e-5):
    """bfloat16 keeps 8 bits of every value on the way."""
    tolerance = tolerance if self.config.dtype == 'float32' else 0.2
    np.testing.assert_allclose(actual, expected, atol=tolerance, rtol=tolerance)


@pytest.fixture(scope='module', params=[
    *SEEDS, *(pytest.param(seed, marks=pytest.mark.slow) for seed in range(1000, 1200))])
def case(request) -> Case:
  return Case(draw(request.param), many=request.param >= 1000)


# -- the laws ---------------------------------------------------------------------------------------------------------


def test_a_config_survives_json(case):
  stored = json.dumps(dataclasses.asdict(case.config))
  assert build(TransformerConfig, json.loads(stored), 'model') == case.config


def test_parameters_are_the_same_in_both_layouts_and_have_a_rule_of_sharding(case):
  unrolled = jax.eval_shape(partial(case.model.init, jax.random.key(0)), *case.batch)['params']
  assert jax.tree.map(jnp.shape, unrolled) == jax.tree.map(jnp.shape, case.params)
  scanned = jax.eval_shape(partial(to_layout, layout='scanned'), case.params)
  back = jax.eval_shape(partial(to_layout, layout='unrolled'), scanned)
  assert jax.tree.map(jnp.shape, back) == jax.tree.map(jnp.shape, case.params)
  for params in (unrolled, scanned):
    for name, leaf in named_leaves(params).items():
      assert len(logical_axes(name, leaf.ndim)) == leaf.ndim


def test_a_sentence_alone_and_one_in_a_batch_with_padding_get_the_same(case):
  c, n = case.config, 3
  short = S if c.encoder_layers and c.pad_id is None else n  # else everything is a word
  batch = [case.ids([width, short if side == 'source' else n], width, seed=2)
           for side, width in zip(case.sides, (S, T) if c.encoder_layers else (T,))]
  alone = [ids[1:, :short if side == 'source' else n] for side, ids in zip(case.sides, batch)]
  methods = ('__call__', *['embed'] * (c.shape == 'encoder_only'), *['classify'] * (c.num_labels > 0))
  whole, one = case.run(lambda params: [
      [case.apply(params, *ids, method=method) for method in methods] for ids in (batch, alone)], case.params)
  for one_1xT, whole_BxT in zip(one, whole):
    case.assert_close(whole_BxT[1, :one_1xT.shape[1]], one_1xT[0])


def test_pairs_packed_in_a_row_are_as_if_alone(case):
  c = case.config
  if c.shape != 'encoder_decoder' or c.convolution != 'none':
    pytest.skip('it takes no packed pairs')
  widths = ((3, 2), (2, 4))  # of source and target
  pairs = [[case.ids([width], width, seed=5 + number) for width in pair] for number, pair in enumerate(widths)]
  padding = case.ids([0], 1)
  packed = [np.concatenate([*side, padding], axis=1) for side in zip(*pairs)]
  segments = [np.repeat([[1, 2, 0]], [*lengths, 1], axis=1) for lengths in zip(*widths)]
  whole, *alone = case.run(lambda params: [case.apply(params, *packed, *segments),
                                           *(case.apply(params, *pair) for pair in pairs)], case.params)
  case.assert_close(whole[:, :6], np.concatenate(alone, axis=1))


def test_gradients_flow_exactly_from_where_a_word_may_look(case):
  """d logits[t] / d embedding[s] is exactly 0 across the mask, and elsewhere not."""
  c, reach = case.config, {}
  _, (_, nudges) = case.loss_and_gradients

  def through(layers: int, visible_TxS, convolution='none'):
    """What is seen through so many layers, each adding to what it was given what is visible."""
    at, own = np.arange(len(visible_TxS)), np.eye(len(visible_TxS))
    distance = np.abs(at[:, None] - at)
    attended, near = visible_TxS & (distance < (c.window or np.inf)), visible_TxS & (distance <= c.kernel_width // 2)
    layer = {'none': own + attended, 'before': (own + attended) @ (own + near), 'parallel': own + attended + near}.get(
        convolution, (own + near) @ (own + attended))
    return np.linalg.matrix_power(layer, layers) > 0

  real_S = np.arange(S) < (S if c.pad_id is None else S - 2)
  if c.encoder_layers:
    encoder_SxS = through(c.encoder_layers, np.broadcast_to(real_S, (S, S)), c.convolution)
    reach['source_embed'] = (encoder_SxS if c.shape == 'encoder_only' else
                             np.broadcast_to(encoder_SxS[real_S].any(0), (T, S)))
  if c.decoder_layers:
    segments_T = np.asarray(case.more['segments_BxT'][0]) if case.more else np.zeros(T)
    reach['target_embed'] = through(c.decoder_layers, np.tri(T, dtype=bool) & (segments_T[:, None] == segments_T))
  for name, expected_TxS in reach.items():
    found_TxS = np.any(np.asarray(nudges[name]) != 0, axis=-1)[:len(expected_TxS)]
    if c.attention_dropout:  # it cuts some
      assert not (found_TxS & ~expected_TxS).any()
    else:
      np.testing.assert_array_equal(found_TxS, expected_TxS)


def is_idle(c: TransformerConfig, path: str) -> bool:
  """Whether a parameter cannot change what the model says.

  What adds the same to the scores of all keys vanishes in the softmax; unless positions turn it, a cap bends it, or a
  sink competes.
  """
  shifts = path.endswith('_attention/key_norm/bias' if c.qk_norm else '_attention/key/bias')
  turned = c.positions == 'rope' and '/self_attention/' in path
  return shifts and not (turned or c.attention_softcap or c.attention_sinks)


def test_every_parameter_counts_but_for_what_the_softmax_cancels(case):
  _, (gradients, _) = case.loss_and_gradients
  for path, leaf in named_leaves(gradients).items():
    assert np.isfinite(leaf).all(), path
    if is_idle(case.config, path):
      assert case.config.dtype == 'bfloat16' or np.abs(leaf).max() < 1e-4, path
    else:
      # Of a router that is sure of itself little is left, but no rounding is in its way.
      assert np.abs(leaf).max() > (1e-7 if path.endswith('router') else 1e-4), path


def test_cached_decoding_equals_teacher_forcing(case):
  if case.config.shape == 'encoder_only':
    pytest.skip('it does not decode')
  target_BxT, widths = case.ids([T, T], T, seed=4), (3, 1, 2)
  sources = [case.ids([S, S if case.config.pad_id is None else 2], S, seed=3)] * (case.config.encoder_layers > 0)

  @case.run
  def whole_BxTxV(params=case.params):
    return case.apply(params, *sources, target_BxT)

  @case.run
  def stepped_BxTxV(params=case.params):
    memory = [case.apply(params, source_BxS, method='encode') for source_BxS in sources]
    cache = case.apply(params, *(memory or [2]), T, method='init_cache')
    logits, at = [], 0
    for width in widths:
      logits_BxTxV, cache = case.apply(params, target_BxT[:, at:at + width], *memory, cache, method='step')
      logits.append(logits_BxTxV)
      at += width
    return jnp.concatenate(logits, axis=1)

  case.assert_close(stepped_BxTxV, whole_BxTxV)


def test_scanned_layers_that_recompute_do_the_same(case):
  value, (gradients, _) = case.loss_and_gradients
  model = with_layout(build_model(case.config, V, V), True)

  def loss(params):
    return case.loss(model, to_layout(params, 'scanned'), {})

  backwards = case.config.dtype == 'float32' and (not case.many or case.config.remat == 'dots')
  other = jax.jit(jax.value_and_grad(loss) if backwards else loss)(case.params)
  case.assert_close(other[0] if backwards else other, value, 1e-4)
  if backwards:
    expected = named_leaves(gradients)
    for path, leaf in named_leaves(other[1]).items():
      np.testing.assert_allclose(leaf, expected[path], atol=1e-4 * max(1, np.abs(expected[path]).max()), err_msg=path)


def test_dropout_is_a_function_of_its_key(case):
  c, value = case.config, jax.jit(lambda params, key: case.loss(case.model, params, {}, key))
  first, again, other = (float(value(case.params, key)) for key in (KEY, KEY, jax.random.key(8)))
  assert first == again
  assert (first != other) == (c.dropout + c.attention_dropout + c.activation_dropout > 0)
