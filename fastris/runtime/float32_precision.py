"""What float32 products are computed in: IEEE float32 for a block of code, and what is set outside of it.

By default cuDNN computes float32 convolutions in TF32, with 10 bits of mantissa: 3e-4 of scale off, where proofs ask
for 1e-5. PyTorch has a setting for each backend beside its older switches, and refuses to read a switch that
contradicts its setting. So both are set here: what reads the switches, as torch.compile does, works within the block.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch

IEEE = "ieee"

_backends: Any = torch.backends
_cuda, _cudnn, _cpu = _backends.cuda.matmul, _backends.cudnn, _backends.mkldnn
_SETTINGS: tuple[Any, ...] = (_cuda, _cudnn.conv, _cudnn.rnn, _cpu.matmul, _cpu.conv)
_SWITCHES: tuple[tuple[Callable[[], Any], Callable[[Any], None], Any], ...] = (
    (torch.get_float32_matmul_precision, torch.set_float32_matmul_precision, "highest"),
    (lambda: _cudnn.allow_tf32, lambda allowed: setattr(_cudnn, "allow_tf32", allowed), False),
)
"""How each older switch is read and set, and what means IEEE float32."""


@contextlib.contextmanager
def ieee_float32() -> Iterator[None]:
    """Within this block float32 matrix products and convolutions are IEEE float32, on every device of this process.

    What was set before is restored, after an exception too.
    """
    with contextlib.ExitStack() as undo:
        for setting in _SETTINGS:
            undo.callback(setattr, setting, "fp32_precision", setting.fp32_precision)
        for read, write, exact in _SWITCHES:
            with contextlib.suppress(RuntimeError):  # it contradicts its setting: nobody can read it, here or outside
                undo.callback(write, read())
                write(exact)
        for setting in _SETTINGS:
            setting.fp32_precision = IEEE
        yield


def float32_precision(device: torch.device) -> dict[str, str]:
    """What float32 products are computed in now: {"matmul": "ieee", "convolution": "tf32"} on a GPU by default."""
    matmul, convolution = (_cuda, _cudnn.conv) if device.type == "cuda" else (_cpu.matmul, _cpu.conv)
    found = {"matmul": matmul.fp32_precision, "convolution": convolution.fp32_precision}
    return {product: IEEE if value == "none" else value for product, value in found.items()}
