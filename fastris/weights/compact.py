"""Make a small model's file smaller: the tokens that its data uses, and weights in half precision."""

from __future__ import annotations

import copy
from collections.abc import Collection
from pathlib import Path
from typing import Any

from fastris.models.base import ReferringModel
from fastris.models.cris.kept_tokens import with_kept_tokens
from fastris.models.cris.model import CRIS
from fastris.weights.convert import write_model


def compact(model: ReferringModel, tokens: Collection[int]) -> Any:
    """A float32 copy of the model, in eval mode, that computes what :func:`write_compact`'s file will.

    Its matrices are rounded to float16, biases and norms stay as they are, and a CRIS knows only ``tokens``, ids of
    CLIP's vocabulary; the other systems' small models have vocabularies of their own. Raises ValueError for weights
    that float16 does not hold.
    """
    small = with_kept_tokens(model, tokens) if isinstance(model, CRIS) else copy.deepcopy(model).eval()
    for name, parameter in small.named_parameters():
        if parameter.ndim > 1:  # nearly all of the bytes
            parameter.data = parameter.data.half().float()
            if not parameter.isfinite().all():
                raise ValueError(f"{name} has values that float16 does not hold; save the model as it is")
    return small


def write_compact(model: ReferringModel, folder: Path) -> None:
    """Write a folder that loads like any other, with matrices as float16: loading makes them float32 again."""
    small = copy.deepcopy(model)
    for parameter in small.parameters():
        if parameter.ndim > 1:
            parameter.data = parameter.data.half()
    write_model(small, folder, "folder", "")
