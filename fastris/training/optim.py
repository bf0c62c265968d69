"""The published optimisation recipe: two learning rates, one step down, and mixed precision where it can run."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from typing import Any

from torch.optim import Adam, Optimizer
from torch.optim.lr_scheduler import LambdaLR

from fastris.models.base import HEAD, ReferringModel


def parameter_groups(model: ReferringModel, base_lr: float, lr_multi: float) -> list[dict[str, Any]]:
    """The model's groups by "name": its head at `base_lr`, what starts from weights at `base_lr * lr_multi`."""
    return [
        {"name": name, "params": parameters, "lr": base_lr if name == HEAD else base_lr * lr_multi}
        for name, parameters in model.parameter_groups().items()
    ]


def build_optimizer(
    model: ReferringModel, base_lr: float, lr_multi: float, weight_decay: float = 0.0, fused: bool = False
) -> Adam:
    """Adam with PyTorch's default betas over :func:`parameter_groups`, as published.

    `fused`: update all weights in one kernel; the same numbers up to rounding, without temporary copies of the weights.
    """
    groups = parameter_groups(model, base_lr, lr_multi)
    return Adam(groups, lr=base_lr, weight_decay=weight_decay, fused=True if fused else None)


def build_scheduler(
    optimizer: Optimizer,
    milestones: Sequence[int],
    lr_decay: float,
    *,
    first_epoch_factor: float = 1.0,
) -> LambdaLR:
    """Learning rates per epoch: times `lr_decay` from each of the epochs in `milestones` on (counted from 0).

    Call `step()` after each epoch. The published code hands the encoders' rate to its optimizer as `initial_lr`, which
    only the scheduler reads, so that they train the whole first epoch at the full `base_lr`.
    `first_epoch_factor = 1 / lr_multi` does the same for all groups but the head; the default 1 does what the paper
    says.
    """
    steps = sorted(milestones)

    def head(epoch: int) -> float:
        return lr_decay ** bisect_right(steps, epoch)

    def others(epoch: int) -> float:
        return head(epoch) * (first_epoch_factor if epoch == 0 else 1.0)

    return LambdaLR(optimizer, [head if group["name"] == HEAD else others for group in optimizer.param_groups])
