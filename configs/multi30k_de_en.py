"""Multi30k, German to English: Transformer-Tiny, 2.6 M parameters (Wu et al. 2021).

    python train.py configs/multi30k_de_en.py --data.root DIR
    tfm average runs/multi30k_de_en --last 10
    tfm evaluate runs/multi30k_de_en/averaged

As published: 4 + 4 layers, width 128, feed-forward 256, 4 heads, dropout 0.3, one joint BPE vocabulary of 10,000 tied
three ways, peak rate 0.005, average of the last 10 checkpoints, beam 5. Not so: pre-norm, the rate falls linearly to 0
over 7,000 updates of 4,096 tokens (8,000 of 2 x 4,096, as 1/sqrt, there), and text stays cased and untokenised
(lower-casing and Moses tokens are for scoring only).

Test 2016, beam 5, after a short run (`--training.steps 3000 --optimizer.warmup-steps 500`, 58 minutes on one CPU core):
BLEU 40.82 +- 1.66 (13a, cased), 41.11 +- 1.64 (lower-cased Moses tokens); the average of its last 5 checkpoints 40.47
and 40.73. Validation, BLEU on 200 sentences at minute (update): 36.4 @20 (1,000), 41.4 @40, 41.8 @58 (3,000); nll
2.00, 1.72, 1.66. The 7,000 updates have not been run.
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
    data=DataConfig(corpus='files', source='de', target='en', root='../shared/data/multi30k', train='train',
                    validation='val', test='test_2016_flickr', limit=None, held_out=None, tokens_per_batch=4096,
                    buckets=10, max_length=128),
    optimizer=OptimizerConfig(schedule='linear', learning_rate=5e-3, warmup_steps=1000),
    training=TrainingConfig(steps=7000, log_every=100, validate_every=1000, checkpoint_every=200, keep_last=10),
    decoding=DecodingConfig(beam_size=5, length_penalty=0.6),
)
