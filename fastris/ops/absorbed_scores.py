"""One score matrix between pixels and words, and what both sides read from it, without keeping maps of the pixels.

:mod:`fastris.ops.bidirectional_attention` explains the algebra. Two forms of it are here, with backward passes written
by hand; which is cheaper depends on how many pixels there are for each channel. Scores are (B, L, N): a softmax over
few words is fast where the pixels are contiguous. Selective checkpoints (:mod:`fastris.nn.recompute`) keep products, so
none is changed in place in a forward pass, and ask that saved tensors are fetched once.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


class Scored(NamedTuple):
    """What the scores give; all in float32 or wider.

    ``rows`` (B, L, N) is the softmax over the words less its mean over the pixels, ``spread`` (B, L, L) its covariance,
    and ``gathered`` (B, L, T) the normalised sym_value map of the pixels, under the softmax over the pixels.
    """

    rows: Tensor
    spread: Tensor
    gathered: Tensor


def score_and_read(
    pixels: Tensor,
    key: Tensor,
    bias: Tensor,
    query_weight: Tensor,
    sym_value_weight: Tensor,
    eps: float,
    kernels: bool = False,
) -> Scored:
    """Scores ``IN(Wq x) k^T / sqrt(C) + bias``, and what is read from them.

    ``pixels`` (B, N, C) in the dtype of the matrix products; ``key`` (B, L, C), ``bias`` (B, L), ``query_weight``
    (C, C) and ``sym_value_weight`` (T, C) in float32, or float64 for float64 pixels. No gradient reaches ``bias``. With
    ``kernels`` what has an axis of pixels and one of words is made by Triton kernels, ``rows`` in the pixels' dtype.
    """
    through_covariance = covariance_pays(pixels.shape[1], pixels.shape[2], len(sym_value_weight))
    form = _ThroughCovariance if through_covariance else _ThroughMaps
    return Scored(*form.apply(pixels, key, bias, query_weight, sym_value_weight, eps, kernels))


def read_normed(
    few: Tensor, pixels: Tensor, key_weight: Tensor, value_weight: Tensor, eps: float, kernels: bool = False
) -> Tensor:
    """``softmax(few IN(W_k x)^T / sqrt(T)) IN(W_v x)``: (B, L, T), what few rows (B, L, T) read from the pixels.

    The other half of :func:`score_and_read` by itself, in the same two forms: ``pixels`` (B, N, C) in the dtype of the
    matrix products, the others in float32, or float64 for float64 pixels; both weights are (T, C). With ``kernels``
    what has an axis of pixels and one of words is made by Triton kernels.
    """
    count, width = pixels.shape[1:]
    rows = len(key_weight) + len(value_weight)
    form = _ThroughCovariance if _covariance_pays(count, width, rows) else _ThroughMaps
    few = few * (width / len(key_weight)) ** 0.5  # which is divided by sqrt(C) there
    return form.apply(pixels, few, None, key_weight, value_weight, eps, kernels)[2]


def covariance_pays(pixels: int, width: int, text_width: int) -> bool:
    """Whether variances of projections cost less through the pixels' covariance than through the projected maps.

    Multiplications of forward and backward: 2 N C^2 + 3 C^2 (C + T) against 3 N C (C + T).
    """
    return _covariance_pays(pixels, width, width + text_width)


def _covariance_pays(pixels: int, width: int, rows: int) -> bool:
    """The same of projections with so many ``rows`` in all."""
    return pixels * (3 * rows - 2 * width) > 3 * width * rows


class _ThroughCovariance(torch.autograd.Function):
    """With Cov the pixels' covariance, a projection w has the variance w^T Cov w, and no map is projected.

    Keeps pixels and scores, and tensors without a pixel axis. The pixels' gradient is one product for the covariance
    and one for all that the scores give it: its last column, of ones, takes out the mean.
    """

    @staticmethod
    def forward(ctx, pixels, key, bias, query_weight, sym_value_weight, eps, kernels):
        centred = _centred(pixels)
        covariance = product(centred.mT, centred, pixels.dtype) / pixels.shape[1]
        mixed = [
            torch.bmm(each.expand(pixels.shape[0], -1, -1), covariance) for each in (query_weight, sym_value_weight)
        ]
        scales = [
            ((each * weight).sum(-1).clamp_min_(0) + eps).rsqrt_()[:, None]  # [B, 1, C], [B, 1, T]
            for each, weight in zip(mixed, (query_weight, sym_value_weight), strict=True)
        ]
        absorbed = _mapped(key * scales[0] * pixels.shape[2] ** -0.5, query_weight)  # [B, L, C]
        scores, rows, spread, heard, sums = _read(absorbed, bias, centred, centred, kernels)  # heard [B, L, C]
        ctx.save_for_backward(
            pixels, key, query_weight, sym_value_weight, scores, sums, absorbed, heard, *mixed, *scales
        )
        return rows, spread, _mapped(heard, sym_value_weight.T) * scales[1]

    @staticmethod
    @once_differentiable
    def backward(ctx, d_rows, d_spread, d_gathered):
        pixels, key, query_weight, sym_value_weight, scores, sums, absorbed, heard, *rest = ctx.saved_tensors
        with torch.autocast(pixels.device.type, enabled=False):  # which may be on in here
            mixed_query, mixed_value, query_scale, value_scale = rest
            dtype, count, unit = pixels.dtype, pixels.shape[1], pixels.shape[2] ** -0.5
            centred = _centred(pixels)
            d_value_scale = (d_gathered * _mapped(heard, sym_value_weight.T)).sum(1)
            d_value = d_gathered * value_scale
            d_heard = _mapped(d_value, sym_value_weight)
            d_scores, columns = _read_backward(scores, sums, heard, d_rows, d_spread, d_heard, centred)
            d_absorbed = split_product(d_scores, centred, dtype)
            d_scaled = _mapped(d_absorbed, query_weight.T) * unit
            d_query_scale = (d_scaled * key).sum(1)
            d_query_variance = _variance_backward(d_query_scale, query_scale)
            d_value_variance = _variance_backward(d_value_scale, value_scale)
            d_query_weight = _outer(key * query_scale * unit, d_absorbed) + 2 * (d_query_variance * mixed_query).sum(0)
            d_value_weight = _outer(d_value, heard) + 2 * (d_value_variance * mixed_value).sum(0)
            d_pixels = None
            if ctx.needs_input_grad[0]:
                d_covariance = _mapped((d_query_variance * query_weight).mT, query_weight)
                d_covariance += _mapped((d_value_variance * sym_value_weight).mT, sym_value_weight)
                mean = (torch.bmm(d_scores.sum(2, keepdim=True).mT, absorbed) + d_heard.sum(1, keepdim=True)) / -count
                ones = torch.ones_like(columns[:, :1])
                left, right = torch.cat([d_scores, columns, ones], 1), torch.cat([absorbed, d_heard, mean], 1)
                d_pixels = product(centred, d_covariance.mul_(2 / count), dtype)
                d_pixels = product(left.mT, right, dtype, d_pixels).to(dtype)
            return d_pixels, d_scaled * query_scale, None, d_query_weight, d_value_weight, None, None


class _ThroughMaps(torch.autograd.Function):
    """Both projected maps are made, and kept, but not their norms: these scale the words' side of each product."""

    @staticmethod
    def forward(ctx, pixels, key, bias, query_weight, sym_value_weight, eps, kernels):
        dtype, centred = pixels.dtype, _centred(pixels)
        maps = [product(centred, weight.T, dtype).to(dtype) for weight in (query_weight, sym_value_weight)]
        scales = [_scale(each, key.dtype, eps) for each in maps]  # [B, 1, C], [B, 1, T]
        scaled = key * scales[0] * pixels.shape[2] ** -0.5
        scores, rows, spread, heard, sums = _read(scaled, bias, *maps, kernels)  # heard [B, L, T]
        ctx.save_for_backward(pixels, key, query_weight, sym_value_weight, scores, sums, heard, *maps, *scales)
        return rows, spread, heard * scales[1]

    @staticmethod
    @once_differentiable
    def backward(ctx, d_rows, d_spread, d_gathered):
        pixels, key, query_weight, sym_value_weight, scores, sums, heard, *rest = ctx.saved_tensors
        with torch.autocast(pixels.device.type, enabled=False):  # which may be on in here
            query, value, query_scale, value_scale = rest
            dtype, count, unit = pixels.dtype, pixels.shape[1], pixels.shape[2] ** -0.5
            d_value_scale = (d_gathered * heard).sum(1)
            d_heard = d_gathered * value_scale
            d_scores, columns = _read_backward(scores, sums, heard, d_rows, d_spread, d_heard, value)
            d_scaled = split_product(d_scores, query, dtype) * unit
            d_query_scale = (d_scaled * key).sum(1)
            d_variances = [
                _variance_backward(*each).mT.mul_(2 / count)
                for each in ((d_query_scale, query_scale), (d_value_scale, value_scale))
            ]
            d_query = product(d_scores.mT, key * query_scale * unit, dtype, query * d_variances[0])
            d_value = product(columns.mT, d_heard, dtype, value * d_variances[1])
            flat = _centred(pixels).flatten(0, 1)[None]
            d_weights = [product(each.flatten(0, 1)[None].mT, flat, dtype)[0] for each in (d_query, d_value)]
            d_pixels = None
            if ctx.needs_input_grad[0]:
                d_pixels = product(d_query, query_weight, dtype)
                d_pixels = d_pixels.add_(product(d_value, sym_value_weight, dtype))
                d_pixels = d_pixels.sub_(d_pixels.mean(1, keepdim=True)).to(dtype)
            return d_pixels, d_scaled * query_scale, None, *d_weights, None, None


def with_silent(x: Tensor, *others: Tensor) -> Tensor:
    """``x`` itself. The others change nothing that is made of it, and their gradients are exactly 0."""
    return _Silent.apply(x, *others)


class _Silent(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, *others):
        ctx.shapes = [each.shape for each in others]
        return x.view_as(x)

    @staticmethod
    def backward(ctx, upstream):
        needed = zip(ctx.shapes, ctx.needs_input_grad[1:], strict=True)
        return upstream, *(upstream.new_zeros(shape) if need else None for shape, need in needed)


def product(left: Tensor, right: Tensor, dtype: torch.dtype, onto: Tensor | None = None) -> Tensor:
    """``left @ right``, added to ``onto`` in place, in float32 or wider, of operands that are rounded to ``dtype``.

    (B, M, K) with (B, K, N) or (K, N). float16 has few exponents: what is rounded to it is scaled to 1 first.
    """
    wide = torch.promote_types(dtype, torch.float32)
    if dtype is wide:
        if onto is not None:
            return onto.baddbmm_(left, right)
        return torch.bmm(left, right) if right.ndim == 3 else _mapped(left, right)
    (left, rows), (right, columns) = _rounded(left, dtype, -1), _rounded(right, dtype, -2)
    right = right.expand(len(left), -1, -1)
    on_gpu = left.device.type == "cuda"  # where products of float32 are slow, and these are summed in float32
    found = torch.bmm(left, right, out_dtype=wide) if on_gpu else torch.bmm(left.to(wide), right.to(wide))
    found = found * rows * columns if dtype is torch.float16 else found
    return found if onto is None else onto + found


def split_product(few: Tensor, right: Tensor, dtype: torch.dtype) -> Tensor:
    """:func:`product` of which only ``right`` is rounded: of the few rows on the left so is what rounding leaves."""
    wide = torch.promote_types(dtype, torch.float32)
    if dtype is wide:
        return product(few, right, dtype)
    size = _largest(few.to(wide), 2)
    few = few / size
    rounded = few.to(dtype).to(wide)
    first, rest = product(torch.cat([rounded, few - rounded], 1), right, dtype).chunk(2, 1)
    return (first + rest) * size


def _rounded(x: Tensor, dtype: torch.dtype, axis: int) -> tuple[Tensor, Tensor]:
    """``x`` in ``dtype``, in float16 over its size along ``axis``; and that size."""
    one = torch.ones((), device=x.device)
    if x.dtype is dtype or dtype is not torch.float16:
        return x.to(dtype), one
    size = _largest(x, axis)
    return (x / size).to(dtype), size


def _largest(x: Tensor, axis: int) -> Tensor:
    """The power of two above the largest number along ``axis``: dividing by it rounds nothing."""
    largest = x.abs().amax(axis, keepdim=True).clamp_min(1e-30)
    return torch.ldexp(torch.ones_like(largest), torch.frexp(largest).exponent)


def _mapped(x: Tensor, matrix: Tensor) -> Tensor:
    """(B, M, K) with (K, N). What ``@`` does depends on who needs gradients, and so do its last bits."""
    return (x.flatten(0, 1) @ matrix).unflatten(0, x.shape[:2])


def _centred(pixels: Tensor) -> Tensor:
    """The pixels less their mean over the pixels, which float32 or wider has summed."""
    wide = torch.promote_types(pixels.dtype, torch.float32)
    return (pixels - pixels.mean(1, keepdim=True, dtype=wide)).to(pixels.dtype)


def _scale(centred: Tensor, wide: torch.dtype, eps: float) -> Tensor:
    """(B, 1, C): one over the deviation of a centred map (B, N, C)."""
    length = torch.linalg.vector_norm(centred, dim=1, keepdim=True, dtype=wide)
    return (length.square() / centred.shape[1] + eps).rsqrt_()


def _read(
    few: Tensor, bias: Tensor | None, source: Tensor, value: Tensor, kernels: bool
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor, Tensor | None]:
    """Scores ``few source^T + bias`` (B, L, N) and what is read from them.

    That is the softmax over the words less its mean over the pixels (B, L, N), its covariance (B, L, L), and ``value``
    (B, N, V) under the softmax over the pixels: (B, L, V). Without a ``bias`` the first two are not wanted, and None.
    Last comes what the kernels need for their backward pass.
    """
    if kernels and bias is not None:
        from fastris.kernels.bidirectional_attention import read

        return read(few, bias, source, value)
    if kernels:
        from fastris.kernels.bidirectional_attention import read_columns

        scores, heard, sums = read_columns(few, source, value)
        return scores, None, None, heard, sums
    scores = split_product(few, source.mT, source.dtype)
    if bias is None:
        return scores, None, None, split_product(scores.softmax(2), value, source.dtype), None
    scores = scores + bias[..., None]
    rows = scores.softmax(1)
    rows = rows.sub_(rows.mean(2, keepdim=True))
    heard = split_product(scores.softmax(2), value, source.dtype)
    return scores, rows, torch.bmm(rows, rows.mT) / rows.shape[2], heard, None


def _read_backward(
    scores: Tensor,
    sums: Tensor | None,
    heard: Tensor,
    d_rows: Tensor | None,
    d_spread: Tensor | None,
    d_heard: Tensor,
    value: Tensor,
) -> tuple[Tensor, Tensor]:
    """The gradient of the scores, and the softmax over the pixels, both (B, L, N)."""
    if sums is not None and d_rows is not None and d_spread is not None:
        from fastris.kernels.bidirectional_attention import read_backward

        return read_backward(scores, sums, heard, d_rows, d_spread, d_heard, value)
    if sums is not None:
        from fastris.kernels.bidirectional_attention import read_columns_backward

        return read_columns_backward(scores, sums, heard, d_heard, value)
    columns = scores.softmax(2)
    d_columns = split_product(d_heard, value.mT, value.dtype)
    d_columns = d_columns - (d_columns * columns).sum(2, keepdim=True)
    if d_rows is None or d_spread is None:
        return d_columns * columns, columns
    rows = scores.softmax(1)
    centred = rows - rows.mean(2, keepdim=True)
    d_rows = torch.baddbmm(d_rows, d_spread + d_spread.mT, centred, alpha=1 / scores.shape[2])
    d_rows = d_rows.sub_(d_rows.mean(2, keepdim=True)).mul_(rows)
    d_scores = d_rows.addcmul_(rows, d_rows.sum(1, keepdim=True), value=-1)
    return d_scores.addcmul_(columns, d_columns), columns


def _variance_backward(d_scale: Tensor, scale: Tensor) -> Tensor:
    """(B, C, 1): the gradient of a variance, from that of one over the deviation, (B, C); ``scale`` is (B, 1, C)."""
    return (d_scale[:, None] * scale**3).mul_(-0.5).mT


def _outer(left: Tensor, right: Tensor) -> Tensor:
    """(M, N): the sum over samples and words of the products of (B, L, M) and (B, L, N)."""
    return left.flatten(0, 1).T @ right.flatten(0, 1)
