"""The operators, one a file: the contract, the algebra behind it, and the plain-PyTorch path."""

from fastris.ops.bidirectional_attention import bidirectional_attention
from fastris.ops.contrastive import text_to_pixel_contrastive_loss
from fastris.ops.coord_conv import coord_conv
from fastris.ops.cross_attention import cross_attention
from fastris.ops.feed_forward import feed_forward
from fastris.ops.few_query_attention import few_query_attention
from fastris.ops.multiscale_deformable_attention import multiscale_deformable_attention
from fastris.ops.pixel_contrast import pixel_contrast
from fastris.ops.pixel_word_attention import pixel_word_attention
from fastris.ops.pointwise_conv import pointwise_conv_cat
from fastris.ops.proofs import PROOFS
from fastris.ops.region_contrast import region_contrast
from fastris.ops.self_attention import self_attention
from fastris.ops.similarity import text_to_pixel_similarity
from fastris.ops.tiles import use_tiles
from fastris.ops.upsample_conv import upsample2x_conv3x3, upsample2x_conv3x3_stats
from fastris.ops.upsampled_bce import upsampled_bce_with_logits
from fastris.ops.word_attention import word_attention
from fastris.ops.word_pixel_attention import word_pixel_attention
from fastris.preflight import register
from fastris.tuned import on_tiles

register(PROOFS)  # here, so that whoever imports an operator has its proof,
on_tiles(use_tiles)  # and whoever asks which path is faster has what was measured

__all__ = [
    "bidirectional_attention",
    "coord_conv",
    "cross_attention",
    "feed_forward",
    "few_query_attention",
    "multiscale_deformable_attention",
    "pixel_contrast",
    "pixel_word_attention",
    "pointwise_conv_cat",
    "region_contrast",
    "self_attention",
    "text_to_pixel_contrastive_loss",
    "text_to_pixel_similarity",
    "upsample2x_conv3x3",
    "upsample2x_conv3x3_stats",
    "upsampled_bce_with_logits",
    "word_attention",
    "word_pixel_attention",
]
