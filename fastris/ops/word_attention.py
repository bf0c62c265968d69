"""Attention of many pixels to a few words of another width, as in AlignFormer's pixel decoder (arXiv 2301.06429).

The words are few, so the pixels' projections are absorbed into them, as :mod:`fastris.ops.cross_attention` does for
CRIS and explains: with K', b and V' made once per sample from the words,

    out = sum_h softmax(q K'_h^T + b_h) V'_h + bo,

and the two D x D projections of every pixel are gone. Keys and values may be of any width, since only K' and V' meet
the pixels.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from fastris import reference
from fastris.dispatch import resolve
from fastris.ops import padding
from fastris.ops.absorbed_attention import absorb, bare_attention
from fastris.ops.checks import check_shape, check_tensors, compute_dtype
from fastris.reference import SeparateAttentionWeights

OPERATOR = "word_attention"


def word_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    weights: SeparateAttentionWeights,
    num_heads: int,
    padding_mask: Tensor | None = None,
    *,
    impl: str = "auto",
) -> Tensor:
    """``MultiheadAttention(query, key, value)`` of pixels (B, N, D) and words: (B, N, D).

    Args:
        query: pixels (B, N, D), their positions added, in any memory layout.
        key: words (B, L, K), their positions added; value: (B, L, V). L >= 1.
        weights: :class:`fastris.reference.SeparateAttentionWeights`.
        num_heads: any divisor of D.
        padding_mask: (B, L) bool, True where a word is padding, or None.
        impl: ``"auto"``, ``"reference"``, ``"torch"`` or ``"triton"``; see :mod:`fastris.dispatch`.

    The result is in query's dtype, or in autocast's where that is on; softmax runs in float32 or wider on the fast
    path. A sample whose words are all padding gets the output's bias, and no gradient passes between it and its words.

    Absorbing saves work while heads * L < D; beyond that the fast paths project as published. On a CPU, outside
    ``torch.compile``, words behind the longest real sentence of the batch are cut off first: they have no weight.
    ``triton``'s tiles hold 32 words and pixels that are up to 256 wide; what is larger is ``torch``'s.

    Gradients reach every tensor. ``torch`` keeps the query and the attention weights for the backward pass, beside a
    few numbers per word; ``triton`` makes the weights again. It can be differentiated once.

    Raises ValueError for a wrong shape, no words or tensors on different devices; TypeError for dtypes that do not fit;
    RuntimeError when ``impl="triton"`` cannot run here.

    Source: AlignFormer's released pixel decoder, ``cross_attn``; :func:`fastris.reference.separate_attention`.
    """
    _check(query, key, value, weights, num_heads, padding_mask)
    dtype = compute_dtype(query)
    path = resolve(OPERATOR, query.device, dtype, impl, query.shape[0])
    if path == "reference" and query.shape[0]:  # PyTorch's own refuses an empty batch
        return reference.separate_attention(query, key, value, weights, num_heads, padding_mask)
    on_cpu = query.device.type == "cpu" and not torch.compiler.is_compiling()
    if padding_mask is not None and path == "torch" and on_cpu:
        length = padding.longest(padding_mask)
        key, value = key[:, :length].contiguous(), value[:, :length].contiguous()
        padding_mask = padding_mask[:, :length]
    words, dim = key.shape[1], query.shape[2]
    attend = _projected
    if num_heads * words < dim:
        attend = _by_kernels if path == "triton" and _kernels_take(words, dim) else _absorbed
    with torch.autocast(query.device.type, enabled=False):
        return attend(query.to(dtype), key, value, weights, num_heads, padding_mask)


def _check(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    weights: SeparateAttentionWeights,
    num_heads: int,
    padding_mask: Tensor | None,
) -> None:
    check_tensors(OPERATOR, query=query, key=key, value=value, **weights._asdict())
    check_shape(OPERATOR, "query", query, ("B", "N", "D"))
    batch, _, dim = query.shape
    check_shape(OPERATOR, "key", key, (batch, "L", "K"))
    words = key.shape[1]
    if words == 0:
        raise ValueError(f"{OPERATOR}: key has no words, got {tuple(key.shape)}; give (B, L, K) with L >= 1")
    check_shape(OPERATOR, "value", value, (batch, words, "V"))
    shapes = {
        "query_weight": (dim, dim),
        "key_weight": (dim, key.shape[2]),
        "value_weight": (dim, value.shape[2]),
        "in_proj_bias": (3 * dim,),
        "out_weight": (dim, dim),
        "out_bias": (dim,),
    }
    for name, shape in shapes.items():
        check_shape(OPERATOR, name, getattr(weights, name), shape)
    if num_heads < 1 or dim % num_heads:
        raise ValueError(f"{OPERATOR}: num_heads must divide the width {dim} of query, got {num_heads}")
    if padding_mask is not None:
        padding.check_padding_mask(OPERATOR, padding_mask, "query", query, words)


def _kernels_take(words: int, dim: int) -> bool:
    from fastris.kernels.word_attention import fits

    return fits(words, dim)


_kernels_take._dynamo_marked_constant = True  # type: ignore[attr-defined]  # torch.compile asks once, for constants


def _absorbed(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    weights: SeparateAttentionWeights,
    num_heads: int,
    padding_mask: Tensor | None,
) -> Tensor:
    """Attention with D-wide keys and values."""
    words = _absorbed_words(query, key, value, weights, num_heads, padding_mask)
    return bare_attention(query, *words, None if padding_mask is None else padding_mask.all(dim=1))


def _by_kernels(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    weights: SeparateAttentionWeights,
    num_heads: int,
    padding_mask: Tensor | None,
) -> Tensor:
    """The same in the Triton kernels, to whom a sample without words is one whose scores are all -inf."""
    from fastris.kernels.word_attention import fused_word_attention

    return fused_word_attention(query, *_absorbed_words(query, key, value, weights, num_heads, padding_mask))


def _absorbed_words(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    weights: SeparateAttentionWeights,
    num_heads: int,
    padding_mask: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Keys, their bias, -inf at padding, values and the output's bias; biases in float32 or wider."""
    dtype = query.dtype
    wide = torch.promote_types(dtype, torch.float32)
    keys, key_bias, values = absorb(key.to(wide), value.to(wide), weights, num_heads)
    if padding_mask is not None:
        key_bias = key_bias.masked_fill(padding_mask[:, None], float("-inf"))
    return keys.to(dtype), key_bias, values.to(dtype), weights.out_bias.to(wide)


def _projected(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    weights: SeparateAttentionWeights,
    num_heads: int,
    padding_mask: Tensor | None,
) -> Tensor:
    """The published projections, around PyTorch's fused attention."""
    biases = weights.in_proj_bias.chunk(3)
    q, k, v = (
        F.linear(*(each.to(query.dtype) for each in part)).unflatten(-1, (num_heads, -1)).transpose(1, 2)
        for part in zip((query, key, value), weights[:3], biases, strict=True)
    )
    mask = silent = None
    if padding_mask is not None:
        silent = padding_mask.all(dim=1)[:, None, None, None]
        mask = silent | ~padding_mask[:, None, None, :]
    attended = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    if silent is not None:
        attended = attended.masked_fill(silent, 0)
    return F.linear(attended.transpose(1, 2).flatten(2), *(each.to(query.dtype) for each in weights[4:]))
