"""Multi30k, German to English, by six kinds of model of one size: the ancestors beside the Transformer.

    tfm compare configs/compare/multi30k.py --root DIR
    MODEL=gru_attention python train.py configs/compare/multi30k.py --run runs/multi30k/gru_attention-0 --data.root DIR

All read the same tokens in the same order (one joint BPE vocabulary of 8,000, tied three ways) and have about 2.4
million parameters, the same number of updates, smoothing, schedule and beam. Learning rate and dropout belong to the
kind.
"""

import os
from dataclasses import replace

from tfm.config import (
    Config,
    ConfigError,
    ConvolutionalConfig,
    DataConfig,
    DecodingConfig,
    OptimizerConfig,
    RecurrentConfig,
    TokenizerConfig,
    TrainingConfig,
    TransformerConfig,
    nearest,
)

TRANSFORMER = TransformerConfig(encoder_layers=4, decoder_layers=4, d_model=128, d_ff=256, num_heads=4, norm='pre',
                                dropout=0.1)
"""Wu et al. 2021, "tiny"."""

BASE = Config(
    model=TRANSFORMER,
    tokenizer=TokenizerConfig(kind='bpe', vocab_size=8000),
    data=DataConfig(corpus='files', source='de', target='en', root='../shared/data/multi30k', train='train',
                    validation='val', test='test_2016_flickr', limit=None, held_out=None, tokens_per_batch=4096,
                    buckets=8, max_length=64),
    optimizer=OptimizerConfig(schedule='linear', learning_rate=5e-3, warmup_steps=200, clip_norm=1.0),
    training=TrainingConfig(steps=1000, log_every=50, validate_every=500, checkpoint_every=500, keep_last=1),
    decoding=DecodingConfig(beam_size=5, length_penalty=0.6),
)


def with_model(model, learning_rate: float) -> Config:
  return replace(BASE, model=model, optimizer=replace(BASE.optimizer, learning_rate=learning_rate))


configs = {
    # Sutskever et al. 2014: the source is read backwards into one vector, with which the decoder starts.
    'lstm_fixed': with_model(RecurrentConfig(
        encoder_layers=2, decoder_layers=2, d_model=128, d_hidden=208, cell='lstm', bidirectional=False,
        reverse_source=True, bridge='copy', context='start', readout='linear', tying='all', dropout=0.1), 3e-3),
    # Cho et al. 2014: the vector enters every step of the decoder and its readout.
    'gru_every_step': with_model(RecurrentConfig(
        encoder_layers=1, decoder_layers=1, d_model=128, d_hidden=304, cell='gru', bidirectional=False,
        context='every_step', tying='all', dropout=0.1), 3e-3),
    # Bahdanau et al. 2015: an encoder in both directions, and attention.
    'gru_attention': with_model(RecurrentConfig(
        encoder_layers=1, decoder_layers=1, d_model=128, d_hidden=208, cell='gru', context='attention', tying='all',
        dropout=0.1), 3e-3),
    # Gehring et al. 2017: gated convolutions, attention in every decoder layer.
    'conv_s2s': with_model(ConvolutionalConfig(
        encoder_layers=4, decoder_layers=4, d_model=128, d_hidden=144, kernel_width=3, max_positions=128, tying='all',
        dropout=0.1), 3e-3),
    'transformer': with_model(TRANSFORMER, 5e-3),
    # Gulati et al. 2020: convolutions inside the encoder's layers.
    'conformer': with_model(replace(TRANSFORMER, encoder_layers=3, d_ff=192, convolution='conformer'), 5e-3),
}
_model = os.environ.get('MODEL', 'transformer')
if _model not in configs:
  raise ConfigError(f"MODEL is '{_model}', which is none of {', '.join(configs)}{nearest(_model, configs)}")
config = configs[_model]
