"""An arm's numbers are held against float64 before its time counts: outputs, BatchNorm statistics and all gradients.

One operator is held to the rule of ``fastris/testing.py``, in the dtype that is timed. A composition of operators and
ReLUs cannot be: where the input of a ReLU is 1e-8, rounding decides whether its gradient is there, so that a few
gradients, the published formula's own too, are off by 1e-3 of their scale. A composition is therefore held twice:

- in float64, every tensor to 1e-10 of its scale (compiled: 1e-6), where the arm can compute in float64;
- in the dtype that is timed, by the relative error of outputs, statistics and gradients as wholes, and in float32 by
  that of each tensor too, less strictly.

Checks run in IEEE float32; steps are timed in what is set, which the result file tells.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from fastris import testing as bounds
from fastris.runtime.float32_precision import ieee_float32

from ..cases.arms import ARMS, Arm
from ..cases.problem import LOW_PRECISION, Problem
from ..options import BASELINE

LOW_PRECISION_DRAWS = 8
"""Random upstream gradients whose errors are pooled in low precision, as in ``fastris/testing.py``."""

EXACT = 1e-10
"""Largest error of a composition in float64, as a fraction of the tensor's scale."""

EXACT_COMPILED = 1e-6
"""The same of a compiled arm: a compiler computes float32 tables, such as positions, with sines of its own."""

NOTHING = 1e-9
"""A gradient below this fraction of the largest one is zero but for rounding; it is held to the largest one's scale."""

COMPOSED_FACTOR = 1.5
COMPOSED_FLOAT32 = {"output": 1e-5, "statistic": 1e-5, "gradient": 2e-3}
"""A composition's relative error may be this factor times the published formula's in the same dtype, plus one rounding
in low precision or these in float32. The factor is not 1.25 because which ReLUs tip over is luck on both sides."""

COMPOSED_EACH = 2e-2
"""Largest relative error of each of a composition's tensors in float32; a few tipped ReLUs make 1e-3."""


class WrongNumbersError(Exception):
    """An arm does not compute what the published formula does; the message says where and by how much."""


@dataclass(frozen=True)
class Checked:
    """A passed check: how many tensors were compared, on what, and the largest error found.

    ``error`` is the largest error as a fraction of the scale of the tensor ``where`` it was found, in the timed dtype.
    """

    tensors: int
    float64_too: bool
    error: float
    where: str


class Checker:
    """Holds arms to the float64 result of one problem. ``problem`` is on the device and in the dtype that is timed."""

    def __init__(self, problem: Problem, composed: bool):
        self.problem = problem
        self.composed = composed
        self._draws = LOW_PRECISION_DRAWS if problem.dtype in LOW_PRECISION else 1

    @cached_property
    def truth(self) -> dict[str, Tensor]:
        """The published formula in float64, on the numbers that the arms get."""
        return self._results(ARMS[BASELINE], torch.float64)

    @cached_property
    def published(self) -> dict[str, Tensor]:
        """The published formula in the timed dtype."""
        return self._results(ARMS[BASELINE], self.problem.dtype)

    def check(self, arm: Arm) -> Checked:
        """Compare one arm. Raises WrongNumbersError, and whatever the arm itself raises."""
        results = self.published if arm.name == BASELINE else self._results(arm, self.problem.dtype)
        self._require_all(results)
        float64_too = self.composed and arm.obstacle(self.problem.device, torch.float64) is None
        if not self.composed:
            self._hold_each(results)
        else:
            if float64_too and arm.name != BASELINE:
                self._hold_exactly(self._results(arm, torch.float64), EXACT if arm.compile is None else EXACT_COMPILED)
            self._hold_as_wholes(results)
        error, where = max((self._error(results[name], name), name) for name in self.truth)
        return Checked(len(results), float64_too, error, where)

    def _results(self, arm: Arm, dtype: torch.dtype) -> dict[str, Tensor]:
        problem, runnable = arm.prepare(self.problem.to(self.problem.device, dtype, arm.tuned))
        with ieee_float32(), arm.active():
            return problem.results(self._draws, runnable)

    def _require_all(self, results: dict[str, Tensor]) -> None:
        for name, truth in self.truth.items():
            if name not in results:
                raise WrongNumbersError(f"{name} is missing")
            if results[name].shape != truth.shape:
                raise WrongNumbersError(f"{name} is {tuple(results[name].shape)}, must be {tuple(truth.shape)}")
            if not torch.isfinite(results[name]).all():
                raise WrongNumbersError(f"{name} is not finite")

    def _hold_each(self, results: dict[str, Tensor]) -> None:
        for name, truth in self.truth.items():
            value = results[name]
            if self.problem.dtype in LOW_PRECISION:  # the gradient of a float32 parameter is no better than its inputs
                value = value.to(self.problem.dtype)
            try:
                bounds.assert_same(value, self.published[name], truth, name)
            except AssertionError as error:
                raise WrongNumbersError(str(error)) from None

    def _hold_exactly(self, results: dict[str, Tensor], limit: float) -> None:
        self._require_all(results)
        for name in self.truth:
            if (error := self._error(results[name], name)) > limit:
                raise WrongNumbersError(
                    f"{name}: in float64 the error is {error:.1e} of its scale, at most {limit:.0e}"
                )

    def _hold_as_wholes(self, results: dict[str, Tensor]) -> None:
        low = self.problem.dtype in LOW_PRECISION
        for kind, float32_allowance in COMPOSED_FLOAT32.items():
            names = [name for name in self.truth if name.startswith(kind)]
            allowance = bounds.EPS[self.problem.dtype] if low else float32_allowance
            limit = COMPOSED_FACTOR * self._relative_error(self.published, names) + allowance
            if (error := self._relative_error(results, names)) > limit:
                raise WrongNumbersError(f"all {kind}s: relative error {error:.1e}, at most {limit:.1e}")
        for name in () if low else self.truth:
            error = (
                self._error(results[name], name) if self._is_nothing(name) else self._relative_error(results, [name])
            )
            if error > COMPOSED_EACH:
                raise WrongNumbersError(f"{name}: relative error {error:.1e}, at most {COMPOSED_EACH:.0e}")

    def _error(self, value: Tensor, name: str) -> float:
        """Largest error as a fraction of the tensor's scale."""
        truth = self.truth[name]
        scale = self._largest_gradient if self._is_nothing(name) else truth.abs().max()
        return float((value.double() - truth).abs().max() / scale.clamp_min(1e-300))

    def _is_nothing(self, name: str) -> bool:
        """Whether it is a gradient that is zero but for rounding, as that of a bias in front of a softmax."""
        return name.startswith("gradient") and bool(self.truth[name].abs().max() < NOTHING * self._largest_gradient)

    @cached_property
    def _largest_gradient(self) -> Tensor:
        return torch.stack([t.abs().max() for name, t in self.truth.items() if name.startswith("gradient")]).max()

    def _relative_error(self, results: dict[str, Tensor], names: Iterable[str]) -> float:
        """Norm of the error of these tensors together over the norm of their truth; 0 where that is 0."""
        error = norm = 0.0
        for name in names:
            truth = self.truth[name]
            error += float((results[name].double() - truth).square().sum())
            norm += float(truth.square().sum())
        return (error / norm) ** 0.5 if norm else 0.0
