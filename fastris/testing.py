"""The error bounds, against float64, within which a fast path counts as equal to the published formula."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

EXACT = 1e-10
"""Largest error of a float64 path, as a fraction of the truth's scale."""

FLOAT32_TABLES = 1e-6
"""The same where float32 tables, such as positions, enter a float64 path and each side computes them by itself."""

FLOAT32 = 1e-5
"""Largest error of a float32 path, as a fraction of the truth's scale."""

EPS = {torch.float32: 2**-24, torch.float16: 2**-11, torch.bfloat16: 2**-8}  # half a unit in the last place of 1


class WrongNumber(AssertionError):
    """A result is further from the truth than its bound allows."""


def assert_same(
    fast: Tensor,
    published: Tensor,
    truth: Tensor,
    name: str,
    *,
    float32_tables: bool = False,
    rounding: float | None = None,
) -> None:
    """Hold ``fast`` to ``truth`` (float64), allowing what the ``published`` formula loses in the same precision.

    The largest error in float64 is at most :data:`EXACT` of the truth's scale, or :data:`FLOAT32_TABLES` where the
    caller says that ``float32_tables`` enter; in float32 at most :data:`FLOAT32`. float16 and bfloat16: largest and
    RMS error at most 1.25 times the published formula's, plus one rounding of the result. So is float32 held where its
    products are rounded to fewer digits, as in TF32, and ``rounding`` says to how many. A result may not be of a lower
    precision than float64 where the published formula's is float64.
    """
    _require(fast.shape == truth.shape, f"{name}: shape {tuple(fast.shape)}, expected {tuple(truth.shape)}")
    if published.dtype is torch.float64:
        _require(fast.dtype is torch.float64, f"{name}: {fast.dtype}, where the published formula answers in float64")
    if truth.numel() == 0:
        return
    _require(bool(torch.isfinite(truth).all()), f"{name}: the truth itself is not finite")
    error, allowed = (fast.double() - truth).abs(), (published.double() - truth).abs()
    scale = truth.abs().max()
    if fast.dtype in (torch.float32, torch.float64) and rounding is None:
        exact = FLOAT32_TABLES if float32_tables else EXACT
        bound = (exact if fast.dtype is torch.float64 else FLOAT32) * scale
        _require(bool(error.max() <= bound), f"{name}: error {error.max():.2e} of scale {scale:.2e}")
        return
    rounding = EPS[fast.dtype] if rounding is None else rounding
    for kind, measure, size in (("max", torch.max, scale), ("RMS", rms, rms(truth))):
        bound = 1.25 * measure(allowed) + rounding * size
        _require(bool(measure(error) <= bound), f"{name}: {kind} error {measure(error):.3e} exceeds {bound:.3e}")


def _require(holds: bool, message: str) -> None:
    """An assertion that ``python -O`` keeps: the benchmarks rely on these checks."""
    if not holds:
        raise WrongNumber(message)


def rms(x: Tensor) -> Tensor:
    return x.double().square().mean().sqrt()


def run_with_gradients(function: Callable, inputs: dict[str, Tensor], seed: int = 0) -> dict[str, Tensor]:
    """Outputs and the gradient of every floating-point input, under random upstream gradients of every output.

    The upstream gradients depend on ``seed`` and the outputs' shapes alone, so that paths and dtypes share them.
    """
    leaves = {k: v.detach().requires_grad_(v.is_floating_point()) for k, v in inputs.items()}
    outputs = function(**leaves)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    generator = torch.Generator().manual_seed(seed)
    upstream = [torch.randn(o.shape, generator=generator, dtype=torch.float64).to(o) for o in outputs]
    names = [k for k, v in leaves.items() if v.requires_grad]
    gradients = torch.autograd.grad(outputs, [leaves[k] for k in names], upstream, allow_unused=True)
    result = {f"output {i}": o.detach() for i, o in enumerate(outputs)}
    return result | {f"gradient of {k}": g for k, g in zip(names, gradients, strict=True) if g is not None}


def assert_path_same(
    fast: Callable,
    published: Callable,
    inputs: dict[str, Tensor],
    dtype: torch.dtype,
    draws: int | None = None,
    *,
    float32_tables: bool = False,
    autocast: torch.dtype | None = None,
    rounding: float | None = None,
) -> None:
    """Check outputs and gradients of ``fast`` in ``dtype`` against ``published`` in float64; see :func:`assert_same`.

    The inputs are rounded to ``dtype`` first, so that all three see the same numbers. In low precision the errors of
    ``draws`` random upstream gradients are pooled, by default 8: a bias gradient has few elements, so the largest error
    of a single draw would be luck. ``float32_tables`` and ``rounding`` as in :func:`assert_same`. With ``autocast``,
    ``fast`` and ``published`` run under it, and ``fast`` may lose what ``published`` loses there; the float64 truth
    runs without.
    """
    low = {k: v.to(dtype) if v.is_floating_point() else v for k, v in inputs.items()}
    high = {k: v.double() if v.is_floating_point() else v for k, v in low.items()}
    seeds = range(draws or (1 if (autocast or dtype) in (torch.float32, torch.float64) else 8))
    truth = _pool([run_with_gradients(published, high, seed) for seed in seeds])
    with _autocast(next(iter(low.values())), autocast):
        result = _pool([run_with_gradients(fast, low, seed) for seed in seeds])
        baseline = truth  # in float64 the published formula is the truth
        if dtype is not torch.float64:
            baseline = _pool([run_with_gradients(published, low, seed) for seed in seeds])
    _require(result.keys() == truth.keys(), f"results are {sorted(result)}, expected {sorted(truth)}")
    for name, value in result.items():
        want = baseline[name]
        _require(
            value.dtype is want.dtype, f"{name}: {value.dtype}, where the published formula answers in {want.dtype}"
        )
        value = value if autocast is None else value.to(autocast)  # of that precision, whatever dtype holds it
        assert_same(value, want, truth[name], name, float32_tables=float32_tables, rounding=rounding)


def _autocast(first: Tensor, dtype: torch.dtype | None) -> AbstractContextManager:
    return nullcontext() if dtype is None else torch.autocast(first.device.type, dtype)


def _pool(runs: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    return {name: torch.stack([run[name] for run in runs]) for name in runs[0]}
