"""Pixels that read words where the contract cannot see: padding, answers that cancel, what is kept and refused."""

from __future__ import annotations

import pytest
import torch
from operator_cases import pixel_word_problem
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from fastris.bench.counter import saved_storages
from fastris.nn.recompute import recomputed
from fastris.ops import pixel_word_attention
from fastris.ops.pixel_word_products import gram_pays
from fastris.reference import PixelWordWeights
from fastris.runtime import cpu_products
from fastris.testing import run_with_gradients

FORMS = {"gram": pixel_word_problem(40, 8, 6, (3, 5)), "queries": pixel_word_problem(5, 8, 6, (3, 5))}
BOTH = pytest.mark.parametrize("problem", FORMS.values(), ids=FORMS)


def inputs_of(problem, dtype: torch.dtype = torch.float64) -> dict[str, Tensor]:
    """The problem's inputs, and the keys' bias that it leaves out."""
    made = problem.make() | {"key_bias": torch.linspace(-1, 1, 8)}
    return {name: value.to(dtype) if value.is_floating_point() else value for name, value in made.items()}


def call(impl: str):
    def function(pixels: Tensor, words: Tensor, valid: Tensor, **weights: Tensor) -> Tensor:
        return pixel_word_attention(pixels, words, valid, PixelWordWeights(**weights), impl=impl)

    return function


def hold(inputs: dict[str, Tensor], bound: float = 1e-10) -> dict[str, Tensor]:
    """The fast path's results, which equal the published ones but for the gradient of a bias that does nothing."""
    found, expected = (run_with_gradients(call(impl), inputs) for impl in ("torch", "reference"))
    assert found.keys() == expected.keys() and len(found) == 19
    for name, want in expected.items():
        error = (found[name] - want).abs().max()
        assert error <= bound * max(1.0, float(want.abs().max())), f"{name}: {error}"
    return found


def test_each_form_is_taken_where_it_costs_less():
    assert [gram_pays(*sizes) for sizes in ((40 * 2, 8), (5 * 2, 8))] == [True, False]
    stages = [(14400, 128), (3600, 256), (900, 512), (225, 1024)]
    assert [gram_pays(n, c) for n, c in stages] == [True, True, False, False]


def test_fewer_pixels_than_words_are_computed_as_published():
    inputs = inputs_of(FORMS["queries"])
    few = inputs | {"pixels": inputs["pixels"][:, :4]}
    one, two = (run_with_gradients(call(impl), few) for impl in ("torch", "reference"))
    assert all(torch.equal(one[name], two[name]) for name in two)
    assert not torch.equal(call("torch")(**inputs), call("reference")(**inputs))


class Products(TorchDispatchMode):
    """Counts oneDNN's products."""

    count = 0

    def __torch_dispatch__(self, function, types, arguments=(), named=None):
        self.count += "_linear_pointwise" in str(function)
        return function(*arguments, **named or {})


@BOTH
def test_selective_checkpoints_keep_onednns_products(monkeypatch, problem):
    if not torch.backends.mkldnn.is_available():
        pytest.skip("PyTorch has no oneDNN here")
    monkeypatch.setattr(cpu_products, "SMALLEST", 0)
    monkeypatch.setattr(cpu_products, "_onednn_wins", lambda: True)
    found, counts = [], []
    for setting in ("none", "pointwise"):
        inputs = {
            name: x.requires_grad_(x.is_floating_point()) for name, x in inputs_of(problem, torch.float32).items()
        }
        out = recomputed([nn.Identity().train()], setting, lambda *x, of=inputs: call("torch")(**of), *inputs.values())
        with Products() as backward:
            out.square().sum().backward()
        found.append([out, *(each.grad for each in inputs.values() if each.requires_grad)])
        counts.append(backward.count)
    assert all(torch.equal(*each) for each in zip(*found, strict=True))
    assert counts[0] == counts[1] > 0


def test_compiled_programs_hold_no_products_of_onednn(monkeypatch):
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    monkeypatch.setattr(cpu_products, "SMALLEST", 0)
    monkeypatch.setattr(cpu_products, "_onednn_wins", lambda: True)
    with Products() as products:
        inputs = inputs_of(FORMS["gram"], torch.float32)
        call("torch")(**inputs | {"pixels": inputs["pixels"].requires_grad_()}).sum().backward()
    assert products.count == 0


@BOTH
def test_the_keys_bias_changes_nothing_and_has_a_gradient_of_exactly_zero(problem):
    inputs = inputs_of(problem)
    found = hold(inputs)
    assert not found["gradient of key_bias"].any() and found["gradient of query_bias"].any()
    assert torch.equal(call("torch")(**inputs | {"key_bias": inputs["key_bias"] + 3}), found["output 0"])


@BOTH
def test_padding_words_have_no_weight_and_no_gradient_whatever_they_hold(problem):
    inputs = inputs_of(problem)
    valid = inputs["valid"]
    spoilt = inputs | {"words": inputs["words"].masked_fill(~valid[..., None], 50.0)}
    one, two = (run_with_gradients(call("torch"), each) for each in (inputs, spoilt))
    gradient = one["gradient of words"]
    assert gradient[valid].all() and not gradient[~valid].any()
    for name, value in one.items():
        assert torch.equal(value, two[name]), name
    shorter = inputs | {"words": inputs["words"][:1, :3], "valid": valid[:1, :3], "pixels": inputs["pixels"][:1]}
    torch.testing.assert_close(call("torch")(**shorter), one["output 0"][:1], rtol=0, atol=1e-13)
    for numbers in (valid.long(), valid.float()):
        assert torch.equal(call("torch")(**inputs | {"valid": numbers}), one["output 0"])


@BOTH
def test_one_word_and_nothing_but_padding_are_what_the_formula_says(problem):
    inputs = inputs_of(problem)
    inputs["valid"] = torch.arange(5) < torch.tensor([[1], [0]])
    found = hold(inputs)
    assert found["gradient of words"][0, 0].any() and not found["gradient of words"][1].any()
    assert found["gradient of pixels"][1].any()  # of what the pixels themselves are
    silent = inputs | {"words": inputs["words"] + 1, "key_bias": inputs["key_bias"] + 1}
    assert torch.equal(call("torch")(**silent)[1], found["output 0"][1])


@BOTH
def test_extreme_scores_pick_one_word_and_stay_finite(problem):
    inputs = inputs_of(problem)
    inputs["key_weight"] = 300 * inputs["key_weight"]
    assert hold(inputs, 1e-9)["output 0"].isfinite().all()


def with_answers_that_cancel(problem) -> dict[str, Tensor]:
    """Two words of one key whose answers are opposite, and large, but for a thousandth: what is read is that."""
    inputs = inputs_of(problem)
    inputs["valid"] = torch.arange(5) < torch.tensor([[2], [2]])
    inputs["words"] = torch.zeros_like(inputs["words"])
    inputs["words"][:, :2, 0] = torch.tensor([1.0, -0.999])
    inputs["key_weight"] = inputs["key_weight"].clone()
    inputs["key_weight"][:, 0] = 0
    return (
        inputs
        | {"value_weight": 30 * inputs["value_weight"], "value_bias": 0 * inputs["value_bias"]}
        | {"out_bias": 0 * inputs["out_bias"]}
    )


@BOTH
def test_answers_that_cancel_lose_the_digits_that_cancel_and_no_more(problem):
    """Answers of 1 and -0.999 are rounded before they cancel, so a rounding counts their sum over their difference.

    A few roundings reach an answer: from weights, words and two short sums. A variance of float32 would make it 34.
    """
    inputs = with_answers_that_cancel(problem)
    truth = hold(inputs)
    low = {name: value.float() if value.is_floating_point() else value for name, value in inputs.items()}
    fast, published = (call(impl)(**low).double() - truth["output 0"] for impl in ("torch", "reference"))
    scale = truth["output 0"].abs().max()
    assert published.abs().max() > 2e-5 * scale
    assert fast.abs().max() <= 4 * torch.finfo(torch.float32).eps * 1.999 / 0.001 * scale


@BOTH
@pytest.mark.parametrize("scale", [0.0, 1e-4, 1e-2])
def test_variances_below_eps_are_what_the_formula_says(problem, scale):
    inputs = inputs_of(problem)
    for name in ("query_weight", "query_bias", "out_weight", "out_bias"):
        inputs[name] = scale * inputs[name]
    hold(inputs)


@BOTH
def test_pixels_far_from_zero_cost_no_more_accuracy_than_as_published(problem):
    inputs = inputs_of(problem)
    inputs["pixels"] = inputs["pixels"] + 30 * torch.randn(8, generator=torch.Generator().manual_seed(5)).double()
    truth = hold(inputs)
    low = {name: value.float() if value.is_floating_point() else value for name, value in inputs.items()}
    fast, published = (run_with_gradients(call(impl), low) for impl in ("torch", "reference"))
    for name in truth.keys() - {"gradient of key_bias"}:
        ours, theirs = ((each[name] - truth[name]).abs().max() / truth[name].abs().max() for each in (fast, published))
        assert ours <= max(1e-5, 2 * theirs), (name, ours, theirs)


@BOTH
def test_it_can_be_differentiated_once(problem):
    inputs = {k: v.requires_grad_() if v.is_floating_point() else v for k, v in inputs_of(problem).items()}
    output = call("torch")(**inputs).square().sum()
    (gradient,) = torch.autograd.grad(output, inputs["pixels"], create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()


@pytest.mark.parametrize(("pixels", "width", "most"), [(1200, 128, 0.34), (250, 128, 0.34)], ids=FORMS)
def test_few_bytes_are_kept(pixels, width, most):
    problem = pixel_word_problem(pixels, width, 24, (9,))
    inputs = problem.make()
    learnt = {name: value.requires_grad_() for name, value in inputs.items() if name not in problem.data}
    kept = {}
    for impl in ("torch", "reference"):
        with saved_storages(value for name, value in learnt.items() if name not in problem.samples) as saved:
            problem.call(impl)(**inputs)
        kept[impl] = sum(saved.values())
    assert kept["torch"] <= most * kept["reference"], kept


def test_dtypes_may_differ_under_autocast():
    inputs = inputs_of(FORMS["gram"], torch.float32)
    inputs["pixels"] = inputs["pixels"].bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        found, expected = (call(impl)(**inputs) for impl in ("torch", "reference"))
    assert found.dtype is expected.dtype is torch.bfloat16


@pytest.mark.parametrize("impl", ["reference", "torch"])
@pytest.mark.parametrize(
    ("message", "change"),
    [
        (r"words must be \(2, L, T\), got", lambda x: x | {"words": x["words"][:1]}),
        (r"words must not be empty", lambda x: x | {"words": x["words"][:, :0]}),
        (r"pixels must not be empty", lambda x: x | {"pixels": x["pixels"][:, :0]}),
        (r"pixels must be \(B, N, C\)", lambda x: x | {"pixels": x["pixels"][0]}),
        (r"key_weight must be \(8, 6\)", lambda x: x | {"key_weight": x["key_weight"].T}),
        (r"out_norm_weight must be \(8\)", lambda x: x | {"out_norm_weight": x["out_weight"]}),
        (r"mixed_bias must be \(8\)", lambda x: x | {"mixed_bias": x["mixed_bias"][:3]}),
        (r"words is torch.float32 but", lambda x: x | {"words": x["words"].float()}),
        (r"valid must be \(2, 5\), got \(2, 4\)", lambda x: x | {"valid": x["valid"][:, :4]}),
        (r"valid must be a tensor, got list", lambda x: x | {"valid": [1, 1]}),
    ],
)
def test_what_does_not_fit_is_named(message, change, impl):
    with pytest.raises((TypeError, ValueError), match=f"pixel_word_attention: {message}"):
        call(impl)(**change(inputs_of(FORMS["gram"])))
