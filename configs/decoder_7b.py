"""A language model of 6.7 billion parameters, of the shape of Llama 2 7B (Touvron et al. 2023), to plan with.

    tfm plan configs/decoder_7b.py --devices 256 --chip v5p --fsdp 256
    python train.py configs/decoder_7b.py --data.root DIR --mesh.fsdp 256

bfloat16, 4 M tokens a batch in rows of 4,096. It was planned (docs/plan.md), not trained: data.root is yours to set.
"""

from tfm.config import Config, DataConfig, OptimizerConfig, TokenizerConfig, TrainingConfig, TransformerConfig

config = Config(
    model=TransformerConfig(encoder_layers=0, decoder_layers=32, d_model=4096, d_ff=11008, num_heads=32, norm='pre',
                            norm_type='rms', norm_epsilon=1e-5, positions='rope', feed_forward='swiglu', biases='none',
                            tying='none', scale_embeddings=False, dropout=0.0, dtype='bfloat16', scan_layers=True,
                            remat='full'),
    tokenizer=TokenizerConfig(kind='bpe', vocab_size=32_000),
    data=DataConfig(corpus='text', source=None, target=None, limit=None, held_out=None, root='text', train='train.txt',
                    validation='validation.txt', packing='blocks', tokens_per_batch=4_194_304, max_length=4096),
    optimizer=OptimizerConfig(schedule='cosine', learning_rate=3e-4, warmup_steps=2000, b2=0.95, epsilon=1e-8,
                              clip_norm=1.0, label_smoothing=0.0),
    training=TrainingConfig(steps=500_000),
)
