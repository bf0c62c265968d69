"""Run a copy of somebody's module once, to learn what its attributes do not show.

What the run suggests is proved afterwards, like every other candidate.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from fastris.dropin.copies import Noise, random_copy, unnoticed

Watch = Callable[[nn.Module], None]


def observed(module: nn.Module, inputs: Callable[[Any], tuple], watch: Watch | None = None) -> tuple | None:
    """Run a float64 copy with random parameters and no hooks once in eval mode; returns (copy, inputs, output).

    ``watch`` may register hooks on the copy before it runs. None if it cannot be copied or does not run; the proof then
    reports the reason.
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
        except Exception:  # other people's code may raise anything
            return None
