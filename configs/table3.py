"""Every row of Table 3 of "Attention Is All You Need" (Vaswani et al. 2017): what each part of the model is worth.

    TABLE3_ROW=C-N2 python train.py configs/table3.py --data.root DIR --run runs/C-N2
    tfm evaluate runs/C-N2 --source DIR/newstest2013.en --reference DIR/newstest2013.de

The environment variable TABLE3_ROW names the row, a key of `VARIANTS`; without it, base. DIR is that of
`transformer_base.py`. The scores are of one checkpoint, not of an average.

Published, for WMT14 English to German on newstest2013 (perplexity per word piece, BLEU of tokenised text); 8 P100 GPUs,
0.4 s a step and 12 hours for base, 1.0 s a step and 3.5 days for big:

    row              PPL   BLEU        row               PPL   BLEU        row               PPL   BLEU
    base             4.92  25.8        C-N2              6.11  23.7        D-dropout0.0      5.77  24.6
    A-h1             5.29  24.9        C-N4              5.19  25.3        D-dropout0.2      4.95  25.5
    A-h4             5.00  25.5        C-N8              4.88  25.5        D-smoothing0.0    4.67  25.3
    A-h16            4.91  25.8        C-d256            5.75  24.5        D-smoothing0.2    5.47  25.7
    A-h32            5.01  25.4        C-d1024           4.66  26.0        E-learned         4.92  25.7
    B-dk16           5.16  25.1        C-ff1024          5.12  25.4        big               4.33  26.4
    B-dk32           5.01  25.4        C-ff4096          4.75  26.2

Not run here: the rows have been built and their parameters counted, but no model has been trained with them.
"""

import os
from dataclasses import replace

from tfm.config import (
    Config,
    ConfigError,
    DataConfig,
    DecodingConfig,
    OptimizerConfig,
    TokenizerConfig,
    TrainingConfig,
    TransformerConfig,
    nearest,
)

BASE = Config(
    model=TransformerConfig(encoder_layers=6, decoder_layers=6, d_model=512, d_ff=2048, num_heads=8, dropout=0.1,
                            scan_layers=True),
    tokenizer=TokenizerConfig(kind='bpe', vocab_size=37_000),
    data=DataConfig(corpus='files', source='en', target='de', root='wmt14', train='train', validation='newstest2013',
                    test='newstest2014', limit=None, held_out=None, tokens_per_batch=25_000, buckets=8),
    optimizer=OptimizerConfig(schedule='noam', warmup_steps=4000, label_smoothing=0.1),
    training=TrainingConfig(steps=100_000, log_every=100, validate_every=3000, checkpoint_every=1500, keep_last=5),
    decoding=DecodingConfig(beam_size=4, length_penalty=0.6, extra_length=50),
)


def row(**model) -> Config:
  """Base with other fields of the model; heads are d_model / num_heads wide, as in the table, unless d_k is set."""
  return replace(BASE, model=replace(BASE.model, **model))


def smoothing(label_smoothing: float) -> Config:
  return replace(BASE, optimizer=replace(BASE.optimizer, label_smoothing=label_smoothing))


VARIANTS: dict[str, Config] = {
    'base': BASE,
    **{f'A-h{h}': row(num_heads=h) for h in (1, 4, 16, 32)},
    **{f'B-dk{width}': row(d_k=width) for width in (16, 32)},
    **{f'C-N{layers}': row(encoder_layers=layers, decoder_layers=layers) for layers in (2, 4, 8)},
    **{f'C-d{width}': row(d_model=width) for width in (256, 1024)},
    **{f'C-ff{width}': row(d_ff=width) for width in (1024, 4096)},
    **{f'D-dropout{rate}': row(dropout=rate) for rate in (0.0, 0.2)},
    **{f'D-smoothing{epsilon}': smoothing(epsilon) for epsilon in (0.0, 0.2)},
    # Room for the longest training sentence (256) as a source and 50 more tokens of its translation.
    'E-learned': row(positions='learned', max_positions=320),
    'big': replace(row(d_model=1024, d_ff=4096, num_heads=16, dropout=0.3),
                   training=replace(BASE.training, steps=300_000, checkpoint_every=600, keep_last=20)),
}

_row = os.environ.get('TABLE3_ROW', 'base')
if _row not in VARIANTS:
  raise ConfigError(f"TABLE3_ROW is '{_row}', which is none of {', '.join(VARIANTS)}{nearest(_row, VARIANTS)}")
config = VARIANTS[_row]
