"""The decoder's cross-attention of pixels to words, with the pixels' projections absorbed into the text.

The words are few, so both projections of the pixels can be applied to the words. With q = LN(x) + pos and, for head h,
the slices Wq_h, bq_h, Wo_h of the query and output projections and the projected words K_h, V_h (L, d):

    (q Wq_h^T + bq_h) K_h^T / sqrt(d)  =  q K'_h^T + b_h       K'_h = K_h Wq_h / sqrt(d),  b_h = K_h bq_h / sqrt(d)
    sum_h P_h V_h Wo_h^T + bo          =  sum_h P_h V'_h + bo  V'_h = V_h Wo_h^T

Both are exact. What is left for each pixel is attention with D-wide keys and values, heads * L of them, in place of two
D x D projections. b_h is -inf where a word is padding. V keeps its bias, so dropout on the weights P is still exact.
K', b and V' are built once per sample, in float32 under ordinary autograd, and then rounded to the compute dtype.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from fastris import reference
from fastris.dispatch import resolve
from fastris.ops import padding
from fastris.ops.absorbed_attention import absorb, absorbed_attention, kept_scale
from fastris.ops.checks import check_shape, check_tensors, compute_dtype
from fastris.reference import AttentionWeights, SeparateAttentionWeights

# The kernels' softmax keeps one head's words in one tile of at most this many columns.
MAX_KERNEL_WORDS = 128


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
    impl: str = "auto",
) -> Tensor:
    """``x + drop(LN(CrossAttn(q = LN(x) + pos, k = text + textpos, v = text)))`` of pixels and words: (B, N, D).

    Args:
        x: pixels (B, N, D), in any memory layout.
        text: words (B, L, D), L >= 1.
        positions: (N, D), added to the normalised pixels; text_positions: (L, D), added to the words' keys.
        padding_mask: (B, L) bool, True where a word is padding, or None.
        weights: the sub-layer's parameters, :class:`fastris.reference.AttentionWeights`.
        num_heads: any divisor of D.
        dropout: probability that a channel of the branch is dropped; attention_dropout: that an attention weight is.
            Both act only when ``training``. ``torch.manual_seed`` makes the fast paths repeat; each path and device
            draws its own masks, of the same distribution.
        impl: ``"auto"``, ``"reference"``, ``"torch"`` or ``"triton"``; see :mod:`fastris.dispatch`.

    Returns (B, N, D) in x's dtype: the residual keeps its precision. The matrix products run in autocast's dtype where
    autocast is on, else in x's dtype; normalisation and softmax inside the kernels run in float32.

    Absorbing saves work while heads * L < D. Beyond that (at D = 512 and 8 heads: from 64 words on) the fast paths
    project the pixels as published and call PyTorch's ``scaled_dot_product_attention``; ``triton`` also does so for
    more than 128 words. On a CPU, outside ``torch.compile``, words behind the longest real sentence of the batch are
    cut off first: they have no weight, so nothing changes.

    For a sample whose words are all padding the published formula divides 0 by 0 and returns NaN. On the fast paths all
    its weights are 0, and output and gradients are finite. Non-finite inputs at real positions propagate as in IEEE
    arithmetic.

    The fast paths keep x, the weights P and a few numbers per pixel for the backward pass, which computes the rest
    again; they can be differentiated once.

    Raises ValueError for a wrong shape, no words, a dropout outside [0, 1] or tensors on different devices; TypeError
    for dtypes that do not fit; RuntimeError when ``impl="triton"`` cannot run here.

    Source: CRIS section 3.3, published ``TransformerDecoderLayer.forward``; :func:`fastris.reference.cross_attention`.
    """
    dropouts = {"dropout": dropout, "attention_dropout": attention_dropout}
    _check(x, text, positions, text_positions, padding_mask, weights, num_heads, dropouts)
    dtype = compute_dtype(x)
    path = resolve("cross_attention", x.device, dtype, impl, x.shape[0])
    if path == "reference":
        output = reference.cross_attention(
            x.transpose(0, 1),
            text.transpose(0, 1),
            positions[:, None],
            text_positions[:, None],
            padding_mask,
            weights,
            num_heads,
            dropout=dropout,
            attention_dropout=attention_dropout,
            training=training,
            eps=eps,
        )
        return output.transpose(0, 1)
    if not training:
        dropout = attention_dropout = 0.0
    if padding_mask is not None and path == "torch" and x.device.type == "cpu" and not torch.compiler.is_compiling():
        length = padding.longest(padding_mask)
        text, text_positions, padding_mask = text[:, :length], text_positions[:length], padding_mask[:, :length]
    words, dim = text.shape[1:]
    absorbs = num_heads * words < dim and (path == "torch" or words <= MAX_KERNEL_WORDS)
    attend = _absorbed if absorbs else _projected
    with torch.autocast(x.device.type, enabled=False):
        branch = _Branch(weights, num_heads, dropout, attention_dropout, eps, dtype, path)
        return attend(x, text, positions, text_positions, padding_mask, branch)


class _Branch(NamedTuple):
    """The weights and settings of one call, as the functions below take them."""

    weights: AttentionWeights
    num_heads: int
    dropout: float
    attention_dropout: float
    eps: float
    dtype: torch.dtype  # of the matrix products
    path: str


def _check(
    x: Tensor,
    text: Tensor,
    positions: Tensor,
    text_positions: Tensor,
    padding_mask: Tensor | None,
    weights: AttentionWeights,
    num_heads: int,
    dropouts: dict[str, float],
) -> None:
    name = "cross_attention"
    tables = {"positions": positions, "text_positions": text_positions}
    check_tensors(name, x=x, text=text, **tables, **weights._asdict())
    check_shape(name, "x", x, ("B", "N", "D"))
    batch, rows, dim = x.shape
    check_shape(name, "text", text, (batch, "L", dim))
    words = text.shape[1]
    if words == 0:
        raise ValueError(f"{name}: text has no words, got {tuple(text.shape)}; give (B, L, D) with L >= 1")
    check_shape(name, "positions", positions, (rows, dim))
    check_shape(name, "text_positions", text_positions, (words, dim))
    for field, tensor in weights._asdict().items():
        out = 3 * dim if field.startswith("in_proj") else dim
        check_shape(name, field, tensor, (out, dim) if field.endswith("proj_weight") else (out,))
    if num_heads < 1 or dim % num_heads:
        raise ValueError(f"{name}: num_heads must divide the width {dim} of x, got {num_heads}")
    for argument, probability in dropouts.items():
        if not 0.0 <= probability <= 1.0:
            raise ValueError(f"{name}: {argument} must be a probability between 0 and 1, got {probability}")
    if padding_mask is not None:
        padding.check_padding_mask(name, padding_mask, "x", x, words)


def _projected(
    x: Tensor, text: Tensor, positions: Tensor, text_positions: Tensor, padding_mask: Tensor | None, branch: _Branch
) -> Tensor:
    """The sub-layer with its published projections, around PyTorch's fused attention."""
    weights, dtype, dim = branch.weights, branch.dtype, x.shape[-1]
    wide = torch.promote_types(dtype, torch.float32)
    vectors = {name: tensor.to(wide) for name, tensor in weights._asdict().items() if tensor.ndim == 1}
    normed = F.layer_norm(x.to(wide), (dim,), vectors["norm_weight"], vectors["norm_bias"], branch.eps)
    sources = normed + positions, text + text_positions, text
    matrices = weights.in_proj_weight.to(dtype).chunk(3)
    biases = weights.in_proj_bias.to(dtype).chunk(3)
    query, key, value = (
        F.linear(source.to(dtype), matrix, bias).unflatten(-1, (branch.num_heads, -1)).transpose(1, 2)
        for source, matrix, bias in zip(sources, matrices, biases, strict=True)
    )
    mask = silent = None
    if padding_mask is not None:
        silent = padding_mask.all(dim=1)[:, None, None, None]
        mask = silent | ~padding_mask[:, None, None, :]
    attended = F.scaled_dot_product_attention(query, key, value, attn_mask=mask, dropout_p=branch.attention_dropout)
    if silent is not None:
        attended = attended.masked_fill(silent, 0)
    output = F.linear(attended.transpose(1, 2).flatten(2), weights.out_proj_weight.to(dtype)).to(wide)
    output = output + vectors["out_proj_bias"]
    output = F.layer_norm(output, (dim,), vectors["post_norm_weight"], vectors["post_norm_bias"], branch.eps)
    return (x + F.dropout(output, branch.dropout, training=branch.dropout > 0)).to(x.dtype)


def _absorbed(
    x: Tensor, text: Tensor, positions: Tensor, text_positions: Tensor, padding_mask: Tensor | None, branch: _Branch
) -> Tensor:
    """The sub-layer as attention with D-wide keys and values, in plain PyTorch or in the Triton kernels."""
    weights, dropouts = branch.weights, (branch.dropout, branch.attention_dropout)
    wide = torch.promote_types(branch.dtype, torch.float32)
    text = text.to(wide)
    query, key, value = weights.in_proj_weight.chunk(3)
    outer = weights.out_proj_weight, weights.out_proj_bias
    projections = SeparateAttentionWeights(query, key, value, weights.in_proj_bias, *outer)
    keys, key_bias, values = absorb(text + text_positions.to(wide), text, projections, branch.num_heads)
    if padding_mask is not None:
        key_bias = key_bias.masked_fill(padding_mask[:, None], float("-inf"))
    if branch.attention_dropout > 0:
        values = values * kept_scale(branch.attention_dropout)
    keys, values = keys.to(branch.dtype), values.to(branch.dtype)
    vectors = (weights.norm_weight, weights.norm_bias, weights.out_proj_bias)
    affine = torch.stack([*vectors, weights.post_norm_weight, weights.post_norm_bias]).to(wide)
    if branch.path == "triton":
        from fastris.kernels.cross_attention import fused_attention

        return fused_attention(x, positions, keys, key_bias, values, affine, *dropouts, branch.eps)
    silent = None if padding_mask is None else padding_mask.all(dim=1)
    return absorbed_attention(x, positions, keys, key_bias, values, affine, silent, *dropouts, branch.eps)
