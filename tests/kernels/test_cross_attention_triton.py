"""The fused cross-attention kernels, on a GPU or under Triton's interpreter: published values, the same bits."""

from __future__ import annotations

import os

import pytest
import torch
import triton
import triton.language as tl
from bounds import assert_path_same, assert_same, run_with_gradients
from cross_attention_cases import Case, masked_formula
from operator_cases import poison
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils.flop_counter import FlopCounterMode

HAS_GPU = torch.cuda.is_available()
if not HAS_GPU and os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("needs a CUDA device, or TRITON_INTERPRET=1 to run the kernels on a CPU", allow_module_level=True)

from fastris.kernels import cross_attention as kernels  # noqa: E402
from fastris.kernels.common import drop_bits  # noqa: E402

DEVICE = "cuda" if HAS_GPU else "cpu"
DTYPES = [torch.float32, torch.float16, *([torch.bfloat16] if HAS_GPU else [])]
SMALL = Case(2, 3, 4, 32, 2, real=(4, 2))
DROPPING = Case(1, 33, 5, 64, 2, real=(4,))
ODD_DROPPING = Case(2, 3, 4, 66, 2, real=(4, 3))  # a row's last draw serves two channels
WIDE_DROPPING = Case(1, 2, 2, 576, 2, real=(2,))  # float32 tiles whose masks fill more than one word
WIDEST_DROPPING = Case(1, 2, 2, 1056, 2, real=(2,))  # and more than both, so that they are drawn again


def inputs_of(case: Case, scale: float = 1.0) -> dict[str, torch.Tensor]:
    return {name: tensor.to(DEVICE) for name, tensor in case.inputs(scale).items()}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_extreme_logits_of_one_sample_stay_exact(dtype):
    case = Case(2, 7, 5, 32, 2, real=(5, 3))
    inputs = inputs_of(case)
    inputs["text"][1] *= 4000.0  # logits of +-1e4
    assert_path_same(case.call("triton"), case.call("reference"), inputs, dtype)


def test_all_masked_text_row_stays_finite_and_equals_the_torch_path():
    case = Case(2, 5, 4, 32, 2, real=(4, 0))
    results, expected = (run_with_gradients(case.call(impl), inputs_of(case)) for impl in ("triton", "torch"))
    for name, value in results.items():
        assert torch.isfinite(value).all(), name
        torch.testing.assert_close(value, expected[name], rtol=1e-4, atol=1e-5, msg=name)


@pytest.mark.parametrize(("batch", "rows"), [(0, 5), (2, 0)])
def test_empty_batch_or_map_gives_an_empty_answer(batch, rows):
    case = Case(batch, rows, 4, 64, 2, real=(4,) * batch)
    results = run_with_gradients(case.call("triton"), inputs_of(case))
    assert results["output 0"].shape == (batch, rows, 64)
    assert not results["gradient of post_norm_weight"].any()


def layouts(x: torch.Tensor) -> dict[str, torch.Tensor]:
    return {
        "sequence first": x.transpose(0, 1).contiguous().transpose(0, 1),
        "channels first": x.transpose(1, 2).contiguous().transpose(1, 2),
        "expanded": x[:1].expand(x.shape[0], -1, -1),
    }


@pytest.mark.parametrize("layout", ["sequence first", "channels first", "expanded"])
def test_any_memory_layout_of_pixels_and_upstream_gradient_works(layout):
    case, inputs = SMALL, inputs_of(SMALL)
    x, upstream = (layouts(tensor)[layout] for tensor in (inputs["x"], torch.randn_like(inputs["x"])))

    def run(x, upstream):
        leaf = x.detach().requires_grad_()
        output = case.call("triton")(**{**inputs, "x": leaf})
        return output, torch.autograd.grad(output, leaf, upstream)[0]

    output, gradient = run(x, upstream)
    expected_output, expected_gradient = run(x.contiguous(), upstream.contiguous())
    assert torch.equal(output, expected_output)
    assert torch.equal(gradient, expected_gradient)
    assert layout != "sequence first" or output.stride() == x.stride()


def test_with_dropout_every_element_is_written_and_every_run_gives_the_same_bits(monkeypatch):
    case = DROPPING
    function = case.call("triton", dropout=0.2, attention_dropout=0.2, training=True)
    torch.manual_seed(5)
    first = run_with_gradients(function, inputs_of(case))
    poison(monkeypatch)
    torch.manual_seed(5)
    second = run_with_gradients(function, inputs_of(case))
    for name, value in second.items():
        assert torch.equal(value, first[name]), name


@pytest.mark.parametrize(("dropout", "attention_dropout"), [(0.0, 0.3), (0.4, 0.0), (0.4, 0.3)])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_dropout_equals_the_formula_under_the_kernels_masks(dropout, attention_dropout, dtype):
    assert_formula_under_masks(DROPPING, dropout, attention_dropout, dtype)


@pytest.mark.parametrize(
    "case", [ODD_DROPPING, WIDE_DROPPING, pytest.param(WIDEST_DROPPING, marks=pytest.mark.slow)], ids=str
)
def test_masks_are_the_same_at_any_width_in_both_passes(case):
    assert_formula_under_masks(case, 0.4, 0.3, torch.float32)


def assert_formula_under_masks(case: Case, dropout: float, attention_dropout: float, dtype: torch.dtype) -> None:
    inputs = {name: tensor.to(dtype) for name, tensor in inputs_of(case).items()}
    torch.manual_seed(3)
    ours = case.call("triton", dropout=dropout, attention_dropout=attention_dropout, training=True)
    results = run_with_gradients(ours, inputs)
    torch.manual_seed(3)
    seeds = torch.randint(2**62, (2,), dtype=torch.int64, device=DEVICE)
    shape = case.batch, case.heads, case.words, case.dim
    masks = kernels.dropout_masks(seeds, shape, case.rows, dropout, attention_dropout)
    formula = masked_formula(case, *masks, attention_dropout, dropout)
    truth = run_with_gradients(formula, {name: tensor.double() for name, tensor in inputs.items()})
    published = run_with_gradients(formula, inputs)
    for name, value in results.items():
        assert_same(value, published[name], truth[name], name)


@pytest.mark.parametrize("dropout", [0.1, 0.5])
def test_dropout_masks_are_bernoulli_and_independent(dropout):
    seeds = torch.tensor([7, 11], device=DEVICE)
    weights, branch = kernels.dropout_masks(seeds, (2, 4, 16, 64), 67, dropout, dropout)
    for mask in (weights.double() - (1 - dropout), branch.double() - (1 - dropout)):
        deviation = (dropout * (1 - dropout) / mask.numel()) ** 0.5
        assert abs(mask.mean()) < 5 * deviation
        for axis in range(mask.ndim):
            product = mask.narrow(axis, 1, mask.shape[axis] - 1) * mask.narrow(axis, 0, mask.shape[axis] - 1)
            assert abs(product.mean()) < 5 * dropout * (1 - dropout) / product.numel() ** 0.5, axis
        for distance in (2, 3, 4):  # four neighbours come of one draw
            product = mask[..., distance:] * mask[..., :-distance]
            assert abs(product.mean()) < 5 * dropout * (1 - dropout) / product.numel() ** 0.5, distance
    assert not torch.equal(branch, kernels.dropout_masks(seeds + 1, (2, 4, 16, 64), 67, dropout, dropout)[1])


@triton.jit
def _bits_kernel(bits_ptr, first):
    place = tl.arange(0, 64)
    tl.store(bits_ptr + place, drop_bits(7, first.to(tl.int64) + place, 0.5))


def test_masks_do_not_repeat_past_two_to_the_32_draws():
    first, second = (torch.empty(64, dtype=torch.int32, device=DEVICE) for _ in range(2))
    _bits_kernel[(1,)](first, 3)
    _bits_kernel[(1,)](second, 3 + 2**32)
    assert (first == second).float().mean() < 0.3  # one in sixteen by chance


def test_dropping_everything_leaves_the_residual():
    inputs = inputs_of(DROPPING)
    output = DROPPING.call("triton", dropout=1.0, attention_dropout=1.0, training=True)(**inputs)
    assert torch.equal(output, inputs["x"])


def operands(case: Case) -> tuple:
    """Arguments of the fused operator: x, positions, keys, key bias, values and the vectors."""
    inputs = inputs_of(case)
    heads = case.batch, case.heads, case.words
    generator = torch.Generator().manual_seed(1)
    shapes = {"keys": (*heads, case.dim), "key_bias": heads, "values": (*heads, case.dim), "affine": (5, case.dim)}
    made = [torch.randn(shape, generator=generator).to(DEVICE) for shape in shapes.values()]
    return tuple(tensor.requires_grad_() for tensor in (inputs["x"], inputs["positions"], *made))


def test_operators_pass_opcheck():
    case = Case(2, 5, 16, 32, 2)
    arguments = operands(case)
    seeds = torch.tensor([1, 2], device=DEVICE)
    torch.library.opcheck(torch.ops.fastris.cross_attention, (*arguments, seeds, 0.2, 0.1, 1e-5))
    x, positions, keys, _, values, affine = (tensor.detach() for tensor in arguments)
    _, weights, statistics = torch.ops.fastris.cross_attention(*(t.detach() for t in arguments), None, 0.0, 0.0, 1e-5)
    branch = torch.ops.fastris.cross_attention_branch_backward
    torch.library.opcheck(branch, (x, weights, values, affine, statistics, None, 0.0, 0.0))
    query = torch.ops.fastris.cross_attention_query_backward
    for need_d_query in (False, True):
        torch.library.opcheck(query, (x, x, positions, keys, affine, statistics, weights, need_d_query))


def test_fullgraph_compiled_equals_eager_and_a_new_length_in_the_bucket_compiles_nothing():
    counter = CompileCounterWithBackend("aot_eager")

    @torch.compile(fullgraph=True, backend=counter, dynamic=True)
    def compiled(**tensors):
        return Case(2, 3, 1, 32, 2).call("triton")(**tensors)

    compilations = []
    for words in (5, 9):
        case = Case(2, 3, words, 32, 2)
        results = run_with_gradients(compiled, inputs_of(case))
        for name, want in run_with_gradients(case.call("triton"), inputs_of(case)).items():
            torch.testing.assert_close(results[name], want, rtol=0, atol=1e-5, msg=name)
        compilations.append(counter.frame_count)
    assert compilations[0] == compilations[-1]


def test_flops_count_the_absorbed_products():
    case, inputs = SMALL, inputs_of(SMALL)
    with FlopCounterMode(display=False) as counter:
        output = case.call("triton")(**inputs)
    bucket = 16
    fold = 2 * case.batch * case.words * case.dim * (4 * case.dim + 1)
    assert counter.get_total_flops() == fold + 4 * output.numel() * case.heads * bucket
