"""The three sub-layers of CRIS's decoder (section 3.3): self-attention, cross-attention, feed-forward.

Shapes: B batch, N = H*W pixels, L words, D model width, F hidden width.
"""

from __future__ import annotations

from typing import NamedTuple

import torch.nn.functional as F
from torch import Tensor


class AttentionWeights(NamedTuple):
    """The parameters of one attention sub-layer: the norm before it, its projections, and the norm behind it.

    ``in_proj_weight`` (3D, D) and ``in_proj_bias`` (3D,) hold query, key and value one under the other, as in
    ``torch.nn.MultiheadAttention``; ``out_proj_*`` are (D, D) and (D,); the norms' weights and biases are (D,).
    """

    norm_weight: Tensor
    norm_bias: Tensor
    in_proj_weight: Tensor
    in_proj_bias: Tensor
    out_proj_weight: Tensor
    out_proj_bias: Tensor
    post_norm_weight: Tensor
    post_norm_bias: Tensor


def _layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    return F.layer_norm(x, (x.shape[-1],), weight, bias, eps)


def _attention(
    query: Tensor, key: Tensor, value: Tensor, weights: AttentionWeights, num_heads: int, **options
) -> Tensor:
    """``nn.MultiheadAttention`` on sequence-first tensors. As published, averaged weights are computed and dropped."""
    output, _ = F.multi_head_attention_forward(
        query,
        key,
        value,
        embed_dim_to_check=query.shape[-1],
        num_heads=num_heads,
        in_proj_weight=weights.in_proj_weight,
        in_proj_bias=weights.in_proj_bias,
        bias_k=None,
        bias_v=None,
        add_zero_attn=False,
        out_proj_weight=weights.out_proj_weight,
        out_proj_bias=weights.out_proj_bias,
        **options,
    )
    return output


def self_attention(
    x: Tensor,
    positions: Tensor,
    weights: AttentionWeights,
    num_heads: int,
    *,
    dropout: float = 0.0,
    attention_dropout: float = 0.0,
    training: bool = False,
    eps: float = 1e-5,
) -> Tensor:
    """``x + drop(LN(SelfAttn(q = k = LN(x) + pos, v = LN(x))))``, the decoder's first sub-layer (paper section 3.3).

    ``x`` (N, B, D) and ``positions`` (N, 1, D) are sequence-first, as in the published layer. Dropout acts on
    the attention weights (``attention_dropout``) and on the branch (``dropout``). Easy to miss: the second LayerNorm,
    inside the residual branch.
    """
    normed = _layer_norm(x, weights.norm_weight, weights.norm_bias, eps)
    query = normed + positions.to(x.device)
    branch = _attention(query, query, normed, weights, num_heads, dropout_p=attention_dropout, training=training)
    branch = _layer_norm(branch, weights.post_norm_weight, weights.post_norm_bias, eps)
    return x + F.dropout(branch, dropout, training)


def cross_attention(
    x: Tensor,
    text: Tensor,
    positions: Tensor,
    text_positions: Tensor,
    padding_mask: Tensor | None,
    weights: AttentionWeights,
    num_heads: int,
    *,
    dropout: float = 0.0,
    attention_dropout: float = 0.0,
    training: bool = False,
    eps: float = 1e-5,
) -> Tensor:
    """``x + drop(LN(CrossAttn(q = LN(x) + pos, k = text + textpos, v = text)))``, the second sub-layer (section 3.3).

    Every pixel attends to every word. ``x`` (N, B, D), ``text`` (L, B, D), ``positions`` (N, 1, D), ``text_positions``
    (L, 1, D) are sequence-first, as in the published layer; ``padding_mask`` (B, L) is True where a word is padding.
    Returns (N, B, D).
    """
    query = _layer_norm(x, weights.norm_weight, weights.norm_bias, eps) + positions.to(x.device)
    key = text + text_positions.to(text.device)
    branch = _attention(
        query,
        key,
        text,
        weights,
        num_heads,
        key_padding_mask=padding_mask,
        dropout_p=attention_dropout,
        training=training,
    )
    branch = _layer_norm(branch, weights.post_norm_weight, weights.post_norm_bias, eps)
    return x + F.dropout(branch, dropout, training)


class FeedForwardWeights(NamedTuple):
    """The parameters of the feed-forward sub-layer: norm (D), up (F, D), inner norm (F), down (D, F)."""

    norm_weight: Tensor
    norm_bias: Tensor
    up_weight: Tensor
    up_bias: Tensor
    inner_norm_weight: Tensor
    inner_norm_bias: Tensor
    down_weight: Tensor
    down_bias: Tensor


def feed_forward(
    x: Tensor,
    weights: FeedForwardWeights,
    *,
    dropout: float = 0.0,
    inner_dropout: float = 0.0,
    training: bool = False,
    eps: float = 1e-5,
) -> Tensor:
    """``x + drop(W2 LN(drop(ReLU(W1 LN(x)))))``, the third sub-layer (section 3.3): (..., D) -> (..., D).

    Easy to miss: the LayerNorm of the hidden width F.
    """
    hidden = _layer_norm(x, weights.norm_weight, weights.norm_bias, eps)
    hidden = F.dropout(F.relu(F.linear(hidden, weights.up_weight, weights.up_bias)), inner_dropout, training)
    hidden = _layer_norm(hidden, weights.inner_norm_weight, weights.inner_norm_bias, eps)
    return x + F.dropout(F.linear(hidden, weights.down_weight, weights.down_bias), dropout, training)
