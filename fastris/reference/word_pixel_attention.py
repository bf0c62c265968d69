"""MagNet's language side: every word reads the pixels. One formula as released, one as meant, one of our own.

Mask Grounding for Referring Image Segmentation (arXiv 2312.12198), released evaluation code. Shapes: B batch, L words
of width T, N pixels of width C; one head of width T.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from fastris.reference.bidirectional_attention import instance_norm

LanguageMask = Literal["masked", "intended", "released"]

EPS = 1e-5
"""Of the two instance norms, which have no parameters."""


class WordPixelWeights(NamedTuple):
    """The parameters, as matrices (out, in) and biases."""

    project_weight: Tensor  # (T, T), of the words themselves
    project_bias: Tensor
    query_weight: Tensor  # (T, T)
    query_bias: Tensor
    key_weight: Tensor  # (T, C)
    key_bias: Tensor
    value_weight: Tensor  # (T, C)
    value_bias: Tensor
    out_weight: Tensor  # (T, T), of what was read
    out_bias: Tensor
    mixed_weight: Tensor  # (T, T), of the product of the two
    mixed_bias: Tensor


def word_pixel_attention(
    words: Tensor, pixels: Tensor, valid: Tensor, weights: WordPixelWeights, rule: LanguageMask
) -> Tensor:
    """The residual (B, L, T) of words (B, L, T) that read pixels (B, N, C); ``valid`` (B, L) says which are no padding.

    ``r = GELU(W_m (GELU(W_x l) * IN(W_o (a v))))``, with keys and values normed over the pixels, each channel by
    itself, and IN the same over the words. The ``rule`` says what padding does:

    - ``"intended"``: ``a = softmax(q k^T / sqrt(T))`` over the pixels; padding has ``q = 0`` and so reads the mean,
      which is 0 behind the norm. IN counts all L rows, so that the result depends on how many are padding.
    - ``"masked"``, ours: as intended, but IN counts the words alone, and padding is 0 behind it. Padding changes
      nothing, and a sentence of one word reads 0.
    - ``"released"``: the released code multiplies the queries by -10000 at padding and by 0 at words, and adds 1e4
      times that. Words then read the mean, exactly 0, and padding the one pixel with the *smallest* ``q . k``; in
      float32 its scores are rounded to multiples of 8, and in half precision they are NaN. This is that rule, not
      that arithmetic. Queries and keys get no gradient.
    """
    w = weights
    mask = valid.to(words.dtype)[..., None]
    query = F.linear(words, w.query_weight, w.query_bias)
    key = instance_norm(F.linear(pixels, w.key_weight, w.key_bias), EPS)
    value = instance_norm(F.linear(pixels, w.value_weight, w.value_bias), EPS)
    if rule == "released":
        read = (1 - mask) * _at_smallest(query.detach(), key.detach(), value)
    else:
        read = torch.softmax((mask * query) @ key.mT / words.shape[-1] ** 0.5, dim=-1) @ value
    out = F.linear(read, w.out_weight, w.out_bias)
    heard = masked_instance_norm(out, mask) if rule == "masked" else instance_norm(out, EPS)
    seen = F.gelu(F.linear(words, w.project_weight, w.project_bias))
    return F.gelu(F.linear(seen * heard, w.mixed_weight, w.mixed_bias))


def masked_instance_norm(x: Tensor, mask: Tensor) -> Tensor:
    """:func:`fastris.reference.bidirectional_attention.instance_norm` of x (B, R, C) over the rows where ``mask``
    (B, R, 1) is 1 alone; the others, where it is 0, become 0.
    """
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    mask = mask.to(wide.dtype)
    count = mask.sum(1, keepdim=True).clamp_min(1)
    centred = mask * (wide - (mask * wide).sum(1, keepdim=True) / count)
    return (centred * (centred.square().sum(1, keepdim=True) / count + EPS).rsqrt()).to(x.dtype)


def _at_smallest(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """The values (B, L, T) of the pixels (B, N, T) whose key has the smallest product with each query (B, L, T)."""
    smallest = (query @ key.mT).argmin(-1, keepdim=True)
    return value.gather(1, smallest.expand(-1, -1, value.shape[-1]))
