"""The published optimisation recipe: two learning rates, one step down, and mixed precision where it can run."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from typing import Any

from torch import nn
from torch.optim import Adam, Optimizer
from torch.optim.lr_scheduler import LambdaLR


def parameter_groups(model: nn.Module, base_lr: float, lr_multi: float) -> list[dict[str, Any]]:
    """Two groups: the CLIP encoders at `base_lr * lr_multi`, everything else at `base_lr`.

    As published, the first holds the parameters named `backbone...`, except the positional embeddings, which belong to
    the second. Each group has its "name", "backbone" or "head".
    """
    backbone: list[nn.Parameter] = []
    head: list[nn.Parameter] = []
    for name, parameter in model.named_parameters():
        is_backbone = name.startswith("backbone") and "positional_embedding" not in name
        (backbone if is_backbone else head).append(parameter)
    return [
        {"name": "backbone", "params": backbone, "lr": base_lr * lr_multi},
        {"name": "head", "params": head, "lr": base_lr},
    ]


def build_optimizer(
    model: nn.Module, base_lr: float, lr_multi: float, weight_decay: float = 0.0, fused: bool = False
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
    first_epoch_backbone_factor: float = 1.0,
) -> LambdaLR:
    """Learning rates per epoch: times `lr_decay` from each of the epochs in `milestones` on (counted from 0).

    Call `step()` after each epoch. The published code hands the backbone's rate to its optimizer as `initial_lr`, which
    only the scheduler reads, so that the backbone trains the whole first epoch at the full `base_lr`.
    `first_epoch_backbone_factor = 1 / lr_multi` does the same; the default 1 does what the paper says.
    """
    steps = sorted(milestones)

    def head(epoch: int) -> float:
        return lr_decay ** bisect_right(steps, epoch)

    def backbone(epoch: int) -> float:
        return head(epoch) * (first_epoch_backbone_factor if epoch == 0 else 1.0)

    by_name = {"backbone": backbone, "head": head}
    return LambdaLR(optimizer, [by_name[group["name"]] for group in optimizer.param_groups])
