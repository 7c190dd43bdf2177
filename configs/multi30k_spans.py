"""Span corruption on the English side of Multi30k (T5, Raffel et al. 2020, section 3.1.4, in small).

    python train.py configs/multi30k_spans.py --data.root DIR
    tfm evaluate runs/multi30k_spans

Validation nll after 1,500 updates: 1.79 nats a target token, 4.12 a word (43 % of the target are words, the rest
sentinels and </s>); the entropies of single tokens are 3.27 and 5.40. 6 minutes on a CPU core that other work shared.
"""

from tfm.config import Config, DataConfig, OptimizerConfig, TokenizerConfig, TrainingConfig, TransformerConfig

config = Config(
    model=TransformerConfig(encoder_layers=2, decoder_layers=2, d_model=128, d_ff=512, num_heads=4, norm='pre',
                            norm_type='rms', positions='relative', biases='none', attention_scale=1.0,
                            scale_embeddings=False, scale_output=True, dropout=0.1),
    tokenizer=TokenizerConfig(kind='bpe', vocab_size=4000, extra_ids=8),
    data=DataConfig(corpus='text', source=None, target=None, limit=None, held_out=None, root='../shared/data/multi30k',
                    train='train.en', validation='val.en', test='test_2016_flickr.en', tokens_per_batch=2048,
                    max_length=64),
    optimizer=OptimizerConfig(schedule='linear', learning_rate=2e-3, warmup_steps=300, epsilon=1e-8,
                              label_smoothing=0.0),
    training=TrainingConfig(steps=1500, log_every=100, validate_every=500, checkpoint_every=500),
)
