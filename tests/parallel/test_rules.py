"""The table of sharding covers every parameter of every family, uses every rule, and refuses what does not fit."""

from __future__ import annotations

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractMesh, AxisType

from tfm.config import (
    Config,
    ConfigError,
    ConvolutionalConfig,
    DataConfig,
    OptimizerConfig,
    RecurrentConfig,
    TokenizerConfig,
    TransformerConfig,
)
from tfm.models.build import build_model, initialize
from tfm.parallel import rules
from tfm.parallel.mesh import AXES
from tfm.training.named_arrays import named_leaves
from tfm.training.step import new_state

FAMILIES = [
    TransformerConfig(**{**dict(encoder_layers=2, decoder_layers=2, d_model=16, d_ff=32, num_heads=4, scan_layers=scan),
                         **fields})
    for scan in (False, True)
    for fields in (
        dict(), dict(norm='pre', tying='none', positions='learned', max_positions=16), dict(tying='target'),
        dict(experts=4, biases='none', feed_forward='swiglu'),
        dict(encoder_layers=0, num_kv_heads=2, biases='all', attention_sinks=True, output_bias=True, qk_norm=True),
        dict(decoder_layers=0, norm='sandwich', positions='relative', token_types=2, output_transform=True, pooler=True,
             num_labels=3, embedding_norm=True, feed_forward='geglu'),
        dict(convolution='conformer', norm='pre'), dict(convolution='parallel'))] + [
    RecurrentConfig(d_model=16, d_hidden=8, score='general', alignment='local_predictive', attention_window=2,
                    output_bias=True),
    RecurrentConfig(d_model=16, d_hidden=8, cell='lstm', decoder_layers=2, readout='tanh', bidirectional=False,
                    context='every_step'),
    RecurrentConfig(encoder_layers=0, d_model=16, d_hidden=8, cell='window', order=3),
    ConvolutionalConfig(encoder_layers=2, decoder_layers=2, d_model=16, d_hidden=8),
    ConvolutionalConfig(encoder_layers=0, decoder_layers=2, d_model=16, d_hidden=8, weight_norm=False)]


def mesh_of(*sizes: int) -> AbstractMesh:
  return AbstractMesh(sizes, AXES, axis_types=(AxisType.Auto,) * len(AXES))


def state_of(model_config: TransformerConfig, vocab: int = 40):
  text = dict(corpus='text', source=None, target=None, limit=None, held_out=None, root='r', train='t', validation='v')
  data = DataConfig(max_length=16, **(text if model_config.shape != 'encoder_decoder' else {}))
  tokenizer = TokenizerConfig(extra_ids=int(model_config.shape == 'encoder_only'))
  config = Config(model=model_config, data=data, tokenizer=tokenizer)
  model = build_model(model_config, vocab, vocab)
  return jax.eval_shape(lambda: new_state(config, model, initialize(model, jax.random.key(0))))


@pytest.mark.parametrize('family', range(len(FAMILIES)))
def test_every_parameter_and_every_moment_is_placed_along_all_that_can_cut_it(family):
  state = state_of(FAMILIES[family])
  placed = named_leaves(rules.shardings(mesh_of(1, 2, 2, 2, 2), state))
  assert placed.keys() == named_leaves(state).keys()
  for name, leaf in named_leaves(state).items():
    used = [each for names in placed[name].spec if names for each in np.atleast_1d(names)]
    assert len(used) == len(set(used)) and len(rules.logical_axes(name, leaf.ndim)) == leaf.ndim
    # Heads of an encoder and filters are not worth the communication; ancestors share out rows alone.
    narrow = {'bias', 'states', 'kernel_width'} & set(rules.logical_axes(name, leaf.ndim))
    if name.endswith(('kernel', 'embedding/table')) and not narrow:
      assert set(used) == {'fsdp', 'tensor'}, name
    if re.search(r'mlp/(inner|gate|outer)$', name):
      assert set(used) == {'expert', 'fsdp', 'tensor'}, name
  moments = [name for name in placed if '/mu/' in name]
  assert moments and all(placed[name] == placed[f'params/{name.split("/mu/")[1]}'] for name in moments)


def test_every_rule_and_every_logical_axis_is_used():
  paths = {name: leaf.ndim for family in FAMILIES for name, leaf in named_leaves(state_of(family)).items()}
  used = {pattern for pattern in rules.PARAMETER_AXES for path in paths if re.search(f'(^|/){pattern}$', path)}
  assert used == set(rules.PARAMETER_AXES)
  axes = {axis for path, ndim in paths.items() for axis in rules.logical_axes(path, ndim)}
  assert axes == set(rules.PARAMETER_MESH)


def test_a_parameter_without_a_rule_is_an_error_that_names_it():
  with pytest.raises(ConfigError, match='No sharding rule covers params/novel/kernel'):
    rules.shardings(mesh_of(1, 1, 1, 1, 1), {'params': {'novel': {'kernel': jnp.zeros((2, 2))}}})


def test_a_rule_of_another_rank_is_an_error():
  with pytest.raises(ConfigError, match='mlp/inner/kernel has 3 dimensions, but its sharding rule names 2'):
    rules.logical_axes('encoder/mlp/inner/kernel', 3)


def test_a_collision_is_an_error():
  with pytest.raises(ConfigError, match="cut twice along mesh axis 'tensor'"):
    rules.partition(('heads', 'mlp'), rules.PARAMETER_MESH, 'it')
  with pytest.raises(ConfigError, match="logical axis 'width', which no rule knows"):
    rules.partition(('width',), rules.PARAMETER_MESH, 'it')


@pytest.mark.parametrize('sizes, vocab, changes, sentence', [
    ((1, 1, 1, 4, 1), 42, {}, r'target_embedding/table: its vocab axis has 42 entries, which the 4 devices of '
                           r'mesh\.tensor cannot share; set model\.vocab_multiple'),
    ((1, 1, 1, 8, 1), 40, {}, r'heads axis has 4 entries, which the 8 devices of mesh\.tensor'),
    ((1, 1, 1, 4, 1), 40, dict(d_ff=30), r'mlp axis has 30 entries.*model\.d_ff'),
    ((1, 3, 1, 1, 1), 40, {}, r'embed axis has 16 entries, which the 3 devices of mesh\.fsdp'),
    ((1, 1, 4, 1, 1), 40, dict(experts=6, biases='none'),
     r'mlp/inner: its experts axis has 6 entries, which the 4 devices of mesh\.expert.*multiple of it')])
def test_what_the_devices_do_not_divide_is_refused_by_name(sizes, vocab, changes, sentence):
  model = TransformerConfig(encoder_layers=1, decoder_layers=1, d_model=16, num_heads=4, **{'d_ff': 32, **changes})
  with pytest.raises(ConfigError, match=sentence):
    rules.shardings(mesh_of(*sizes), state_of(model, vocab))


def test_a_padded_vocabulary_can_be_shared():
  model = TransformerConfig(encoder_layers=1, decoder_layers=1, d_model=16, d_ff=32, num_heads=4, vocab_multiple=8)
  state = state_of(model, 42)
  assert state.params['target_embedding']['table'].shape == (48, 16)
  rules.shardings(mesh_of(1, 1, 1, 4, 1), state)


def test_activations_are_named_dimension_by_dimension():
  x = jnp.zeros((4, 6))
  assert rules.constrain(x, 'batch', 'length') is x  # no mesh

  def constrained(axes, x, mesh):
    with jax.sharding.use_abstract_mesh(mesh):
      return rules.constrain(x, *axes)

  with pytest.raises(ConfigError, match='was given 1 logical axes'):
    constrained(('batch',), x, mesh_of(2, 1, 1, 1, 1))
  with pytest.raises(ConfigError, match=r'length axis has 6 entries, which the 4 devices .*data\.width_multiple'):
    constrained(('batch', 'length'), x, mesh_of(1, 1, 1, 1, 4))


@pytest.mark.parametrize('name', ['adamw', 'adafactor', 'lion', 'muon'])
@pytest.mark.parametrize('scan', [False, True])
def test_the_state_of_every_optimizer_is_placed(name, scan):
  model_config = TransformerConfig(encoder_layers=2, decoder_layers=2, d_model=128, d_ff=128, num_heads=2, biases='all',
                                   scan_layers=scan)
  config = Config(model=model_config, optimizer=OptimizerConfig(name=name))
  model = build_model(model_config, 128, 128)
  state = jax.eval_shape(lambda: new_state(config, model, initialize(model, jax.random.key(0))))
  placed = named_leaves(rules.shardings(mesh_of(1, 2, 1, 2, 1), state))
  moments = {leaf for leaf in placed if re.search('/(mu|nu)/', leaf)}
  assert all(placed[leaf] == placed[f'params/{re.split("/(?:mu|nu)/", leaf)[1]}'] for leaf in moments)
  others = [leaf for leaf in placed if leaf.startswith('opt_state') and leaf not in moments]
  assert all(placed[leaf].is_fully_replicated for leaf in others) and bool(moments) == (name != 'adafactor')
