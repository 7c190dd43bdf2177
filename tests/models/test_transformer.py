from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tfm.attention import masks
from tfm.config import ConfigError, TransformerConfig
from tfm.models.build import build_model, initialize
from tfm.models.positions import sinusoidal
from tfm.models.tap import Tap


def embedded(model, variables, ids, key=None) -> dict[str, np.ndarray]:
  """What enters the first layers; XLA drops all that comes after."""

  @jax.jit
  def run(key):
    _, found = model.apply(variables, *ids, dropout_key=key, mutable=['intermediates'],
                           capture_intermediates=lambda module, _: isinstance(module, Tap))
    return {name: found['intermediates'][name]['__call__'][0] for name in ('source_embed', 'target_embed')}

  return run(key)


@pytest.mark.parametrize('tying, scale_embeddings, positions', [
    ('all', True, 'sinusoidal'), ('target', False, 'learned'), ('none', True, 'learned')])
def test_embeddings_are_scaled_rows_plus_positions(tiny, ids, tying, scale_embeddings, positions):
  model, variables = tiny(tying=tying, scale_embeddings=scale_embeddings, positions=positions,
                          max_positions=8 if positions == 'learned' else None)
  params = variables['params']
  for (name, x_BxTxD), ids_BxT in zip(embedded(model, variables, ids).items(), ids):
    side = name.removesuffix('_embed')
    table = params[f'{side}_embedding' if tying != 'all' else 'target_embedding']['table']
    position_TxD = (params[f'{side}_positions']['table'][:ids_BxT.shape[1]] if positions == 'learned'
                    else sinusoidal(jnp.arange(ids_BxT.shape[1]), 16))
    scale = 4.0 if scale_embeddings else 1.0  # sqrt(16)
    np.testing.assert_allclose(x_BxTxD, scale * table[ids_BxT] + position_TxD, atol=1e-6)


def test_dropout_falls_on_the_sum_of_embedding_and_position(tiny, ids):
  model, variables = tiny(dropout=0.4)
  whole, dropped = (embedded(model, variables, ids, key) for key in (None, jax.random.key(0)))
  for side in whole:
    kept = dropped[side] != 0
    assert abs(kept.mean() - 0.6) < 4 * (0.24 / kept.size)**0.5
    np.testing.assert_allclose(dropped[side], np.where(kept, whole[side] / 0.6, 0), rtol=1e-6)


# -- tying ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize('tying, tables', [
    ('none', {'source_embedding', 'target_embedding', 'output'}), ('target', {'source_embedding', 'target_embedding'}),
    ('all', {'target_embedding'})])
def test_tying_says_which_tables_there_are(tiny, tying, tables):
  params = tiny(tying=tying)[1]['params']
  assert set(params) == {'encoder', 'decoder', *tables}
  for name in tables:
    assert params[name]['table'].shape == (19 if name == 'source_embedding' else 17, 16)


def test_a_shared_table_gets_the_gradients_of_all_its_uses(ids):
  """Tied = untied with equal tables, and the gradients of those add up."""
  def gradients(tying, **tables):
    config = TransformerConfig(encoder_layers=1, decoder_layers=1, d_model=16, d_ff=24, num_heads=2, tying=tying)
    model = build_model(config, 17, 17)

    def loss(params):
      return jnp.sum(jax.nn.log_softmax(model.apply({'params': params}, *ids))[..., 5])

    return jax.jit(jax.grad(loss))({**layers, **{name: {'table': table} for name, table in tables.items()}})

  random = np.random.default_rng(0)
  table, other = (jnp.asarray(random.standard_normal((17, 16)) / 4, jnp.float32) for _ in range(2))
  config = TransformerConfig(encoder_layers=1, decoder_layers=1, d_model=16, d_ff=24, num_heads=2)
  shapes = jax.eval_shape(partial(initialize, build_model(config, 17, 17)), jax.random.key(0))
  filled = jax.tree.map(lambda leaf: jnp.asarray(random.standard_normal(leaf.shape) / 4, jnp.float32), shapes)
  layers = {name: filled[name] for name in ('encoder', 'decoder')}
  for tying, source in (('all', table), ('target', other)):
    untied = gradients('none', source_embedding=source, target_embedding=table, output=table)
    uses = [untied[name]['table'] for name in ('target_embedding', 'output')]
    if tying == 'all':
      tied = gradients(tying, target_embedding=table)
      uses.append(untied['source_embedding']['table'])
    else:
      tied = gradients(tying, target_embedding=table, source_embedding=source)
      np.testing.assert_allclose(tied['source_embedding']['table'], untied['source_embedding']['table'], atol=1e-5)
    assert all(np.abs(use).max() > 0.01 for use in uses)
    np.testing.assert_allclose(tied['target_embedding']['table'], sum(uses), rtol=1e-4, atol=1e-5)


def test_one_table_for_two_vocabularies_is_refused():
  model = build_model(TransformerConfig(d_model=16, tying='all'), 19, 17)
  with pytest.raises(ConfigError, match=r"tying='all'.*19.*17.*tying='target'"):
    jax.eval_shape(partial(initialize, model), jax.random.key(0))


# -- the methods ------------------------------------------------------------------------------------------------------


def test_the_methods_are_parts_of_one_another(tiny, ids):
  """logits = unembed(hidden(source, target)) = decode(target, encode(source)), each compiled for itself."""
  model, variables = tiny(norm='pre', tying='none')
  whole, hidden, unembed, encode, decode = (
      jax.jit(partial(model.apply, variables, method=method))
      for method in ('__call__', 'hidden', 'unembed', 'encode', 'decode'))
  logits_BxTxV = whole(*ids)
  assert logits_BxTxV.shape == (3, 5, 17) and logits_BxTxV.dtype == jnp.float32
  np.testing.assert_allclose(unembed(hidden(*ids)), logits_BxTxV, atol=2e-6)
  np.testing.assert_allclose(decode(ids[1], encode(ids[0])), logits_BxTxV, atol=2e-6)


LEARNED = {'positions': 'learned', 'max_positions': 9}
POSITIONS = [*({'positions': kind} for kind in
               ('sinusoidal', 'sinusoidal_halves', 'rope', 'alibi', 'relative', 'none')),
             LEARNED, {'positions': 'rope', 'attention_backend': 'blockwise'},
             {**LEARNED, 'attention_backend': 'blockwise', 'window': 2}]


@pytest.mark.parametrize('changes', POSITIONS, ids=lambda changes: '-'.join(map(str, changes.values())))
def test_pairs_packed_in_a_row_are_as_if_alone(tiny, changes):
  model, variables = tiny(**changes)
  sources = [jnp.array([[5, 6, 7, 2]]), jnp.array([[4, 2]])]
  targets = [jnp.array([[1, 7]]), jnp.array([[1, 9, 16, 8]])]
  padding = jnp.zeros((1, 2), jnp.int32)
  numbers = [jnp.array([row]) for row in ([3] * 4 + [1] * 2 + [0] * 2, [3] * 2 + [1] * 4 + [0] * 2)]
  packed = jax.jit(model.apply)(variables, *(jnp.concatenate([*side, padding], axis=1) for side in (sources, targets)),
                                *numbers)
  alone = jax.jit(lambda: [model.apply(variables, *pair) for pair in zip(sources, targets)])()
  np.testing.assert_allclose(packed[:, :6], jnp.concatenate(alone, axis=1), atol=3e-6)
  assert np.isfinite(packed).all()


def test_no_gradient_leads_from_a_pair_to_its_neighbour(tiny):
  """d logits[t] / d embedding[s] of words that are all different; a target sees its source and what came before it."""
  model, variables = tiny(positions='none', encoder_layers=1, decoder_layers=1, tying='none')
  source_S, target_T, segments_S, segments_T = (jnp.array(row) for row in (
      [4, 5, 6, 7, 8, 9], [4, 5, 6, 7, 8, 9, 10], [1, 1, 1, 2, 2, 0], [1, 1, 2, 2, 2, 2, 0]))

  def logits_TxV(tables):
    params = {**variables['params'], **{name: {'table': table} for name, table in tables.items()}}
    row = (array[None] for array in (source_S, target_T, segments_S, segments_T))
    return model.apply({'params': params}, *row)[0].sum(-1)

  tables = {name: variables['params'][name]['table'] for name in ('source_embedding', 'target_embedding')}
  seen = {name: np.abs(rows).max(-1) > 0 for name, rows in jax.jit(jax.jacobian(logits_TxV))(tables).items()}
  own = np.asarray(segments_T)[:, None]
  np.testing.assert_array_equal(seen['source_embedding'][:, source_S], own == np.asarray(segments_S))
  np.testing.assert_array_equal(seen['target_embedding'][:, target_T],
                                (own == np.asarray(segments_T)) & np.tri(7, dtype=bool))


def test_segments_of_one_side_alone_are_refused(tiny, ids):
  model, variables = tiny()
  for segments in ((jnp.ones_like(ids[0]), None), (None, jnp.ones_like(ids[1]))):
    with pytest.raises(ValueError, match='Segments of one side were given without those of the other'):
      model.apply(variables, *ids, *segments)


def test_the_encoder_looks_in_both_directions_and_reports_the_padding(tiny, ids):
  model, variables = tiny()
  encode = jax.jit(lambda source_BxS, mask: model.apply(variables, source_BxS, mask, method='encode'))
  mask = masks.lengths(jnp.array([6, 3, 4]))
  memory = encode(ids[0], mask)
  changed = encode(ids[0].at[0, 5].set(4), mask)
  difference_BxS = np.abs(changed.states_BxSxD - memory.states_BxSxD).max(-1)
  assert (difference_BxS[0] > 1e-3).all() and (difference_BxS[1:] == 0).all()
  np.testing.assert_array_equal(memory.mask.lengths_B, mask.lengths_B)
  np.testing.assert_array_equal(model.apply(variables, ids[0][:, :2], method='encode').mask.lengths_B, [2, 2, 2])
  # A mask that is given is the mask that is used: a shorter one hides the last token of sentence 0.
  shorter = masks.lengths(jnp.array([5, 3, 4]))
  hidden = encode(ids[0].at[0, 5].set(4), shorter).states_BxSxD - encode(ids[0], shorter).states_BxSxD
  np.testing.assert_array_equal(hidden[0, :5], 0)


def test_a_cache_holds_rows_first_and_one_memory_per_sentence(tiny, ids):
  for scan_layers in (False, True):
    model, variables = tiny(decoder_layers=3, d_k=6, d_v=10, scan_layers=scan_layers)

    def start(model=model, variables=variables):
      memory = model.apply(variables, ids[0], method='encode')
      return model.apply(variables, memory, 7, 4, method='init_cache')

    cache = jax.eval_shape(start)
    middle = (3,) if scan_layers else ()
    layers = 1 if scan_layers else 3
    widths = [6, 10] * layers
    assert [leaf.shape for leaf in jax.tree.leaves(cache.steps)] == [(12, *middle, 2, 7, width) for width in widths]
    assert [leaf.shape for leaf in jax.tree.leaves(cache.source)] == [(3, *middle, 2, 6, width) for width in widths]
    assert cache.index.shape == () and cache.index.dtype == jnp.int32


# -- bfloat16 ---------------------------------------------------------------------------------------------------------


def test_bfloat16_computes_in_bfloat16_and_ends_near_float32(tiny, ids):
  _, variables = tiny()
  losses = {}
  for dtype in ('float32', 'bfloat16'):
    model, _ = tiny(dtype=dtype)
    logits_BxTxV = jax.jit(model.apply)(variables, *ids)
    assert logits_BxTxV.dtype == jnp.float32
    losses[dtype] = float(-jax.nn.log_softmax(logits_BxTxV)[..., 5].mean())
  assert losses['bfloat16'] != losses['float32']
  assert losses['bfloat16'] == pytest.approx(losses['float32'], rel=0.01)


def test_in_bfloat16_matrix_products_are_bfloat16_and_softmax_and_logits_float32(tiny, ids):
  model, variables = tiny(dtype='bfloat16')
  jaxpr = jax.make_jaxpr(model.apply)(variables, *ids)
  types: dict[str, set] = {}

  def visit(jaxpr):
    for equation in jaxpr.eqns:
      types.setdefault(equation.primitive.name, set()).update(str(x.aval.dtype) for x in equation.invars)
      for value in equation.params.values():
        if hasattr(value, 'jaxpr'):
          visit(value.jaxpr)

  visit(jaxpr.jaxpr)
  assert types['dot_general'] == {'bfloat16'}
  assert types['exp'] == {'float32'}
  assert jaxpr.out_avals[0].dtype == jnp.float32
