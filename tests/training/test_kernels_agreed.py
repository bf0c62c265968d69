"""All processes of a run take the same path: what fails in one is left by all, and told once."""

from __future__ import annotations

import dataclasses
import warnings
from pathlib import Path
from unittest import mock

import pytest
import torch
from pretended_gpu import CPU, pretended_gpu
from process_helpers import run_processes
from training_helpers import parts_of, train_config, val_set

from fastris import dispatch
from fastris.dispatch import resolve, use_impl
from fastris.runtime import distributed
from fastris.training import loop
from fastris.training.paths import agree_on_kernels
from fastris.training.validation import Validation

OPERATORS = [name for name, operator in dispatch.OPERATORS.items() if operator.kernels]


def out_of_memory_in_the_second(operator: str, dtype: torch.dtype) -> None:
    if distributed.rank() == 1 and operator == "cross_attention" and dtype is torch.bfloat16:
        raise torch.OutOfMemoryError("CUDA out of memory")


def paths_of_a_process(impl: str) -> tuple[dict[str, str], list[str]]:
    """What each operator takes in bfloat16, and all notices."""
    with (
        pretended_gpu(out_of_memory_in_the_second),
        use_impl(impl),
        distributed.joined(CPU, 1),
        warnings.catch_warnings(record=True) as told,
    ):
        warnings.simplefilter("always")
        agree_on_kernels(CPU, [torch.bfloat16, torch.float32])
        taken = {name: resolve(name, CPU, torch.bfloat16) for name in OPERATORS}
    return taken, [str(warning.message) for warning in told if "Triton kernels" in str(warning.message)]


def test_kernels_that_fail_in_one_process_are_left_by_all_with_one_notice():
    (main, told), (other, silent) = run_processes(paths_of_a_process, 2, "auto")
    assert main == other == dict.fromkeys(OPERATORS, "triton") | {"cross_attention": "torch"}
    assert len(told) == 1 and "in process 1 of the run there was no memory left" in told[0]
    assert not silent


def test_kernels_that_fail_in_one_process_and_were_asked_for_end_all():
    main, other = run_processes(paths_of_a_process, 2, "triton")
    assert main.startswith('RuntimeError: cross_attention: impl="triton" cannot run: in process 1 of the run there was')
    assert other.startswith("StoppedElsewhere: process 0 of 2 ended the run: RuntimeError: cross_attention")


def with_a_wrong_path_in_the_second(impl: str) -> None:
    with (
        distributed.joined(CPU, 1),
        mock.patch.object(dispatch, "_process_impl", "fast" if distributed.rank() else impl),
    ):
        agree_on_kernels(CPU, [torch.float32])


def test_a_wrong_path_in_one_process_ends_all_and_lets_nobody_wait():
    main, other = run_processes(with_a_wrong_path_in_the_second, 2, "auto")
    assert other.startswith("ValueError: the environment variable FASTRIS_IMPL must be one of")
    assert main.startswith("StoppedElsewhere: process 1 of 2 ended the run: ValueError: the environment variable")


def evaluate_in_the_main_process() -> str:
    with pretended_gpu(), distributed.joined(CPU, 1):
        return resolve("cross_attention", CPU, torch.float32) if distributed.is_main() else "idle"


def test_first_use_in_one_process_alone_waits_for_nobody():
    assert run_processes(evaluate_in_the_main_process, 2) == ["triton", "idle"]


def test_nothing_is_proved_on_a_cpu_or_for_another_path():
    with pretended_gpu() as proofs, use_impl("torch"):
        agree_on_kernels(CPU, [torch.float32])
        assert not proofs.made
    agree_on_kernels(CPU, [torch.float32])


@pytest.mark.parametrize("validated", [False, True])
def test_training_proves_what_it_computes_in_before_its_first_step(tmp_path: Path, monkeypatch, validated):
    class Stop(Exception):
        pass

    def step(*_):
        raise Stop

    monkeypatch.setattr(loop, "train_step", step)
    parts = dataclasses.replace(
        parts_of(train_config(tmp_path, amp="bf16")), validation=Validation(val_set()) if validated else None
    )
    with pretended_gpu() as proofs, pytest.raises(Stop):
        loop.train(parts)
    dtypes = [torch.bfloat16, torch.float32] if validated else [torch.bfloat16]
    assert proofs.made == [(name, dtype) for dtype in dtypes for name in OPERATORS]


def test_training_goes_on_without_a_compiler_with_one_notice(tmp_path):
    def no_compiler(operator, dtype):
        raise RuntimeError("Failed to find C compiler.")

    with pretended_gpu(no_compiler), pytest.warns(UserWarning, match="Triton kernels") as told:
        result = loop.train(parts_of(train_config(tmp_path, max_steps=2, epochs=1)))
    assert result.step == 2
    assert len([warning for warning in told if "Triton kernels" in str(warning.message)]) == 1
