"""Multi30k, English to German, by an encoder-decoder made of T5's parts (Raffel et al. 2020).

    python train.py configs/multi30k_t5_en_de.py --data.root DIR
    tfm evaluate runs/multi30k_t5_en_de

Relative positions, RMSNorm before every sub-layer, no biases, no scale on the scores, GEGLU (T5 1.1), one matrix for
both embeddings and the output. Sizes, data and schedule are those of configs/multi30k_en_de.py. Not
trained to its end here; configs/numbers_t5.py has the same parts on the embedded corpus.
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
    model=TransformerConfig(encoder_layers=4, decoder_layers=4, d_model=128, d_ff=256, num_heads=4, norm='pre',
                            norm_type='rms', positions='relative', feed_forward='geglu_tanh', biases='none',
                            attention_scale=1.0, scale_embeddings=False, scale_output=True, dropout=0.3),
    tokenizer=TokenizerConfig(kind='bpe', vocab_size=10_000),
    data=DataConfig(corpus='files', source='en', target='de', root='../shared/data/multi30k', train='train',
                    validation='val', test='test_2016_flickr', limit=None, held_out=None, tokens_per_batch=4096,
                    buckets=10, max_length=128),
    optimizer=OptimizerConfig(schedule='linear', learning_rate=5e-3, warmup_steps=1000),
    training=TrainingConfig(steps=7000, log_every=100, validate_every=1000, checkpoint_every=200, keep_last=10),
    decoding=DecodingConfig(beam_size=5, length_penalty=0.6),
)
