"""The few classes that choices are made for: batches in buckets, and dtypes with what their products are rounded to."""

from __future__ import annotations

import torch

SMALL, MIDDLE, LARGE = "batch <= 4", "batch <= 16", "batch > 16"
BUCKETS = {SMALL: 4, MIDDLE: 16, LARGE: 64}
"""Bucket -> the batch that it is measured at."""

PRECISIONS = {
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "float32": torch.float32,
    "float32 by TF32": torch.float32,
}
"""What a choice is made for -> its dtype. A file's names, too."""


def bucket_of(batch: int | None) -> str:
    """The bucket of a batch; None stands for many. Comparisons alone: torch.compile guards on the bucket only."""
    if batch is None:
        return LARGE
    if batch <= 4:
        return SMALL
    return MIDDLE if batch <= 16 else LARGE


def precision_of(dtype: torch.dtype) -> str:
    """The precision that products of ``dtype`` on CUDA are computed in now, as PyTorch's switches say."""
    if dtype is torch.float32:
        return "float32 by TF32" if _tf32_allowed() else "float32"
    return "bfloat16" if dtype is torch.bfloat16 else "float16"


def precisions_of(dtype: torch.dtype) -> list[str]:
    """Every precision that products of ``dtype`` may be computed in."""
    return [name for name, each in PRECISIONS.items() if each is dtype]


def _tf32_allowed() -> bool:
    """By PyTorch's new switch: reading the old one raises once the new one was written to."""
    setting = torch.backends.cuda.matmul.fp32_precision
    if setting == "none":  # as the general one says
        setting = torch.backends.fp32_precision  # type: ignore[attr-defined]
    return bool(setting == "tf32") and torch.version.hip is None
