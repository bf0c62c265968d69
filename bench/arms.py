"""What is compared: every arm runs the same modules, by one path of fastris and perhaps through a compiler."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import nn

from fastris.dispatch import triton_obstacle, use_impl


@dataclass(frozen=True)
class Arm:
    """One way to run every case.

    Attributes:
        name: as on the command line and in the tables.
        impl: the path that the operators take, see :func:`fastris.use_impl`.
        prepare: what is done to a module before it runs, such as compiling it.
    """

    name: str
    impl: str
    prepare: Callable[[nn.Module], nn.Module] = lambda module: module

    @contextmanager
    def active(self) -> Iterator[None]:
        """Within this block fastris takes this arm's path."""
        with use_impl(self.impl):
            yield

    def obstacle(self, device: torch.device, dtype: torch.dtype) -> str | None:
        """Why the arm cannot run on ``device`` in ``dtype``, or None."""
        return triton_obstacle(device, dtype) if self.impl == "triton" else None


BASELINE = "reference"
"""The arm that all others are compared with: the published formulas, operation by operation."""

ARMS = {arm.name: arm for arm in (Arm(BASELINE, "reference"), Arm("torch", "torch"), Arm("triton", "triton"))}


def choose_arms(names: tuple[str, ...], device: torch.device, dtype: torch.dtype) -> list[Arm]:
    """The arms called ``names``, with the baseline first; for no names, all that run on ``device`` in ``dtype``.

    Raises ValueError for a name that is unknown or that cannot run, with the ones that can.
    """
    obstacles = {name: arm.obstacle(device, dtype) for name, arm in ARMS.items()}
    usable = [name for name, obstacle in obstacles.items() if obstacle is None]
    for name in names:
        if name not in ARMS:
            raise ValueError(f"there is no arm {name!r}; the arms are {', '.join(ARMS)}")
        if obstacles[name]:
            raise ValueError(f"arm {name} cannot run: {obstacles[name]}. Here these can: {', '.join(usable)}")
    return [ARMS[name] for name in usable if not names or name in names or name == BASELINE]
