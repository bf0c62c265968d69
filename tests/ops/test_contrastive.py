"""Text-to-pixel contrastive loss: the published loss, logits and gradients from one pass over the features."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from bounds import assert_path_same, run_with_gradients
from similarity_cases import Case, contrastive, similarity

from fastris.ops.contrastive import text_to_pixel_contrastive_loss

CASE = Case(2, 2, 6, 5, 4, pointwise=7)
PATHS = ["reference", "torch"]


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_the_published_loss_is_the_interpolated_binary_cross_entropy(reduction):
    target = CASE.target(13, 9)
    for impl in PATHS:
        loss, logits = contrastive(impl, target, reduction=reduction)(**CASE.inputs())
        resized = F.interpolate(target, (5, 4), mode="nearest")
        torch.testing.assert_close(logits, similarity(impl)(**CASE.inputs()))
        torch.testing.assert_close(loss, F.binary_cross_entropy_with_logits(logits, resized, reduction=reduction))


@pytest.mark.parametrize("size", [(1, 1), (2, 3), (5, 4), (10, 8), (416, 416)])
def test_a_mask_of_any_size_is_resized_as_published(size):
    fast, published = (contrastive(impl, CASE.target(*size)) for impl in ("torch", "reference"))
    for dtype in (torch.float64, torch.float32):
        assert_path_same(fast, published, CASE.inputs(), dtype)


@pytest.mark.parametrize("impl", PATHS)
def test_pos_weight_weighs_the_referred_pixels(impl):
    target, inputs = CASE.target(), CASE.inputs()
    for pos_weight in (2.5, torch.tensor(2.5), torch.rand(2, 1, 1), torch.rand(CASE.logits_shape)):
        loss, logits = contrastive(impl, target, pos_weight=pos_weight)(**inputs)
        factor = torch.as_tensor(pos_weight)
        torch.testing.assert_close(loss, F.binary_cross_entropy_with_logits(logits, target, pos_weight=factor))


@pytest.mark.parametrize("impl", PATHS)
def test_ignored_pixels_do_not_count(impl):
    target, ignored, inputs = CASE.target(), CASE.ignore_mask(), CASE.inputs()
    kept = ~ignored
    for reduction in ("mean", "sum"):
        loss, logits = contrastive(impl, target, ignore_mask=ignored, reduction=reduction)(**inputs)
        counted = F.binary_cross_entropy_with_logits(logits[kept], target[kept], reduction=reduction)
        torch.testing.assert_close(loss, counted)
    loss, logits = contrastive(impl, target, ignore_mask=ignored, reduction="none")(**inputs)
    published = F.binary_cross_entropy_with_logits(logits, target, reduction="none")
    torch.testing.assert_close(loss, published * kept)


@pytest.mark.parametrize("impl", PATHS)
def test_an_ignored_pixel_may_hold_nan(impl):
    case = Case(1, 1, 4, 3, 6, size=1)
    inputs = case.inputs()
    inputs["features"][0, :, 1, 2] = torch.nan
    ignored = torch.zeros(case.logits_shape, dtype=torch.bool)
    ignored[0, 0, 1, 2] = True
    leaves = {name: tensor.requires_grad_() for name, tensor in inputs.items()}
    loss, logits = contrastive(impl, case.target(), ignore_mask=ignored)(**leaves)
    assert torch.isnan(logits[0, 0, 1, 2])
    (gradient,) = torch.autograd.grad(loss, leaves["features"])
    assert torch.isfinite(loss)
    assert torch.isfinite(gradient).all()
    assert not gradient[0, :, 1, 2].any()


@pytest.mark.parametrize("impl", PATHS)
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_no_counted_pixel_gives_zero_loss_and_zero_gradients(impl, reduction):
    everything = torch.ones(CASE.logits_shape, dtype=torch.bool)
    leaves = {name: tensor.requires_grad_() for name, tensor in CASE.inputs().items()}
    loss, _ = contrastive(impl, CASE.target(), ignore_mask=everything, reduction=reduction)(**leaves)
    assert loss == 0
    assert not any(gradient.any() for gradient in torch.autograd.grad(loss, list(leaves.values())))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_extreme_logits_of_1e4_stay_exact(reduction, dtype):
    case = Case(2, 1, 16, 9, 8, pointwise=16)
    fast, published = (contrastive(impl, case.target(), reduction=reduction) for impl in ("torch", "reference"))
    inputs = case.inputs(scale=4000.0)
    results = run_with_gradients(fast, inputs)
    assert results["output 1"].abs().max() > 1e4
    assert all(torch.isfinite(value).all() for value in results.values())
    assert_path_same(fast, published, inputs, dtype)


@pytest.mark.parametrize("wanted", ["loss", "logits"])
def test_either_output_alone_has_its_own_gradient(wanted):
    gradients = []
    for impl in PATHS:
        leaves = {name: tensor.double().requires_grad_() for name, tensor in CASE.inputs().items()}
        loss, logits = contrastive(impl, CASE.target())(**leaves)
        output = loss if wanted == "loss" else logits.square().sum()
        gradients.append(torch.autograd.grad(output, list(leaves.values())))
    torch.testing.assert_close(*gradients)


def test_no_gradient_reaches_the_target():
    target = CASE.target().requires_grad_()
    features = CASE.inputs()["features"].requires_grad_()
    for impl in PATHS:
        loss, _ = contrastive(impl, target)(**(CASE.inputs() | {"features": features}))
        assert torch.autograd.grad(loss, [features, target], allow_unused=True)[1] is None


@pytest.mark.parametrize("impl", PATHS)
def test_the_loss_is_float32_under_autocast_and_of_the_inputs_dtype_otherwise(impl):
    inputs, target = CASE.inputs(), CASE.target()
    with torch.autocast("cpu", torch.bfloat16):
        loss, logits = contrastive(impl, target)(**inputs)
    assert (loss.dtype, logits.dtype) == (torch.float32, torch.bfloat16)
    for dtype in (torch.float64, torch.float16):
        loss, logits = contrastive(impl, target)(**{name: tensor.to(dtype) for name, tensor in inputs.items()})
        assert (loss.dtype, logits.dtype) == (dtype, dtype)


@pytest.mark.parametrize("impl", PATHS)
def test_empty_batch_works(impl):
    case = Case(0, 2, 4, 5, 6, pointwise=3)
    results = run_with_gradients(contrastive(impl, case.target(), reduction="sum"), case.inputs())
    assert results["output 0"] == 0
    assert results["output 1"].shape == (0, 2, 5, 6)
    assert results["gradient of features"].shape == (0, 4, 5, 6)
    loss, _ = contrastive(impl, case.target(8, 8))(**case.inputs())
    assert torch.isnan(loss)


def test_only_features_and_maps_of_the_logits_size_are_kept_for_backward():
    case = Case(2, 1, 64, 32, 32, pointwise=64)
    kept = {}
    leaves = {name: tensor.requires_grad_() for name, tensor in case.inputs().items()}
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.setdefault(t.data_ptr(), t), lambda t: t):
        contrastive("torch", case.target(64, 64))(**leaves)
    assert sum(tensor.nbytes for tensor in kept.values()) < 1.15 * leaves["features"].nbytes


BAD_INPUT = {
    "target must be \\(2, 2, H', W'\\)": {"target": torch.zeros(2, 1, 5, 4)},
    "target must be \\(2, 2, H', W'\\), got \\(3, 2": {"target": torch.zeros(3, 2, 5, 4)},
    "target must have pixels": {"target": torch.zeros(2, 2, 0, 4)},
    "target is on meta": {"target": torch.zeros(2, 2, 5, 4, device="meta")},
    "reduction must be one of mean, sum, none, got 'average'": {"reduction": "average"},
    "pos_weight must broadcast": {"pos_weight": torch.ones(3)},
    "pos_weight must broadcast to the logits": {"pos_weight": torch.ones(1, 2, 2, 5, 4)},
    "pos_weight is on meta": {"pos_weight": torch.ones(4, device="meta")},
    "ignore_mask must be \\(2, 2, H', W'\\)": {"ignore_mask": torch.zeros(2, 5, 4, dtype=torch.bool)},
    "kernel must be": {"kernel": torch.zeros(1, 2, 7, 3, 3)},
}


@pytest.mark.parametrize("message", list(BAD_INPUT))
def test_bad_input_names_the_argument(message):
    with pytest.raises(ValueError, match=message):
        text_to_pixel_contrastive_loss(**({"target": CASE.target()} | CASE.inputs() | BAD_INPUT[message]))


@pytest.mark.parametrize("name", ["target", "ignore_mask"])
def test_data_of_a_wrong_dtype_is_refused_by_name(name):
    arguments = {"target": CASE.target()} | CASE.inputs() | {name: torch.zeros(CASE.logits_shape, dtype=torch.int64)}
    with pytest.raises(TypeError, match=f"{name} must be"):
        text_to_pixel_contrastive_loss(**arguments)
