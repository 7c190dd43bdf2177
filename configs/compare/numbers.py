"""Number names of growing length, English to German, by six kinds of model of one size.

    tfm compare configs/compare/numbers.py
    MODEL=lstm_fixed python train.py configs/compare/numbers.py --run runs/numbers/lstm_fixed-0

Numbers below a billion, none of the test seen before: up to some 40 tokens, where a sentence of Multi30k has 15. The
same six as in `multi30k.py` beside it, at a fifth of the size; the table by source length is what to look at.
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

TRANSFORMER = TransformerConfig(encoder_layers=2, decoder_layers=2, d_model=96, d_ff=256, num_heads=4, norm='pre',
                                dropout=0.0)

BASE = Config(
    model=TRANSFORMER,
    tokenizer=TokenizerConfig(kind='bpe', vocab_size=400),
    data=DataConfig(corpus='numbers', source='en', target='de', limit=10**9, held_out=500, tokens_per_batch=4096,
                    buckets=4, max_length=96),
    optimizer=OptimizerConfig(schedule='linear', learning_rate=3e-3, warmup_steps=100, clip_norm=1.0),
    training=TrainingConfig(steps=600, log_every=50, validate_every=300, checkpoint_every=300, keep_last=1),
    decoding=DecodingConfig(beam_size=5, length_penalty=0.6),
)


def with_model(model) -> Config:
  return replace(BASE, model=model)


configs = {
    'lstm_fixed': with_model(RecurrentConfig(
        encoder_layers=1, decoder_layers=1, d_model=96, d_hidden=180, cell='lstm', bidirectional=False,
        reverse_source=True, bridge='copy', context='start', readout='linear', tying='all')),
    'gru_every_step': with_model(RecurrentConfig(
        encoder_layers=1, decoder_layers=1, d_model=96, d_hidden=158, cell='gru', bidirectional=False,
        context='every_step', tying='all')),
    'gru_attention': with_model(RecurrentConfig(
        encoder_layers=1, decoder_layers=1, d_model=96, d_hidden=110, cell='gru', context='attention', tying='all')),
    'conv_s2s': with_model(ConvolutionalConfig(
        encoder_layers=3, decoder_layers=3, d_model=96, d_hidden=90, kernel_width=3, max_positions=192, tying='all',
        dropout=0.0)),
    'transformer': with_model(TRANSFORMER),
    'conformer': with_model(replace(TRANSFORMER, d_ff=120, convolution='conformer')),
}
_model = os.environ.get('MODEL', 'transformer')
if _model not in configs:
  raise ConfigError(f"MODEL is '{_model}', which is none of {', '.join(configs)}{nearest(_model, configs)}")
config = configs[_model]
