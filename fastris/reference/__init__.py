"""The operators as the papers and their published code write them: the specification of every faster path.

Nothing here is clever, and nothing else in fastris is imported: a reader should be able to hold a file against the
paper (CRIS, arXiv 2111.15174), and every other implementation is tested against it in float64. One file per family of
operators; all names can be had from this package.
"""

from fastris.reference.attention import (
    AttentionWeights,
    FeedForwardWeights,
    cross_attention,
    feed_forward,
    self_attention,
)
from fastris.reference.convolution import coord_conv, pointwise_conv_cat, upsample2x_conv3x3
from fastris.reference.positions import append_coordinates, sine_positions_1d, sine_positions_2d
from fastris.reference.similarity import contrastive_loss, resize_target, text_to_pixel_similarity

__all__ = [
    "AttentionWeights",
    "FeedForwardWeights",
    "append_coordinates",
    "contrastive_loss",
    "coord_conv",
    "cross_attention",
    "feed_forward",
    "pointwise_conv_cat",
    "resize_target",
    "self_attention",
    "sine_positions_1d",
    "sine_positions_2d",
    "text_to_pixel_similarity",
    "upsample2x_conv3x3",
]
