"""tiny Shakespeare, letter by letter: nanoGPT's recipe for a GPU. It has not been run here: no GPU was at hand.

    python train.py configs/shakespeare_gpu.py --data.root DIR

As there: 6 layers, 6 heads, width 384, no biases, dropout 0.2, blocks of 256 letters, 64 a batch, 5,000 updates of
AdamW, the rate rising to 1e-3 in 100 and falling as a cosine to 1e-4. Published best validation loss: 1.4697.
"""

from tfm.config import Config, DataConfig, OptimizerConfig, TokenizerConfig, TrainingConfig, TransformerConfig

config = Config(
    model=TransformerConfig(encoder_layers=0, decoder_layers=6, d_model=384, d_ff=1536, num_heads=6, norm='pre',
                            norm_epsilon=1e-5, positions='learned', max_positions=256, feed_forward='gelu',
                            biases='none', scale_embeddings=False, dropout=0.2, attention_dropout=0.2,
                            dtype='bfloat16'),
    tokenizer=TokenizerConfig(kind='char', vocab_size=261),
    data=DataConfig(corpus='text', source=None, target=None, limit=None, held_out=None,
                    root='../shared/data/tinyshakespeare', train='input.txt', validation_fraction=0.1,
                    documents='file', packing='blocks', tokens_per_batch=64 * 256, max_length=256),
    optimizer=OptimizerConfig(name='adamw', schedule='cosine', learning_rate=1e-3, final_fraction=0.1, warmup_steps=100,
                              b2=0.99, epsilon=1e-8, weight_decay=0.1, clip_norm=1.0, label_smoothing=0.0),
    training=TrainingConfig(steps=5000, log_every=100, validate_every=250, checkpoint_every=250, samples=2),
)
