"""The four ids that are not text, the same in every vocabulary."""

PAD, BOS, EOS, UNK = 0, 1, 2, 3
"""Padding (always on the right), start of sentence, end of sentence, unknown."""
