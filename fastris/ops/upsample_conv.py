"""Bilinear upsampling and a 3x3 convolution, in the order that costs less: mix channels first, interpolate after.

The projector convolves upsampled maps. Mixing channels and interpolating in space are linear maps over different axes,
so they commute, and with W_t the C' x C matrix of tap t (its row t_y, its column t_x) and shift_t zero-padded:

    conv3x3(up2(x))  =  sum_t shift_t(W_t up2(x))  =  sum_t shift_t(up2(W_t x))

The right-hand side is one matrix product C -> 9C' at low resolution, a quarter of the multiplications, and then a fixed
linear map of the nine tap images. That map is separable; along an axis of n pixels it is the matrix [2n, 3, n]

    A[Y, t, y] = weight of pixel y in the upsampled value at Y + t - 1, and 0 where Y + t - 1 is outside the image

which holds the zero padding of the convolution and the clamped border of the interpolation, so no border is special.
The upsampled input, four times the size of x, never exists. Backward is the transposed map and two matrix products.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from fastris import reference
from fastris.dispatch import resolve
from fastris.ops.checks import check_shape, check_tensors, compute_dtype

# A batch is computed in parts whose nine tap images stay below these bytes. On a CPU the allocator maps larger blocks
# anew on every call, and the page faults cost a good part of the matrix product's time.
CPU_PART_BYTES = 32 * 2**20
GPU_PART_BYTES = 512 * 2**20


def upsample2x_conv3x3(x: Tensor, weight: Tensor, bias: Tensor | None = None, *, impl: str = "auto") -> Tensor:
    """``conv3x3(up2(x))``: bilinear upsampling (align_corners=False), then a zero-padded 3x3 convolution.

    Args:
        x: (B, C, H, W), any strides; H and W at least 1, B may be 0.
        weight: (C', C, 3, 3).
        bias: (C',) or None.
        impl: ``"auto"``, ``"reference"``, ``"torch"`` or ``"triton"``; see :mod:`fastris.dispatch`.

    Returns (B, C', 2H, 2W) in autocast's dtype where autocast is on, else in x's dtype. Memory format: ``reference``
    and ``torch`` follow x as a convolution does (channels_last stays channels_last); ``triton`` answers channels_last.

    The fast paths keep only x and weight, in the computing dtype, for the backward pass, and can be differentiated
    once. Their intermediate is nine tap images of C' channels at low resolution; the batch is computed in parts of
    whole samples that keep it below 32 MiB on a CPU and 512 MiB on a GPU. All sums over channels run in float32 or
    better; tap images are stored in the computing dtype, so in float16 their values must stay below 65504. A non-finite
    value spreads within its own sample only, but on the ``torch`` path to every pixel of it: zeros multiply it there.

    Raises ValueError for a wrong shape, an empty image or tensors on different devices; TypeError for dtypes that do
    not fit; RuntimeError when ``impl="triton"`` cannot run here.

    Source: CRIS section 3.4, published ``Projector.vis``; :func:`fastris.reference.upsample2x_conv3x3`.
    """
    _check("upsample2x_conv3x3", x, weight, bias)
    dtype = compute_dtype(x)
    path = resolve("upsample2x_conv3x3", x.device, dtype, impl, x.shape[0])
    if path == "reference":
        return reference.upsample2x_conv3x3(x, weight, bias)
    with torch.autocast(x.device.type, enabled=False):
        x, weight, bias = _cast(dtype, x, weight, bias)
        if path == "torch":
            return _UpsampleConv.apply(x, weight, bias)
        from fastris.kernels import upsample_conv

        return upsample_conv.upsample2x_conv3x3(x, weight, bias)


def upsample2x_conv3x3_stats(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, *, impl: str = "auto"
) -> tuple[Tensor, Tensor, Tensor]:
    """:func:`upsample2x_conv3x3` with the statistics that a BatchNorm behind it needs: ``(output, mean, var)``.

    ``mean`` and ``var`` (C',) are those of the returned (rounded) output over B, 2H and 2W; ``var`` is biased (divided
    by the count, as BatchNorm normalises). They are float32, or float64 for float64 inputs, and are computed around
    local means, so that a mean much larger than the deviation costs no digits. On ``triton`` they come from the pass
    that writes the output. Everything is differentiable, once: with ``(output - mean) * rsqrt(var + eps)`` in plain
    PyTorch the gradient of a BatchNorm follows. Backward then keeps the output too, which a BatchNorm keeps anyway.

    Arguments, dtypes and errors are those of :func:`upsample2x_conv3x3`; the batch must not be empty.
    """
    _check("upsample2x_conv3x3_stats", x, weight, bias)
    if x.shape[0] == 0:
        raise ValueError("upsample2x_conv3x3_stats: x holds no samples, so it has no statistics; give B >= 1")
    dtype = compute_dtype(x)
    if resolve("upsample2x_conv3x3", x.device, dtype, impl, x.shape[0]) == "triton":
        from fastris.kernels import upsample_conv

        with torch.autocast(x.device.type, enabled=False):
            return upsample_conv.upsample2x_conv3x3_stats(*_cast(dtype, x, weight, bias))
    output = upsample2x_conv3x3(x, weight, bias, impl=impl)
    wide = output if output.dtype is torch.float64 else output.float()
    var, mean = torch.var_mean(wide, dim=(0, 2, 3), correction=0)
    return output, mean, var


def statistics_come_free(x: Tensor) -> bool:
    """Whether :func:`upsample2x_conv3x3_stats` of ``x`` takes them from the pass that writes the output."""
    return resolve("upsample2x_conv3x3", x.device, compute_dtype(x), batch=x.shape[0]) == "triton"


def _check(operator: str, x: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    check_tensors(operator, x=x, weight=weight, bias=bias)
    check_shape(operator, "x", x, ("B", "C", "H", "W"))
    if not x.shape[1]:
        raise ValueError(f"{operator}: x must have channels, got {tuple(x.shape)}")
    check_shape(operator, "weight", weight, ("C'", x.shape[1], 3, 3))
    if bias is not None:
        check_shape(operator, "bias", bias, (weight.shape[0],))
    if 0 in x.shape[2:]:
        raise ValueError(f"{operator}: x must be at least one pixel high and wide, got {tuple(x.shape)}")


def _cast(dtype: torch.dtype, x: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
    return x.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype)


class _UpsampleConv(torch.autograd.Function):
    """The algebra as three matrix products each way; keeps x and weight and nothing else."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        return _forward(x, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        x, weight = ctx.saved_tensors
        need_x, need_weight, need_bias = ctx.needs_input_grad
        with _without_autocast(x):
            x_gradient, weight_gradient = _backward(gradient, x, weight, need_x, need_weight)
            return x_gradient, weight_gradient, gradient.sum((0, 2, 3)) if need_bias else None


def _without_autocast(x: Tensor) -> AbstractContextManager:
    """Turn autocast off; a compiled backward needs nothing, as it is traced inside the forward's block."""
    return nullcontext() if torch.compiler.is_compiling() else torch.autocast(x.device.type, enabled=False)


def _forward(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    batch, _, height, width = x.shape
    channels = weight.shape[0]
    taps = _tap_matrices(weight)  # (3, 3C', C)
    along_y, along_x = _axis_matrices(x)
    output = _empty_like(x, (batch, channels, 2 * height, 2 * width))
    for part in _parts(x, channels):
        lines = _lines(x[part])  # (H n W, C)
        count = lines.shape[0] // width  # H n
        mixed = lines.new_empty(lines.shape[0], 3 * channels)
        wide = lines.new_empty(3, count, 2 * width, channels)
        for t_y in range(3):
            torch.mm(lines, taps[t_y].t(), out=mixed)
            torch.bmm(along_x.expand(count, -1, -1), mixed.view(count, 3 * width, channels), out=wide[t_y])
        samples = wide.view(3 * height, -1, 2 * width * channels).transpose(0, 1)  # (n, t_y H, 2W C')
        target = output[part].permute(0, 2, 3, 1).flatten(2) if _is_channels_last(x) else None
        rows = along_y.expand(samples.shape[0], -1, -1)
        if bias is None:
            result = torch.bmm(rows, samples, out=target)
        else:
            result = torch.baddbmm(bias.repeat(2 * width), rows, samples, out=target)  # (n, 2H, 2W C')
        if target is None:
            _store(result.view(samples.shape[0], -1, channels), output[part])
    return output


def _backward(
    gradient: Tensor, x: Tensor, weight: Tensor, need_x: bool, need_weight: bool
) -> tuple[Tensor | None, Tensor | None]:
    height, width = x.shape[2:]
    channels = weight.shape[0]
    taps = _tap_matrices(weight)  # (3, 3C', C)
    along_y, along_x = (matrix.t() for matrix in _axis_matrices(x))
    x_gradient = _empty_like(x, x.shape) if need_x else None
    sum_dtype = torch.float64 if x.dtype is torch.float64 else torch.float32
    taps_gradient = torch.zeros_like(taps, dtype=sum_dtype) if need_weight else None
    for part in _parts(x, channels):
        lines = _lines(x[part])  # (H n W, C)
        rows = torch.zeros_like(lines)
        upstream = _lines(gradient[part]).view(2 * height, -1)  # (2H, n 2W C')
        for t_y, rows_of_tap in enumerate(along_y.split(height)):  # (H, 2H) each
            wide = torch.mm(rows_of_tap, upstream).view(-1, 2 * width, channels)  # (H n, 2W, C')
            mixed = torch.bmm(along_x.expand(wide.shape[0], -1, -1), wide).view(-1, 3 * channels)  # (H n W, t_x C')
            if need_x:
                rows.addmm_(mixed, taps[t_y])
            if taps_gradient is not None:
                _add_product(taps_gradient[t_y], mixed.t(), lines)
        if x_gradient is not None:
            _store(rows.view(height, -1, width, rows.shape[1]).transpose(0, 1), x_gradient[part])
    if taps_gradient is None:
        return x_gradient, None
    return x_gradient, taps_gradient.view(3, 3, channels, -1).permute(2, 3, 0, 1).to(weight.dtype)


def _add_product(total: Tensor, first: Tensor, second: Tensor) -> None:
    """``total += first @ second``, where total may be of a wider dtype than the factors."""
    if total.dtype is first.dtype:
        total.addmm_(first, second)
    else:
        total += torch.mm(first, second)


def _tap_matrices(weight: Tensor) -> Tensor:
    """(C', C, 3, 3) -> (3, 3C', C): one matrix for each row t_y of taps, its rows ordered (t_x, C')."""
    return weight.permute(2, 3, 0, 1).reshape(3, 3 * weight.shape[0], weight.shape[1])


def _axis_matrices(x: Tensor) -> tuple[Tensor, Tensor]:
    """The maps from tap images to output rows, (2H, 3H) with columns (t_y, y), and columns, (2W, 3W) with (x, t_x)."""
    height, width = x.shape[2:]
    along_y = _axis_map(height, x).reshape(2 * height, 3 * height)
    return along_y, _axis_map(width, x).transpose(1, 2).reshape(2 * width, 3 * width)


def _axis_map(size: int, like: Tensor) -> Tensor:
    """A[Y, t, y] of the module's docstring, (2 size, 3, size). Every entry is exact in any floating-point dtype."""
    pixel = torch.arange(size, device=like.device)
    tap = torch.arange(3, device=like.device)[:, None]
    upsampled = torch.arange(2 * size, device=like.device)[:, None, None] + tap - 1
    position = ((upsampled - 0.5) / 2).clamp(0, size - 1)
    inside = (upsampled >= 0) & (upsampled < 2 * size)
    return ((1 - (position - pixel).abs()).clamp_min(0) * inside).to(like.dtype)


def _parts(x: Tensor, out_channels: int) -> Iterator[slice]:
    """Slices of the batch whose nine tap images stay below the bound; a single sample is never divided."""
    per_sample = 9 * out_channels * x.shape[2] * x.shape[3] * x.element_size()
    step = max(1, (GPU_PART_BYTES if x.is_cuda else CPU_PART_BYTES) // max(1, per_sample))
    return (slice(first, first + step) for first in range(0, x.shape[0], step))


def _is_channels_last(x: Tensor) -> bool:
    return x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous()


def _empty_like(x: Tensor, shape: tuple[int, ...]) -> Tensor:
    """An uninitialised tensor of x's dtype, device and memory format (channels_last or contiguous)."""
    memory_format = torch.channels_last if _is_channels_last(x) else torch.contiguous_format
    return torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=memory_format)


def _lines(image: Tensor) -> Tensor:
    """(n, C, H, W) -> (H n W, C): pixels, ordered so that a map over y is one matrix product for all samples."""
    rows = image.permute(0, 2, 3, 1)
    if not rows.is_contiguous():
        planes = image.reshape(*image.shape[:2], -1)
        rows = image.new_empty(rows.shape)
        # Sample by sample: on a CPU PyTorch transposes a matrix several times faster than it permutes four axes.
        for target, plane in zip(rows.flatten(1, 2), planes, strict=True):
            target.copy_(plane.t())
    return rows.transpose(0, 1).reshape(-1, image.shape[1])


def _store(pixels: Tensor, image: Tensor) -> None:
    """Copy pixels (n, H, W, C) or (n, H W, C) into an image (n, C, H, W) of either memory format."""
    if _is_channels_last(image):
        image.permute(0, 2, 3, 1).copy_(pixels.view_as(image.permute(0, 2, 3, 1)))
        return
    for target, sample in zip(image.flatten(2), pixels.reshape(len(pixels), -1, image.shape[1]), strict=True):
        target.copy_(sample.t())
