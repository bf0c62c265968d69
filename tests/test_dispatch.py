"""Which path runs is decided in one place, for a call, a block of code or a process, and the reason is given."""

from __future__ import annotations

import os
import subprocess
import sys
import threading

import pytest
import torch

from fastris import dispatch
from fastris.dispatch import explain, requested_impl, resolve, triton_obstacle, use_impl

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
    rows = explain("cpu")
    assert [operator for operator, _, _ in rows] == list(dispatch.OPERATORS)
    assert all(path in ("reference", "torch", "triton") and reason for _, path, reason in rows)
    with use_impl("reference"):
        assert all(path == "reference" for _, path, _ in explain("cpu"))


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
