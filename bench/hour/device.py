"""Step 1: the device, the versions, and its ceilings: copy bandwidth and matrix products per dtype."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch

from fastris.dispatch import chosen_paths
from fastris.runtime.float32_precision import ieee_float32

from ..timing import machine
from ..timing.roofline import measure_ceilings
from .problems import Place, missing

OPTIONAL = ("open_clip", "ftfy", "pycocotools", "cv2", "pytest", "hypothesis", "xdist")

PROPERTIES = (
    *("name", "major", "minor", "total_memory", "multi_processor_count", "warp_size"),
    *("L2_cache_size", "shared_memory_per_block_optin", "regs_per_multiprocessor"),
)


def items(place: Place) -> Iterator[tuple[str, Callable[[], dict[str, Any]]]]:
    yield "machine", lambda: describe(place)
    for dtype in (torch.bfloat16, torch.float16, torch.float32) if place.is_gpu else (torch.bfloat16, torch.float32):
        yield f"ceilings {str(dtype).removeprefix('torch.')}", partial(ceilings, place, dtype)
    if place.is_gpu:
        yield "ceilings tf32", partial(ceilings, place, torch.float32, tf32=True)


def describe(place: Place) -> dict[str, Any]:
    """Everything that a reader needs to measure the same again."""
    found: dict[str, Any] = {"machine": machine.prepare(place.device)}
    if place.is_gpu:
        properties = torch.cuda.get_device_properties(place.device)
        found["properties"] = {name: getattr(properties, name, None) for name in PROPERTIES}
        found["devices"] = torch.cuda.device_count()
    found["missing_packages"] = [name for name in OPTIONAL if missing(name)]
    found["paths"] = {
        str(dtype).removeprefix("torch."): [list(map(str, row)) for row in chosen_paths(place.device, dtype)]
        for dtype in (torch.float32, torch.bfloat16)
    }
    return place.labelled(found)


def ceilings(place: Place, dtype: torch.dtype, tf32: bool = False) -> dict[str, Any]:
    """The best of some copies and matrix products; float32 products are IEEE float32 unless ``tf32``."""
    with ieee_float32():
        if tf32:
            torch.backends.cuda.matmul.fp32_precision = "tf32"
        found = dataclasses.asdict(measure_ceilings(place.device, dtype, place.synchronize))
    return place.labelled({**found, "float32_products": "tf32" if tf32 else "ieee"})
