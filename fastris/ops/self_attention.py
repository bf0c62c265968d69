"""The decoder's self-attention sub-layer, without the averaged attention maps that the published code never reads.

The published code asks ``nn.MultiheadAttention`` for its averaged weights, so every layer computes, averages and keeps
N x N maps for each head (676 x 676 x 8 at 416x416). Here PyTorch's ``scaled_dot_product_attention`` is called, whose
fused kernels never build them.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastris import reference
from fastris.dispatch import requested_impl
from fastris.ops.checks import compute_dtype
from fastris.ops.cpu.dropout_attention import attention_with_dropout
from fastris.ops.cpu.dropout_bits import dropout as drop
from fastris.reference import AttentionWeights


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
    impl: str = "auto",
) -> Tensor:
    """``x + drop(LN(SelfAttn(q = k = LN(x) + pos, v = LN(x))))`` for pixels ``x`` (B, N, D): (B, N, D).

    ``positions`` is (N, D); ``weights`` is :class:`fastris.reference.AttentionWeights`; ``dropout`` acts on the branch
    and ``attention_dropout`` on the attention weights, both only when ``training``. ``impl="reference"`` runs
    :func:`fastris.reference.self_attention`; every other choice runs the path here, on any device and dtype.
    Source: CRIS section 3.3; published ``TransformerDecoderLayer.forward``.
    """
    options: dict[str, Any] = {
        "dropout": dropout,
        "attention_dropout": attention_dropout,
        "training": training,
        "eps": eps,
    }
    if requested_impl(impl) == "reference":
        output = reference.self_attention(x.transpose(0, 1), positions[:, None], weights, num_heads, **options)
        return output.transpose(0, 1)
    dim = x.shape[-1]
    normed = F.layer_norm(x, (dim,), weights.norm_weight, weights.norm_bias, eps)
    dtype = compute_dtype(x)
    positioned, normed = (normed + positions).to(dtype), normed.to(dtype)  # once for all three products
    inputs = (positioned, positioned, normed)
    in_proj = zip(inputs, weights.in_proj_weight.chunk(3), weights.in_proj_bias.chunk(3), strict=True)
    query, key, value = (F.linear(*each).unflatten(-1, (num_heads, -1)).transpose(1, 2) for each in in_proj)
    attended = _attend(query, key, value, attention_dropout if training else 0.0)
    branch = F.linear(attended.transpose(1, 2).flatten(2), weights.out_proj_weight, weights.out_proj_bias)
    branch = F.layer_norm(branch, (dim,), weights.post_norm_weight, weights.post_norm_bias, eps)
    return x + drop(branch, dropout, training)


def _attend(query: Tensor, key: Tensor, value: Tensor, dropout: float) -> Tensor:
    """softmax(q k^T / sqrt(d)) v per head, (B, heads, N, d) each, with dropout on the weights."""
    if dropout > 0.0 and query.device.type == "cpu" and not torch.compiler.is_compiling():
        return attention_with_dropout(query, key, value, dropout)
    return F.scaled_dot_product_attention(query, key, value, dropout_p=dropout)
