"""Adam or AdamW with a learning rate for each of a model's parameter groups, and the published schedules of them."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

from torch import nn
from torch.optim import Adam, AdamW, Optimizer
from torch.optim.lr_scheduler import LambdaLR

from fastris.models.base import NO_DECAY


def build_optimizer(
    groups: Mapping[str, Sequence[nn.Parameter]],
    rates: Mapping[str, float],
    weight_decay: float = 0.0,
    fused: bool = False,
    optimizer: str = "adam",
) -> Optimizer:
    """Adam or AdamW with PyTorch's default betas, as published.

    Args:
        groups: a model's parameters by the name of their group; each group of the optimizer has it as its "name".
            Weight decay leaves those alone whose name ends with :data:`fastris.models.base.NO_DECAY`.
        rates: learning rate by the same names.
        fused: update all weights in one kernel; the same numbers up to rounding, without temporary copies of them.
        optimizer: "adam" or "adamw".

    Raises:
        ValueError: a group has no learning rate.
    """
    if missing := [name for name in groups if name not in rates]:
        raise ValueError(
            f"the model's parameter groups {', '.join(missing)} have no learning rate; there are rates for "
            f"{', '.join(rates)}"
        )
    named = [
        {
            "name": name,
            "params": list(group),
            "lr": rates[name],
            "weight_decay": 0.0 if name.endswith(NO_DECAY) else weight_decay,
        }
        for name, group in groups.items()
    ]
    kind = {"adam": Adam, "adamw": AdamW}[optimizer]
    return kind(named, weight_decay=weight_decay, fused=True if fused else None)


def build_scheduler(
    optimizer: Optimizer,
    milestones: Sequence[int],
    lr_decay: float,
    *,
    first_epoch: Mapping[str, float] | None = None,
) -> LambdaLR:
    """Learning rates per epoch: times `lr_decay` from each of the epochs in `milestones` on (counted from 0).

    Call `step()` after each epoch. `first_epoch`: factors on the rates of some groups, by name, in the first epoch
    only. The published code hands the CLIP encoders' rate to its optimizer as `initial_lr`, which only the scheduler
    reads, so that they train the whole first epoch at the full `base_lr`. A factor of `1 / lr_multi` does the same;
    without one the schedule does what the paper says.
    """
    steps, factors = sorted(milestones), dict(first_epoch or {})

    def rate(first: float) -> Callable[[int], float]:
        return lambda epoch: lr_decay ** bisect_right(steps, epoch) * (first if epoch == 0 else 1.0)

    return LambdaLR(optimizer, [rate(factors.get(group["name"], 1.0)) for group in optimizer.param_groups])


def build_poly_scheduler(optimizer: Optimizer, steps: int, power: float = 0.9) -> LambdaLR:
    """Learning rates per step: times (1 - step / `steps`)^`power`, and 0 from `steps` on. Call `step()` after each."""
    return LambdaLR(optimizer, lambda step: max(0.0, 1 - step / steps) ** power)


class Schedule(Protocol):
    """What a run asks of its schedule: PyTorch's schedulers have it."""

    def step(self) -> None: ...

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state_dict: dict[str, Any]) -> None: ...


class CosineSchedule:
    """timm's cosine schedule with a warm-up from 0, by steps, with the interface of PyTorch's schedulers.

    Step n of `steps`, from 1, has the rate n / `warmup` of the highest until `warmup`, and then that of half a cosine,
    which would reach 0 one step after the last.

    Raises:
        RuntimeError: timm is not installed.
    """

    def __init__(self, optimizer: Optimizer, steps: int, warmup: int):
        try:
            from timm.scheduler import CosineLRScheduler
        except ImportError:
            raise RuntimeError(
                "schedule=cosine needs timm, which is not installed; run pip install timm, or give schedule=poly"
            ) from None
        self._rates: Any = CosineLRScheduler(optimizer, t_initial=steps + 1, warmup_t=warmup, t_in_epochs=False)
        self._done = 0
        self._rates.step_update(1)

    def step(self) -> None:
        """On to the rates of the next step."""
        self._done += 1
        self._rates.step_update(self._done + 1)

    def state_dict(self) -> dict[str, Any]:
        """How many steps are done; all else follows from the options."""
        return {"done": self._done}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from what :meth:`state_dict` returned."""
        self._done = int(state_dict["done"])
        self._rates.step_update(self._done + 1)
