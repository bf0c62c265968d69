"""Bidirectional attention between pixels and words: one score matrix, a softmax over each of its axes.

AlignFormer's vision-language bidirectional attention ("VLBA"; arXiv 2301.06429, section 3.2, and its released code).
Shapes: B batch, N = H*W pixels, C their width, L words, T their width.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


class BidirectionalAttentionWeights(NamedTuple):
    """Six projections, of pixels: query, out (C, C), sym_value (T, C); of words: key, value (C, T), sym_out (T, T).

    The released names of ``out`` and ``sym_out`` are ``W`` and ``sym_W``. Each has a bias of its output's width. Those
    of query, value, out and sym_value change no result: an instance norm, or a softmax row that sums to one, takes them
    out again.
    """

    query_weight: Tensor
    query_bias: Tensor
    key_weight: Tensor
    key_bias: Tensor
    value_weight: Tensor
    value_bias: Tensor
    out_weight: Tensor
    out_bias: Tensor
    sym_value_weight: Tensor
    sym_value_bias: Tensor
    sym_out_weight: Tensor
    sym_out_bias: Tensor


def bidirectional_attention(
    pixels: Tensor,
    words: Tensor,
    valid: Tensor,
    weights: BidirectionalAttentionWeights,
    *,
    lone_word_is_zero: bool = False,
    eps: float = 1e-5,
) -> tuple[Tensor, Tensor]:
    """Pixels attend to words, and words to pixels, on one score matrix: ((B, N, C), (B, L, T)).

    ``pixels`` (B, N, C), ``words`` (B, L, T), ``valid`` (B, L) is 1 or True where a word is not padding. IN below is
    the instance norm over a sample's pixels, m the mask, and q = IN(Wq x), k = m Wk l, u = m Wu l::

        S = q k^T / sqrt(C) + 1e4 (m - 1)                              (B, N, L)
        pixels: IN(W (softmax over words(S) u))
        words:  m sym_W (m softmax over pixels(S)^T IN(sym_value x))

    Where a sentence has one valid word, its softmax over words is constant and the norm behind it divides rounding
    noise by its own size, as published; with ``lone_word_is_zero`` such a sample's pixels are exactly 0, which is what
    the formula says. In half precision the scores, both softmaxes and the norms' statistics are in float32.
    """
    mask = valid.to(words.dtype)[..., None]  # [B, L, 1]
    query = instance_norm(F.linear(pixels, weights.query_weight, weights.query_bias), eps)
    key = mask * F.linear(words, weights.key_weight, weights.key_bias)
    value = mask * F.linear(words, weights.value_weight, weights.value_bias)
    scores = _wide(query @ key.transpose(1, 2)) * pixels.shape[-1] ** -0.5
    scores = scores + (1e4 * _wide(mask) - 1e4).transpose(1, 2)

    attended = scores.softmax(dim=2).to(value.dtype) @ value
    attended = instance_norm(F.linear(attended, weights.out_weight, weights.out_bias), eps)
    if lone_word_is_zero:
        attended = torch.where((valid.sum(1) > 1)[:, None, None], attended, 0.0)

    sym_value = instance_norm(F.linear(pixels, weights.sym_value_weight, weights.sym_value_bias), eps)
    gathered = mask * (scores.softmax(dim=1).to(sym_value.dtype).transpose(1, 2) @ sym_value)
    return attended, mask * F.linear(gathered, weights.sym_out_weight, weights.sym_out_bias)


def instance_norm(x: Tensor, eps: float = 1e-5) -> Tensor:
    """(B, N, C) minus its mean over N, divided by its biased deviation there; without scale, shift and running means.

    Half precision is normalised in float32. A single pixel becomes 0 (``torch.nn.InstanceNorm1d`` refuses it).
    """
    wide = _wide(x)
    variance, mean = torch.var_mean(wide, dim=1, correction=0, keepdim=True)
    return ((wide - mean) * (variance + eps).rsqrt()).to(x.dtype)


def _wide(x: Tensor) -> Tensor:
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x
