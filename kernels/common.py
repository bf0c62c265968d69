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


@triton.constexpr_function
def drop_threshold(probability):
    """Random bits below this drop an element, with ``probability`` to 2^-32."""
    return min(round(probability * 2**32), 2**32 - 1)


@triton.jit
def philox_of_four(seed, index):
    """The four random uint32 of a group of four elements that follow each other, from its int64 ``index`` alone.

    The index's upper half goes into the counter's second word, so that streams past 2^32 groups do not repeat.
    """
    low = (index & 0xFFFFFFFF).to(tl.uint32)
    high = (index >> 32).to(tl.uint32)
    zero = low * 0
    return tl.philox(seed, low, high, zero, zero)


@triton.jit
def drop_bits(seed, index, PROBABILITY: tl.constexpr):
    """int32 [M, G] whose four lowest bits say which elements of a group are dropped, from its index [M, G]."""
    first, second, third, fourth = philox_of_four(seed, index)
    if PROBABILITY >= 1:
        return tl.full(first.shape, 15, tl.int32)
    BELOW: tl.constexpr = drop_threshold(PROBABILITY)
    low = tl.where(first < BELOW, 1, 0) | tl.where(second < BELOW, 2, 0)
    return low | tl.where(third < BELOW, 4, 0) | tl.where(fourth < BELOW, 8, 0)


@triton.jit
def spread_bits(bits):
    """Whether each element of the groups [M, G] is dropped: [M, 4 * G]. The same for any tiling."""
    even = tl.interleave((bits & 1) != 0, (bits & 4) != 0)
    odd = tl.interleave((bits & 2) != 0, (bits & 8) != 0)
    return tl.interleave(even, odd)


@triton.jit
def _log1p(x):
    """log(1 + x) for x >= 0 to full relative precision: the second term gives back what rounding 1 + x lost."""
    y = 1.0 + x
    return tl.log(y) + (x - (y - 1.0)) / y


@triton.jit
def cross_entropy(logits, positive, negative):
    """``positive * softplus(-z) + negative * softplus(z)`` of logits z in float32, and its slope."""
    small = tl.exp(-tl.abs(logits))  # in (0, 1]: no overflow for any logit
    log_sum = _log1p(small)
    loss = positive * (log_sum + tl.maximum(-logits, 0.0)) + negative * (log_sum + tl.maximum(logits, 0.0))
    sigma = tl.where(logits >= 0.0, 1.0, small) / (1.0 + small)
    sigma_minus = tl.where(logits >= 0.0, small, 1.0) / (1.0 + small)
    return loss, negative * sigma - positive * sigma_minus
