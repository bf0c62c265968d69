"""Which paths the operators take in a run: found out before its first step, the same in all of its processes."""

from __future__ import annotations

from collections.abc import Iterable

import torch

from fastris import dispatch, preflight
from fastris.operators import OPERATORS
from fastris.runtime import distributed

Verdicts = dict[tuple[str, torch.dtype], preflight.Failure | None]


def agree_on_kernels(device: torch.device, dtypes: Iterable[torch.dtype]) -> None:
    """Prove the kernels that a run may use on ``device`` in ``dtypes``; what fails in one process is left by all.

    Every process of the run must call it. The main process says what is left, and why. At a first use in another dtype
    later on, each process proves for itself and waits for nobody.

    Raises RuntimeError, in all of them, where ``FASTRIS_IMPL=triton`` asks for kernels that failed.
    """
    own: Verdicts = {}
    with distributed.together():
        requested = dispatch.requested_impl()
        for dtype in dtypes if requested in ("auto", "triton") else ():
            obstacle = dispatch.unproved_obstacle(device, dtype)
            for name in (operator.name for operator in OPERATORS.values() if operator.kernels):
                if requested == "auto" and not obstacle and not dispatch.ever_pays(name, device, dtype):
                    continue
                failed = preflight.Failure(obstacle, "give all processes GPUs of one kind") if obstacle else None
                own[name, dtype] = failed or dispatch.prove(name, device, dtype)
    together = _agreed(distributed.gather(own))
    with distributed.together():
        for (name, dtype), failure in together.items():
            if failure is None or dispatch.unproved_obstacle(device, dtype):
                continue
            preflight.adopt(name, device, dtype, failure)
            dispatch.forget()
            if requested == "triton":
                dispatch.resolve(name, device, dtype)
            preflight.tell(name, device, dtype, failure)


def _agreed(by_process: list[Verdicts]) -> Verdicts:
    """For each the failure in the process of the lowest rank, which is named unless it is the main one; or None."""
    agreed: Verdicts = dict(by_process[0])
    for number, verdicts in enumerate(by_process[1:], 1):
        for key, failure in verdicts.items():
            if agreed.get(key) is None and failure is not None:
                agreed[key] = failure.in_process(number)
    return agreed
