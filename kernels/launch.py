"""The one way to launch a kernel, and the way to see what would be launched without launching it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch

from .common import on_device
from .configs import Config

# Whether a * b + c may be one rounding. Triton 3.10 stops taking it for granted, and with it every bit would change.
ENABLE_FP_FUSION = True


@dataclass(frozen=True)
class Launch:
    """One recorded launch: the kernel, what it was given by argument name, and its configuration.

    ``arguments`` holds every argument of the kernel by name, in its order: a tensor as a :class:`Pointer`, numbers and
    constexprs, tile sizes too, as they are.
    """

    kernel: Any
    arguments: tuple[tuple[str, Any], ...]
    config: Config
    grid: tuple[int, ...] = field(compare=False)


@dataclass(frozen=True)
class Pointer:
    """What a compiled kernel can know of a tensor: its dtype, and whether it begins at a multiple of 16 bytes."""

    dtype: torch.dtype
    aligned: bool


_recordings: list[list[Launch]] = []


def launch(kernel: Any, grid: tuple[int, ...], *arguments: Any, config: Config, **constexprs: Any) -> None:
    """``kernel[grid](*arguments, **constexprs)`` with the tiles of ``config``, on the first tensor's device.

    Inside :func:`recording` nothing runs.
    """
    if _recordings:
        _recordings[-1].append(_record(kernel, grid, arguments, constexprs, config))
        return
    first = next(argument for argument in arguments if isinstance(argument, torch.Tensor))
    with on_device(first):
        kernel[grid](
            *arguments,
            **constexprs,
            **dict(config.blocks),
            num_warps=config.num_warps,
            num_stages=config.num_stages,
            enable_fp_fusion=ENABLE_FP_FUSION,
        )


@contextmanager
def recording() -> Iterator[list[Launch]]:
    """Launch nothing in the block, in any thread, and collect the launches instead: outputs stay uninitialised."""
    launches: list[Launch] = []
    _recordings.append(launches)
    try:
        yield launches
    finally:
        _recordings[:] = [each for each in _recordings if each is not launches]


def _record(kernel: Any, grid: tuple[int, ...], arguments: tuple, constexprs: dict[str, Any], config: Config) -> Launch:
    named = dict(zip(kernel.arg_names, arguments, strict=False)) | constexprs | dict(config.blocks)
    if set(named) != set(kernel.arg_names):
        raise TypeError(f"{kernel.fn.__name__} takes {', '.join(kernel.arg_names)}; given were {', '.join(named)}")
    known = tuple((name, _known(named[name])) for name in kernel.arg_names)
    return Launch(kernel, known, config, grid)


def _known(value: Any) -> Any:
    return Pointer(value.dtype, value.data_ptr() % 16 == 0) if isinstance(value, torch.Tensor) else value
