"""Attention of a few queries over many pixels, without a map of keys or values.

A handful of queries read thousands of pixels, so the pixels' projections can be applied to the queries. With
``q = (c + query_pos) Wq^T + bq``, the pixels ``y + level`` and the slices Wk_h, Wv_h, bk_h, bv_h of head h (d wide)::

    q_h . (Wk_h (y + level + pos) + bk_h)  =  a_h . (y + pos) + constant     a_h = Wk_h^T q_h
    sum_N p_h (Wv_h (y + level) + bv_h)    =  Wv_h (sum_N p_h y + level) + bv_h

Both are exact. The constant holds the key bias and the level's embedding; it is the same at every pixel, so the softmax
drops it, and a softmax sums to 1, so ``level`` is added once to what was pooled. What is left for the pixels is
``softmax((y + pos) a^T / sqrt(d))`` and one weighted mean for each head and query: K multiplications a pixel where two
projections take 2 D K. The positions are the same for every sample: their scores ``a . pos`` are one small product,
and ``y + pos`` is never formed. a and what is pooled are computed in float32 under ordinary autograd.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from fastris import reference
from fastris.dispatch import resolve
from fastris.ops.checks import check_is_tensor, check_shape, check_tensors, compute_dtype
from fastris.reference import SeparateAttentionWeights


def few_query_attention(
    query: Tensor,
    query_positions: Tensor,
    pixels: Tensor,
    level: Tensor,
    positions: Tensor,
    weights: SeparateAttentionWeights,
    num_heads: int,
    forbidden: Tensor | None = None,
    *,
    impl: str = "auto",
) -> Tensor:
    """``MHA(query + query_positions, y + positions, y)`` with ``y = pixels + level``: (B, Q, D).

    Args:
        query: (B, Q, D), Q >= 1. Meant for a few: absorbing saves work while heads * Q < D. Beyond that the published
            formula runs.
        query_positions: (Q, D).
        pixels: (B, N, K), N >= 1, in any memory layout; their gradient has the same one where pixels or channels are
            contiguous.
        level: (K,), the embedding of the pixels' resolution, in keys and values.
        positions: (N, K), in the keys alone; of any floating-point dtype.
        weights: :class:`fastris.reference.SeparateAttentionWeights`, those of ``nn.MultiheadAttention(D, heads,
            kdim=K, vdim=K)``.
        num_heads: any divisor of D.
        forbidden: (B, N) bool, True at pixels that no query reads, or None. A sample with no other pixel gives NaN, as
            in PyTorch. Kernels take none: with it ``triton`` means ``torch``.
        impl: ``"auto"``, ``"reference"``, ``"torch"`` or ``"triton"``; see :mod:`fastris.dispatch`.

    Returns (B, Q, D) in the query's dtype, or in autocast's where it is on. The products with the pixels run in that
    dtype; everything else in float32, or in float64 for float64.

    For the backward pass the fast path keeps the pixels themselves and heads * Q numbers for each of them, of which
    nothing is K or D wide; it can be differentiated once. Non-finite values pass through as IEEE arithmetic says.
    ``triton`` reads every pixel once in each pass; its tiles hold heads * Q up to 16 and K up to 512 (in float32 256),
    and what is larger, and everything on cards with 64 KiB of shared memory, is ``torch``'s.

    Raises ValueError for a wrong shape, no query or no pixel, a ``num_heads`` that does not divide D or tensors on
    different devices; TypeError for dtypes that do not fit; RuntimeError when ``impl="triton"`` cannot run here.

    Source: arXiv 2301.06429, section 3.3, and its released code; :func:`fastris.reference.few_query_attention`.
    """
    _check(query, query_positions, pixels, level, positions, weights, num_heads)
    _check_forbidden(forbidden, pixels)
    dim = query.shape[-1]
    dtype, rows = compute_dtype(query), num_heads * query.shape[1]
    count, channels = pixels.shape[1:]
    path = resolve("few_query_attention", query.device, dtype, impl, query.shape[0])
    if path == "reference" or rows >= dim:
        published = reference.few_query_attention
        return published(query, query_positions, pixels, level, positions, weights, num_heads, forbidden)
    wide = torch.promote_types(dtype, torch.float32)
    with torch.autocast(query.device.type, enabled=False):
        weights = SeparateAttentionWeights(*(each.to(wide) for each in weights))
        absorbed = _absorb(query.to(wide) + query_positions.to(wide), weights, num_heads)
        pixels, positions = pixels.to(dtype), positions.to(wide)
        if path == "triton" and forbidden is None and _kernels_take(rows, count, channels, dtype, pixels.device):
            pooled = _pooled_by_kernels(pixels, absorbed, positions)
        else:
            pooled = _PooledPixels.apply(pixels, absorbed, positions, forbidden)
        return _project(pooled + level.to(wide), weights, num_heads).to(dtype)


def _kernels_take(rows: int, count: int, channels: int, dtype: torch.dtype, device: torch.device) -> bool:
    """The slope of a softmax over a single pixel is 0, which the kernels' two sums would miss by a rounding."""
    from fastris.kernels.few_query_attention_tiles import fits

    return count > 1 and fits(rows, channels, dtype, device)


_kernels_take._dynamo_marked_constant = True  # type: ignore[attr-defined]  # torch.compile asks once, for constants


def _pooled_by_kernels(pixels: Tensor, absorbed: Tensor, positions: Tensor) -> Tensor:
    from fastris.kernels.few_query_attention import pooled_pixels

    scores = absorbed.flatten(0, 1) @ positions.T  # [B * R, N], the positions' own
    return pooled_pixels(pixels, absorbed, scores.unflatten(0, absorbed.shape[:2]))


def _check(
    query: Tensor,
    query_positions: Tensor,
    pixels: Tensor,
    level: Tensor,
    positions: Tensor,
    weights: SeparateAttentionWeights,
    num_heads: int,
) -> None:
    name = "few_query_attention"
    check_tensors(name, query=query, query_positions=query_positions, pixels=pixels, level=level, **weights._asdict())
    check_shape(name, "query", query, ("B", "Q", "D"))
    batch, queries, dim = query.shape
    check_shape(name, "pixels", pixels, (batch, "N", "K"))
    count, width = pixels.shape[1:]
    if queries == 0:
        raise ValueError(f"{name}: query holds no query, got {tuple(query.shape)}; give (B, Q, D) with Q >= 1")
    if count == 0:
        raise ValueError(f"{name}: pixels holds no pixel, got {tuple(pixels.shape)}; give (B, N, K) with N >= 1")
    check_shape(name, "query_positions", query_positions, (queries, dim))
    check_shape(name, "level", level, (width,))
    check_is_tensor(name, "positions", positions)
    check_shape(name, "positions", positions, (count, width))
    if not positions.is_floating_point():
        raise TypeError(f"{name}: positions must be floating point, got {positions.dtype}")
    if positions.device != query.device:
        raise ValueError(
            f"{name}: positions is on {positions.device} but query is on {query.device}; move them to one device"
        )
    shapes = {"query_weight": (dim, dim), "key_weight": (dim, width), "value_weight": (dim, width)}
    shapes |= {"out_weight": (dim, dim)}
    for field, shape in shapes.items():
        check_shape(name, field, getattr(weights, field), shape)
    check_shape(name, "in_proj_bias", weights.in_proj_bias, (3 * dim,))
    check_shape(name, "out_bias", weights.out_bias, (dim,))
    if num_heads < 1 or dim % num_heads:
        raise ValueError(f"{name}: num_heads must divide the width {dim} of query, got {num_heads}")


def _check_forbidden(forbidden: Tensor | None, pixels: Tensor) -> None:
    if forbidden is None:
        return
    name = "few_query_attention"
    check_is_tensor(name, "forbidden", forbidden)
    check_shape(name, "forbidden", forbidden, pixels.shape[:2])
    if forbidden.dtype != torch.bool:
        raise TypeError(f"{name}: forbidden must be bool, got {forbidden.dtype}; compare it first, such as scores < 0")
    if forbidden.device != pixels.device:
        raise ValueError(
            f"{name}: forbidden is on {forbidden.device} but pixels is on {pixels.device}; move them to one device"
        )


def _absorb(query: Tensor, weights: SeparateAttentionWeights, num_heads: int) -> Tensor:
    """The queries (B, Q, D) in the pixels' own space, scaled: a (B, heads * Q, K) of the module's docstring."""
    batch, queries, dim = query.shape
    depth = dim // num_heads
    projected = F.linear(query, weights.query_weight, weights.in_proj_bias[:dim]) * depth**-0.5
    by_head = projected.reshape(batch * queries, num_heads, depth).transpose(0, 1)
    absorbed = torch.bmm(by_head, weights.key_weight.reshape(num_heads, depth, -1))  # [heads, B * Q, K]
    return absorbed.unflatten(1, (batch, queries)).transpose(0, 1).flatten(1, 2)


def _project(pooled: Tensor, weights: SeparateAttentionWeights, num_heads: int) -> Tensor:
    """What each head has read, (B, heads * Q, K), through the value and output projections: (B, Q, D)."""
    batch, (dim, width) = pooled.shape[0], weights.value_weight.shape
    by_head = pooled.unflatten(1, (num_heads, -1)).transpose(0, 1).flatten(1, 2)
    values = torch.bmm(by_head, weights.value_weight.reshape(num_heads, -1, width).mT)  # [heads, B * Q, d]
    values = values.unflatten(1, (batch, pooled.shape[1] // num_heads)).permute(1, 2, 0, 3).flatten(2)
    return F.linear(values + weights.in_proj_bias[2 * dim :], weights.out_weight, weights.out_bias)


class _PooledPixels(torch.autograd.Function):
    """``softmax((y + pos) a^T) y``: (B, R, K) from pixels (B, N, K), a (B, R, K) in ``wide``, positions (N, K).

    Pixels that are ``forbidden`` (B, N), where that is not None, have weight 0. Keeps the softmax (B, R, N) besides its
    inputs. The pixels' gradient is one product of depth 2R.
    """

    @staticmethod
    def forward(ctx, pixels: Tensor, absorbed: Tensor, positions: Tensor, forbidden: Tensor | None) -> Tensor:
        scores = _product(absorbed, pixels.mT)
        scores = scores + (absorbed.flatten(0, 1) @ positions.T).view_as(scores)  # products may be kept: none changes
        if forbidden is not None:
            scores = scores.masked_fill(forbidden[:, None], -torch.inf)
        weights = torch.softmax(scores, dim=-1)
        ctx.save_for_backward(pixels, absorbed, positions, weights)
        return _product(weights, pixels)

    @staticmethod
    @once_differentiable
    def backward(ctx, upstream: Tensor):
        pixels, absorbed, positions, weights = ctx.saved_tensors
        need_pixels, need_absorbed, need_positions, _ = ctx.needs_input_grad
        d_weights = _product(upstream, pixels.mT)
        d_scores = torch._softmax_backward_data(d_weights, weights, -1, weights.dtype)
        d_pixels = d_absorbed = d_positions = None
        if need_pixels:
            rows = torch.cat([upstream, absorbed], dim=1)  # [B, 2R, K]
            d_pixels = _gradient_of_pixels(torch.cat([weights, d_scores], dim=1), rows, pixels)
        if need_absorbed:
            d_absorbed = _product(d_scores, pixels)
            d_absorbed += (d_scores.flatten(0, 1) @ positions).view_as(d_absorbed)
        if need_positions:
            d_positions = d_scores.flatten(0, 1).T @ absorbed.flatten(0, 1)
        return d_pixels, d_absorbed, d_positions, None


def _product(rows: Tensor, pixels: Tensor) -> Tensor:
    """``rows @ pixels`` in the pixels' dtype, as a tensor of the rows' wider one.

    In low precision every row is divided by its largest number, so that scores do not overflow in float16 and the
    weights of thousands of pixels do not vanish.
    """
    if rows.dtype == pixels.dtype:
        return torch.bmm(rows, pixels)
    largest = _largest(rows)
    return torch.bmm((rows / largest).to(pixels.dtype), pixels).to(rows.dtype) * largest


def _gradient_of_pixels(weights: Tensor, rows: Tensor, pixels: Tensor) -> Tensor:
    """``weights^T rows`` (B, N, K) of (B, R, N) and (B, R, K), in dtype and memory layout of ``pixels``."""
    if rows.dtype != pixels.dtype:
        largest = _largest(rows)
        weights, rows = (weights * largest).to(pixels.dtype), (rows / largest).to(pixels.dtype)
    if pixels.stride(1) == 1:
        return torch.bmm(rows.mT, weights).mT
    return torch.bmm(weights.mT, rows)


def _largest(rows: Tensor) -> Tensor:
    """The largest magnitude of each row, (B, R, 1)."""
    return rows.abs().amax(-1, keepdim=True).clamp_min(torch.finfo(torch.float32).tiny)
