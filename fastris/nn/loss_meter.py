"""The mean of one of a step's losses, for its log: counted on the device, and read once a step."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fastris.runtime.distributed import sum_over_processes


class LossMeter(nn.Module):
    """Adds up a loss over the parts of a step. In no state dict, and empty between steps."""

    sums: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("sums", torch.zeros(2), persistent=False)

    @torch.no_grad()
    def count(self, loss: Tensor) -> None:
        """One forward pass's loss, a scalar."""
        self.sums += torch.stack([loss, torch.ones_like(loss)]).to(self.sums.dtype)

    @torch.no_grad()
    def take(self) -> float:
        """The mean since the last call, over all processes; NaN where nothing was counted."""
        total, count = sum_over_processes(self.sums.double()).tolist()
        self.sums.zero_()
        return total / count if count else float("nan")
