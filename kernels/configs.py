"""Static launch tables: which tile sizes a kernel uses on which card.

Cards differ, for our purposes, in the shared memory that one block may use. Each kernel file holds a table from the
class of the card to its configuration; there is no autotuning at run time, so a new sentence length never stalls
training. The compile gate (``python -m fastris.kernels.gate``) proves that every entry fits every card of its class.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch

# Shared memory that one block may opt in to, in bytes.
SHARED_LIMIT = {80: 166_912, 86: 101_376, 89: 101_376, 90: 232_448, 100: 232_448, 103: 232_448, 120: 101_376}
HIP_SHARED_LIMIT = 65_536


@dataclass(frozen=True)
class Config:
    """Tile sizes (constexpr arguments by name) and launch options of one kernel."""

    blocks: tuple[tuple[str, int], ...]
    num_warps: int = 4
    num_stages: int = 2

    @property
    def kwargs(self) -> dict[str, int]:
        """Keyword arguments for ``kernel[grid](...)``."""
        return {**dict(self.blocks), "num_warps": self.num_warps, "num_stages": self.num_stages}


def shared_class(limit: int) -> str:
    """``large`` (A100, H100, B200), ``small`` (consumer cards from Ampere on) or ``tiny`` (64 KiB: AMD)."""
    if limit >= 160_000:
        return "large"
    return "small" if limit >= 99_000 else "tiny"


@functools.cache
def _device_class(index: int) -> str:
    if torch.version.hip is not None:
        return "tiny"
    return shared_class(torch.cuda.get_device_properties(index).shared_memory_per_block_optin)


def device_class(device: torch.device) -> str:
    """The shared-memory class of ``device``; under the interpreter, the class of consumer cards."""
    if device.type != "cuda":
        return "small"
    return _device_class(device.index if device.index is not None else torch.cuda.current_device())
