"""Multi30k, English to German: Transformer-Tiny, 2.6 M parameters (Wu et al. 2021).

    python train.py configs/multi30k_en_de.py --data.root DIR
    tfm average runs/multi30k_en_de --last 10
    tfm evaluate runs/multi30k_en_de/averaged

As published: 4 + 4 layers, width 128, feed-forward 256, 4 heads, dropout 0.3, one joint BPE vocabulary of 10,000 tied
three ways, peak rate 0.005, average of the last 10 checkpoints, beam 5. Not so: pre-norm, the rate falls linearly to 0
over 7,000 updates of 4,096 tokens (8,000 of 2 x 4,096, as 1/sqrt, there), and text stays cased and untokenised
(lower-casing and Moses tokens are for scoring only).

Test 2016, beam 5: BLEU 40.62 +- 1.63 (13a, cased), 41.09 +- 1.62 (lower-cased Moses tokens; published: 41.02). Trained
in 92 minutes on two CPU cores that other work shared, with its validations, BLEU on 200 sentences at minute (update):
30.9 @11 (1,000), 37.8 @20, 38.8 @29, 41.1 @38, 42.1 @51, 41.7 @74, 42.2 @92 (7,000); nll 2.40, 1.88, 1.79, 1.72, 1.70,
1.66, 1.64. That run was told 10,000 updates at first, 8,000 from 5,405 on and 7,000 from 6,064 on, so its rate fell a
little later than that of a new one will.

Its batches were padded, in 10 shapes; `--data.packing packed --data.buckets 4` packs several pairs into a row instead,
which takes one shape and has less padding.
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
                            dropout=0.3),
    tokenizer=TokenizerConfig(kind='bpe', vocab_size=10_000),
    data=DataConfig(corpus='files', source='en', target='de', root='../shared/data/multi30k', train='train',
                    validation='val', test='test_2016_flickr', limit=None, held_out=None, tokens_per_batch=4096,
                    buckets=10, max_length=128),
    optimizer=OptimizerConfig(schedule='linear', learning_rate=5e-3, warmup_steps=1000),
    training=TrainingConfig(steps=7000, log_every=100, validate_every=1000, checkpoint_every=200, keep_last=10),
    decoding=DecodingConfig(beam_size=5, length_penalty=0.6),
)
