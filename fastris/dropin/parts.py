"""What a part of CRIS is to the drop-in, and what its families share when they look for theirs."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

# How far, of the scale, two float64 results may lie apart; where tables of positions enter, those are float32 numbers.
ROUNDING = 1e-10
FLOAT32_TABLES = 1e-6


@dataclass(frozen=True)
class Part:
    """A part of CRIS that a module has the looks of: how we would run it, and what its proof needs.

    ``forward(module, *inputs)`` is ours; ``inputs(module)`` makes small random float64 inputs, of which those at the
    places ``optional`` may be None; ``takes(*inputs)`` says of a call whether it is of the kind that the proof covers;
    ``obstacle`` is what rules the module out before any proof; ``tolerance`` is what the proof allows for rounding.
    """

    name: str
    forward: Callable
    inputs: Callable[[Any], tuple]
    takes: Callable[..., bool]
    obstacle: str | None = None
    optional: tuple[int, ...] = ()
    tolerance: float = ROUNDING


BLOCK = (nn.Conv2d, nn.BatchNorm2d, nn.ReLU)


def normal(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64)


def is_chain(module: Any, kinds: tuple[type, ...]) -> bool:
    """A Sequential of exactly these kinds, where SyncBatchNorm may stand for BatchNorm2d."""
    if not isinstance(module, nn.Sequential) or len(module) != len(kinds):
        return False
    allowed = [(kind, nn.SyncBatchNorm) if kind is nn.BatchNorm2d else kind for kind in kinds]
    return all(isinstance(child, kind) for child, kind in zip(module, allowed, strict=True))


def arguments(module: nn.Module) -> list[inspect.Parameter]:
    """What the module's own forward takes by position, without ``self``; empty where that cannot be seen."""
    try:
        parameters = list(inspect.signature(type(module).forward).parameters.values())[1:]
    except (TypeError, ValueError):
        return []
    return [p for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]


def at(module: nn.Module, path: str) -> Any:
    """The descendant at a dotted path, as ``named_modules`` spells it."""
    for name in path.split("."):
        module = getattr(module, name)
    return module


def leaves(module: nn.Module, within: str = "") -> list[tuple[str, nn.Module]]:
    """(path, module) of what does the work, in order of registration: attentions as a whole, else what has no child."""
    found = []
    for name, child in module.named_children():
        inside = isinstance(child, nn.MultiheadAttention) or next(child.children(), None) is None
        found += [(within + name, child)] if inside else leaves(child, f"{within}{name}.")
    return found


def owns_parameters(module: nn.Module, *others: nn.Module) -> bool:
    """Whether ``module`` has parameters or buffers that none of ``others`` has."""
    known = {id(t) for other in others for t in (*other.parameters(), *other.buffers())}
    return any(id(t) not in known for t in (*module.parameters(), *module.buffers()))


def is_wrapper(module: nn.Module) -> bool:
    """Whether all that ``module`` has is in one child, which is then the one to look at."""
    return sum(next(child.parameters(), None) is not None for child in module.children()) < 2
