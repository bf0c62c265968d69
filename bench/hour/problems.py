"""What the steps measure: a place, and the cases and arms of the benchmarks at its sizes."""

from __future__ import annotations

import functools
import importlib
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from ..cases.arms import ARMS, Arm
from ..cases.problem import Problem
from ..cases.table import CASES, Case

LABEL = "CPU, small sizes: no number of a GPU"
"""What every measurement on a CPU says of itself."""

OPERATOR_CASES = (
    "similarity_loss",
    "upsample_conv_26",
    "upsample_conv_52",
    "cross_attention_padded",
    "cross_attention",
    "projector_loss",
    "decoder",
    "bidirectional_attention_stage0",
    "bidirectional_attention_stage3",
    "few_query_attention",
    "deformable_attention",
    "word_attention",
    "region_contrast",
    "pixel_contrast",
    "pixel_word_attention_stage1",
    "word_pixel_attention_stage1",
    "upsampled_bce",
)
"""The cases of operators with kernels, and of the parts of CRIS that are made of them. None needs open_clip."""

KERNEL_CASES = OPERATOR_CASES[:5]


class Skip(Exception):
    """Something that cannot be done here; the message says why."""


@dataclass(frozen=True)
class Place:
    """Where a step works.

    Attributes:
        device: the device.
        folder: the folder of the results.
        end: the moment (``time.monotonic``) from which nothing new begins.
        done: the step's items so far.
    """

    device: torch.device
    folder: Path
    end: float
    done: Mapping[str, Any] = field(default_factory=dict, hash=False, compare=False)

    @property
    def is_gpu(self) -> bool:
        return self.device.type == "cuda"

    @property
    def left(self) -> float:
        """Seconds until :attr:`end`."""
        return self.end - time.monotonic()

    def synchronize(self) -> None:
        if self.is_gpu:
            torch.cuda.synchronize(self.device)

    def labelled(self, found: dict[str, Any]) -> dict[str, Any]:
        """``found``, with a label where it was measured on a CPU."""
        return found if self.is_gpu else {**found, "label": LABEL}


def missing(*modules: str) -> str:
    """Those of ``modules`` that cannot be imported, as a text; empty if all can."""
    return ", ".join(module for module in modules if _import_error(module))


def whole_model_obstacle() -> str:
    """Why the whole model cannot be built here; empty where it can. It may be a package that open_clip needs."""
    error = _import_error("open_clip")
    return (
        f"the whole model needs open_clip (pip install open_clip_torch), which cannot be read: {error}" if error else ""
    )


@functools.cache
def _import_error(module: str) -> str:
    try:
        importlib.import_module(module)
    except Exception as error:  # a package that is there and broken may raise anything
        return str(error) or type(error).__name__
    return ""


def case_named(name: str) -> Case:
    return next(case for case in CASES if case.name == name)


def sized(case: Case, place: Place, batch: int) -> Problem:
    """The case at ``batch`` on a GPU, and on its small copy on a CPU; float32, on the CPU."""
    return case.problem(**({"batch": batch} if place.is_gpu else {**case.small, "batch": max(batch, case.least_batch)}))


def batches(place: Place, wanted: Sequence[int]) -> Sequence[int]:
    """The batch sizes to measure: on a CPU a small one stands for all."""
    return wanted if place.is_gpu else (4,)


def usable(names: Sequence[str], place: Place, dtype: torch.dtype) -> tuple[list[Arm], dict[str, str]]:
    """The arms called ``names`` that run here, and why the others do not."""
    obstacles = {name: ARMS[name].obstacle(place.device, dtype) for name in names}
    return [ARMS[name] for name, why in obstacles.items() if not why], {n: why for n, why in obstacles.items() if why}


MAX_AUTOTUNE = replace(ARMS["max_autotune"], compile={"mode": "max-autotune-no-cudagraphs"})
"""For graph replay: its own CUDA graphs cannot be captured in another one, and replaying is what they are for."""
