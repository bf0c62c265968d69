"""CRIS's operators as the paper and its published code write them: the specification of every faster path.

Nothing here is clever, and nothing else in fastris is imported: a reader should be able to hold this file against the
paper (CRIS, arXiv 2111.15174), and every other implementation is tested against it in float64. The order is that of a
forward pass: positions and coordinates, the decoder's three sub-layers, the projector, the loss.

Shapes: B batch, N = H*W pixels, L words, D model width, C channels of the pixel map, Q text kernels per sample.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


def sine_positions_1d(length: int, dim: int, device: torch.device | str = "cpu") -> Tensor:
    """Fixed sine/cosine position table (length, dim), sine and cosine interleaved, in float32."""
    if dim % 2:
        raise ValueError(f"dim must be even to hold sine and cosine pairs, got {dim}")
    frequency = torch.exp(torch.arange(0, dim, 2, dtype=torch.float32, device=device) * (-math.log(10000.0) / dim))
    angle = torch.arange(length, dtype=torch.float32, device=device)[:, None] * frequency
    return torch.stack([angle.sin(), angle.cos()], dim=-1).flatten(1)


def sine_positions_2d(height: int, width: int, dim: int, device: torch.device | str = "cpu") -> Tensor:
    """Position table (height*width, dim) of a pixel grid: the first half of the channels codes x, the second half y."""
    if dim % 4:
        raise ValueError(f"dim must be divisible by 4 to hold sine and cosine of x and of y, got {dim}")
    x = sine_positions_1d(width, dim // 2, device)[None, :, :].expand(height, width, dim // 2)
    y = sine_positions_1d(height, dim // 2, device)[:, None, :].expand(height, width, dim // 2)
    return torch.cat([x, y], dim=-1).reshape(height * width, dim)


def append_coordinates(x: Tensor) -> Tensor:
    """CoordConv's input: (B, C, H, W) -> (B, C+2, H, W), with x and then y running over [-1, 1]."""
    batch, _, height, width = x.shape
    column = torch.linspace(-1, 1, width, device=x.device)
    row = torch.linspace(-1, 1, height, device=x.device)
    y_grid, x_grid = torch.meshgrid(row, column, indexing="ij")
    return torch.cat([x, x_grid.expand(batch, 1, -1, -1), y_grid.expand(batch, 1, -1, -1)], dim=1)


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
    """``x + drop(LN(CrossAttn(q = LN(x) + pos, k = text + textpos, v = text)))``: every pixel looks at every word.

    ``x`` (N, B, D), ``text`` (L, B, D), ``positions`` (N, 1, D), ``text_positions`` (L, 1, D) are sequence-first;
    ``padding_mask`` (B, L) is True where a word is padding.
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
    """``x + drop(W2 LN(drop(ReLU(W1 LN(x)))))``, any leading shape. Easy to miss: the LayerNorm of the hidden width."""
    hidden = _layer_norm(x, weights.norm_weight, weights.norm_bias, eps)
    hidden = F.dropout(F.relu(F.linear(hidden, weights.up_weight, weights.up_bias)), inner_dropout, training)
    hidden = _layer_norm(hidden, weights.inner_norm_weight, weights.inner_norm_bias, eps)
    return x + F.dropout(F.linear(hidden, weights.down_weight, weights.down_bias), dropout, training)


def upsample2x_conv3x3(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """``conv3x3(up2(x))``: (B, C, H, W) -> (B, C', 2H, 2W); bilinear, align_corners=False, zero-padded."""
    return F.conv2d(F.interpolate(x, scale_factor=2, mode="bilinear"), weight, bias, padding=1)


def text_to_pixel_similarity(
    features: Tensor,
    kernel: Tensor,
    bias: Tensor | None = None,
    *,
    pointwise_weight: Tensor | None = None,
    pointwise_bias: Tensor | None = None,
) -> Tensor:
    """Score every pixel against its own sample's text: (B, C, H, W) -> logits (B, Q, H, W).

    ``kernel`` (B, Q, C, k, k) or (B, C, k, k) is the text projected to one convolution kernel per sample (and query),
    ``bias`` (B, Q) or (B,). As published: one convolution whose groups are the samples, with padding k // 2.
    ``pointwise_weight`` (C, Cin, 1, 1) and ``pointwise_bias`` (C,) are the projector's 1x1 convolution before it.
    """
    if pointwise_weight is not None:
        features = F.conv2d(features, pointwise_weight, pointwise_bias)
    if kernel.ndim == 4:
        kernel = kernel[:, None]
    batch, channels, height, width = features.shape
    queries, size = kernel.shape[1], kernel.shape[-1]
    logits = F.conv2d(
        features.reshape(1, batch * channels, height, width),
        kernel.reshape(batch * queries, channels, size, size),
        None if bias is None else bias.reshape(batch * queries),
        padding=size // 2,
        groups=batch,
    )
    return logits.reshape(batch, queries, height, width)


def contrastive_loss(logits: Tensor, target: Tensor, *, reduction: str = "mean") -> Tensor:
    """The text-to-pixel contrastive loss (paper, equations 9 and 10) on given logits.

    ``-log sigma(z_t . z_i)`` where pixel i belongs to the referred object and ``-log(1 - sigma(z_t . z_i))`` where it
    does not, averaged over all pixels; for soft targets the two are mixed, which is binary cross-entropy with logits.
    ``target`` must have the logits' shape: see :func:`resize_target`.
    """
    return F.binary_cross_entropy_with_logits(logits, target, reduction=reduction)


def resize_target(target: Tensor, size: Sequence[int]) -> Tensor:
    """The mask (B, 1, H, W) at the logits' size by nearest neighbour, as published; unchanged when sizes agree."""
    if tuple(target.shape[-2:]) == tuple(size):
        return target
    return F.interpolate(target, tuple(size), mode="nearest").detach()
