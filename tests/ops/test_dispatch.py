"""Which path runs is decided in one place, for a call, a block of code or a process, and the reason is given."""

from __future__ import annotations

import asyncio
import contextvars
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator

import pytest
import torch

from fastris import dispatch
from fastris.dispatch import chosen_paths, requested_impl, resolve, triton_obstacle, use_impl
from fastris.ops import upsample2x_conv3x3

CPU = torch.device("cpu")


def test_auto_takes_the_torch_path_on_a_cpu():
    assert resolve("cross_attention", CPU, torch.float32) == "torch"


def test_block_chooses_for_its_code_and_restores_even_after_an_exception():
    with use_impl("reference"):
        assert requested_impl() == "reference"
        with pytest.raises(KeyError), use_impl("torch"):
            assert requested_impl() == "torch"
            raise KeyError
        assert requested_impl() == "reference"
    assert requested_impl() == "auto"


def test_argument_wins_over_the_block():
    with use_impl("reference"):
        assert resolve("cross_attention", CPU, torch.float32, "torch") == "torch"


def test_block_does_not_reach_other_threads():
    seen = []
    with use_impl("reference"):
        thread = threading.Thread(target=lambda: seen.append(requested_impl()))
        thread.start()
        thread.join()
    assert seen == ["auto"]


def interleaved(look: Callable[[], object]) -> list[tuple[str, object]]:
    """What ``look`` answers in two asyncio tasks of one thread, each in a block of its own, by turns."""
    seen = []

    async def task(impl: str) -> None:
        with use_impl(impl):
            for _ in range(3):
                seen.append((impl, look()))
                await asyncio.sleep(0)

    async def both() -> None:
        await asyncio.gather(task("reference"), task("torch"))

    asyncio.run(both())
    return seen


def test_interleaved_tasks_of_one_thread_each_keep_their_own_choice():
    seen = interleaved(requested_impl)
    assert [impl for impl, _ in seen] == ["reference", "torch"] * 3, "the tasks must take turns"
    assert all(asked == impl for impl, asked in seen)
    assert requested_impl() == "auto"


def test_task_and_worker_thread_started_in_a_block_follow_it():
    async def ask() -> str:
        return requested_impl()

    async def main() -> list[str]:
        with use_impl("reference"):
            task = asyncio.create_task(ask())
            in_thread = await asyncio.to_thread(requested_impl)
        return [await task, in_thread, requested_impl()]

    assert asyncio.run(main()) == ["reference", "reference", "auto"]


def test_task_that_fails_or_is_cancelled_in_its_block_leaves_the_others_alone():
    async def stay() -> str:
        with use_impl("torch"):
            await asyncio.sleep(0.05)
            return requested_impl()

    async def fail() -> None:
        with use_impl("reference"):
            await asyncio.sleep(0)
            raise KeyError

    async def wait() -> None:
        with use_impl("reference"):
            await asyncio.sleep(60)

    async def main() -> list[object]:
        tasks = [asyncio.create_task(work()) for work in (stay, fail, wait)]
        await asyncio.sleep(0.01)
        tasks[2].cancel()
        return [*await asyncio.gather(*tasks, return_exceptions=True), requested_impl()]

    stayed, failed, cancelled, after = asyncio.run(main())
    assert stayed == "torch" and isinstance(failed, KeyError) and isinstance(cancelled, asyncio.CancelledError)
    assert after == "auto"


def in_block(impl: str) -> Iterator[str]:
    with use_impl(impl):
        yield requested_impl()
        yield requested_impl()


def test_blocks_of_generators_may_be_left_in_any_order():
    first, second = in_block("reference"), in_block("torch")
    assert [next(first), next(second)] == ["reference", "torch"]
    first.close()
    assert [requested_impl(), next(second)] == ["torch", "torch"]
    second.close()
    assert requested_impl() == "auto"


def test_generator_closed_in_another_context_changes_nothing_there():
    generator = in_block("reference")
    contextvars.copy_context().run(next, generator)
    with use_impl("torch"):
        generator.close()
        assert requested_impl() == "torch"
    assert requested_impl() == "auto"


def test_unknown_name_lists_the_valid_ones():
    with pytest.raises(ValueError, match="auto, reference, torch, triton, got 'cuda'"), use_impl("cuda"):
        pass
    with pytest.raises(ValueError, match="impl must be one of"):
        resolve("cross_attention", CPU, torch.float32, "fast")


def test_triton_that_cannot_run_is_an_error_with_its_reason(monkeypatch):
    monkeypatch.setattr(dispatch, "_interpreting", False)
    with pytest.raises(RuntimeError, match=r'impl="triton" cannot run: .*(on cpu|not installed)'):
        resolve("cross_attention", CPU, torch.float32, "triton")


def test_float64_and_interpreted_bfloat16_are_refused_with_their_reasons(monkeypatch):
    assert "not in float64" in triton_obstacle(CPU, torch.float64)
    monkeypatch.setattr(dispatch, "_interpreting", True)
    monkeypatch.setattr(dispatch, "_missing_triton", None)
    assert "bfloat16" in triton_obstacle(CPU, torch.bfloat16)
    assert triton_obstacle(CPU, torch.float16) is None


def test_missing_triton_leaves_auto_working(monkeypatch):
    monkeypatch.setattr(dispatch, "_missing_triton", "Triton is not installed (pip install triton)")
    assert resolve("cross_attention", torch.device("cuda"), torch.float32) == "torch"
    with pytest.raises(RuntimeError, match="pip install triton"):
        resolve("cross_attention", torch.device("cuda"), torch.float32, "triton")


@pytest.mark.slow
def test_environment_variable_chooses_for_the_process():
    code = "from fastris.dispatch import requested_impl; print(requested_impl())"
    for value, expected in (("reference", "reference"), ("", "auto")):
        environment = {**os.environ, "FASTRIS_IMPL": value}
        result = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
        assert result.stdout.strip() == expected, result.stderr
    environment["FASTRIS_IMPL"] = "quick"
    result = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert "FASTRIS_IMPL must be one of" in result.stderr


def test_explanation_covers_every_operator_and_gives_a_reason():
    rows = chosen_paths("cpu")
    assert [operator for operator, _, _ in rows] == list(dispatch.OPERATORS)
    assert all(path in ("reference", "torch", "triton") and reason for _, path, reason in rows)
    with use_impl("reference"):
        assert all(path == "reference" for _, path, _ in chosen_paths("cpu"))


@pytest.mark.skipif(
    not dispatch._compiles_functions, reason="before PyTorch 2.15 compiled code takes the published formula"
)
def test_compiled_function_follows_the_block_it_is_called_in():
    def double_or_negate(x):
        return 2 * x if resolve("cross_attention", x.device, x.dtype) == "torch" else -x

    compiled = torch.compile(double_or_negate, fullgraph=True, backend="eager")
    x = torch.full((2,), 3.0)
    assert compiled(x)[0] == 6
    with use_impl("reference"):
        assert compiled(x)[0] == -3
    assert compiled(x)[0] == 6


needs_watching = pytest.mark.skipif(
    not dispatch._compiles_functions, reason="before PyTorch 2.15 compiled code follows the process's last block"
)


def negative_by_the_reference(x):
    return 2 * x if resolve("cross_attention", x.device, x.dtype) == "torch" else -x


@needs_watching
def test_compiled_function_follows_the_task_and_the_thread_that_call_it():
    compiled = torch.compile(negative_by_the_reference, fullgraph=True, backend="eager")
    expected = {"reference": -3.0, "torch": 6.0}
    seen = interleaved(lambda: compiled(torch.full((2,), 3.0))[0].item())
    assert all(value == expected[impl] for impl, value in seen)
    in_thread = []
    with use_impl("reference"):
        thread = threading.Thread(target=lambda: in_thread.append(compiled(torch.full((2,), 3.0))[0].item()))
        thread.start()
        thread.join()
    assert in_thread == [expected["torch"]]


@needs_watching
def test_block_inside_a_compiled_function_counts_each_time_it_is_called():
    def both(x):
        with use_impl("reference"):
            inside = negative_by_the_reference(x)
        return inside, negative_by_the_reference(x)

    compiled, x = torch.compile(both, fullgraph=True, backend="eager"), torch.full((2,), 3.0)
    for _ in range(2):
        assert [result[0].item() for result in compiled(x)] == [-3.0, 6.0]
    with use_impl("reference"):
        assert [result[0].item() for result in compiled(x)] == [-3.0, -3.0]
    assert requested_impl() == "auto"


@pytest.mark.parametrize("impl", ["reference", "torch"])
def test_backward_in_another_thread_and_block_follows_the_forward(impl):
    def gradient(differentiate: Callable[[torch.Tensor], None]) -> torch.Tensor:
        x = torch.linspace(-1, 1, 32).reshape(1, 2, 4, 4).requires_grad_()
        with use_impl(impl):
            loss = upsample2x_conv3x3(x, torch.ones(3, 2, 3, 3)).square().sum()
        differentiate(loss)
        return x.grad

    def elsewhere(loss: torch.Tensor) -> None:
        with use_impl("torch" if impl == "reference" else "reference"):
            thread = threading.Thread(target=loss.backward)
            thread.start()
            thread.join()

    assert torch.equal(gradient(elsewhere), gradient(torch.Tensor.backward))


@pytest.mark.parametrize(("name", "count"), [("cuda", 0), ("cuda:0", 0), ("cuda:7", 2)])
def test_gpu_that_is_not_there_breaks_nothing_where_its_tensors_are_fake(monkeypatch, name, count):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: count > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
    monkeypatch.setattr(dispatch, "_missing_triton", None)
    monkeypatch.setattr(dispatch, "_device_obstacles", {})
    device = torch.device(name)
    assert resolve("cross_attention", device, torch.float32) == "torch"
    assert "PyTorch finds no" in {operator: why for operator, _, why in chosen_paths(device)}["cross_attention"]
    with pytest.raises(RuntimeError, match=r'impl="triton" cannot run: PyTorch finds no'):
        resolve("cross_attention", device, torch.float32, "triton")
