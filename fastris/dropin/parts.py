"""The description of a candidate for replacement, and the helpers of the functions that look for candidates."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

# Largest difference of two float64 results, as a fraction of their scale; the second where float32 tables enter.
ROUNDING = 1e-10
FLOAT32_TABLES = 1e-6


@dataclass(frozen=True)
class Part:
    """A part of a system that a module may be: the forward that would replace its own, and what the proof needs.

    Attributes:
        name: of the part, for the report.
        forward: fastris's forward, ``forward(module, *inputs)``.
        inputs: ``inputs(module)`` makes small random float64 inputs.
        takes: ``takes(*inputs)`` tells whether a call is of the kind that the proof covers.
        obstacle: why the module cannot be replaced, if that is known without a proof.
        optional: the positions of inputs that may be None.
        tolerance: the rounding that the proof allows, as a fraction of the scale.
        of: the system's title, which find.py fills in.
    """

    name: str
    forward: Callable
    inputs: Callable[[Any], tuple]
    takes: Callable[..., bool]
    obstacle: str | None = None
    optional: tuple[int, ...] = ()
    tolerance: float = ROUNDING
    of: str = ""


def _nothing(module: nn.Module) -> str | None:
    return None


@dataclass(frozen=True)
class DropIn:
    """What a system offers to strangers' models.

    ``by_name`` holds (attributes, find): ``find`` is asked of a module that has all of the attributes; the first one
    that gives parts, likeliest first, counts. Modules without such names are shown to each of ``by_make``, which gives
    nothing for all that is unlike. ``near`` says of a module, in words, what it lacks to be looked at; None of all
    that is no relation.
    """

    by_name: tuple[tuple[tuple[str, ...], Callable[[Any], Sequence[Part]]], ...] = ()
    by_make: tuple[Callable[[nn.Module], Sequence[Part]], ...] = ()
    near: Callable[[nn.Module], str | None] = _nothing


BLOCK = (nn.Conv2d, nn.BatchNorm2d, nn.ReLU)


def normal(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64)


def is_chain(module: Any, kinds: tuple[type, ...]) -> bool:
    """Whether it is a Sequential of exactly these classes; SyncBatchNorm counts as BatchNorm2d."""
    if not isinstance(module, nn.Sequential) or len(module) != len(kinds):
        return False
    allowed = [(kind, nn.SyncBatchNorm) if kind is nn.BatchNorm2d else kind for kind in kinds]
    return all(isinstance(child, kind) for child, kind in zip(module, allowed, strict=True))


def arguments(module: nn.Module) -> list[inspect.Parameter]:
    """The positional parameters of the module's own forward, without ``self``; [] where they cannot be inspected."""
    try:
        parameters = list(inspect.signature(type(module).forward).parameters.values())[1:]
    except (TypeError, ValueError):
        return []
    return [p for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]


def at(module: nn.Module, path: str) -> Any:
    """The submodule at a dotted path, as ``named_modules`` gives it."""
    for name in path.split("."):
        module = getattr(module, name)
    return module


def leaves(module: nn.Module, within: str = "") -> list[tuple[str, nn.Module]]:
    """(path, module) of all submodules without children, in order of registration; an attention counts as one."""
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
    """Whether at most one child of ``module`` has parameters; that child is then the one to look at."""
    return sum(next(child.parameters(), None) is not None for child in module.children()) < 2
