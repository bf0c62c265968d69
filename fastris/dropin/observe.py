"""One look at a stranger's module at work, where its attributes do not say enough. Nothing is concluded from it alone:
what it suggests is put to the proof like everything else."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from fastris.dropin.copies import Noise, random_copy, unnoticed

Watch = Callable[[nn.Module], None]


def observed(module: nn.Module, inputs: Callable[[Any], tuple], watch: Watch | None = None) -> tuple | None:
    """(copy, inputs, answer): one run in eval mode of a deep copy in float64 with random parameters and no hooks.

    ``watch`` may hook the copy before it runs. None when it cannot be copied or does not run, whatever the reason: the
    proof will find the same and say it.
    """
    cpu = torch.device("cpu")
    with unnoticed(cpu), torch.enable_grad():
        torch.default_generator.manual_seed(0)
        try:
            copy = random_copy(module, Noise(torch.float64, cpu)).eval()
            given = inputs(copy)
            if watch:
                watch(copy)
            return copy, given, type(module).forward(copy, *given)
        except Exception:  # a stranger's code may raise anything
            return None
