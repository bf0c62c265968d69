"""Make a small model's file smaller: the tokens that its data uses, and weights in half precision."""

from __future__ import annotations

import copy
from collections.abc import Collection
from pathlib import Path
from typing import Any

import torch

from fastris.models.base import ReferringModel
from fastris.models.cris.kept_tokens import with_kept_tokens
from fastris.models.cris.model import CRIS
from fastris.weights.convert import write_model


def compact(model: ReferringModel, tokens: Collection[int]) -> Any:
    """A float32 copy of the model, in eval mode, that computes what :func:`write_compact`'s file will.

    Its weights are rounded to float16, and a CRIS knows only ``tokens``, ids of CLIP's vocabulary; the other systems'
    small models have vocabularies of their own. Raises ValueError for weights that float16 does not hold.
    """
    small = with_kept_tokens(model, tokens) if isinstance(model, CRIS) else copy.deepcopy(model).eval()
    small.half()
    for name, tensor in small.state_dict().items():
        if tensor.is_floating_point() and not tensor.isfinite().all():
            raise ValueError(f"{name} has values that float16 does not hold; save the model as it is")
    return small.to(torch.float32)


def write_compact(model: ReferringModel, folder: Path) -> None:
    """Write a folder that loads like any other, with weights as float16: loading makes them float32 again."""
    write_model(copy.deepcopy(model).half(), folder, "folder", "")
