"""Words that read pixels where the contract cannot see: padding by each rule, silent biases, what is refused."""

from __future__ import annotations

import pytest
import torch
from operator_cases import word_pixel_problem
from torch import Tensor

from fastris import reference
from fastris.bench.counter import saved_storages
from fastris.ops import word_pixel_attention
from fastris.reference import WordPixelWeights
from fastris.testing import run_with_gradients

SIZES = {"covariance": (60, 6, 8), "maps": (5, 8, 6)}
"""Pixels, their width and the words', by the form of the fast path that they take."""
SILENT = ("key_bias", "value_bias", "out_bias")
BOTH = pytest.mark.parametrize("form", SIZES)
RULES = pytest.mark.parametrize("rule", ["masked", "intended"])


def inputs_of(form: str, real: tuple[int, ...] = (3, 4), words: int = 5) -> dict[str, Tensor]:
    """A problem's inputs in float64, and the biases that it leaves out."""
    made = word_pixel_problem(*SIZES[form], real, "masked", words).make()
    made |= {name: torch.linspace(-1, 1, SIZES[form][2]) for name in SILENT}
    return {name: value.double() if value.is_floating_point() else value for name, value in made.items()}


def call(impl: str, rule: str):
    def function(words: Tensor, pixels: Tensor, valid: Tensor, **weights: Tensor) -> Tensor:
        return word_pixel_attention(words, pixels, valid, WordPixelWeights(**weights), rule, impl=impl)

    return function


def hold(inputs: dict[str, Tensor], rule: str) -> dict[str, Tensor]:
    """The fast path's results, which equal the published ones to 1e-10."""
    found, expected = (run_with_gradients(call(impl, rule), inputs) for impl in ("torch", "reference"))
    assert found.keys() == expected.keys() and len(found) == 15
    for name, want in expected.items():
        error = (found[name] - want).abs().max()
        assert error <= 1e-10 * max(1.0, float(want.abs().max())), f"{name}: {error}"
    return found


@RULES
@BOTH
def test_biases_that_change_nothing_have_gradients_of_exactly_zero(form, rule):
    inputs = inputs_of(form)
    found = hold(inputs, rule)
    assert not any(found[f"gradient of {name}"].any() for name in SILENT)
    assert all(found[f"gradient of {name}"].any() for name in ("query_bias", "project_bias", "key_weight"))
    moved = inputs | {name: inputs[name] + 3 for name in SILENT}
    assert torch.equal(call("torch", rule)(**moved), found["output 0"])


@BOTH
def test_masked_padding_changes_nothing_whatever_it_holds(form):
    inputs = inputs_of(form)
    valid = inputs["valid"]
    one = hold(inputs, "masked")
    other = inputs | {"words": torch.where(valid[..., None], inputs["words"], 9.0)}
    two = call("torch", "masked")(**other)
    assert torch.equal(two[valid], one["output 0"][valid])
    shorter = inputs | {"words": inputs["words"][:, :4], "valid": valid[:, :4]}
    torch.testing.assert_close(call("torch", "masked")(**shorter), one["output 0"][:, :4], rtol=0, atol=1e-13)


@RULES
@BOTH
def test_one_word_and_nothing_but_padding_are_what_the_formula_says(form, rule):
    inputs = inputs_of(form, real=(1, 0))
    found = hold(inputs, rule)
    deaf = torch.nn.functional.gelu(inputs["mixed_bias"])  # what a word says that hears nothing
    nothing = [found["output 0"][1]] + ([found["output 0"][0]] if rule == "masked" else [])
    for rows in nothing:
        torch.testing.assert_close(rows, deaf.expand_as(rows), rtol=0, atol=1e-13)
    assert not found["gradient of pixels"][1].any()


@RULES
def test_a_single_pixel_says_nothing(rule):
    inputs = inputs_of("maps")
    inputs["pixels"] = inputs["pixels"][:, :1]
    found = hold(inputs, rule)
    assert not found["gradient of pixels"].any()


@RULES
@BOTH
def test_extreme_scores_pick_one_pixel_and_stay_finite(form, rule):
    inputs = inputs_of(form)
    inputs["query_weight"] = 100 * inputs["query_weight"]
    assert hold(inputs, rule)["output 0"].isfinite().all()


@RULES
@BOTH
def test_a_mean_far_from_zero_costs_no_more_accuracy_than_as_published(form, rule):
    inputs = inputs_of(form)
    shift = torch.randn(inputs["pixels"].shape[2], generator=torch.Generator().manual_seed(5)).double()
    inputs["pixels"] = inputs["pixels"] + 30 * shift
    truth = hold(inputs, rule)
    low = {name: value.float() if value.is_floating_point() else value for name, value in inputs.items()}
    fast, published = (run_with_gradients(call(impl, rule), low) for impl in ("torch", "reference"))
    for name in truth.keys() - {f"gradient of {each}" for each in SILENT}:
        ours, theirs = ((each[name] - truth[name]).abs().max() / truth[name].abs().max() for each in (fast, published))
        assert ours <= max(1e-5, 2 * theirs), (name, ours, theirs)


def test_released_is_computed_as_written_by_every_path():
    inputs = inputs_of("covariance")
    own = WordPixelWeights(**{name: inputs[name] for name in WordPixelWeights._fields})
    expected = reference.word_pixel_attention(inputs["words"], inputs["pixels"], inputs["valid"], own, "released")
    assert torch.equal(call("torch", "released")(**inputs), expected)


@BOTH
def test_it_can_be_differentiated_once(form):
    inputs = {k: v.requires_grad_() if v.is_floating_point() else v for k, v in inputs_of(form).items()}
    output = call("torch", "masked")(**inputs).square().sum()
    (gradient,) = torch.autograd.grad(output, inputs["pixels"], create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()


def test_few_bytes_are_kept():
    problem = word_pixel_problem(900, 24, 96, (9,), "masked")
    inputs, kept = problem.make(), {}
    learnt = {name: value.requires_grad_() for name, value in inputs.items() if name not in problem.data}
    for impl in ("torch", "reference"):
        with saved_storages(value for name, value in learnt.items() if name not in problem.samples) as saved:
            problem.call(impl)(**inputs)
        kept[impl] = sum(saved.values())
    assert kept["torch"] <= 0.15 * kept["reference"], kept


@pytest.mark.parametrize("impl", ["reference", "torch"])
@pytest.mark.parametrize(
    ("message", "change"),
    [
        (r"pixels must be \(2, N, C\), got", lambda x: x | {"pixels": x["pixels"][:1]}),
        (r"words must not be empty", lambda x: x | {"words": x["words"][:, :0]}),
        (r"pixels must not be empty", lambda x: x | {"pixels": x["pixels"][:, :0]}),
        (r"words must be \(B, L, T\)", lambda x: x | {"words": x["words"][0]}),
        (r"key_weight must be \(8, 6\)", lambda x: x | {"key_weight": x["key_weight"].T}),
        (r"out_bias must be \(8\)", lambda x: x | {"out_bias": x["out_bias"][:3]}),
        (r"pixels is torch.float32 but", lambda x: x | {"pixels": x["pixels"].float()}),
        (r"valid must be \(2, 5\), got \(2, 4\)", lambda x: x | {"valid": x["valid"][:, :4]}),
        (r"valid must be a tensor, got list", lambda x: x | {"valid": [1, 1]}),
    ],
)
def test_what_does_not_fit_is_named(message, change, impl):
    with pytest.raises((TypeError, ValueError), match=f"word_pixel_attention: {message}"):
        call(impl, "masked")(**change(inputs_of("covariance")))


def test_an_unknown_rule_is_named_with_those_there_are():
    with pytest.raises(ValueError, match="rule must be one of masked, intended, released, got 'compat'"):
        call("torch", "compat")(**inputs_of("covariance"))
