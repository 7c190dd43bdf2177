"""tiny Shakespeare, letter by letter: nanoGPT's recipe for a CPU.

    python train.py configs/shakespeare_char.py --data.root DIR
    tfm generate runs/shakespeare_char --prompt "ROMEO:" --sampling-temperature 0.8

As there: 4 layers, 4 heads, width 128, no biases, no dropout, blocks of 64 letters, 12 a batch, 2,000 updates of AdamW
(b2 0.99, weight decay 0.1, norm clipped at 1), the rate rising to 1e-3 in 100 and falling as a cosine to 1e-4.
Validation loss: 1.811 after 7 minutes on one of two cores that other work shared (published: 1.88).
"""

from tfm.config import Config, DataConfig, OptimizerConfig, TokenizerConfig, TrainingConfig, TransformerConfig

config = Config(
    model=TransformerConfig(encoder_layers=0, decoder_layers=4, d_model=128, d_ff=512, num_heads=4, norm='pre',
                            norm_epsilon=1e-5, positions='learned', max_positions=64, feed_forward='gelu',
                            biases='none', scale_embeddings=False, dropout=0.0),
    tokenizer=TokenizerConfig(kind='char', vocab_size=261),
    data=DataConfig(corpus='text', source=None, target=None, limit=None, held_out=None,
                    root='../shared/data/tinyshakespeare', train='input.txt', validation_fraction=0.1,
                    documents='file', packing='blocks', tokens_per_batch=12 * 64, rows_multiple=4, max_length=64),
    optimizer=OptimizerConfig(name='adamw', schedule='cosine', learning_rate=1e-3, final_fraction=0.1, warmup_steps=100,
                              b2=0.99, epsilon=1e-8, weight_decay=0.1, clip_norm=1.0, label_smoothing=0.0),
    training=TrainingConfig(steps=2000, log_every=100, validate_every=500, checkpoint_every=500, samples=2),
)
