"""Blocks that several systems share: CLIP's encoders, convolution blocks, positions, recomputation."""
