"""Transformer base on WMT14 English to German, as in "Attention Is All You Need" (Vaswani et al. 2017).

    python train.py configs/transformer_base.py --data.root DIR --run RUN
    tfm average RUN --last 5
    tfm evaluate RUN/averaged

DIR holds the parallel text, one sentence a line: train.en, train.de (4.5 million pairs), newstest2013.en and .de,
newstest2014.en and .de.

Published: 8 P100 GPUs, 0.4 s a step, 12 hours; newstest2013 25.8 BLEU and perplexity 4.92 per word piece with one
checkpoint (Table 3), newstest2014 27.3 BLEU with the last 5 checkpoints averaged, 10 minutes apart (Table 2). The
paper's BLEU is of tokenised text with compounds split, about half a point above sacreBLEU's.

Not run here: this recipe has been built and its parameters counted, but no model has been trained with it. Where one
batch does not fit the device, `--training.accumulate 8` cuts it up without changing the update.
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
    model=TransformerConfig(encoder_layers=6, decoder_layers=6, d_model=512, d_ff=2048, num_heads=8, dropout=0.1,
                            scan_layers=True),
    tokenizer=TokenizerConfig(kind='bpe', vocab_size=37_000),
    data=DataConfig(corpus='files', source='en', target='de', root='wmt14', train='train', validation='newstest2013',
                    test='newstest2014', limit=None, held_out=None, tokens_per_batch=25_000, buckets=8),
    optimizer=OptimizerConfig(schedule='noam', warmup_steps=4000, label_smoothing=0.1),
    training=TrainingConfig(steps=100_000, log_every=100, validate_every=3000, checkpoint_every=1500, keep_last=5),
    decoding=DecodingConfig(beam_size=4, length_penalty=0.6, extra_length=50),
)
