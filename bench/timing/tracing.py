"""Traces of what an arm does: ``fastris bench --profile FOLDER`` writes one a case and arm, to open in Perfetto."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import nn
from torch.profiler import profile, record_function

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
    path.parent.mkdir(parents=True, exist_ok=True)
    set_up = getattr(step, "set_up", None)
    with named_stages(stages or nn.Module()), profile() as found:
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
    with ExitStack() as undo:
        for name, part in module.named_modules():
            for method in METHODS if name.count(".") < DEPTH and not isinstance(part, nn.ModuleList) else ():
                if hasattr(part, method):
                    label = name or type(part).__name__
                    named = _named(getattr(part, method), label if method == "forward" else f"{label}.{method}")
                    undo.enter_context(mock.patch.object(part, method, named))
        yield


def _named(original: Callable[..., Any], label: str) -> Callable[..., Any]:
    @functools.wraps(original)
    def named(*args: Any, **kwargs: Any) -> Any:
        with record_function(label):
            return original(*args, **kwargs)

    return named
