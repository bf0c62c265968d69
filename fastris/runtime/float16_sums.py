"""Let cuBLAS accumulate float16 matrix products in float16: faster on consumer cards, less precise. Off by default.

GeForce cards multiply float16 matrices at half their rate when the products are accumulated in float32, PyTorch's
default. Since the projector and the text kernel are plain matrix products here, cuBLAS can accumulate in float16
instead. This affects matrix products of float16 tensors through cuBLAS (autocast in float16). It does not affect
bfloat16, float32, convolutions (cuDNN), and fastris's Triton kernels, which always accumulate in float32. A float16 sum
rounds to 2^-11 at every step and overflows beyond 65504; ``python -m bench.studies.float16_sums`` shows both.
"""

from __future__ import annotations

from types import TracebackType

import torch

MIN_CAPABILITY = (7, 0)
"""Compute capability of the first cards with matrix units for float16."""


class allow_fp16_accumulation:
    """Let cuBLAS sum float16 products in float16, from now on or for a block of code.

    ``allow_fp16_accumulation(True)`` turns it on for the process (all threads, all devices) and
    ``allow_fp16_accumulation(False)`` off; ``with allow_fp16_accumulation(True): ...`` restores the earlier setting at
    the end of the block. ``device`` is the CUDA device that must support it, by default the current one.

    Raises RuntimeError, with the reason, where it cannot be switched on; switching off never fails. TypeError for
    anything but True and False.
    """

    def __init__(self, enabled: bool = True, device: torch.device | str | None = None):
        if not isinstance(enabled, bool):
            raise TypeError(f"enabled must be True or False, got {enabled!r}")
        obstacle = fp16_accumulation_obstacle(device) if enabled else None
        if obstacle:
            raise RuntimeError(f"allow_fp16_accumulation has no effect here: {obstacle}. Leave it off.")
        self.previous = _get()
        if enabled or self.previous:
            _set(enabled)

    def __enter__(self) -> None:
        return None

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.previous != _get():
            _set(self.previous)


def fp16_accumulation_obstacle(
    device: torch.device | str | None = None, dtype: torch.dtype = torch.float16
) -> str | None:
    """Why float16 accumulation does nothing for products of ``dtype`` on ``device``, or None where it works."""
    device = torch.device("cuda" if device is None else device)
    if dtype is not torch.float16:
        return f"it concerns float16 products, not {str(dtype).removeprefix('torch.')} ones; use autocast in float16"
    if device.type != "cuda":
        return f"it needs a CUDA device, and products on {device.type} are summed in float32"
    if torch.version.hip is not None:
        return "it is a setting of cuBLAS, and this PyTorch is built for ROCm"
    if not torch.cuda.is_available():
        return "it needs a CUDA device, and PyTorch finds none"
    capability = torch.cuda.get_device_capability(device)
    if capability < MIN_CAPABILITY:
        name = torch.cuda.get_device_name(device)
        return f"it needs compute capability 7.0, and {name} has {capability[0]}.{capability[1]}"
    return None


def _get() -> bool:
    return bool(torch.backends.cuda.matmul.allow_fp16_accumulation)


def _set(enabled: bool) -> None:
    torch.backends.cuda.matmul.allow_fp16_accumulation = enabled
