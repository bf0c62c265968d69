"""The operators' own tests are attacked: off by a millionth in any one place, every operator fails them in float64."""

from __future__ import annotations

import importlib
import inspect
import pkgutil
import typing
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any
from unittest import mock

import pytest
import torch
from bounds import assert_path_same, assert_same
from cross_attention_cases import Case as CrossCase
from cross_attention_cases import masked_formula
from operator_cases import (
    GIVEN,
    bidirectional_problem,
    coord_problem,
    cross_attention_problem,
    deformable_problem,
    feed_forward_problem,
    few_query_problem,
    pixel_contrast_problem,
    pixel_word_problem,
    pointwise_problem,
    region_contrast_problem,
    self_attention_problem,
    similarity_problem,
    upsample_problem,
    upsampled_bce_problem,
    word_pixel_problem,
    word_problem,
)
from operator_cases import Problem as ContractProblem
from similarity_cases import Case, similarity
from torch import Tensor

import fastris.ops
from fastris import dispatch, reference
from fastris.ops.contrastive import text_to_pixel_contrastive_loss
from fastris.ops.cpu import streamed_taps
from fastris.ops.cpu.dropout_attention import attention_with_dropout, dropout_mask
from fastris.ops.upsample_conv import upsample2x_conv3x3_stats

OFF = 1 + 1e-6
UNCALLED = {f"fastris.ops.{name}" for name in ("proofs", "proving", "magnet_proofs", "tiles")}
"""Modules that no operator calls."""
MODULES = [
    importlib.import_module(found.name)
    for found in pkgutil.walk_packages(fastris.ops.__path__, "fastris.ops.")
    if not found.ispkg and found.name not in UNCALLED
]


@dataclass
class Problem:
    """A fast path, the published formula and what both are asked; ``data`` are the inputs that have no gradient."""

    fast: Callable
    published: Callable
    inputs: dict[str, Tensor]
    data: tuple[str, ...] = ()
    options: dict[str, Any] = field(default_factory=dict)

    def check(self, fast: Callable | None = None) -> None:
        """The assertion of the operator's own tests."""
        assert_path_same(fast or self.fast, self.published, self.inputs, torch.float64)

    def assert_seen(self, what: str, fast: Callable | None = None) -> None:
        """Fail unless :meth:`check` finds a wrong number."""
        try:
            self.check(fast)
        except AssertionError as error:
            assert " of scale " in str(error), f"{what}: not a wrong number but {error}"
        else:
            pytest.fail(f"{what} may be off by {OFF - 1:.0e}, and nothing is seen")


def of_contract(problem: ContractProblem) -> Problem:
    """A problem of the operators' contract."""
    return Problem(problem.call("torch"), problem.call("reference"), problem.make(), problem.data)


def cross_with_dropout() -> Problem:
    case, rates = CrossCase(2, 5, 3, 32, 2, real=(3, 2)), {"dropout": 0.4, "attention_dropout": 0.3}

    def fast(**inputs: Tensor) -> Tensor:
        torch.manual_seed(3)
        return case.call("torch", **rates, training=True)(**inputs)

    def published(**inputs: Tensor) -> Tensor:
        torch.manual_seed(3)
        dropped = torch.empty(2, 2, 3, 5, dtype=torch.bool).bernoulli_(0.3)  # the order in memory
        kept = torch.empty(2, 5, 32, dtype=torch.bool).bernoulli_(0.6)
        return masked_formula(case, ~dropped.permute(0, 3, 1, 2), kept, 0.3, 0.4)(**inputs)

    return Problem(fast, published, case.inputs())


def attention_under_its_own_mask() -> Problem:
    inputs = {name: torch.randn(1, 2, 5, 4) for name in ("query", "key", "value")}

    def fast(**inputs: Tensor) -> Tensor:
        torch.manual_seed(7)
        return attention_with_dropout(**inputs, dropout=0.3)

    def published(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        torch.manual_seed(7)
        mask = dropout_mask(1, 2, 5, 5, 0.3, int(torch.randint(2**62, (1,)).item()))
        return (torch.softmax(query @ key.mT / 2, -1) * mask / 0.7) @ value

    return Problem(fast, published, inputs)


def pixels_against_text(layout: torch.memory_format = torch.contiguous_format, stream: bool = False) -> Problem:
    inputs = Case(2, 2, 6, 5, 4, pointwise=7).inputs()
    inputs["features"] = inputs["features"].double().contiguous(memory_format=layout)

    def fast(**tensors: Tensor) -> Tensor:
        with mock.patch.object(streamed_taps, "LEAST_BYTES", 0 if stream else streamed_taps.LEAST_BYTES):
            return similarity("torch")(**tensors)

    return Problem(fast, similarity("reference"), inputs)


def loss(reduction: str, weighted: bool) -> Problem:
    case = Case(2, 2, 6, 5, 4, pointwise=7)
    inputs = case.inputs() | {"target": case.target()}
    options: dict[str, Any] = {"reduction": reduction}
    if weighted:
        inputs["pos_weight"] = torch.rand(2, 1, 1)
        options["ignore_mask"] = case.ignore_mask()
    fast, published = (partial(text_to_pixel_contrastive_loss, impl=impl, **options) for impl in ("torch", "reference"))
    return Problem(fast, published, inputs, ("target", "pos_weight"))


def statistics() -> Problem:
    def published(**inputs: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        output = reference.upsample2x_conv3x3(**inputs)
        var, mean = torch.var_mean(output, dim=(0, 2, 3), correction=0)
        return output, mean, var

    inputs = upsample_problem(2, 3, 4, 3, 2).make()
    return Problem(partial(upsample2x_conv3x3_stats, impl="torch"), published, inputs)


def regions_against_shifted_centres() -> Problem:
    """A centre is normalised, so that its length alone is seen by nothing: here the inputs are what is added to it."""
    problem = of_contract(region_contrast_problem(4, 5, 6, 7, pointwise=6))

    def shifted(call: Callable) -> Callable:
        return lambda centres, **others: call(centres=centres + torch.arange(6), **others)

    return Problem(shifted(problem.fast), shifted(problem.published), problem.inputs, problem.data)


def pixels_from_elsewhere() -> Problem:
    """Pixels and sentence are normalised, so that their length is seen by nothing: the inputs are what is added."""
    problem = of_contract(pixel_contrast_problem(4, 5, 6, 7))

    def moved(call: Callable) -> Callable:
        return lambda features, sentence, **others: call(
            features=features + torch.arange(5)[:, None, None], sentence=sentence + torch.arange(5), **others
        )

    return Problem(moved(problem.fast), moved(problem.published), problem.inputs, problem.data)


PROBLEMS: dict[str, Callable[[], Problem]] = {
    "cross_attention": lambda: of_contract(cross_attention_problem(CrossCase(2, 5, 3, 32, 2, real=(3, 2)))),
    "cross_attention, projected": lambda: of_contract(cross_attention_problem(CrossCase(2, 5, 3, 16, 8, real=(3, 2)))),
    "cross_attention, dropout": cross_with_dropout,
    "self_attention": lambda: of_contract(self_attention_problem(2, 5, 16, 4, learnt=True)),
    "attention_with_dropout": attention_under_its_own_mask,
    "feed_forward": lambda: of_contract(feed_forward_problem(5, dim=6, hidden=10)),
    "text_to_pixel_similarity": pixels_against_text,
    "text_to_pixel_similarity, channels last": lambda: pixels_against_text(torch.channels_last),
    "text_to_pixel_similarity, streamed": lambda: pixels_against_text(stream=True),
    "text_to_pixel_similarity, normed": lambda: of_contract(similarity_problem(Case(2, 1, 6, 5, 4), GIVEN)),
    "text_to_pixel_contrastive_loss": lambda: loss("mean", weighted=False),
    "text_to_pixel_contrastive_loss, weighted": lambda: loss("none", weighted=True),
    "upsample2x_conv3x3": lambda: of_contract(upsample_problem(2, 3, 4, 3, 2)),
    "upsample2x_conv3x3_stats": statistics,
    "pointwise_conv_cat": lambda: of_contract(pointwise_problem((2, 3), (3, 2))),
    "coord_conv": lambda: of_contract(coord_problem(3, 3, padding=1)),
    "bidirectional_attention": lambda: of_contract(bidirectional_problem(30, 4, 3, (3, 2), project=2, eps=0.1)),
    "bidirectional_attention, maps": lambda: of_contract(bidirectional_problem(5, 8, 6, (3, 2), eps=0.1)),
    "few_query_attention": lambda: of_contract(few_query_problem(2, 2, 9, 16, 6, 4)),
    "region_contrast": regions_against_shifted_centres,
    "pixel_contrast": pixels_from_elsewhere,
    "upsampled_bce_with_logits": lambda: of_contract(upsampled_bce_problem(2, 3, (4, 5), (9, 14))),
    "word_attention": lambda: of_contract(word_problem(2, 5, 32, 2, (7, 3), real=(3, 2))),
    "word_attention, projected": lambda: of_contract(word_problem(2, 5, 16, 8, (7, 3), real=(3, 2))),
    "pixel_word_attention": lambda: of_contract(pixel_word_problem(20, 6, 5, (3, 2))),
    "pixel_word_attention, queries": lambda: of_contract(pixel_word_problem(4, 6, 5, (3, 2))),
    "word_pixel_attention": lambda: of_contract(word_pixel_problem(20, 4, 5, (3, 2), "masked", scale=0.01)),
    "word_pixel_attention, maps": lambda: of_contract(word_pixel_problem(5, 8, 6, (3, 2), "intended", scale=0.01)),
    "multiscale_deformable_attention": lambda: of_contract(deformable_problem(2, 5, 2, 3, ((3, 4), (2, 2)), 2)),
}
"""Operator, or operator and way through it -> a small problem. Every operator has to be here."""

INSIDE = {
    "cross_attention": """
        cross_attention._absorbed absorbed_attention.absorb absorbed_attention._attention_weights
        absorbed_attention.absorbed_attention absorbed_attention._AbsorbedAttention.forward
        absorbed_attention._AbsorbedAttention.backward absorbed_attention._query absorbed_attention._gather
        absorbed_attention._kept absorbed_attention._softmax_backward absorbed_attention._norm_backward
        absorbed_attention._by_head""",
    "cross_attention, projected": "cross_attention._projected",
    "cross_attention, dropout": "absorbed_attention.kept_scale",
    "self_attention": "self_attention._attend dropout_bits.dropout",
    "attention_with_dropout": """
        dropout_attention._DropoutAttention.forward dropout_attention._DropoutAttention.backward
        dropout_attention._softmax""",
    "feed_forward": "feed_forward._FeedForward.forward feed_forward._FeedForward.backward feed_forward._norm",
    "text_to_pixel_similarity": "similarity.fold similarity.shifted_tap_sum",
    "text_to_pixel_similarity, streamed": """
        streamed_taps.streamed_tap_sum streamed_taps._StreamedTapSum.forward streamed_taps._StreamedTapSum.backward""",
    "text_to_pixel_contrastive_loss": "contrastive._pixel_loss contrastive._reduce",
    "upsample2x_conv3x3": """
        upsample_conv._UpsampleConv.forward upsample_conv._UpsampleConv.backward upsample_conv._cast
        upsample_conv._forward upsample_conv._backward upsample_conv._add_product upsample_conv._tap_matrices
        upsample_conv._axis_matrices upsample_conv._axis_map upsample_conv._lines upsample_conv._store""",
    "pointwise_conv_cat": "pointwise_conv._sum pointwise_conv._up2",
    "bidirectional_attention": """
        absorbed_scores.score_and_read absorbed_scores._ThroughCovariance.forward
        absorbed_scores._ThroughCovariance.backward absorbed_scores.product absorbed_scores.split_product
        absorbed_scores._mapped
        absorbed_scores._centred absorbed_scores._read absorbed_scores._read_backward
        absorbed_scores._variance_backward absorbed_scores._outer bidirectional_attention._absorb
        absorbed_scores.with_silent absorbed_scores._Silent.forward absorbed_scores._Silent.backward""",
    "bidirectional_attention, maps": """
        absorbed_scores._ThroughMaps.forward absorbed_scores._ThroughMaps.backward absorbed_scores._scale""",
    "few_query_attention": """
        few_query_attention._absorb few_query_attention._project few_query_attention._product
        few_query_attention._gradient_of_pixels
        few_query_attention._PooledPixels.forward few_query_attention._PooledPixels.backward""",
    "region_contrast": """
        region_contrast._unit_means region_contrast._RegionMeans.forward region_contrast._RegionMeans.backward
        region_contrast._rows_times region_contrast._two_vectors""",
    "pixel_contrast": """
        pixel_contrast._PixelContrast.forward pixel_contrast._PixelContrast.backward pixel_contrast._combined
        pixel_contrast._norms_and_means pixel_contrast._cosines pixel_contrast._sums
        pixel_contrast._shares pixel_contrast._in_turns pixel_contrast._log_sum pixel_contrast._slopes""",
    "upsampled_bce_with_logits": """
        upsampled_bce._samples upsampled_bce._StreamedLoss.forward upsampled_bce._StreamedLoss.backward
        upsampled_bce._group_loss""",
    "word_attention": """
        word_attention._absorbed word_attention._absorbed_words absorbed_attention.bare_attention
        absorbed_attention._BareAttention.forward
        absorbed_attention._BareAttention.backward""",
    "word_attention, projected": "word_attention._projected",
    "pixel_word_attention": """
        pixel_word_attention._answers pixel_word_products.attend_and_mix pixel_word_products._ThroughGram.forward
        pixel_word_products._ThroughGram.backward pixel_word_products.linear pixel_word_products._listen
        pixel_word_products._listen_backward
        pixel_word_products._heard pixel_word_products._with_ones pixel_word_products._mix_backward
        pixel_word_products._slope pixel_word_products._flat_product pixel_word_products._outer
        pixel_word_products._mapped pixel_word_products._moment""",
    "pixel_word_attention, queries": """
        pixel_word_products._ThroughQuery.forward pixel_word_products._ThroughQuery.backward
        pixel_word_products._unit""",
    "word_pixel_attention": "absorbed_scores.read_normed",
    "multiscale_deformable_attention": """
        deformable_samples.sampled_sum deformable_samples._SampledSum.forward deformable_samples._SampledSum.backward
        deformable_samples._scale deformable_samples._origins deformable_samples._table deformable_samples._inner
        deformable_samples._find deformable_samples._softmax deformable_samples._summed
        deformable_samples.sampled_gradients deformable_samples._sample_gradients
        deformable_samples._value_gradient""",
}
"""Problem -> the functions within its fast path whose results are scaled: folded tensors, tables, gradients."""

HARMLESS = {
    "dropout_attention.dropout_mask": "true or false",
    "dropout_bits.dropped": "true or false",
    "upsample_conv._empty_like": "not yet written",
    "similarity.reference_similarity": "the published formula",
    "few_query_attention._pooled_by_kernels": "the Triton path, which has its proof",
    "word_attention._by_kernels": "the Triton path, which has its proof",
    "few_query_attention._largest": "divided by before and multiplied with after; in low precision alone",
    "deformable_samples._each_point": "repeats numbers; where they come from is attacked",
    "similarity.normed_first": "part of every path, by the published formula; its numbers are attacked as inputs",
    "similarity.norm_rows": "for the kernels alone, whose proofs and tests attack it",
    "contrastive._counted_pixels": "part of every path; target and pos_weight are attacked as inputs",
    "contrastive._checked_pos_weight": "as _counted_pixels",
    "absorbed_scores._rounded": "of half precision alone, which is held to looser bounds",
    "absorbed_scores._largest": "as _rounded",
    "multiscale_deformable_attention.gradients_of_sums": "for stacks of layers; hands on what is attacked by itself",
    "similarity._sum_of_shifted": "of exported programs alone, which are held against the model as they are written",
}
"""What else computes tensors, and why it is not attacked."""

ATTACKED = {name: problem for problem, names in INSIDE.items() for name in names.split()}


def operators() -> set[str]:
    """Public functions of ``fastris.ops`` that choose a path, and those that compute under a mask of their own."""
    found = {name for module in MODULES for name, function in functions_of(module) if "impl" in parameters(function)}
    return found | set(fastris.ops.__all__) | set(dispatch.OPERATORS) | {"attention_with_dropout"}


def insides() -> dict[str, Callable]:
    """Every other function of ``fastris.ops`` that returns tensors or numbers, or fills tensors, by module and name."""
    found = {}
    for module in MODULES:
        short = module.__name__.rpartition(".")[2]
        for name, function in functions_of(module):
            hint = typing.get_type_hints(function).get("return")
            checks = name.lstrip("_").startswith("check")
            if (hint is type(None) and not checks) or holds_numbers(hint):
                found[f"{short}.{name}"] = function
        for name, kind in vars(module).items():
            if (
                inspect.isclass(kind)
                and issubclass(kind, torch.autograd.Function)
                and kind.__module__ == module.__name__
            ):
                found |= {f"{short}.{name}.{method}": getattr(kind, method) for method in ("forward", "backward")}
    return {name: function for name, function in found.items() if name.rpartition(".")[2] not in operators()}


def functions_of(module: Any) -> Iterator[tuple[str, Callable]]:
    """The functions that a module defines, by name."""
    for name, value in vars(module).items():
        if inspect.isfunction(value) and value.__module__ == module.__name__:
            yield name, value


def parameters(function: Callable) -> set[str]:
    return set(inspect.signature(function).parameters)


def holds_numbers(hint: Any) -> bool:
    """Whether a return annotation is of tensors or floats, alone or in tuples."""
    if hasattr(hint, "_fields"):
        return any(map(holds_numbers, typing.get_type_hints(hint).values()))
    return hint in (Tensor, float) or any(map(holds_numbers, typing.get_args(hint)))


INSIDES = insides()


def scaled(value: Any) -> Any:
    return value * OFF if isinstance(value, float) or is_real(value) else value


def is_real(value: Any) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point()


class _ScaledGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx, gradient: Tensor) -> Tensor:
        return scaled(gradient)


@contextmanager
def replaced(name: str, wrapper: Callable) -> Iterator[None]:
    """``wrapper(function, *arguments)`` in place of a function of ``fastris.ops``, wherever it was imported to."""
    function = INSIDES[name]
    _, *owner, _ = name.split(".")
    call = partial(wrapper, function)
    places: list[tuple[Any, str, Any]] = [
        (module, at, call) for module in MODULES for at, value in vars(module).items() if value is function
    ]
    if owner:
        module = importlib.import_module(function.__module__)
        places = [(getattr(module, owner[0]), function.__name__, staticmethod(call))]
    with pytest.MonkeyPatch.context() as patch:
        for place in places:
            patch.setattr(*place)
        yield


def changed(values: tuple, index: int) -> tuple:
    return tuple(scaled(value) if at == index else value for at, value in enumerate(values))


def with_result_off(index: int, function: Callable, *arguments: Any) -> Any:
    result = function(*arguments)
    if not isinstance(result, tuple):
        return scaled(result)
    values = changed(result, index)
    return type(result)(*values) if hasattr(result, "_fields") else values


def with_argument_off(index: int, function: Callable, *arguments: Any) -> Any:
    return function(*changed(arguments, index))


def numbers_of(name: str, problem: Problem) -> tuple[Callable, list[int]]:
    """How to set one of a function's numbers off, and the places that hold some in ``problem``.

    They are those of its results; of its arguments, where it fills tensors and returns nothing.
    """
    found: set[int] = set()
    fills = typing.get_type_hints(INSIDES[name]).get("return") is type(None)

    def watch(function: Callable, *arguments: Any) -> Any:
        result = function(*arguments)
        values = arguments if fills else result if isinstance(result, tuple) else (result,)
        found.update(at for at, value in enumerate(values) if isinstance(value, float) or is_real(value))
        return result

    with replaced(name, watch):
        problem.check()
    return with_argument_off if fills else with_result_off, sorted(found)


@pytest.mark.parametrize(
    ("dtype", "tables", "bound"),
    [(torch.float64, False, 1e-10), (torch.float64, True, 1e-6), (torch.float32, False, 1e-5)],
)
def test_the_bound_is_a_fraction_of_the_scale(dtype, tables, bound):
    truth = torch.linspace(-7, 5, 9, dtype=torch.float64)
    hold = partial(assert_same, published=truth.to(dtype), truth=truth, name="x", float32_tables=tables)
    hold((truth + 7 * 0.9 * bound).to(dtype))
    with pytest.raises(AssertionError, match="x: error"):
        hold((truth + 7 * 1.1 * bound).to(dtype))


def test_a_float64_question_may_not_be_answered_in_float32():
    x = {"x": torch.ones(3)}  # exact in both
    with pytest.raises(AssertionError, match=r"output 0: torch\.float32, where .* torch\.float64"):
        assert_path_same(lambda x: x.float() * 2, lambda x: x * 2, x, torch.float64)
    one = torch.ones(3, dtype=torch.float64)
    with pytest.raises(AssertionError, match=r"torch\.float32"):
        assert_same(one.float(), one, one, "x")


@pytest.mark.parametrize("name", PROBLEMS)
def test_nothing_is_found_where_nothing_is_off(name):
    PROBLEMS[name]().check()


@pytest.mark.parametrize("name", PROBLEMS)
def test_an_input_off_by_a_millionth_is_seen(name):
    problem = PROBLEMS[name]()
    for operand in filter(lambda at: is_real(problem.inputs[at]), problem.inputs):
        problem.assert_seen(operand, lambda at=operand, **x: problem.fast(**x | {at: scaled(x[at])}))


@pytest.mark.parametrize("name", PROBLEMS)
def test_a_gradient_off_by_a_millionth_is_seen(name):
    problem = PROBLEMS[name]()
    for operand in problem.inputs.keys() - set(problem.data):
        wrong = lambda at=operand, **x: problem.fast(**x | {at: _ScaledGradient.apply(x[at])})  # noqa: E731
        problem.assert_seen(f"the gradient of {operand}", wrong)


@pytest.mark.parametrize("name", PROBLEMS)
def test_an_output_off_by_a_millionth_is_seen(name):
    problem = PROBLEMS[name]()
    outputs = problem.fast(
        **{key: value.double() if is_real(value) else value for key, value in problem.inputs.items()}
    )
    for index in range(len(outputs) if isinstance(outputs, tuple) else 1):
        problem.assert_seen(f"output {index}", lambda at=index, **x: with_result_off(at, lambda: problem.fast(**x)))


@pytest.mark.parametrize("name", ATTACKED)
def test_a_number_inside_off_by_a_millionth_is_seen(name):
    problem = PROBLEMS[ATTACKED[name]]()
    off, places = numbers_of(name, problem)
    assert places, f"{name} is not called by {ATTACKED[name]}"
    for index in places:
        with replaced(name, partial(off, index)):
            problem.assert_seen(f"number {index} of {name}")


def test_every_operator_is_attacked():
    assert {name.partition(",")[0] for name in PROBLEMS} == operators()


def test_every_function_inside_is_attacked_or_says_why_not():
    assert set(ATTACKED) | set(HARMLESS) == set(insides())
    assert not set(ATTACKED) & set(HARMLESS)


def test_a_new_operator_or_function_must_be_attacked(monkeypatch):
    def new_operator(x: Tensor, *, impl: str = "auto") -> Tensor:
        return x

    def _new_table(x: Tensor) -> tuple[Tensor, float]:
        return x, 1.0

    for function in (new_operator, _new_table):
        function.__module__ = "fastris.ops.pointwise_conv"
        monkeypatch.setattr(fastris.ops.pointwise_conv, function.__name__, function, raising=False)
    with pytest.raises(AssertionError, match="new_operator"):
        test_every_operator_is_attacked()
    with pytest.raises(AssertionError, match="_new_table"):
        test_every_function_inside_is_attacked_or_says_why_not()
