"""The one place that decides which path an operator takes, and says why.

Every operator has three paths: ``reference`` (the published formula), ``torch`` (the same function after exact algebra)
and ``triton`` (that algebra with its heavy steps in fused kernels). The choice is, in this order: the operator's own
``impl=`` argument, the innermost :func:`use_impl` block of the running thread, the environment variable
``FASTRIS_IMPL``, and ``auto``. ``auto`` takes ``triton`` where it runs and ``torch`` elsewhere, and never fails.
Under ``torch.compile`` with PyTorch before 2.15 ``torch`` stands for ``reference``.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import torch

IMPLS = ("auto", "reference", "torch", "triton")
OPERATORS = ("text_to_pixel_similarity", "text_to_pixel_contrastive_loss", "cross_attention", "upsample2x_conv3x3")
MIN_CAPABILITY = (8, 0)
MIN_TRITON = (3, 6)
KERNEL_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def _find_triton() -> str | None:
    """Why Triton is unusable in this process, or None. Reads package metadata; imports nothing."""
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed (pip install triton)"
    try:
        version = importlib.metadata.version("triton")
    except importlib.metadata.PackageNotFoundError:
        return None
    if tuple(int(part) for part in version.split(".")[:2]) < MIN_TRITON:
        return f"Triton {version} is too old; install triton>={'.'.join(map(str, MIN_TRITON))}"
    return None


class _Blocks(threading.local):
    impl = "auto"


_blocks = _Blocks()
# torch.compile watches module globals but not thread-locals: this one changes with every block, so that a compiled
# function that is called inside a block is compiled for it.
_last_block: str | None = None
# Under torch.compile, PyTorch 2.11 gives wrong gradients for the torch path's autograd functions; 2.15 is right.
_compiles_functions = tuple(int(part) for part in torch.__version__.split(".")[:2]) >= (2, 15)
_process_impl = os.environ.get("FASTRIS_IMPL") or "auto"
_missing_triton = _find_triton()
_interpreting = os.environ.get("TRITON_INTERPRET") == "1"
_device_obstacles: dict[int, str | None] = {}


def _check_impl(impl: str, where: str) -> str:
    if impl not in IMPLS:
        raise ValueError(f"{where} must be one of {', '.join(IMPLS)}, got {impl!r}")
    return impl


@contextmanager
def use_impl(impl: str) -> Iterator[None]:
    """Run the operators called in this block, in this thread, by one path: auto, reference, torch or triton.

    Blocks nest, and the choice before is restored when the block is left, by an exception too. An operator's own
    ``impl=`` argument still wins. Raises ValueError for an unknown name.
    """
    global _last_block
    previous, _blocks.impl = _blocks.impl, _check_impl(impl, "impl")
    _last_block = impl
    try:
        yield
    finally:
        _blocks.impl = _last_block = previous


def requested_impl(impl: str = "auto") -> str:
    """The path asked for: ``impl`` if it names one, else the block's, else the process's, else auto."""
    if impl != "auto":
        return _check_impl(impl, "impl")
    block = (_last_block if torch.compiler.is_compiling() else _blocks.impl) or "auto"
    if block != "auto":
        return block
    return _check_impl(_process_impl, "the environment variable FASTRIS_IMPL")


def resolve(operator: str, device: torch.device, dtype: torch.dtype, impl: str = "auto") -> str:
    """The path that ``operator`` takes for tensors of ``device`` and ``dtype``: reference, torch or triton.

    Raises RuntimeError, with the reason, when ``triton`` is asked for and cannot run.
    """
    requested = requested_impl(impl)
    if requested == "reference":
        return requested
    torch_path = "torch" if _compiles_functions or not torch.compiler.is_compiling() else "reference"
    if requested == "torch":
        return torch_path
    obstacle = triton_obstacle(device, dtype)
    if requested == "triton":
        if obstacle:
            raise RuntimeError(f'{operator}: impl="triton" cannot run: {obstacle}. Use impl="torch" or impl="auto".')
        return "triton"
    return torch_path if obstacle or _interpreting else "triton"


def triton_obstacle(device: torch.device, dtype: torch.dtype) -> str | None:
    """Why the Triton kernels cannot run on ``device`` in ``dtype``, or None when they can."""
    if dtype not in KERNEL_DTYPES:
        return f"the kernels compute in float32, float16 or bfloat16, not in {str(dtype).removeprefix('torch.')}"
    if _missing_triton:
        return _missing_triton
    if _interpreting:
        if dtype is torch.bfloat16:
            return "Triton's interpreter (TRITON_INTERPRET=1) computes wrong numbers in bfloat16"
        return None
    if device.type != "cuda":
        return f"the tensors are on {device.type}, and the kernels run on CUDA (on a CPU only under TRITON_INTERPRET=1)"
    return _device_obstacle(device.index if device.index is not None else torch.cuda.current_device())


def _device_obstacle(index: int) -> str | None:
    if index not in _device_obstacles:
        properties = torch.cuda.get_device_properties(index)
        capability = (properties.major, properties.minor)
        too_old = torch.version.hip is None and capability < MIN_CAPABILITY
        _device_obstacles[index] = (
            f"{properties.name} has compute capability {capability[0]}.{capability[1]}, "
            f"and the kernels need {MIN_CAPABILITY[0]}.{MIN_CAPABILITY[1]}"
            if too_old
            else None
        )
    return _device_obstacles[index]


def explain(device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32) -> list[tuple[str, str, str]]:
    """(operator, path, reason) for every operator, for tensors of ``device`` and ``dtype``. Never raises."""
    device = torch.device(device)
    try:
        requested = requested_impl()
    except ValueError as error:
        return [(operator, "none", str(error)) for operator in OPERATORS]
    obstacle = triton_obstacle(device, dtype)
    rows = []
    for operator in OPERATORS:
        if requested in ("reference", "torch"):
            rows.append((operator, requested, f"asked for by use_impl or FASTRIS_IMPL={requested}"))
        elif requested == "triton":
            rows.append((operator, "none" if obstacle else "triton", obstacle or "asked for"))
        elif _interpreting and not obstacle:
            rows.append((operator, "torch", "auto does not choose Triton's interpreter, which is for tests"))
        else:
            rows.append((operator, "torch" if obstacle else "triton", obstacle or "CUDA device with Triton"))
    return rows
