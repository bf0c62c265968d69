"""A proof launches what a step of training and an evaluation launch: the same kernels, tiles, types and options."""

from __future__ import annotations

import os

import pytest
import torch

pytest.importorskip("triton")
pytestmark = pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="the interpreter launches for real")

from fastris.gate import scenarios  # noqa: E402
from fastris.gate.scenarios import Scenario  # noqa: E402
from fastris.kernels.configs import kernel_name  # noqa: E402
from fastris.kernels.launch import Launch, Pointer  # noqa: E402
from fastris.ops import proofs, proving  # noqa: E402
from fastris.testing import run_with_gradients  # noqa: E402


def run_once(fast, published, inputs, dtype, draws, *, autocast=None, rounding=None) -> None:
    """In place of the comparison: what it would run on a GPU, forward and backward."""
    with torch.autocast("cpu", autocast, enabled=autocast is not None):
        run_with_gradients(fast, {name: value.to(dtype) for name, value in inputs.items()})


def build_of(launch: Launch) -> tuple:
    """What Triton compiles anew for: the kernel, its tiles, the types of its pointers and its constants."""
    types = (value.dtype if isinstance(value, Pointer) else value if name.isupper() else None
             for name, value in launch.arguments)  # fmt: skip
    return (kernel_name(launch.kernel), launch.config, *types)


def launched(scenario: Scenario, dtype: torch.dtype) -> set[tuple]:
    return {build_of(launch) for launch in scenarios.launches(scenario, "large", dtype)}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_whatever_training_and_evaluation_launch_is_proved(monkeypatch, dtype):
    monkeypatch.setattr(proving, "INTERPRETED", proving.ON_A_GPU)
    monkeypatch.setattr(proving, "assert_path_same", run_once)
    cpu, proved = torch.device("cpu"), set()
    for proof in proofs.PROOFS.values():
        proved |= launched(Scenario("proof", lambda dtype, proof=proof: proof(cpu, dtype)), dtype)
    names = ["train", "eval", "stage 1", "stage 4", "train pixel decoder", "eval pixel decoder", "train words"]
    for name in (*names, "eval words", "train loss", "MagNet stage 1", "MagNet stage 4"):
        (scenario,) = (each for each in scenarios.SCENARIOS if each.name == name)
        missing = launched(scenario, dtype) - proved
        assert not missing, f"{name}: {sorted(map(str, missing))}"
