"""What a run does about a GPU's memory: recomputation where a model has it, and an error that says what to try next."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from fastris.training.gpu_settings import MemoryUse, what_next


def set_recompute(model: nn.Module, mode: str) -> None:
    """Have the model compute some of its activations again in backward, in place of keeping them. Changes no number.

    `mode`: "none", "pointwise" (what is cheap to compute again) or "stages" (whole stages: the least memory, about a
    seventh more time on a CPU).

    Raises:
        ValueError: the model does not offer it.
    """
    setter = getattr(model, "set_recompute", None)
    if setter is not None:
        setter(mode)
    elif mode != "none":
        raise ValueError(
            f"recompute={mode} needs a model with set_recompute, which {type(model).__name__} of this version has not; "
            "give recompute=none, and a smaller part of the batch instead (accumulate)"
        )


@contextmanager
def out_of_memory_explained(use: MemoryUse) -> Iterator[None]:
    """Within this block, PyTorch's out-of-memory error becomes a RuntimeError that says what to give next."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise RuntimeError(f"{_first_line(error)}. {what_next(use)}") from error


def _first_line(error: BaseException) -> str:
    """PyTorch's own message up to its advice about the allocator."""
    line = next(iter(str(error).strip().splitlines()), type(error).__name__)
    return line.split(" See documentation")[0].split(" If reserved but")[0].rstrip(". ")[:300]
