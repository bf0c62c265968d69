"""Dropout masks on a CPU for a tenth of the time: raw random bits from NumPy's SFC64 against a threshold.

``bernoulli_`` draws one number at a time from a Mersenne twister. Thirty-two raw bits decide an element just as well,
to 2^-32 of the probability. NumPy's generator is seeded from torch's, so ``torch.manual_seed`` makes masks repeat.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor


def draw_seed() -> int:
    """A seed for :func:`numpy.random.SFC64` from torch's own CPU generator."""
    return int(torch.randint(2**62, (1,)).item())


def dropped(shape: Sequence[int], dropout: float, bits: np.random.BitGenerator) -> Tensor:
    """A bool mask on the CPU, each element True (to be dropped) with probability ``dropout``, independently."""
    count = math.prod(shape)
    draws = torch.from_numpy(bits.random_raw((count + 1) // 2).view(np.int32)[:count]).reshape(tuple(shape))
    threshold = round(dropout * 2**32) - 2**31
    return draws < threshold if threshold < 2**31 else torch.ones(tuple(shape), dtype=torch.bool)


def dropout(x: Tensor, probability: float, training: bool) -> Tensor:
    """``F.dropout``; on a CPU, outside ``torch.compile``, with the same distribution for less time."""
    if not training or probability == 0.0:
        return x
    if x.device.type != "cpu" or torch.compiler.is_compiling() or probability == 1.0:
        return F.dropout(x, probability)
    mask = dropped(x.shape, probability, np.random.SFC64(draw_seed()))
    return x.masked_fill(mask, 0) * (1 / (1 - probability))
