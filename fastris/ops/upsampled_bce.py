"""Binary cross-entropy on bilinearly upsampled logits, without the upsampled maps.

At four times the size a map has sixteen times the pixels, and as published each of Q maps is kept there once for the
loss and once for its gradient. Yet both are sums over pixels, and upsampling is linear. With the matrices Ry (H, h) and
Rx (W, w), of two numbers a row, and the slope l' of a pixel's loss l at z = Ry X Rx^T::

    loss = sum l(z),    dX = Ry^T l'(z) Rx

The rows of z are made a few at a time; each tile adds its loss to one number and Ry^T l' to its few rows of (h, W), and
is forgotten. The upstream gradient of a sum is one number, so the gradient is made with the loss: the pixels are
visited once, and what is kept is dX, of the logits' own size. Products with small matrices add in a fixed order, where
PyTorch's backward of bilinear upsampling uses atomics on a GPU. The kernels (``kernels/upsampled_bce.py``) make the
pixels in registers and form no product at all.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from fastris import reference
from fastris.dispatch import resolve
from fastris.ops.checks import check_is_tensor, check_shape

TILE = 2**16
"""Pixels of one sample's maps that are made at a time: a quarter of a MiB in float32, which a core's cache holds."""


def upsampled_bce_with_logits(logits: Tensor, target: Tensor, *, pos_weight: float = 1.0, impl: str = "auto") -> Tensor:
    """The sum, over Q maps, of the mean binary cross-entropy at the masks' size, a scalar.

    Args:
        logits: (B, Q, h, w) of any size, upsampled (or sampled down) bilinearly to the masks' size, as
            ``F.interpolate(..., mode="bilinear", align_corners=False)`` does.
        target: (B, 1, H, W), the masks that all Q maps share, floating point of any dtype, hard or soft, in [0, 1].
        pos_weight: factor of the loss on the object, a number.
        impl: ``"auto"``, ``"reference"``, ``"torch"`` or ``"triton"``; see :mod:`fastris.dispatch`.

    Computed and returned in float32, or float64 for float64 logits, under autocast, too. Where a gradient is wanted it
    is computed with the loss and kept, (B, Q, h, w), and nothing of size H x W is; the masks are data and get none. It
    can be differentiated once, and is the same at every run. Any two sizes are ``triton``'s, too, in logits up to
    float32. Under ``torch.compile`` the published formula runs in place of ``torch``'s, as the compiler fuses it by
    itself. The loss of an empty batch is NaN, as everywhere in PyTorch.

    Raises ValueError for a wrong shape or tensors on different devices, TypeError for dtypes that do not fit and for a
    ``pos_weight`` that is no finite number; RuntimeError when ``impl="triton"`` cannot run here.

    Source: arXiv 2301.06429, released code; :func:`fastris.reference.upsampled_bce_with_logits`.
    """
    _check(logits, target, pos_weight)
    target = target.detach()
    path = resolve("upsampled_bce_with_logits", logits.device, logits.dtype, impl, len(logits))
    if path == "reference" or (path == "torch" and torch.compiler.is_compiling()):
        return reference.upsampled_bce_with_logits(logits, target, pos_weight=pos_weight)
    wide = torch.promote_types(logits.dtype, torch.float32)
    wanted = torch.is_grad_enabled() and logits.requires_grad
    with torch.autocast(logits.device.type, enabled=False):
        if path == "triton" and len(logits):
            from fastris.kernels.upsampled_bce import upsampled_bce

            return upsampled_bce(logits, target, float(pos_weight), wanted)
        return _StreamedLoss.apply(logits.to(wide), target, pos_weight, wanted)


def _check(logits: Tensor, target: Tensor, pos_weight: float) -> None:
    name = "upsampled_bce_with_logits"
    for field, tensor in {"logits": logits, "target": target}.items():
        check_is_tensor(name, field, tensor)
        if not tensor.is_floating_point():
            raise TypeError(f"{name}: {field} must be floating point, got {tensor.dtype}; convert it with .float()")
    check_shape(name, "logits", logits, ("B", "Q", "h", "w"))
    check_shape(name, "target", target, (len(logits), 1, "H", "W"))
    if 0 in logits.shape[1:]:
        raise ValueError(f"{name}: logits must have maps and pixels, got {tuple(logits.shape)}")
    if 0 in target.shape[2:]:
        raise ValueError(f"{name}: target must have pixels, got {tuple(target.shape)}")
    if target.device != logits.device:
        raise ValueError(
            f"{name}: target is on {target.device} but logits is on {logits.device}; move them to one device"
        )
    if not isinstance(pos_weight, int | float) or not math.isfinite(pos_weight):
        raise TypeError(f"{name}: pos_weight must be a finite number, got {pos_weight!r}")


class _Samples(NamedTuple):
    """One axis of bilinear upsampling: each of n outputs lies between two of m inputs.

    ``low`` and ``high`` (n,) are their positions, ``share`` (n,) is the higher one's.
    """

    low: Tensor
    high: Tensor
    share: Tensor

    def between(self, x: Tensor, dim: int) -> Tensor:
        """``x`` upsampled along its dimension ``dim``, -1 or -2."""
        share = self.share if dim == -1 else self.share[:, None]
        return torch.lerp(x.index_select(dim, self.low), x.index_select(dim, self.high), share)

    def matrix(self, inputs: int) -> Tensor:
        """(n, m), whose product with the inputs gives the outputs."""
        rows = torch.arange(len(self.low), device=self.low.device)
        matrix = self.share.new_zeros(len(self.low), inputs)
        matrix[rows, self.low] = 1 - self.share
        matrix[rows, self.high] += self.share  # at the border both are one input
        return matrix


def _samples(inputs: int, outputs: int, like: Tensor) -> _Samples:
    """As PyTorch places them with ``align_corners=False``, on the device and in the dtype of ``like``."""
    centre = torch.arange(outputs, dtype=torch.float64, device=like.device) + 0.5
    place = (centre * (inputs / outputs) - 0.5).clamp_min(0)
    low = place.floor().long().clamp_max(inputs - 1)
    return _Samples(low, (low + 1).clamp_max(inputs - 1), (place - low).to(like.dtype))


def _low(output: int, inputs: int, outputs: int) -> int:
    """``low`` of :func:`_samples` for one output, as a number that no device has to be asked for."""
    return min(int(max((output + 0.5) * (inputs / outputs) - 0.5, 0)), inputs - 1)


class _StreamedLoss(torch.autograd.Function):
    """The loss of logits (B, Q, h, w) and masks (B, 1, H, W); its gradient is made with it where it is ``wanted``."""

    @staticmethod
    def forward(ctx, logits: Tensor, target: Tensor, pos_weight: float, wanted: bool) -> Tensor:
        height, width = target.shape[2:]
        columns = _samples(logits.shape[3], width, logits)
        back = columns.matrix(logits.shape[3]) if wanted else None  # [W, w]
        on_cpu = logits.device.type == "cpu"
        groups = 1 if on_cpu else max(1, len(logits))  # of samples: one at a time where a cache has to hold them
        losses, gradients = [], []
        for maps, mask in zip(logits.split(groups), target.split(groups), strict=True):
            wide = columns.between(maps, dim=-1)  # [b, Q, h, W]
            loss, gradient = _group_loss(wide, mask.to(logits.dtype), pos_weight, wanted, TILE if on_cpu else 64 * TILE)
            losses.append(loss)
            if back is not None:
                gradients.append(gradient @ back)
        scale = 1 / max(1, len(logits) * height * width)
        if wanted:
            ctx.save_for_backward(torch.cat(gradients) * scale)
        return torch.stack(losses).sum() * scale if len(logits) else logits.new_full((), math.nan)

    @staticmethod
    @once_differentiable
    def backward(ctx, upstream: Tensor):
        (gradient,) = ctx.saved_tensors
        return gradient * upstream, None, None, None


def _group_loss(wide: Tensor, mask: Tensor, pos_weight: float, wanted: bool, pixels: int) -> tuple[Tensor, Tensor]:
    """The summed loss of maps (b, Q, h, W) and masks (b, 1, H, W), and its gradient by the maps, empty if not wanted.

    Works on so many rows of all maps at a time that they have at most this number of ``pixels``.
    """
    inputs, outputs = wide.shape[2], mask.shape[2]
    rows = _samples(inputs, outputs, wide)
    down = rows.matrix(inputs).t()  # [h, H]
    step = max(1, pixels // max(1, wide.shape[0] * wide.shape[1] * wide.shape[3]))
    total, gradient = wide.new_zeros(()), torch.zeros_like(wide if wanted else wide[:0])
    for start in range(0, outputs, step):
        stop = min(start + step, outputs)
        full = _Samples(*(each[start:stop] for each in rows)).between(wide, dim=-2)  # [b, Q, step, W]
        inside = mask[:, :, start:stop]
        weight = torch.add(1, inside, alpha=pos_weight - 1)
        total = total + ((1 - inside)[:, 0] * full.sum(1) - weight[:, 0] * F.logsigmoid(full).sum(1)).sum()
        if wanted:
            slope = full.sigmoid_().mul_(weight).sub_(inside, alpha=pos_weight)
            first, last = _low(start, inputs, outputs), min(_low(stop - 1, inputs, outputs) + 1, inputs - 1)
            gradient[:, :, first : last + 1] += down[first : last + 1, start:stop] @ slope
    return total, gradient
