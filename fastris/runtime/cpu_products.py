"""Matrix products in float32 on a CPU that is not Intel's, by the faster of PyTorch's two libraries.

PyTorch multiplies float32 matrices with MKL, and convolves with oneDNN. On AMD's processors oneDNN is faster at the
sizes of an encoder's layers: 1.2 to 1.7 times on a Zen 4, for ``x W^T`` and for the gradient of x. Elsewhere, for other
dtypes, for small products and where PyTorch has no oneDNN, these functions are PyTorch's own. They have no gradients:
they are for autograd Functions.
"""

from __future__ import annotations

import functools
import platform
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

SMALLEST = 2**24
"""Multiplications below which the choice of the library costs what it saves."""


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """``x weight^T + bias``: (..., K) and (N, K) to (..., N)."""
    if _by_onednn(x, weight):
        return _onednn(x, weight, bias)
    return F.linear(x, weight, bias)


def product(x: Tensor, matrix: Tensor) -> Tensor:
    """``x matrix``: (..., N) and (N, K) to (..., K)."""
    if _by_onednn(x, matrix):
        return _onednn(x, matrix.mT)
    return x @ matrix


def _onednn(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    bias = None if bias is None else bias.contiguous()  # its strides are not looked at
    if not (weight.is_contiguous() or weight.mT.is_contiguous()):
        weight = weight.contiguous()  # a part of a wider matrix would take a thousand times as long
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")


def _by_onednn(x: Tensor, matrix: Tensor) -> bool:
    if x.device.type != "cpu" or x.dtype != torch.float32 or matrix.dtype != torch.float32:
        return False
    return (
        x.numel() // x.shape[-1] * matrix.numel() >= SMALLEST and bool(torch.backends.mkldnn.enabled) and _onednn_wins()
    )


@functools.cache
def _onednn_wins() -> bool:
    """Whether products would go to MKL on a processor that is not Intel's, and oneDNN's are to be had, and right."""
    if not (torch.backends.mkl.is_available() and torch.backends.mkldnn.is_available()) or _intel():
        return False
    with _disable_current_modes():  # real numbers, also where shapes alone are being computed
        generator = torch.Generator().manual_seed(0)
        x, weight = (torch.randn(shape, generator=generator) for shape in ((2, 5, 7), (3, 7)))
        try:
            found = _onednn(x, weight, weight[:, 0])
        except (AttributeError, RuntimeError):  # it is what torch.compile emits, and no public name
            return False
        return torch.allclose(found, F.linear(x, weight, weight[:, 0]), rtol=1e-5, atol=1e-5)


def _intel() -> bool:
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        text = platform.processor()
    return "GenuineIntel" in text
