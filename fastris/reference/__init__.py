"""The operators as the papers and their published code write them: the specification of every faster path.

Nothing here is clever, and nothing else in fastris is imported: a reader should be able to hold a file against the
paper (CRIS, arXiv 2111.15174; AlignFormer, arXiv 2301.06429; MagNet, arXiv 2312.12198), and every other implementation
is tested against it in float64. One file per family of operators; all names can be had from this package.
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
from fastris.reference.mask_loss import upsampled_bce_and_dice
from fastris.reference.multiscale_deformable_attention import multiscale_deformable_attention, pixel_centres
from fastris.reference.pixel_contrast import pixel_contrast
from fastris.reference.pixel_word_attention import PixelWordWeights, pixel_word_attention
from fastris.reference.positions import (
    append_coordinates,
    sine_positions_1d,
    sine_positions_2d,
    sine_positions_of_box,
)
from fastris.reference.pyramid import pyramid_mix, spread_matrix
from fastris.reference.region_contrast import region_contrast
from fastris.reference.similarity import (
    PixelNorm,
    contrastive_loss,
    normed_pixels,
    resize_target,
    text_to_pixel_similarity,
    upsampled_bce_with_logits,
)
from fastris.reference.word_pixel_attention import (
    LanguageMask,
    WordPixelWeights,
    masked_instance_norm,
    word_pixel_attention,
)

__all__ = [
    "AttentionWeights",
    "BidirectionalAttentionWeights",
    "FeedForwardWeights",
    "LanguageMask",
    "PixelNorm",
    "PixelWordWeights",
    "SeparateAttentionWeights",
    "WordPixelWeights",
    "append_coordinates",
    "bidirectional_attention",
    "contrastive_loss",
    "coord_conv",
    "cross_attention",
    "feed_forward",
    "few_query_attention",
    "masked_instance_norm",
    "multiscale_deformable_attention",
    "normed_pixels",
    "pixel_centres",
    "pixel_contrast",
    "pixel_word_attention",
    "pointwise_conv_cat",
    "pyramid_mix",
    "region_contrast",
    "resize_target",
    "self_attention",
    "separate_attention",
    "sine_positions_1d",
    "sine_positions_2d",
    "sine_positions_of_box",
    "spread_matrix",
    "text_to_pixel_similarity",
    "upsample2x_conv3x3",
    "upsampled_bce_and_dice",
    "upsampled_bce_with_logits",
    "word_pixel_attention",
]
