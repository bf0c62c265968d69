"""An upsampling convolution and the BatchNorm behind it, whose batch statistics the convolution's kernel gives.

A BatchNorm in training reads its input twice: for the statistics, and to apply them. The kernel that writes the
convolution's answer has every value in registers and sums them there, so that the first of the two passes disappears.
The gradient is the published one, through the statistics too, and nothing more is kept for it: the norm's input and two
numbers a channel. The other pass disappears where a text-to-pixel operator reads the map: its kernels apply norm and
ReLU themselves, and the norm's input is the only map that is written, read and kept.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from fastris.nn.plain_modules import is_plainly
from fastris.ops.similarity import applies_norm
from fastris.ops.upsample_conv import statistics_come_free, upsample2x_conv3x3, upsample2x_conv3x3_stats
from fastris.reference import PixelNorm


def upsampled_to_be_scored(x: Tensor, block: Any, operator: str, columns: int) -> tuple[Tensor, PixelNorm | None]:
    """``relu(norm(conv3x3(up2(x))))`` for ``operator``, which scores its pixels: (features, norm), its arguments.

    ``block`` is (3x3 convolution, norm, activation); a sample's text kernels have ``columns`` taps together. Where the
    kernels do not run or do not apply norms, under ``torch.compile``, and for another activation or norm, or one with
    hooks, they are called, and no norm is left to apply.
    """
    convolution, norm, activation = block
    called = torch.compiler.is_compiling() or not (is_plainly(nn.BatchNorm2d, norm) and is_plainly(nn.ReLU, activation))
    if called or not x.shape[0] or not applies_norm(operator, x, convolution.weight.shape[0], columns):
        return activation(upsampled_and_normed(x, convolution, norm)), None
    if not norm.training and norm.running_mean is not None and norm.running_var is not None:
        output = upsample2x_conv3x3(x, convolution.weight, convolution.bias)
        return output, PixelNorm(norm.running_mean, norm.running_var, norm.weight, norm.bias, norm.eps, False)
    if not (_normalises_by_the_batch(norm) and statistics_come_free(x)):
        return activation(upsampled_and_normed(x, convolution, norm)), None
    output, mean, var = _with_statistics(x, convolution, norm)
    return output, PixelNorm(mean, var, norm.weight, norm.bias, norm.eps, True)


def upsampled_and_normed(x: Tensor, convolution: Any, norm: Any) -> Tensor:
    """``norm(conv3x3(up2(x)))`` for a 3x3 convolution and the norm behind it: (B, C, H, W) -> (B, C', 2H, 2W).

    Values, gradients and running statistics are those of calling ``norm``. It is called where the kernels do not run,
    under ``torch.compile``, and where it is more, or less, than a BatchNorm2d of this batch alone: in eval mode with
    running statistics, as SyncBatchNorm, with hooks, with parameters that are not float32.
    """
    if not (_normalises_by_the_batch(norm) and x.shape[0] and statistics_come_free(x)):
        return norm(upsample2x_conv3x3(x, convolution.weight, convolution.bias))
    output, mean, var = _with_statistics(x, convolution, norm)
    return _Normalised.apply(output, norm.weight, norm.bias, mean, var, norm.eps)


def _with_statistics(x: Tensor, convolution: Any, norm: nn.BatchNorm2d) -> tuple[Tensor, Tensor, Tensor]:
    """The convolution's output, its mean and variance, which the norm has seen."""
    output, mean, var = upsample2x_conv3x3_stats(x, convolution.weight, convolution.bias)
    mean, var = mean.detach(), var.detach()
    _track(norm, mean, var, output.numel() // output.shape[1])
    return output, mean, var


def _normalises_by_the_batch(norm: Any) -> bool:
    if torch.compiler.is_compiling() or not is_plainly(nn.BatchNorm2d, norm):
        return False
    tensors = (norm.weight, norm.bias, norm.running_mean, norm.running_var)
    if any(tensor is not None and tensor.dtype is not torch.float32 for tensor in tensors):
        return False
    return norm.training or (norm.running_mean is None and norm.running_var is None)


@torch.no_grad()
def _track(norm: nn.BatchNorm2d, mean: Tensor, var: Tensor, count: int) -> None:
    """Move the running statistics as :meth:`nn.BatchNorm2d.forward` does, the variance without bias."""
    if not (norm.training and norm.track_running_stats):
        return
    factor = norm.momentum or 0.0
    if norm.num_batches_tracked is not None:
        norm.num_batches_tracked.add_(1)
        if norm.momentum is None:
            factor = 1.0 / float(norm.num_batches_tracked)
    if norm.running_mean is not None:
        norm.running_mean.mul_(1 - factor).add_(mean, alpha=factor)
    if norm.running_var is not None:
        norm.running_var.mul_(1 - factor).add_(var, alpha=factor * count / (count - 1))


class _Normalised(torch.autograd.Function):
    """A BatchNorm by given statistics of the very tensor that it normalises: its gradient goes through them."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor | None, bias: Tensor | None, mean: Tensor, var: Tensor, eps: float
    ) -> Tensor:
        ctx.save_for_backward(x, weight, mean, torch.rsqrt(var + eps))
        ctx.eps = eps
        return torch.native_batch_norm(x, weight, bias, mean, var, False, 0.0, eps)[0]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, mean, deviation = ctx.saved_tensors
        wanted = list(ctx.needs_input_grad[:3])
        gradients = torch.ops.aten.native_batch_norm_backward(
            gradient, x, weight, None, None, mean, deviation, True, ctx.eps, wanted
        )
        return *(found if want else None for found, want in zip(gradients, wanted, strict=True)), None, None, None
