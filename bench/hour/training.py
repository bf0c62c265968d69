"""Step 6: the training step in bfloat16, an arm at a time: milliseconds and peak memory; one arm is a CUDA graph.

Without open_clip the whole model cannot be built: then the parts of CRIS behind its encoders stand for it.
"""

from __future__ import annotations

import functools
import statistics
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch

from fastris.runtime import graph_timing

from ..cases.arms import ARMS, Arm, compiled_or_failed
from ..cases.problem import Problem
from ..timing.harness import Step, is_out_of_memory, release, timed
from .problems import Place, Skip, case_named, sized, whole_model_obstacle

BATCHES = (16, 64)
AUTO, GRAPH, STAGES = "fastris, auto", "fastris, CUDA graph", "fastris, recompute=stages"
ORDER = ("repaired", "fastris", GRAPH, STAGES, AUTO, "published", "compiled", "max_autotune")
PARTS = ("decoder", "projector_loss")
ROUNDS, SECONDS = 20, 8.0
LEFT_FOR_COMPILING = 60.0
"""Seconds without which compiling is not begun."""


def items(place: Place) -> Iterator[tuple[str, Callable[[], dict[str, Any]]]]:
    names = PARTS if whole_model_obstacle() else ("train_step",)
    for late in (False, True):  # what compiles comes last
        for batch in BATCHES if place.is_gpu else (6,):
            for name in names:
                for arm in ORDER:
                    if (arm in ("compiled", "max_autotune")) == late:
                        yield f"{name} B={batch} {arm}", partial(measure, place, name, batch, arm)


def arm_of(name: str, place: Place) -> Arm:
    """``fastris`` is its Triton path, and on a CPU its plain PyTorch path; ``fastris, auto`` what it chooses itself."""
    if name == AUTO:
        return Arm("auto", "auto")
    if name.startswith("fastris"):
        return ARMS["triton" if place.is_gpu else "torch"]
    return ARMS["reference" if name == "published" else name]


def measure(place: Place, name: str, batch: int, arm_name: str) -> dict[str, Any]:
    """Median milliseconds and the peak of allocated memory, weights and Adam's state included."""
    arm = arm_of(arm_name, place)
    refuse(place, name, arm, arm_name)
    found: dict[str, Any] = {"case": name, "batch": batch, "arm": arm_name, "path": arm.impl, "dtype": "bfloat16"}
    problem = built(name, place, batch).to(place.device, torch.bfloat16, arm.tuned)
    if arm_name == STAGES:
        problem.module.get_submodule("model").set_recompute("stages")  # type: ignore[operator]
    try:
        with compiled_or_failed():
            step = Step(problem, arm)
            if arm_name == GRAPH:
                replay, peak = captured(problem, step)
                found |= {**time_step(place, replay), **peak}
            else:
                found |= time_step(place, step)
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        found |= {"status": "skipped", "why": "out of memory", "out_of_memory": True}
    finally:
        torch.compiler.reset()
        release(place.device)
    if whole_model_obstacle():
        found["instead"] = whole_model_obstacle()
    return place.labelled(found)


@functools.lru_cache(maxsize=2)
def built(name: str, place: Place, batch: int) -> Problem:
    """The case on the CPU, for one arm after the other: building a whole model there takes seconds."""
    return sized(case_named(name), place, batch)


def refuse(place: Place, name: str, arm: Arm, arm_name: str) -> None:
    """Raises Skip for what cannot be measured here."""
    if why := arm.obstacle(place.device, torch.bfloat16):
        raise Skip(why)
    if arm_name == GRAPH and not place.is_gpu:
        raise Skip("CUDA graphs need a GPU")
    if arm.compile is not None and not place.is_gpu:
        raise Skip("compiling a step takes minutes on a CPU; `fastris bench` measures it there")
    if arm_name == STAGES and name != "train_step":
        raise Skip(f"recompute=stages is a setting of the whole model; {whole_model_obstacle()}")
    if arm.compile is not None and place.left < LEFT_FOR_COMPILING:
        raise Skip(f"compiling takes long, and {place.left:.0f} s are left of this step's time")


def captured(problem: Problem, step: Step) -> tuple[Callable[[], object], dict[str, int]]:
    """The same step as one CUDA graph, forward, backward, and Adam where it belongs to it; and its peak of memory.

    A graph's memory is set aside while it is captured: replays allocate nothing that the peak would show.
    """
    if problem.optimizer:
        adam = torch.optim.Adam(problem.module.parameters(), lr=0.0, fused=True, capturable=True)
        step.problem._adam[:] = [adam]
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(stream)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    graph = graph_timing.captured(step)
    return graph.replay, {"peak_bytes": torch.cuda.max_memory_allocated()}


def time_step(place: Place, step: Callable[[], object]) -> dict[str, Any]:
    """From an idle device to an idle device, some rounds after two that warm up."""
    first = timed(step, 1, place.synchronize)
    second = timed(step, 1, place.synchronize)
    if place.is_gpu:
        torch.cuda.reset_peak_memory_stats(place.device)
    rounds = max(3, min(ROUNDS, int(min(SECONDS, max(0.0, place.left)) / second)))
    ms = [1000 * timed(step, 1, place.synchronize) for _ in range(rounds)]
    found: dict[str, Any] = {"first_ms": 1000 * first, "ms": ms, "median_ms": statistics.median(ms)}
    if place.is_gpu:
        found["peak_bytes"] = torch.cuda.max_memory_allocated(place.device)
        found["reserved_bytes"] = torch.cuda.max_memory_reserved(place.device)
    return found
