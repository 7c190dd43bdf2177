"""Numbers in words, English to German, by an encoder-decoder made of T5's parts (Raffel et al. 2020).

    python train.py configs/numbers_t5.py

Relative positions, RMSNorm, GEGLU, no biases, no scale on the scores. Two CPU cores: 4 minutes, compilation, validation
and test included. Exact match on 1,000 held-out numbers below one million: 99.6 %.
"""

from tfm.config import (
    Config,
    DataConfig,
    DecodingConfig,
    OptimizerConfig,
    TokenizerConfig,
    TrainingConfig,
    TransformerConfig,
)

config = Config(
    model=TransformerConfig(encoder_layers=2, decoder_layers=2, d_model=128, d_ff=512, num_heads=4, norm='pre',
                            norm_type='rms', positions='relative', feed_forward='geglu_tanh', biases='none',
                            attention_scale=1.0, scale_embeddings=False, scale_output=True, dropout=0.0),
    tokenizer=TokenizerConfig(kind='bpe', vocab_size=400),
    data=DataConfig(corpus='numbers', source='en', target='de', tokens_per_batch=4096, buckets=2, max_length=64),
    optimizer=OptimizerConfig(schedule='cosine', learning_rate=2e-3, warmup_steps=100),
    training=TrainingConfig(steps=400, log_every=50, validate_every=200, checkpoint_every=200),
    decoding=DecodingConfig(beam_size=1),
)
