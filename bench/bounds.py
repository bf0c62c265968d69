"""What "the same" means: the bounds that every fast path is held to, against float64."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

EPS = {torch.float32: 2**-24, torch.float16: 2**-11, torch.bfloat16: 2**-8}  # half a unit in the last place of 1


def assert_same(fast: Tensor, published: Tensor, truth: Tensor, name: str) -> None:
    """Hold ``fast`` to ``truth`` (float64), allowing what the ``published`` formula loses in the same precision.

    float32: largest error at most 1e-5 of the truth's scale. float16 and bfloat16: largest and RMS error at most 1.25
    times the published formula's, plus one rounding of the result.
    """
    _require(fast.shape == truth.shape, f"{name}: shape {tuple(fast.shape)}, expected {tuple(truth.shape)}")
    if truth.numel() == 0:
        return
    _require(bool(torch.isfinite(truth).all()), f"{name}: the truth itself is not finite")
    error, allowed = (fast.double() - truth).abs(), (published.double() - truth).abs()
    scale = truth.abs().max()
    if fast.dtype in (torch.float32, torch.float64):
        _require(bool(error.max() <= 1e-5 * scale), f"{name}: error {error.max():.2e} of scale {scale:.2e}")
        return
    rounding = EPS[fast.dtype]
    for kind, measure, size in (("max", torch.max, scale), ("RMS", rms, rms(truth))):
        bound = 1.25 * measure(allowed) + rounding * size
        _require(bool(measure(error) <= bound), f"{name}: {kind} error {measure(error):.3e} exceeds {bound:.3e}")


def _require(holds: bool, message: str) -> None:
    """As an assertion, but ``python -O`` keeps it: no arm of a benchmark may pass because checks were stripped."""
    if not holds:
        raise AssertionError(message)


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
    fast: Callable, published: Callable, inputs: dict[str, Tensor], dtype: torch.dtype, draws: int | None = None
) -> None:
    """Outputs and gradients of ``fast`` and ``published`` in ``dtype``, both held against ``published`` in float64.

    The inputs are rounded to ``dtype`` first, so that all three see the same numbers. In low precision the errors of
    ``draws`` random upstream gradients are pooled, 8 unless told: the largest of a short bias gradient's few errors
    would otherwise be luck on either side.
    """
    low = {k: v.to(dtype) if v.is_floating_point() else v for k, v in inputs.items()}
    high = {k: v.double() if v.is_floating_point() else v for k, v in low.items()}
    seeds = range(draws or (1 if dtype in (torch.float32, torch.float64) else 8))
    truth, baseline, result = (
        _pool([run_with_gradients(function, values, seed) for seed in seeds])
        for function, values in ((published, high), (published, low), (fast, low))
    )
    _require(result.keys() == truth.keys(), f"results are {sorted(result)}, expected {sorted(truth)}")
    for name, value in result.items():
        assert_same(value, baseline[name], truth[name], name)


def _pool(runs: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    return {name: torch.stack([run[name] for run in runs]) for name in runs[0]}
