"""Traces of what an arm does: ``fastris bench --profile FOLDER`` writes one a case and arm, to open in Perfetto."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile, record_function

METHODS = ("forward", "encode_image", "encode_text", "project", "fuse")
"""Methods of a stage that work without its forward being called: the encoders' and the neck's."""

DEPTH = 4
"""Ranges are named down to this many names in a row, such as ``model.decoder.layers.0``."""

STEPS = 2


def write_trace(step: Callable[[], object], path: Path, stages: nn.Module | None = None) -> None:
    """Trace some steps into ``path``, Chrome's JSON format and gzipped.

    Ranges are ``step`` and those that it names itself: ``forward``, ``backward``, ``optimizer``. With ``stages``, the
    module that an eager step runs, the stages too, by the names of their modules; compiled code has no modules left.
    What a step sets up before it (``set_up``, where it has one) runs outside its range.
    """
    activities = [ProfilerActivity.CPU]
    if torch.cuda.is_available():
        activities.append(ProfilerActivity.CUDA)
    path.parent.mkdir(parents=True, exist_ok=True)
    set_up = getattr(step, "set_up", None)
    with ExitStack() as stack:
        if stages is not None:
            stack.enter_context(named_stages(stages))
        with profile(activities=activities) as found:
            for _ in range(STEPS):
                if set_up is not None:
                    set_up()
                with record_function("step"):
                    step()
            if torch.cuda.is_available():
                torch.cuda.synchronize()
    found.export_chrome_trace(str(path))


@contextmanager
def named_stages(module: nn.Module) -> Iterator[None]:
    """Within this block every stage of ``module`` is a named range of the profiler."""
    undo: list[Callable[[], None]] = []
    try:
        for name, part in module.named_modules():
            if name.count(".") < DEPTH and not isinstance(part, nn.ModuleList):
                undo += [_name_method(part, method, name) for method in METHODS if hasattr(part, method)]
        yield
    finally:
        for restore in undo:
            restore()


def _name_method(part: nn.Module, method: str, name: str) -> Callable[[], None]:
    """Wrap one method of one instance; gives the function that takes the wrapping back."""
    original: Callable[..., Any] = getattr(part, method)
    had = part.__dict__.get(method)
    label = name or type(part).__name__
    if method != "forward":
        label = f"{label}.{method}"

    @functools.wraps(original)
    def named(*args: Any, **kwargs: Any) -> Any:
        with record_function(label):
            return original(*args, **kwargs)

    part.__dict__[method] = named

    def restore() -> None:
        if had is None:
            part.__dict__.pop(method)
        else:
            part.__dict__[method] = had

    return restore
