"""The products of pixel-word attention that have an axis of pixels, with backward passes that keep little.

:mod:`fastris.ops.pixel_word_attention` explains the algebra. The slope of the query's norm has two forms here; which
is cheaper depends on how many pixels there are for each channel. Both keep the pixels, their projection, the products
of words and pixels, and a deviation or two of every pixel. Scores are (B, L, N): a softmax over few words is fast where
the pixels are contiguous. Selective checkpoints (:mod:`fastris.nn.recompute`) keep products, so none is changed in
place in a forward pass, and ask that saved tensors are fetched once.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from fastris.ops.absorbed_scores import product
from fastris.runtime import cpu_products

BANDS = 4
"""Of rows, in which a symmetric matrix is made: 5/8 of the multiplications, in products that are still large."""


class Answers(NamedTuple):
    """What the words answer, behind the output's projection and in its norm; in float32 or wider.

    ``rows`` (B, L, C) are centred over the channels and weighted as the norm weighs them, ``gram`` (B, L, L), float64,
    is their covariance over the channels without those weights, and ``bias`` (C,) the norm's.
    """

    rows: Tensor
    gram: Tensor
    bias: Tensor


def attend_and_mix(
    pixels: Tensor,
    key: Tensor,
    score_bias: Tensor,
    answers: Answers,
    query: tuple[Tensor, Tensor],
    project: tuple[Tensor, Tensor],
    mixed: tuple[Tensor, Tensor],
    eps: float,
    kernels: bool = False,
) -> Tensor:
    """``(GELU(x W_x^T + b_x) * heard) W_m^T + b_m`` of pixels x (B, N, C), in their dtype, that of the products.

    ``heard`` is the norm of what a pixel reads: ``a rows / sqrt(a gram a^T + eps) + bias``, a the softmax over the
    words of ``norm(x W_q^T + b_q) key^T + score_bias``. ``key`` (B, L, C), ``score_bias`` (B, L) and the pairs of
    weight (C, C) and bias (C,) are in float32, or float64 for float64 pixels; neither norm has weights of its own.
    With ``kernels`` what has an axis of pixels and one of words is made by Triton kernels.
    """
    batch = 1 if torch.compiler.is_exporting() else pixels.shape[0]  # exported, it serves batches of any size
    form = _ThroughGram if gram_pays(batch * pixels.shape[1], pixels.shape[2]) else _ThroughQuery
    return form.apply(pixels, key, score_bias, *answers, *query, *project, *mixed, eps, kernels)


def gram_pays(pixels: int, width: int) -> bool:
    """Whether the query's weights alone say for less than the queries of all ``pixels`` how its norm slopes.

    Multiplications: 2 C^3, of two products of weights, against N C^2 to make the queries again.
    """
    return pixels > 2 * width


class _ThroughGram(torch.autograd.Function):
    """The queries are made, centred, for their length alone.

    With W, b the centred query_weight and query_bias, z = W x + b and D the gradient of ``|z|^2 / 2``, x has the
    gradient ``D (W^T W x + W^T b)``, and W has ``W M + b t^T``, where M is the sum of ``D x x^T`` and t that of
    ``D x``.
    """

    @staticmethod
    def forward(ctx, pixels, key, score_bias, rows, gram, bias, query_weight, query_bias, *rest):
        project_weight, project_bias, mixed_weight, mixed_bias, eps, kernels = rest
        width, wide = pixels.shape[2], key.dtype
        weight, shift = query_weight - query_weight.mean(0), query_bias - query_bias.mean()
        length = torch.linalg.vector_norm(linear(pixels, weight, shift), dim=2, dtype=wide)
        rstd = (length.square() / width + eps).rsqrt()
        absorbed, offset = _mapped(key, weight), (key * shift).sum(2, keepdim=True)
        seen = linear(pixels, project_weight, project_bias)
        answers = Answers(rows, gram, bias)
        mixed, kept = _listen(pixels, absorbed, offset, rstd, score_bias, answers, seen, eps, kernels)
        ctx.save_for_backward(
            pixels, key, *answers, query_weight, query_bias, project_weight, mixed_weight, seen, rstd, *kept
        )
        ctx.eps = eps
        return linear(mixed, mixed_weight, mixed_bias)

    @staticmethod
    @once_differentiable
    def backward(ctx, upstream):
        pixels, key, rows, gram, bias, query_weight, query_bias, project_weight, mixed_weight, *kept = ctx.saved_tensors
        with torch.autocast(pixels.device.type, enabled=False):  # which may be on in here
            seen, rstd, *kept = kept
            raw, dtype = kept[0], pixels.dtype
            answers = Answers(rows, gram, bias)
            d_seen, d_scores, *d_mixed = _listen_backward(upstream, rstd, kept, answers, seen, mixed_weight, ctx.eps)
            d_raw = d_scores * rstd[:, None]
            d_half = _slope(rstd, (d_scores * raw).sum(1)) / pixels.shape[2]  # [B, N], of half the squared length
            weight, shift = query_weight - query_weight.mean(0), query_bias - query_bias.mean()
            scaled = pixels * d_half[..., None]
            d_absorbed = product(d_raw, pixels, dtype)
            d_offset = d_raw.sum(2, keepdim=True)
            moment, total = _moment(scaled, pixels, dtype), scaled.sum((0, 1))
            d_weight = weight @ moment + shift[:, None] * total + key.flatten(0, 1).T @ d_absorbed.flatten(0, 1)
            d_shift = weight @ total + shift * d_half.sum() + (key * d_offset).sum((0, 1))
            d_key = _mapped(d_absorbed, weight.T) + d_offset * shift
            d_pixels = None
            if ctx.needs_input_grad[0]:
                d_pixels = _flat_product(d_seen, project_weight, dtype)
                d_pixels = _flat_product(scaled, weight.T @ weight, dtype, d_pixels)
                left = torch.cat([d_raw, d_half[:, None]], 1)
                right = torch.cat([_mapped(key, weight), (shift @ weight).expand(len(key), 1, -1)], 1)
                d_pixels = product(left.mT, right, dtype, d_pixels).to(dtype)
            d_project = _outer(d_seen, pixels, dtype), d_seen.sum((0, 1), dtype=key.dtype)
            d_query = d_weight - d_weight.mean(0), d_shift - d_shift.mean()
            d_answers, d_mixed = d_mixed[:3], d_mixed[3:]
            return d_pixels, d_key, d_scores.sum(2), *d_answers, *d_query, *d_project, *d_mixed, None, None


class _ThroughQuery(torch.autograd.Function):
    """The queries are made once more for the backward pass, which is then that of a projection and a norm."""

    @staticmethod
    def forward(ctx, pixels, key, score_bias, rows, gram, bias, query_weight, query_bias, *rest):
        project_weight, project_bias, mixed_weight, mixed_bias, eps, kernels = rest
        unit, *_ = _unit(linear(pixels, query_weight, query_bias).to(key.dtype), eps)
        seen = linear(pixels, project_weight, project_bias)
        answers = Answers(rows, gram, bias)
        mixed, kept = _listen(unit, key, None, None, score_bias, answers, seen, eps, kernels)
        ctx.save_for_backward(
            pixels, key, *answers, query_weight, query_bias, project_weight, mixed_weight, seen, *kept
        )
        ctx.eps = eps
        return linear(mixed, mixed_weight, mixed_bias)

    @staticmethod
    @once_differentiable
    def backward(ctx, upstream):
        pixels, key, rows, gram, bias, query_weight, query_bias, project_weight, mixed_weight, *kept = ctx.saved_tensors
        with torch.autocast(pixels.device.type, enabled=False):  # which may be on in here
            seen, *kept = kept
            dtype = pixels.dtype
            answers = Answers(rows, gram, bias)
            d_seen, d_scores, *d_mixed = _listen_backward(upstream, None, kept, answers, seen, mixed_weight, ctx.eps)
            query = linear(pixels, query_weight, query_bias).to(key.dtype)
            unit, mean, rstd = _unit(query, ctx.eps)
            d_key = product(d_scores, unit, dtype)
            d_unit = product(d_scores.mT, key, dtype)
            d_query, *_ = torch.ops.aten.native_layer_norm_backward(
                d_unit, query, query.shape[2:], mean, rstd, None, None, [True, False, False]
            )
            d_pixels = None
            if ctx.needs_input_grad[0]:
                d_pixels = _flat_product(d_seen, project_weight, dtype)
                d_pixels = _flat_product(d_query, query_weight, dtype, d_pixels).to(dtype)
            d_pairs = [(_outer(each, pixels, dtype), each.sum((0, 1), dtype=key.dtype)) for each in (d_query, d_seen)]
            d_answers, d_mixed = d_mixed[:3], d_mixed[3:]
            return d_pixels, d_key, d_scores.sum(2), *d_answers, *d_pairs[0], *d_pairs[1], *d_mixed, None, None


def linear(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """``x W^T + b`` in the dtype of x, rounded once."""
    if x.dtype is weight.dtype:
        return cpu_products.linear(x, weight, bias) if _is_plain(x) else F.linear(x, weight, bias)
    return (_flat_product(x, weight.T, x.dtype) + bias).to(x.dtype)


def _unit(query: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """The queries (B, N, C) without mean and of length sqrt(C), their means and reciprocal deviations."""
    return torch.native_layer_norm(query, query.shape[2:], None, None, eps)


def _listen(
    source: Tensor,
    key: Tensor,
    offset: Tensor | None,
    rstd: Tensor | None,
    score_bias: Tensor,
    answers: Answers,
    seen: Tensor,
    eps: float,
    kernels: bool,
) -> tuple[Tensor, tuple[Tensor | None, ...]]:
    """``GELU(seen) * heard`` (B, N, C) by scores ``(key source^T + offset) rstd + score_bias``, and what is kept.

    Kept are the scores without ``rstd`` and bias where these come back with it, (B, L, N), their softmax, and one over
    the deviation of what each pixel reads, (B, N). Kernels make the last two anew, of the bias and a factor of
    ``gram``. Answers that cancel leave a small variance of large numbers, which float64 can tell from 0.
    """
    if kernels:
        from fastris.kernels.pixel_word_attention import listen

        offset = torch.zeros_like(score_bias) if offset is None else offset[..., 0]
        rstd = torch.ones_like(seen[..., 0], dtype=key.dtype) if rstd is None else rstd
        mixed, raw, factor = listen(source.to(seen.dtype), seen, rstd, key, offset, score_bias, *answers, eps)
        return mixed, (raw, None, None, score_bias, factor)
    raw = product(key, source.mT, seen.dtype)  # [B, L, N]
    raw = raw if offset is None else raw + offset
    weights = ((raw if rstd is None else raw * rstd[:, None]) + score_bias[..., None]).softmax(1)
    own = weights.double()
    variance = (own * torch.bmm(answers.gram, own)).sum(1).clamp_min(0)
    heard_rstd = (variance + eps).rsqrt().to(weights.dtype)
    heard = _heard(weights, heard_rstd, answers.rows, answers.bias, seen.dtype)
    return F.gelu(seen).mul_(heard), (None if rstd is None else raw, weights, heard_rstd, None, None)


def _heard(weights: Tensor, rstd: Tensor, rows: Tensor, bias: Tensor, dtype: torch.dtype) -> Tensor:
    """The norm of what the pixels read, (B, N, C); the bias is one row more, whose weight is 1."""
    right = torch.cat([rows, bias.expand(rows.shape[0], 1, -1)], 1)
    return product(_with_ones(weights * rstd[:, None]).mT, right, dtype)


def _with_ones(weights: Tensor) -> Tensor:
    """(B, L, N) and a row of ones, (B, L + 1, N)."""
    return torch.cat([weights, torch.ones_like(weights[:, :1])], 1)


def _listen_backward(
    upstream: Tensor,
    rstd: Tensor | None,
    kept: Sequence[Tensor],
    answers: Answers,
    seen: Tensor,
    mixed_weight: Tensor,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The gradients of seen, scores, rows, gram, bias, mixed_weight and mixed_bias, in float32 or wider.

    By kernels that of seen is in its own dtype.
    """
    raw, weights, heard_rstd, score_bias, factor = kept
    if weights is not None:
        return _mix_backward(upstream, weights, seen, *answers, mixed_weight, heard_rstd)
    from fastris.kernels.pixel_word_attention import gradients

    dtype, wide, upstream = seen.dtype, raw.dtype, upstream.to(seen.dtype)
    rstd = torch.ones_like(raw[:, 0]) if rstd is None else rstd
    d_product = _flat_product(upstream, mixed_weight, dtype)
    mixed, d_seen, d_heard, weights, d_scores, of_pixels = gradients(
        d_product, seen, raw, rstd, score_bias, answers.rows, factor, answers.bias, eps
    )
    heard_rstd, d_half = of_pixels.split(1, 1)  # [B, 1, N]
    d_right = product(_with_ones(weights * heard_rstd), d_heard, dtype)  # [B, L + 1, C]
    d_gram = (torch.bmm(weights * d_half, weights.mT) / 2).to(answers.gram.dtype)
    d_mixed = _outer(upstream, mixed, dtype), upstream.sum((0, 1), dtype=wide)
    return d_seen, d_scores, d_right[:, :-1], d_gram, d_right[:, -1].sum(0), *d_mixed


def _mix_backward(
    upstream: Tensor,
    weights: Tensor,
    seen: Tensor,
    rows: Tensor,
    gram: Tensor,
    bias: Tensor,
    mixed_weight: Tensor,
    rstd: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The same of kept ``weights`` and ``rstd``, by plain products."""
    dtype, wide = seen.dtype, weights.dtype
    upstream = upstream.to(dtype)
    heard, lively = _heard(weights, rstd, rows, bias, dtype), F.gelu(seen)
    d_mixed_weight = _outer(upstream, (lively * heard).to(dtype), dtype)
    d_product = _flat_product(upstream, mixed_weight, dtype)
    d_heard = lively.to(wide).mul_(d_product)
    d_product = d_product.mul_(heard)
    del heard, lively  # their memory is used again: a fresh map costs as much as filling it
    d_seen = torch.ops.aten.gelu_backward(d_product, seen.to(wide))
    scaled = weights * rstd[:, None]
    d_right = product(_with_ones(scaled), d_heard, dtype)  # [B, L + 1, C]
    d_scaled = product(rows, d_heard.mT, dtype)  # [B, L, N]
    d_half = _slope(rstd, (d_scaled * weights).sum(1))[:, None]  # [B, 1, N], of half the variance
    d_gram = (torch.bmm(weights * d_half, weights.mT) / 2).to(gram.dtype)
    d_weights = (d_scaled * rstd[:, None]).addcmul_(torch.bmm(gram.to(wide), weights), d_half)
    d_scores = d_weights.sub_((d_weights * weights).sum(1, keepdim=True)).mul_(weights)
    d_mixed_bias = upstream.sum((0, 1), dtype=wide)
    return d_seen, d_scores, d_right[:, :-1], d_gram, d_right[:, -1].sum(0), d_mixed_weight, d_mixed_bias


def _slope(rstd: Tensor, gradient: Tensor) -> Tensor:
    """The gradient of half a variance, from that of one over the deviation."""
    return gradient.mul_(rstd).mul_(rstd).mul_(rstd).neg_()


def _flat_product(x: Tensor, matrix: Tensor, dtype: torch.dtype, onto: Tensor | None = None) -> Tensor:
    """``product`` of (B, N, K) and one (K, M) for all samples."""
    if _is_plain(x) and x.dtype is matrix.dtype is dtype:
        found = cpu_products.product(x, matrix)
        return found if onto is None else onto.add_(found)
    flat = x.reshape(1, -1, x.shape[2])
    onto = None if onto is None else onto.view(1, -1, onto.shape[2])
    return product(flat, matrix[None], dtype, onto).view(*x.shape[:2], matrix.shape[1])


def _is_plain(x: Tensor) -> bool:
    """Whether the product may be one of :mod:`fastris.runtime.cpu_products`: on a CPU, and not while compiling."""
    return not torch.compiler.is_compiling() and x.device.type == "cpu"


def _outer(left: Tensor, right: Tensor, dtype: torch.dtype) -> Tensor:
    """(M, K): the sum over all pixels of the products of (B, N, M) and (B, N, K)."""
    left, right = left.reshape(1, -1, left.shape[2]), right.reshape(1, -1, right.shape[2])
    return product(left.mT, right, dtype)[0]


def _moment(scaled: Tensor, x: Tensor, dtype: torch.dtype) -> Tensor:
    """``_outer`` of x (B, N, C) and of x times a number for each pixel: it is symmetric, and half of it is enough."""
    width = x.shape[2]
    if not _is_plain(x) or width < BANDS:
        return _outer(scaled, x, dtype)
    found, step = scaled.new_zeros(width, width), -(-width // BANDS)
    for at in range(0, width, step):
        found[at : at + step, at:] = _outer(scaled[..., at : at + step], x[..., at:], dtype)
    return found.triu() + found.triu(1).T


def _mapped(x: Tensor, matrix: Tensor) -> Tensor:
    """(B, L, K) with (K, M)."""
    return (x.flatten(0, 1) @ matrix).unflatten(0, x.shape[:2])
