"""MagNet's pixel-word attention: every pixel reads a sentence, and answers with what it has read times what it is.

Mask Grounding for Referring Image Segmentation (arXiv 2312.12198), released evaluation code. Shapes: B batch, N pixels
of width C, L words of width T; one head of width C.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

MASKED = -1e4
"""Added to the scores of words that are padding."""


class PixelWordWeights(NamedTuple):
    """The parameters, as matrices (out, in) and biases; the query and the output are each followed by a LayerNorm."""

    project_weight: Tensor  # (C, C), of the pixels themselves
    project_bias: Tensor
    query_weight: Tensor  # (C, C)
    query_bias: Tensor
    query_norm_weight: Tensor
    query_norm_bias: Tensor
    key_weight: Tensor  # (C, T)
    key_bias: Tensor
    value_weight: Tensor  # (C, T)
    value_bias: Tensor
    out_weight: Tensor  # (C, C), of what was read
    out_bias: Tensor
    out_norm_weight: Tensor
    out_norm_bias: Tensor
    mixed_weight: Tensor  # (C, C), of the product of the two
    mixed_bias: Tensor


def pixel_word_attention(pixels: Tensor, words: Tensor, valid: Tensor, weights: PixelWordWeights) -> Tensor:
    """The residual (B, N, C) of pixels (B, N, C) that read words (B, L, T), of which ``valid`` (B, L) are no padding.

    ``r = GELU(W_m (GELU(W_x x) * LN(W_o (a v))))`` with ``a = softmax(LN(W_q x) k^T / sqrt(C))`` over the words; keys
    and values of padding are 0. A sentence of nothing but padding is read as zeros.
    """
    w = weights
    width = pixels.shape[-1]
    mask = valid.to(words.dtype)[..., None]
    query = F.linear(pixels, w.query_weight, w.query_bias)
    query = F.layer_norm(query, (width,), w.query_norm_weight, w.query_norm_bias)
    key = mask * F.linear(words, w.key_weight, w.key_bias)
    value = mask * F.linear(words, w.value_weight, w.value_bias)
    scores = query @ key.mT / width**0.5 + MASKED * (1 - mask.mT)
    read = torch.softmax(scores, dim=-1) @ value
    heard = F.layer_norm(F.linear(read, w.out_weight, w.out_bias), (width,), w.out_norm_weight, w.out_norm_bias)
    seen = F.gelu(F.linear(pixels, w.project_weight, w.project_bias))
    return F.gelu(F.linear(seen * heard, w.mixed_weight, w.mixed_bias))
