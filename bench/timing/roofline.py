"""The least time that a case could take: its operations and its bytes against two ceilings measured in the same run.

    time of a step  >=  max(operations / matrix rate, bytes / copy bandwidth)

Operations are the multiplications and additions of matrix products and convolutions, counted without running anything,
for the published formula and for fastris's algebra; the bound takes the smaller count, so that all arms of a case are
held to one bound and less arithmetic is not punished. Bytes are the compulsory traffic: every tensor that crosses the
border of the case, moved once. Forward: inputs, data, parameters, outputs. Backward: the outputs' gradients, inputs and
parameters again where it runs alone, and the gradients of both. Adam: parameters and two states read and written,
gradients read. Tables of embeddings are not read as a whole, so only their gradients and updates count.
"""

from __future__ import annotations

import math
import statistics
import time
import warnings
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode, conv_flop_count

from fastris.dispatch import use_impl

from ..cases.arms import ARMS
from ..cases.problem import LOW_PRECISION
from ..cases.table import Case

COPY_BYTES = {"cpu": 2**27, "cuda": 2**30}
"""Size of the tensor that is copied: far beyond every cache."""

MATRIX_SIDE = {"cpu": 1024, "cuda": 8192}
CEILING_ROUNDS = 12
CEILING_SECONDS = 1.0


@dataclass(frozen=True)
class Ceilings:
    """The best of several measurements: bytes read and written per second by a copy, operations per second by a GEMM.

    ``dtype`` is that of the matrices. float32 keeps PyTorch's own setting of TF32 (off unless somebody turned it on).
    """

    copy_bytes_per_s: float
    matrix_flops_per_s: float
    dtype: str
    copied_bytes: int
    matrix_side: int

    def or_better(self, other: Ceilings) -> Ceilings:
        """The higher of each ceiling: whatever else was running, the device can do that."""
        copy = max(self.copy_bytes_per_s, other.copy_bytes_per_s)
        matrix = max(self.matrix_flops_per_s, other.matrix_flops_per_s)
        return replace(self, copy_bytes_per_s=copy, matrix_flops_per_s=matrix)


def measure_ceilings(device: torch.device, dtype: torch.dtype, synchronize: Callable[[], None]) -> Ceilings:
    """Copy bandwidth and matrix rate of ``device``; a few seconds at most."""
    kind = "cuda" if device.type == "cuda" else "cpu"
    size, side = COPY_BYTES[kind], MATRIX_SIDE[kind]
    copy = _best_seconds(_copy(size, device), synchronize)
    matrix = _best_seconds(_product(side, device, dtype), synchronize)
    return Ceilings(2 * size / copy, 2 * side**3 / matrix, str(dtype).removeprefix("torch."), size, side)


def _copy(size: int, device: torch.device) -> Callable[[], Any]:
    source = torch.ones(size, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return lambda: target.copy_(source)


def _product(side: int, device: torch.device, dtype: torch.dtype) -> Callable[[], Any]:
    left, right = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
    product = torch.empty_like(left)
    return lambda: torch.mm(left, right, out=product)


def _best_seconds(work: Callable[[], Any], synchronize: Callable[[], None]) -> float:
    best, begin = math.inf, time.perf_counter()
    for number in range(CEILING_ROUNDS):
        synchronize()
        start = time.perf_counter()
        work()
        synchronize()
        if number:  # the first one warms up
            best = min(best, time.perf_counter() - start)
        if number > 1 and time.perf_counter() - begin > CEILING_SECONDS / 2:
            break
    return best


def count_work(case: Case, dtype: torch.dtype) -> dict[str, Any]:
    """What one step of ``case`` has to do in ``dtype``: ``{"flops": {path: operations}, "bytes": traffic}``.

    Nothing is computed.
    """
    with warnings.catch_warnings():  # PyTorch's own deep copy of a layer asks a tensor without numbers where they lie
        warnings.filterwarnings("ignore", "Accessing the data pointer of FakeTensor")
        flops = {path: count_flops(case, path) for path in ("reference", "torch")}
        return {"flops": flops, "bytes": count_bytes(case, dtype)}


def bound(work: Mapping[str, Any], ceilings: Ceilings) -> dict[str, Any]:
    """The least time of a step under ``ceilings``, ``{"ms", "limit"}``, and what limits it."""
    matrix = min(work["flops"].values()) / ceilings.matrix_flops_per_s
    traffic = work["bytes"] / ceilings.copy_bytes_per_s
    return {"ms": 1000 * max(matrix, traffic), "limit": "matrix rate" if matrix > traffic else "bandwidth"}


def add_shares(cases: Iterable[Mapping[str, Any]], ceilings: Ceilings) -> None:
    """Fill in what follows from ``ceilings``: each result's bound, and ``flops`` and ``share`` of what was timed."""
    for case in cases:
        work = case["roofline"]
        if "error" in work:
            continue
        work.update(bound(work, ceilings))
        for name, cell in case["arms"].items():
            if cell["ms"]:
                cell["flops"] = work["flops"]["reference" if ARMS[name].impl == "reference" else "torch"]
                cell["share"] = work["ms"] / statistics.median(cell["ms"])


def count_flops(case: Case, path: str) -> int:
    """Multiplications and additions of matrix products and convolutions in one step of ``case`` by ``path``."""
    with case.shapes_only() as problem, use_impl(path):
        if not problem.training:
            return counted(problem.forward)
        problem.optimizer = False  # Adam has no products, and steps on numbers
        forward = counted(problem.training_forward)
        if case.timed == "forward":
            return forward
        whole = counted(problem.step)
    return whole - forward if case.timed == "backward" else whole


def counted(work: Callable[[], Any]) -> int:
    """Multiplications and additions of matrix products and convolutions in a call."""
    with FlopCounterMode(display=False, custom_mapping=FORMULAS) as counter:
        work()
    return counter.get_total_flops()


def _convolution_backward(upstream, x, weight, _b, _s, _p, _d, transposed, _o, _g, wanted, **_) -> int:
    return conv_flop_count(x, weight, upstream, transposed) * (bool(wanted[0]) + bool(wanted[1]))


def _linear(x, weight, *_, **__) -> int:
    return 2 * math.prod(x) * weight[0]


def _in_place_addmm(total, left, right, **_) -> int:
    return 2 * left[0] * left[1] * right[1]


def _in_place_baddbmm(total, left, right, **_) -> int:
    return 2 * left[0] * left[1] * left[2] * right[2]


FORMULAS = {
    torch.ops.aten.convolution_backward: _convolution_backward,
    torch.ops.aten.addmm_: _in_place_addmm,
    torch.ops.aten.baddbmm_: _in_place_baddbmm,
    **({torch.ops.mkldnn._linear_pointwise: _linear} if hasattr(torch.ops.mkldnn, "_linear_pointwise") else {}),
}
"""Where PyTorch's own counter is wrong: it counts the weight's gradient of a grouped convolution as many times too high
as there are groups (each of the two gradients costs what the forward pass does), and passes over products in place and
by oneDNN."""


def count_bytes(case: Case, dtype: torch.dtype) -> int:
    """Compulsory traffic of one step of ``case`` in ``dtype``: see the top of this file."""
    wide = 4 if dtype in LOW_PRECISION else dtype.itemsize
    with case.shapes_only() as problem, use_impl("reference"):
        outputs = _bytes(problem.training_forward(), dtype.itemsize)
        inputs, data = _bytes(problem.inputs.values(), dtype.itemsize), _bytes(problem.data.values(), wide)
        trained = _bytes((p for p in problem.module.parameters() if p.requires_grad), wide)
        tables = (m.weight for m in problem.module.modules() if isinstance(m, nn.Embedding))
        read = trained - _bytes(tables, wide)
    forward = inputs + data + read + outputs
    backward = outputs + inputs + trained
    if not problem.training or case.timed == "forward":
        return forward
    if case.timed == "backward":
        return backward + inputs + read
    return forward + backward + (7 * trained if problem.optimizer else 0)


def _bytes(tensors: Iterable[Tensor], item: int) -> int:
    """Bytes of ``tensors`` when a floating-point number takes ``item`` of them."""
    return sum(tensor.numel() * (item if tensor.is_floating_point() else tensor.itemsize) for tensor in tensors)
