"""The operators with kernels as GPUs are used: in CUDA graphs, on streams, on a second device, from several threads.

What the contract of the operators promises holds on a GPU, too; ``test_contract.py`` takes it there by itself.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from operator_cases import PROBLEMS, Problem
from torch import Tensor

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
WITH_KERNELS = [problem for problem in PROBLEMS if problem.kernels and problem.thorough]
NOISE = {torch.float32: 1e-5, torch.bfloat16: 2**-6}
each = pytest.mark.parametrize("problem", WITH_KERNELS, ids=str)


class Step:
    """Forward and backward pass of a problem by its kernels, always on the same tensors."""

    def __init__(self, problem: Problem, device: str = "cuda", dtype: torch.dtype = torch.float32):
        self.function: Callable = problem.call("triton")
        self.inputs = {}
        for name, value in problem.make().items():
            moved = value.to(device, dtype if value.is_floating_point() else None)
            self.inputs[name] = moved.requires_grad_(name not in problem.data)
        self.learnt = [value for value in self.inputs.values() if value.requires_grad]
        generator = torch.Generator().manual_seed(0)
        shapes = [(output.shape, output) for output in self.outputs()]
        self.upstream = [torch.randn(shape, generator=generator).to(output) for shape, output in shapes]

    def outputs(self) -> tuple[Tensor, ...]:
        result = self.function(**self.inputs)
        return result if isinstance(result, tuple) else (result,)

    def __call__(self) -> list[Tensor]:
        outputs = self.outputs()
        gradients = torch.autograd.grad(outputs, self.learnt, self.upstream)
        return [*(output.detach() for output in outputs), *gradients]


def assert_same(results: list[Tensor], expected: list[Tensor]) -> None:
    """But for rounding: cuBLAS promises the same bits on one stream alone, and outside of graphs."""
    assert len(results) == len(expected)
    for result, want in zip(results, expected, strict=True):
        error, scale = (result.double() - want.double()).abs(), want.double().abs()
        assert error.numel() == 0 or error.max() <= NOISE[want.dtype] * scale.max()


@each
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_cuda_graph_computes_what_its_inputs_hold_when_it_is_replayed(problem, dtype):
    step = Step(problem, dtype=dtype)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(2):
            step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    graph.replay()
    assert_same(captured, step())
    with torch.no_grad():
        for value in step.learnt:
            value.mul_(0.5)
    graph.replay()
    assert_same(captured, step())


@each
def test_work_on_another_stream_waits_for_nothing_else_and_is_right(problem):
    step = Step(problem)
    expected = step()
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    torch.cuda._sleep(100_000_000)  # the usual stream is busy for some 50 ms
    with torch.cuda.stream(stream):
        results = step()
    stream.synchronize()
    assert_same(results, expected)
    torch.cuda.synchronize()


@each
def test_threads_with_streams_of_their_own_do_not_disturb_each_other(problem):
    expected = Step(problem)()
    torch.cuda.synchronize()

    def work(number: int) -> list[Tensor]:
        with torch.cuda.stream(torch.cuda.Stream()):
            results = [Step(problem)() for _ in range(3)][-1]
            torch.cuda.current_stream().synchronize()
        return results

    with ThreadPoolExecutor(4) as threads:
        for results in threads.map(work, range(4)):
            assert_same(results, expected)


@each
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs a second CUDA device")
def test_tensors_on_a_device_that_is_not_the_current_one_are_computed_there(problem):
    expected = Step(problem, "cuda:0")()
    with torch.cuda.device(0):
        results = Step(problem, "cuda:1")()
    assert {str(result.device) for result in results} == {"cuda:1"}
    if torch.cuda.get_device_name(0) == torch.cuda.get_device_name(1):
        assert_same([result.to("cuda:0") for result in results], expected)


@each
def test_memory_is_given_back_after_every_step(problem):
    step = Step(problem)
    step()
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    for _ in range(3):
        step()
    torch.cuda.synchronize()
    assert torch.cuda.memory_allocated() == before
