"""What every kernel file shares: how to launch on the right device, and the arithmetic helpers used inside kernels."""

from __future__ import annotations

import contextlib
from contextlib import AbstractContextManager

import torch
import triton
import triton.language as tl

TL_DTYPE = {torch.float32: tl.float32, torch.float16: tl.float16, torch.bfloat16: tl.bfloat16}


def on_device(tensor: torch.Tensor) -> AbstractContextManager:
    """Make the tensor's GPU current, so that kernels launch where the data is; nothing to do on a CPU."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else contextlib.nullcontext()


def dot_precision(dtype: torch.dtype) -> str:
    """``input_precision`` for tl.dot: TF32 only for float32 where PyTorch's own switch allows it, IEEE otherwise.

    The switch is ``torch.backends.cuda.matmul.fp32_precision``, where "none" means what
    ``torch.backends.fp32_precision`` says; the older ``allow_tf32`` and ``set_float32_matmul_precision`` set it too.
    Once the newer names were written to, reading the older ones raises: they are read only where nothing else exists.
    """
    if dtype is not torch.float32 or torch.version.hip is not None:
        return "ieee"
    try:
        setting = torch.backends.cuda.matmul.fp32_precision
        if setting == "none":
            setting = torch.backends.fp32_precision  # type: ignore[attr-defined]
    except AttributeError:
        setting = "tf32" if torch.backends.cuda.matmul.allow_tf32 else "ieee"
    return "tf32" if setting == "tf32" else "ieee"


@triton.jit
def uniform_from_index(seed, index):
    """One uniform number in [0, 1) per logical int64 ``index``, from Philox: the same for any tiling.

    The index's upper half goes into the counter's second word, so that streams past 2^32 elements do not repeat.
    """
    low = (index & 0xFFFFFFFF).to(tl.uint32)
    high = (index >> 32).to(tl.uint32)
    zero = low * 0
    bits, _, _, _ = tl.philox(seed, low, high, zero, zero)
    return tl.uint_to_uniform_float(bits)
