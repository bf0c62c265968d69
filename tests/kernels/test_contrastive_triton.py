"""The fused loss kernel, on a GPU or under Triton's interpreter: published values and gradients, the same bits."""

from __future__ import annotations

import os

import pytest
import torch
from bounds import assert_path_same, run_with_gradients
from similarity_cases import Case, contrastive

HAS_GPU = torch.cuda.is_available()
if not HAS_GPU and os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("needs a CUDA device, or TRITON_INTERPRET=1 to run the kernels on a CPU", allow_module_level=True)

from fastris.kernels import contrastive as kernels  # noqa: E402

DEVICE = "cuda" if HAS_GPU else "cpu"
DTYPES = [torch.float32, torch.float16, *([torch.bfloat16] if HAS_GPU else [])]
SMALL = Case(2, 2, 4, 5, 4, pointwise=3)


def inputs_of(case: Case, scale: float = 1.0) -> dict[str, torch.Tensor]:
    return {name: tensor.to(DEVICE) for name, tensor in case.inputs(scale).items()}


def loss_of(impl: str, case: Case, **options):
    return contrastive(impl, case.target(9, 8).to(DEVICE), **options)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_extreme_logits_of_1e4_stay_exact(reduction, dtype):
    case = Case(2, 1, 4, 6, 5, pointwise=3)
    inputs = inputs_of(case, scale=3000.0)
    fast, published = (loss_of(impl, case, reduction=reduction) for impl in ("triton", "reference"))
    results = run_with_gradients(fast, inputs)
    assert results["output 1"].abs().max() > 1e4
    assert all(torch.isfinite(value).all() for value in results.values())
    assert_path_same(fast, published, inputs, dtype)


def test_a_small_loss_keeps_its_digits():
    """The loss of a pixel that is right by a wide margin is exp(-|z|), far below one rounding of 1."""
    z = torch.linspace(5, 40, 36, device=DEVICE).reshape(1, 1, 6, 6)
    loss, _ = contrastive("triton", torch.ones_like(z), reduction="none")(
        features=z, kernel=torch.ones(1, 1, 1, 1, 1, device=DEVICE)
    )
    torch.testing.assert_close(loss.double(), torch.nn.functional.softplus(-z.double()), rtol=1e-5, atol=0)


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_an_ignored_pixel_may_hold_nan(reduction):
    case = Case(1, 1, 4, 3, 6, size=1)
    inputs = inputs_of(case)
    inputs["features"][0, :, 1, 2] = torch.nan
    ignored = torch.zeros(case.logits_shape, dtype=torch.bool, device=DEVICE)
    ignored[0, 0, 1, 2] = True
    features = inputs["features"].requires_grad_()
    loss, logits = loss_of("triton", case, ignore_mask=ignored, reduction=reduction)(**inputs)
    assert torch.isnan(logits[0, 0, 1, 2])
    assert torch.isfinite(loss).all()
    (gradient,) = torch.autograd.grad(loss.sum(), features)
    assert torch.isfinite(gradient).all()
    assert not gradient[0, :, 1, 2].any()


def test_no_counted_pixel_gives_zero_loss_and_zero_gradients():
    everything = torch.ones(SMALL.logits_shape, dtype=torch.bool, device=DEVICE)
    leaves = {name: tensor.requires_grad_() for name, tensor in inputs_of(SMALL).items()}
    loss, _ = loss_of("triton", SMALL, ignore_mask=everything)(**leaves)
    assert loss == 0
    assert not any(gradient.any() for gradient in torch.autograd.grad(loss, list(leaves.values())))


@pytest.mark.parametrize("wanted", ["loss", "logits"])
def test_either_output_alone_has_its_own_gradient(wanted):
    gradients = []
    for impl in ("triton", "reference"):
        leaves = {name: tensor.requires_grad_() for name, tensor in inputs_of(SMALL).items()}
        loss, logits = loss_of(impl, SMALL)(**leaves)
        output = loss if wanted == "loss" else logits.mean()
        gradients.append(torch.autograd.grad(output, list(leaves.values())))
    torch.testing.assert_close(*gradients)


def test_the_operator_passes_opcheck():
    x, weight, constants = torch.randn(2, 3, 12), torch.randn(2, 9, 3), torch.randn(2, 9)
    leaves = [tensor.to(DEVICE).requires_grad_() for tensor in (x, weight, constants)]
    positive, negative = torch.rand(2, 2, 1, 4, 3, device=DEVICE)
    torch.library.opcheck(kernels._contrastive, (*leaves, None, False, positive, negative, 3))
    norm = torch.rand(4, leaves[0].shape[1], device=DEVICE, requires_grad=True)
    torch.library.opcheck(kernels._contrastive, (*leaves, norm, True, positive, negative, 3))


@pytest.mark.skipif(not HAS_GPU, reason="a CUDA graph needs a CUDA device")
def test_a_captured_graph_replays_the_step():
    inputs = {name: tensor.requires_grad_() for name, tensor in inputs_of(SMALL).items()}
    step = loss_of("triton", SMALL, pos_weight=2.0)

    def gradients():
        return torch.autograd.grad(step(**inputs)[0], list(inputs.values()))

    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        expected = gradients()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = gradients()
    graph.replay()
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(captured, expected, strict=True))
