"""Step 7: a trace of one training step, to open in Perfetto, and its kernels by the time that they take."""

from __future__ import annotations

import gzip
import json
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch

from ..timing.harness import Step, release
from ..timing.tracing import STEPS, write_trace
from .problems import Place, case_named, sized, whole_model_obstacle
from .training import arm_of

BATCH = 16
FILE = "trace.json.gz"
MOST_NAMES = 40
MOST_BYTES = 15 * 2**20


def items(place: Place) -> Iterator[tuple[str, Callable[[], dict[str, Any]]]]:
    name = "decoder" if whole_model_obstacle() else "train_step"
    for arm in ("repaired", "fastris"):  # fastris last: its trace is the one that stays
        yield f"{name} {arm}", partial(trace, place, name, arm)


def trace(place: Place, name: str, arm_name: str) -> dict[str, Any]:
    """Write the trace, and sum it up: milliseconds a step, by kernel and by named range."""
    arm = arm_of(arm_name, place)
    problem = sized(case_named(name), place, BATCH if place.is_gpu else 4).to(place.device, torch.bfloat16, arm.tuned)
    step = Step(problem, arm)
    step()
    step()
    place.synchronize()
    path = place.folder / FILE
    write_trace(step, path, step.problem.module)
    found: dict[str, Any] = {"case": name, "arm": arm_name, "path": arm.impl, **summed_up(path)}
    if path.stat().st_size > MOST_BYTES:
        found["trace"] = f"left out: {path.stat().st_size / 2**20:.0f} MiB"
        path.unlink()
    release(place.device)
    if whole_model_obstacle():
        found["instead"] = whole_model_obstacle()
    return place.labelled(found)


def summed_up(path: Path) -> dict[str, Any]:
    """From Chrome's trace: kernels on the device, and named ranges, each with its milliseconds and number per step."""
    with gzip.open(path, "rt", encoding="utf-8") as file:
        events = json.load(file)["traceEvents"]
    kernels = [event for event in events if event.get("cat") in ("kernel", "gpu_memcpy", "gpu_memset")]
    on_device = [event for event in events if event.get("cat") == "gpu_user_annotation"]
    ranges = on_device or [event for event in events if event.get("cat") == "user_annotation"]
    total = sum(event["dur"] for event in kernels) / 1000 / STEPS
    return {"kernels": table(kernels), "ranges": table(ranges), "kernels_ms": total, "launches": len(kernels) // STEPS}


def table(events: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """By name, the longest first."""
    sums: dict[str, list[float]] = defaultdict(list)
    for event in events:
        sums[event["name"]].append(event.get("dur", 0.0))
    longest = sorted(sums, key=lambda name: -sum(sums[name]))[:MOST_NAMES]
    return [{"name": n, "ms": sum(sums[n]) / 1000 / STEPS, "count": len(sums[n]) / STEPS} for n in longest]
