"""Masked language model on the English side of Multi30k (BERT, Devlin et al. 2019, in small).

    python train.py configs/multi30k_masked.py --data.root DIR
    tfm evaluate runs/multi30k_masked

Validation nll after 1,500 updates of 2,048 tokens: 3.57 nats a hidden token, accuracy 37 % (test 2016: 3.50, 36 %); the
entropy of single tokens is 5.92. 22 minutes on part of a CPU core. That run was told 3,000 updates until its 833rd.
"""

from tfm.config import Config, DataConfig, OptimizerConfig, TokenizerConfig, TrainingConfig, TransformerConfig

config = Config(
    model=TransformerConfig(encoder_layers=3, decoder_layers=0, d_model=128, d_ff=512, num_heads=4, norm='pre',
                            positions='learned', max_positions=64, feed_forward='gelu', biases='all',
                            output_transform=True, output_bias=True, scale_embeddings=False, dropout=0.1),
    tokenizer=TokenizerConfig(kind='bpe', vocab_size=4000, extra_ids=1),
    data=DataConfig(corpus='text', source=None, target=None, limit=None, held_out=None, root='../shared/data/multi30k',
                    train='train.en', validation='val.en', test='test_2016_flickr.en', tokens_per_batch=2048,
                    max_length=64),
    optimizer=OptimizerConfig(schedule='linear', learning_rate=2e-3, warmup_steps=300, epsilon=1e-8,
                              label_smoothing=0.0),
    training=TrainingConfig(steps=1500, log_every=100, validate_every=500, checkpoint_every=500),
)
