"""A row of the table of what is measured."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from .arms import swapped
from .problem import Problem


class _Shapes(FakeTensorMode):
    """Tensors without numbers; modules that are copied from one another stay together in it."""

    def __deepcopy__(self, memo: dict[int, Any]) -> _Shapes:
        return self


@dataclass(frozen=True)
class Case:
    """One row of the table.

    Attributes:
        name: as on the command line; ``op`` names the group that it belongs to there.
        title: as in the tables, with whatever a reader has to know to compare.
        build: makes the :class:`Problem`, in float32 on the CPU, from ``sizes``.
        sizes: keyword arguments of ``build`` that are timed.
        published: makes the module that the reference arm runs from the case's, on the same parameters; where it is
            none, that arm runs the same module on the published formulas.
        small: what replaces some of them where a small copy will do: in quick checks.
        check: what replaces some of them when arms are checked, such as dropout, which no two arms draw alike.
        composed: whether it has ReLUs between its operators, which changes how arms are checked: see timing/check.py.
        check_small: whether arms are always checked on the small copy, because float64 would take too long.
        passes: what is timed of it, as in the tables; ``timed`` is its name in :data:`PASSES`.
        check_batch: on how many samples arms are checked at full size, if not on the batch of ``sizes``.
        compiles_long: whether quick runs leave compiled arms out unless they are asked for by name.
        least_batch: fewer samples than these cannot be trained, as one sample through a BatchNorm over the batch.
        targets: on a data-centre GPU in bfloat16, how many times faster than other arms the best of fastris has to be,
            by arm, and under ``share`` which part of its roofline it has to reach.
        goals: "device type/dtype" -> how many times faster than the baseline an arm has to be there.
    """

    name: str
    op: str
    title: str
    build: Callable[..., Problem]
    sizes: Mapping[str, Any]
    small: Mapping[str, Any]
    check: Mapping[str, Any] = field(default_factory=dict)
    published: Callable[[nn.Module], nn.Module] | None = None
    composed: bool = False
    check_small: bool = False
    passes: str = "forward + backward"
    timed: str = "both"
    check_batch: int | None = None
    compiles_long: bool = False
    least_batch: int = 1
    goals: Mapping[str, float] = field(default_factory=dict)
    targets: Mapping[str, float] = field(default_factory=dict)

    def at_batch(self, batch: int) -> Case:
        """The case for another batch, without its goals; arms are checked on as many samples as before, or fewer.

        Raises ValueError when the case cannot be trained on so few.
        """
        if batch < self.least_batch:
            raise ValueError(f"{self.name} needs a batch of at least {self.least_batch}, got {batch}")
        own = self.sizes["batch"]
        if batch == own:
            return self
        title = self.title.replace(f"B={own}", f"B={batch}")
        return replace(self, sizes={**self.sizes, "batch": batch}, check_batch=min(batch, own), title=title, goals={})

    def of_pass(self, name: str) -> Case:
        """The case for one of :data:`PASSES` alone, without its goals unless it is whole. ValueError where it has none.

        What only runs forward is whole with its forward pass.
        """
        if name == "both" or (self.passes, name) == ("forward", "forward"):
            return self
        if self.passes == "forward":
            raise ValueError(f"{self.name} has no {name} pass; choose passes=forward or passes=both")
        return replace(self, passes=f"{name} alone", timed=name, goals={}, targets={})

    @contextmanager
    def shapes_only(self) -> Iterator[Problem]:
        """The case without numbers and without dropout, for counting within this block."""
        with _Shapes(), swapped(nn.init, "trunc_normal_", lambda tensor, **_: tensor):  # PyTorch's reads a number
            yield self.build(**{**self.sizes, **self.check})

    def problem(self, seed: int = 0, **changes: Any) -> Problem:
        """The case at its sizes; the same numbers on every device and for every arm."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return replace(self.build(**{**self.sizes, **changes}), published=self.published)

    def check_problem(self, quick: bool) -> Problem:
        """What arms are checked on."""
        small = self.small if quick or self.check_small else {}
        batch = {} if self.check_batch is None else {"batch": self.check_batch}
        return self.problem(**{**batch, **small, **self.check})
