"""Train a Transformer: python train.py [CONFIG.py] [--run DIR] [--init-from RUN] [--any.config-field VALUE ...]."""

from pathlib import Path

from tfm.cli import train_main

if __name__ == '__main__':
  train_main(Path(__file__).parent / 'configs' / 'numbers_en_de.py')
