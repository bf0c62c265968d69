"""BatchNorm over a batch that is split among processes, with the gradients of one process that holds all of it."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm


def synchronise_batchnorm(model: nn.Module, device: torch.device) -> None:
    """Replace every BatchNorm inside `model`, in place: on a GPU by PyTorch's SyncBatchNorm, which needs one, and on a
    CPU by :class:`CPUSyncBatchNorm`. Parameters, buffers and their names stay the same."""
    for name, child in model.named_children():
        if isinstance(child, _BatchNorm) and not isinstance(child, nn.SyncBatchNorm | CPUSyncBatchNorm):
            setattr(model, name, _converted(child, nn.SyncBatchNorm if device.type == "cuda" else CPUSyncBatchNorm))
        else:
            synchronise_batchnorm(child, device)


class CPUSyncBatchNorm(_BatchNorm):
    """`nn.SyncBatchNorm` for CPU tensors, which PyTorch lacks: ``forward(x)`` maps (B, C, ...) to (B, C, ...).

    Each process contributes its count, mean and variance; those of the batch are computed from them as

        mean = sum_r (n_r / n) mean_r        var = sum_r (n_r / n) (var_r + (mean_r - mean)^2)

    which loses no digits where a mean is large. It is meant for gloo, and for tests that several processes train as one
    does, not for speed. bfloat16 and float16 are computed in float32.
    """

    def _check_input_dim(self, input: Tensor) -> None:
        if input.ndim < 2:
            raise ValueError(f"BatchNorm expects (B, C, ...), got {tuple(input.shape)}")

    def forward(self, input: Tensor) -> Tensor:
        self._check_input_dim(input)
        if not self.training or not dist.is_initialized():
            return super().forward(input)
        x = input.float() if input.dtype in (torch.bfloat16, torch.float16) else input
        mean, var, count = _batch_statistics(x)
        if count < 2:
            raise ValueError(
                f"Expected more than 1 value per channel when training, got {count:.0f} over all processes"
            )
        self._track(mean.detach(), var.detach() * count / (count - 1))
        shape = (1, -1, *[1] * (x.ndim - 2))
        scale = torch.rsqrt(var + self.eps)
        if self.affine:
            scale = scale * self.weight.to(x.dtype)
        y = (x - mean.view(shape)) * scale.view(shape)
        if self.affine:
            y = y + self.bias.to(x.dtype).view(shape)
        return y.to(input.dtype)

    def _track(self, mean: Tensor, unbiased: Tensor) -> None:
        if not self.track_running_stats or self.running_mean is None or self.running_var is None:
            return
        assert self.num_batches_tracked is not None
        self.num_batches_tracked.add_(1)
        momentum = 1 / float(self.num_batches_tracked) if self.momentum is None else self.momentum
        self.running_mean.lerp_(mean.to(self.running_mean.dtype), momentum)
        self.running_var.lerp_(unbiased.to(self.running_var.dtype), momentum)


def _batch_statistics(x: Tensor) -> tuple[Tensor, Tensor, float]:
    """Mean (C,) and biased variance (C,) over all processes' x (B, C, ...), differentiable, and values per channel."""
    dims = [dim for dim in range(x.ndim) if dim != 1]
    count = x.numel() // x.shape[1]
    own = torch.cat([x.new_tensor([count]), x.mean(dims), x.var(dims, unbiased=False)])
    rows = [own if number == dist.get_rank() else torch.zeros_like(own) for number in range(dist.get_world_size())]
    table = _SumOverProcesses.apply(torch.stack(rows))
    counts, means, variances = table.split([1, x.shape[1], x.shape[1]], dim=1)
    total = counts.detach().sum()
    weights = counts.detach() / total
    mean = (weights * means).sum(0)
    var = (weights * (variances + (means - mean).square())).sum(0)
    return mean, var, float(total)


class _SumOverProcesses(torch.autograd.Function):
    """The sum of all processes' tensors. Every process's loss depends on it, so the gradient is a sum, too."""

    @staticmethod
    def forward(ctx: object, x: Tensor) -> Tensor:
        total = x.clone()
        dist.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx: object, *gradients: Tensor) -> Tensor:
        total = gradients[0].contiguous().clone()
        dist.all_reduce(total)
        return total


def _converted(norm: _BatchNorm, kind: type[_BatchNorm]) -> _BatchNorm:
    new = kind(norm.num_features, norm.eps, norm.momentum, norm.affine, norm.track_running_stats)
    new.weight, new.bias = norm.weight, norm.bias
    for name, buffer in norm.named_buffers(recurse=False):
        setattr(new, name, buffer)
    return new.train(norm.training)
