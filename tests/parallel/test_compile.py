"""One step, many meshes: the same losses and weights as on one device, with the collectives that belong to the mesh."""

from __future__ import annotations

import contextlib
import re
from dataclasses import replace
from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import tfm.training.loss
from tfm.config import (
    Config,
    ConfigError,
    ConvolutionalConfig,
    DataConfig,
    MeshConfig,
    OptimizerConfig,
    RecurrentConfig,
    TokenizerConfig,
    TrainingConfig,
    TransformerConfig,
)
from tfm.models.build import build_model, initialize
from tfm.parallel.collectives import collectives
from tfm.parallel.compile import jit_step, place_batch, pmap_step, require_rows, share_of_rows
from tfm.parallel.mesh import build_mesh
from tfm.parallel.rules import shardings
from tfm.training.step import new_state

pytestmark = pytest.mark.skipif(len(jax.devices()) < 8, reason='needs 8 devices: tests/test_multi_device.py has them')

V, B, L, STEPS = 40, 8, 16, 20
MESHES = {
    'data': dict(data=8), 'fsdp': dict(data=1, fsdp=8), 'tensor': dict(data=2, tensor=4),
    'context': dict(data=1, context=8), 'data fsdp': dict(data=2, fsdp=4), 'data context': dict(data=4, context=2),
    'fsdp tensor': dict(data=1, fsdp=4, tensor=2), 'tensor context': dict(data=1, tensor=4, context=2),
    'fsdp context': dict(data=1, fsdp=2, context=4), 'data tensor context': dict(data=2, tensor=2, context=2),
    'fsdp tensor context': dict(data=1, fsdp=2, tensor=2, context=2),
    'data expert': dict(data=2, expert=4), 'fsdp expert tensor': dict(data=1, fsdp=2, expert=2, tensor=2),
    'data expert context': dict(data=2, expert=2, context=2)}
ANCESTORS = {
    'recurrent': RecurrentConfig(d_model=16, d_hidden=16, dropout=0.1),
    'convolutional': ConvolutionalConfig(encoder_layers=1, decoder_layers=1, d_model=16, d_hidden=16, max_positions=64)}
FAMILIES = {
    **dict.fromkeys(ANCESTORS, {}),
    'conformer': dict(encoder_layers=1, decoder_layers=1, convolution='conformer'),
    'encoder_decoder': dict(encoder_layers=1, decoder_layers=1),
    'packed pairs': dict(encoder_layers=1, decoder_layers=1, positions='rope'),
    'decoder_only': dict(encoder_layers=0, decoder_layers=2, positions='rope', num_kv_heads=2, biases='none'),
    'encoder_only': dict(encoder_layers=2, decoder_layers=0, positions='learned', max_positions=64, tying='none'),
    'experts': dict(encoder_layers=0, decoder_layers=2, feed_forward='swiglu', biases='none', experts=4,
                    load_balance=0.1, activation_dropout=0.1)}
PACKED = dict(corpus='files', limit=None, held_out=None, root='root', train='train', validation='validation',
              packing='packed')
MONOLINGUAL = 'decoder_only', 'encoder_only', 'experts'
TEXT = dict(corpus='text', source=None, target=None, limit=None, held_out=None, root='root', train='train',
            validation='validation')
QUICK = [('encoder_decoder', name) for name in MESHES] + [
    ('decoder_only', 'fsdp tensor context'), ('decoder_only', 'data context'), ('decoder_only', 'data fsdp'),
    ('packed pairs', 'fsdp tensor context'), ('packed pairs', 'data context'),
    ('encoder_only', 'fsdp tensor context'), ('encoder_only', 'fsdp context'), ('experts', 'data'),
    ('experts', 'data expert'), ('experts', 'fsdp expert tensor'), ('experts', 'data expert context'),
    ('recurrent', 'data'), ('recurrent', 'data fsdp'), ('convolutional', 'data fsdp'),
    ('conformer', 'fsdp tensor context')]
# Every split of every family; four devices cannot share two key/value heads.
CASES = [pytest.param(family, name, marks=() if (family, name) in QUICK else pytest.mark.slow)
         for family in FAMILIES for name, mesh in MESHES.items()
         if ('expert' not in name or family == 'experts') and
         not (family in ANCESTORS and ('tensor' in name or 'context' in name)) and
         (family, mesh.get('tensor')) != ('decoder_only', 4)]
EXPECTED = {  # what a mesh axis must bring about; XLA's CPU compiler makes no reduce-scatter that is not asked for
    'data': {'all-reduce'}, 'fsdp': {'all-gather', 'all-reduce'}, 'tensor': {'all-reduce'},
    'expert': {'all-reduce', 'all-gather', 'reduce-scatter'}, 'context': {'all-reduce', 'collective-permute'}}


def config_of(mesh: dict, accumulate: int = 1, dropout: float = 0.1, family: str = 'encoder_decoder') -> Config:
  return Config(
      model=replace(ANCESTORS[family], dropout=dropout) if family in ANCESTORS else TransformerConfig(
          **{**dict(d_model=16, d_ff=32, num_heads=4, dropout=dropout, norm='pre'), **FAMILIES[family]}),
      tokenizer=TokenizerConfig(extra_ids=int(family == 'encoder_only')),
      data=DataConfig(width_multiple=16, max_length=64, **(
          TEXT if family in MONOLINGUAL else PACKED if family == 'packed pairs' else {})),
      optimizer=OptimizerConfig(schedule='constant', learning_rate=1e-3, warmup_steps=4),
      training=TrainingConfig(accumulate=accumulate), mesh=MeshConfig(**mesh))


@cache
def batches(shape: str = 'encoder_decoder', packed: bool = False):
  if packed:  # two pairs in each row
    return [(*sides, *((1 + (np.arange(side.shape[1]) >= 6)) * (side > 0) for side in sides))
            for sides in batches()[:4]] * 5
  if shape == 'decoder_only':
    return [(target, None) for _, target in batches()[:4]] * 5
  if shape == 'encoder_only':  # asked for a third of the tokens
    return [(source, np.where(np.arange(L) % 3 == 0, source, 0)) for source, _ in batches()[:4]] * 5
  rng = np.random.default_rng(0)
  made = []
  for _ in range(STEPS):
    sides = [rng.integers(3, V, (B, width)).astype(np.int32) for width in (L, L + 1)]
    for side in sides:
      for row, length in enumerate(rng.integers(L // 2, L + 1, B)):
        side[row, length:] = 0
    made.append(tuple(sides))
  return made


def train(config: Config, devices: int):
  """(losses of all steps, weights at the end, optimised HLO)."""
  model = build_model(config.model, V, V)
  mesh = build_mesh(config.mesh, jax.devices()[:devices])
  state = new_state(config, model, initialize(model, jax.random.key(0)))
  abstract, made = jax.eval_shape(lambda: state), batches(config.model.shape, config.packs_pairs)
  if config.mesh.compiler == 'pmap':
    step, hlo, place = pmap_step(config, model, mesh), '', lambda batch: batch
  else:
    state = jax.device_put(state, shardings(mesh, abstract))
    with jax.set_mesh(mesh):
      step = jit_step(config, model, mesh, abstract).lower(
          abstract, jax.eval_shape(lambda: made[0])).compile()
    hlo, place = step.as_text(), lambda batch: place_batch(batch, 0, B, mesh, config.model.shape)
  losses = []
  for batch in made:
    with contextlib.nullcontext() if config.mesh.compiler == 'pmap' else jax.set_mesh(mesh):
      state, metrics = step(state, place(batch))
    losses.append(float(metrics.sums.loss / metrics.sums.tokens))
  return np.array(losses), jax.device_get(state.params), hlo


@pytest.fixture(autouse=True)
def chunked(monkeypatch):
  """Loss in several chunks, also of a device's share."""
  monkeypatch.setattr(tfm.training.loss, 'most_logits', lambda params: 2**8)


@cache
def alone(dropout: float = 0.1, family: str = 'encoder_decoder'):
  return train(config_of({'data': 1}, dropout=dropout, family=family), 1)


def assert_same(found, expected):
  np.testing.assert_allclose(found[0], expected[0], rtol=1e-5)
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), found[1], expected[1])


@pytest.mark.parametrize('family, name', CASES)
def test_a_mesh_trains_like_one_device(family, name):
  losses, params, hlo = train(config_of(MESHES[name], family=family), 8)
  assert_same((losses, params), alone(family=family))
  assert losses[-4:].mean() < losses[:4].mean() - (0.01 if family in ANCESTORS else 0.05)
  moved = collectives(hlo)
  if family == 'packed pairs':  # positions in segments are gathered, an integer for each token
    moved = [each for each in moved if each.bytes > 4 * B * (L + 1) or not each.kind.startswith('all-')
             or each.kind == 'all-reduce']
  found = {each.kind for each in moved}
  axes = [axis for axis in name.split() if MESHES[name].get(axis, 1) > 1]
  expected = set().union(*(EXPECTED[axis] for axis in axes))
  if family == 'experts' and 'fsdp' in axes:  # their kernels are gathered by hand, the gradient of which is a scatter
    expected.add('reduce-scatter')
  assert expected <= found
  if 'tensor' not in axes:  # combined with it, XLA moves activations between layouts as it likes
    assert found == expected


@cache
def experts_hlo(name: str) -> str:
  config = config_of(MESHES[name], family='experts')
  model, mesh = build_model(config.model, V, V), build_mesh(config.mesh)
  abstract = jax.eval_shape(lambda: new_state(config, model, initialize(model, jax.random.key(0))))
  with jax.set_mesh(mesh):
    return jit_step(config, model, mesh, abstract).lower(
        abstract, jax.eval_shape(lambda: batches('decoder_only')[0])).compile().as_text()


@pytest.mark.parametrize('name', ['data', 'data expert', 'data expert context'])
def test_experts_stay_where_they_are_and_tokens_come_to_them(name):
  hlo, (D, F, k) = experts_hlo(name), (16, 32, 2)
  expert, others = MESHES[name].get('expert', 1), MESHES[name].get('data', 1) * MESHES[name].get('context', 1)
  tokens = B * L // others  # of all devices that share out the experts
  moved = [each for each in collectives(hlo) if each.kind in ('all-gather', 'reduce-scatter')]
  assert bool(moved) == (expert > 1)
  assert all(each.group == expert and each.bytes <= 4 * tokens * D for each in moved)
  assert 4 * tokens * D < 4 * 4 * D * F  # bytes of tokens, of experts
  sorted_rows = [int(rows) for rows in re.findall(r's32\[(\d+)\][^=]* sort\(', hlo)]
  assert sorted_rows and set(sorted_rows) == {tokens * k}


def test_micro_batches_share_out_too():
  assert_same(train(config_of({'data': 4, 'fsdp': 2}, accumulate=1, dropout=0.0), 8),
              train(config_of({'data': 1}, accumulate=2, dropout=0.0), 1))
  assert_same(train(config_of({'data': 2, 'fsdp': 2}, accumulate=2, dropout=0.0), 4),
              train(config_of({'data': 1}, accumulate=1, dropout=0.0), 1))


def test_experts_share_out_micro_batches_too(monkeypatch):
  monkeypatch.setitem(FAMILIES['experts'], 'activation_dropout', 0.0)
  assert_same(train(config_of({'data': 2, 'expert': 2}, accumulate=2, dropout=0.0, family='experts'), 4),
              train(config_of({'data': 1}, accumulate=1, dropout=0.0, family='experts'), 1))


@pytest.mark.parametrize('family', ['encoder_decoder', *(
    pytest.param(family, marks=pytest.mark.slow) for family in FAMILIES if family != 'encoder_decoder')])
def test_pmap_is_jit(family, monkeypatch):
  monkeypatch.setitem(FAMILIES['experts'], 'activation_dropout', 0.0)
  assert_same(train(config_of({'data': 8, 'compiler': 'pmap'}, dropout=0.0, family=family), 8), alone(0.0, family))


def test_no_constraint_is_lost():
  """As many as the model names, whatever the mesh: embeddings, sub-layers, feed-forward, logits and their gradients."""
  counts = set()
  for name in ('data', 'tensor', 'context'):
    config = config_of(MESHES[name])
    model, mesh = build_model(config.model, V, V), build_mesh(config.mesh)
    abstract = jax.eval_shape(lambda model=model, config=config:
                              new_state(config, model, initialize(model, jax.random.key(0))))
    with jax.set_mesh(mesh):
      jaxpr = str(jit_step(config, model, mesh, abstract).trace(
          abstract, jax.eval_shape(lambda: batches()[0])).jaxpr)
    counts.add(jaxpr.count('sharding_constraint'))
  # Queries, keys, values, feed-forward, sub-layers: 3 + 1 + 2 of an encoder layer, 6 + 1 + 3 of a decoder layer; two
  # embedded sequences; the table, for them and for the logits; the logits. Each again for its gradient.
  assert counts == {2 * (6 + 10 + 2 + 2 + 1)}


def test_rows_that_cannot_be_shared_out_are_refused():
  config = config_of({'data': 8}, accumulate=2)
  with pytest.raises(ConfigError, match=r'data\.rows_multiple 8 does not share out among .* = 8 devices and 2 micro'):
    require_rows(config, build_mesh(config.mesh))


@pytest.mark.parametrize('mesh', [dict(data=8), dict(data=1, context=8), dict(data=2, fsdp=2, tensor=2)])
def test_one_process_has_all_rows(mesh):
  assert share_of_rows(build_mesh(MeshConfig(**mesh))) == (0, 1)


def test_a_placed_batch_is_the_batch():
  mesh = build_mesh(MeshConfig(data=2, context=4))
  placed = place_batch(batches()[0], 0, B, mesh, 'encoder_decoder')
  jax.tree.map(np.testing.assert_array_equal, placed, batches()[0])
  assert placed[0].sharding.shard_shape(placed[0].shape) == (B // 2, L // 4)
  assert jnp.asarray(placed[1]).sharding.shard_shape(placed[1].shape) == (B // 2, L + 1)
