"""The operators as the papers and their published code write them: the specification of every faster path.

Nothing here is clever, and nothing else in fastris is imported: a reader should be able to hold a file against the
paper (CRIS, arXiv 2111.15174; AlignFormer, arXiv 2301.06429), and every other implementation is tested against it in
float64. One file per family of operators; all names can be had from this package.
"""

from fastris.reference.attention import (
    AttentionWeights,
    FeedForwardWeights,
    cross_attention,
    feed_forward,
    self_attention,
)
from fastris.reference.bidirectional_attention import BidirectionalAttentionWeights, bidirectional_attention
from fastris.reference.convolution import coord_conv, pointwise_conv_cat, upsample2x_conv3x3
from fastris.reference.few_query_attention import SeparateAttentionWeights, few_query_attention, separate_attention
from fastris.reference.multiscale_deformable_attention import multiscale_deformable_attention, pixel_centres
from fastris.reference.positions import (
    append_coordinates,
    sine_positions_1d,
    sine_positions_2d,
    sine_positions_of_box,
)
from fastris.reference.region_contrast import region_contrast
from fastris.reference.similarity import (
    PixelNorm,
    contrastive_loss,
    normed_pixels,
    resize_target,
    text_to_pixel_similarity,
    upsampled_bce_with_logits,
)

__all__ = [
    "AttentionWeights",
    "BidirectionalAttentionWeights",
    "FeedForwardWeights",
    "PixelNorm",
    "SeparateAttentionWeights",
    "append_coordinates",
    "bidirectional_attention",
    "contrastive_loss",
    "coord_conv",
    "cross_attention",
    "feed_forward",
    "few_query_attention",
    "multiscale_deformable_attention",
    "normed_pixels",
    "pixel_centres",
    "pointwise_conv_cat",
    "region_contrast",
    "resize_target",
    "self_attention",
    "separate_attention",
    "sine_positions_1d",
    "sine_positions_2d",
    "sine_positions_of_box",
    "text_to_pixel_similarity",
    "upsample2x_conv3x3",
    "upsampled_bce_with_logits",
]
