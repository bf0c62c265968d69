"""What every operator promises, on each of its fast paths: one contract, held on the problems of operator_cases.

Under Triton's interpreter (TRITON_INTERPRET=1) and on a GPU the kernels go through it as well.
"""

from __future__ import annotations

import os
from collections.abc import Callable

import pytest
import torch
from bounds import assert_path_same, run_with_gradients
from operator_cases import LAYOUTS, PROBLEMS, Problem, poison
from torch import Tensor

from fastris.operators import OPERATORS

ON_GPU = torch.cuda.is_available()
WITH_KERNELS = ON_GPU or os.environ.get("TRITON_INTERPRET") == "1"
LOW = [torch.float16, *([torch.bfloat16] if ON_GPU or not WITH_KERNELS else [])]  # the interpreter has no bfloat16
PATHS = ("torch", "triton") if WITH_KERNELS else ("torch",)


def each(kept: Callable[[Problem], bool], paths: tuple[str, ...] = PATHS) -> pytest.MarkDecorator:
    """Every path with every problem that is ``kept``."""
    rows = [
        pytest.param(impl, problem, id=f"{problem}-{impl}")
        for impl in paths
        for problem in PROBLEMS
        if kept(problem) and (problem.kernels or impl != "triton")
    ]
    return pytest.mark.parametrize(("impl", "problem"), rows)


EVERY = each(lambda problem: True)
THOROUGH = each(lambda problem: problem.thorough)


def inputs_for(impl: str, problem: Problem, dtype: torch.dtype | None = None) -> dict[str, Tensor]:
    """The problem's inputs, in float32 for the kernels and float64 else, unless ``dtype`` is given."""
    dtype = dtype or exact_dtype(impl)
    device = "cuda" if impl == "triton" and ON_GPU else "cpu"
    made = problem.make()
    return {k: v.to(device, dtype if v.is_floating_point() else None) for k, v in made.items()}


def exact_dtype(impl: str) -> torch.dtype:
    return torch.float32 if impl == "triton" else torch.float64


def largest_error(impl: str, problem: Problem) -> float:
    return 1e-5 if impl == "triton" else problem.exact


def assert_equal(
    results: dict[str, Tensor], expected: dict[str, Tensor], bits: bool = True, exact: float = 0.0
) -> None:
    """The same results under the same names: bit by bit, or within ``exact`` of each one's scale."""
    assert results.keys() == expected.keys()
    for name, want in expected.items():
        got = results[name]
        assert (got.shape, got.dtype) == (want.shape, want.dtype), name
        if bits:
            assert torch.equal(got.nan_to_num(7e7), want.nan_to_num(7e7)), name
        elif want.numel():
            error, scale = (got - want).abs().max(), want.abs().max()
            assert error <= exact * scale, f"{name}: error {error:.2e} of scale {scale:.2e}"


def test_every_operator_has_problems_of_every_kind():
    for kind in ("thorough", "gradcheck"):
        assert {problem.operator for problem in PROBLEMS if getattr(problem, kind)} == set(OPERATORS), kind
    with_kernels = {operator.name for operator in OPERATORS.values() if operator.kernels}
    assert {problem.operator for problem in PROBLEMS if problem.kernels and problem.thorough} == with_kernels
    assert len({str(problem) for problem in PROBLEMS}) == len(PROBLEMS)


@EVERY
def test_values_and_gradients_are_the_published_ones_in_float64_and_float32(impl, problem, monkeypatch):
    poison(monkeypatch)  # an element that nothing writes is seen, too
    function, published = problem.call(impl), problem.call("reference")
    for dtype in {exact_dtype(impl), torch.float32}:
        assert_path_same(function, published, inputs_for(impl, problem, dtype), dtype)
    if impl == "torch":
        results, expected = (run_with_gradients(f, inputs_for(impl, problem)) for f in (function, published))
        assert_equal(results, expected, bits=False, exact=problem.exact)


@pytest.mark.parametrize("dtype", LOW, ids=str)
@each(lambda problem: not problem.few)
def test_low_precision_loses_no_more_than_the_published_formula(impl, problem, dtype):
    draws = 2 if impl == "triton" and not ON_GPU else None
    assert_path_same(problem.call(impl), problem.call("reference"), inputs_for(impl, problem, dtype), dtype, draws)


@pytest.mark.parametrize("problem", [problem for problem in PROBLEMS if problem.gradcheck], ids=str)
def test_published_gradients_are_those_of_finite_differences(problem):
    inputs = inputs_for("torch", problem)
    learnt = {name: inputs.pop(name).requires_grad_() for name in set(inputs) - set(problem.data)}
    function = problem.call("reference")

    def positional(*values: Tensor):
        return function(**inputs, **dict(zip(learnt, values, strict=True)))

    assert torch.autograd.gradcheck(positional, tuple(learnt.values()))


@pytest.mark.parametrize("layout", LAYOUTS)
@THOROUGH
def test_any_memory_layout_gives_the_same_numbers(impl, problem, layout):
    for dtype in {exact_dtype(impl), torch.float32}:
        inputs = inputs_for(impl, problem, dtype)
        laid = {name: LAYOUTS[layout](value) if value.ndim > 1 else value for name, value in inputs.items()}
        assert_path_same(problem.call(impl), problem.call("reference"), laid, dtype)


@THOROUGH
def test_one_sample_expanded_over_the_batch_gives_the_same_numbers(impl, problem):
    inputs = inputs_for(impl, problem)
    inputs |= {name: inputs[name][:1].expand_as(inputs[name]) for name in problem.samples if name in inputs}
    assert_path_same(problem.call(impl), problem.call("reference"), inputs, exact_dtype(impl))


@THOROUGH
def test_any_memory_layout_of_the_upstream_gradient_gives_the_same_numbers(impl, problem):
    inputs = inputs_for(impl, problem)

    def gradients(lay: Callable[[Tensor], Tensor], dense: bool) -> dict[str, Tensor]:
        leaves = {k: v.detach().requires_grad_(k not in problem.data) for k, v in inputs.items()}
        outputs = outputs_of(problem.call(impl)(**leaves))
        generator = torch.Generator().manual_seed(3)
        upstream = [torch.randn(o.shape, generator=generator, dtype=torch.float64).to(o) for o in outputs]
        upstream = [lay(g) if g.ndim > 1 else g for g in upstream]
        wanted = [v for v in leaves.values() if v.requires_grad]
        found = torch.autograd.grad(outputs, wanted, [g.contiguous() if dense else g for g in upstream])
        return dict(zip([k for k, v in leaves.items() if v.requires_grad], found, strict=True))

    for lay in (lambda x: x.flatten()[0].expand_as(x), LAYOUTS["dimensions reversed"], LAYOUTS["channels last"]):
        results, expected = (gradients(lay, dense) for dense in (False, True))
        assert_equal(results, expected, bits=False, exact=largest_error(impl, problem))


@pytest.mark.parametrize("dtype", LOW, ids=str)
@THOROUGH
def test_autocast_answers_in_the_published_dtype_and_accuracy(impl, problem, dtype):
    inputs = inputs_for(impl, problem, torch.float32)
    assert_path_same(problem.call(impl), problem.call("reference"), inputs, torch.float32, autocast=dtype)


@THOROUGH
def test_empty_batch_gives_empty_outputs_and_zero_gradients(impl, problem):
    inputs = inputs_for(impl, problem)
    whole = outputs_of(problem.call(impl)(**inputs))
    batch = len(inputs[problem.samples[0]])
    inputs |= {name: inputs[name][:0] for name in problem.samples if name in inputs}
    results, expected = (run_with_gradients(problem.call(path), inputs) for path in (impl, "reference"))
    assert_equal(results, expected)
    for index, output in enumerate(whole):
        shape = tuple(output.shape)
        assert results[f"output {index}"].shape == ((0, *shape[1:]) if shape[:1] == (batch,) else shape)
    assert not any(value.any() for name, value in results.items() if name.startswith("gradient"))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@THOROUGH
def test_a_value_that_is_not_finite_stays_in_its_sample(impl, problem, value):
    inputs = inputs_for(impl, problem)
    clean = run_with_gradients(problem.call(impl), inputs)
    of_samples = {"output 0", "output 1", *(f"gradient of {name}" for name in problem.samples)}
    batch = len(inputs[problem.samples[0]])
    others = [index for index in range(batch) if index != 1]
    for name in set(problem.samples) & {k for k, v in inputs.items() if v.is_floating_point()}:
        spoilt = inputs[name].clone()
        spoilt[(1,) + (0,) * (spoilt.ndim - 1)] = value
        results = run_with_gradients(problem.call(impl), inputs | {name: spoilt})
        outputs = [result for key, result in results.items() if key.startswith("output")]
        assert not all((o[1] if o.ndim and len(o) == batch else o).isfinite().all() for o in outputs), name
        for key in of_samples & results.keys() if not problem.coupled else ():
            if clean[key].ndim and len(clean[key]) == batch:
                assert torch.equal(results[key][others], clean[key][others]), f"{name} spoils {key}"


@THOROUGH
def test_every_run_gives_the_same_bits(impl, problem):
    for dtype in {exact_dtype(impl), torch.float32}:
        inputs = inputs_for(impl, problem, dtype)
        assert_equal(*(run_with_gradients(problem.call(impl), inputs) for _ in range(2)))


@THOROUGH
def test_gradients_come_alone_as_they_come_together(impl, problem):
    inputs = inputs_for(impl, problem)
    together = run_with_gradients(problem.call(impl), inputs)
    for name in set(inputs) - set(problem.data):
        alone = {k: v.detach().requires_grad_(k == name) for k, v in inputs.items()}
        outputs = outputs_of(problem.call(impl)(**alone))
        generator = torch.Generator().manual_seed(0)
        upstream = [torch.randn(o.shape, generator=generator, dtype=torch.float64).to(o) for o in outputs]
        reached = [(o, g) for o, g in zip(outputs, upstream, strict=True) if o.requires_grad]
        ends, upstream = zip(*reached, strict=True)
        (gradient,) = torch.autograd.grad(ends, alone[name], upstream)
        assert torch.equal(gradient, together[f"gradient of {name}"]), name


@THOROUGH
def test_nothing_is_kept_without_gradients(impl, problem):
    kept = []
    leaves = {k: v.requires_grad_(v.is_floating_point()) for k, v in inputs_for(impl, problem).items()}
    with torch.no_grad(), torch.autograd.graph.saved_tensors_hooks(kept.append, lambda x: x):
        outputs = outputs_of(problem.call(impl)(**leaves))
    assert not kept and all(output.grad_fn is None for output in outputs)


@each(lambda problem: problem.thorough, paths=("reference", *PATHS))
def test_compiled_without_graph_breaks_equals_eager(impl, problem):
    function = problem.call(impl)
    torch.compiler.reset()  # each compiles afresh, and none is refused for what others left behind
    backend = "eager" if impl == "reference" else "aot_eager"  # which asks our own operators for their shapes
    compiled = torch.compile(function, fullgraph=True, backend=backend, dynamic=False)
    results, expected = (run_with_gradients(f, inputs_for(impl, problem)) for f in (compiled, function))
    assert_equal(results, expected, bits=False, exact=largest_error(impl, problem))


def outputs_of(result: Tensor | tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return result if isinstance(result, tuple) else (result,)
