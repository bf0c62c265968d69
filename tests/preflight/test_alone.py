"""A proof disturbs nobody, and nobody disturbs a proof."""

from __future__ import annotations

import os
import random
import signal
import time

import numpy as np
import pytest
import torch

from fastris.dispatch import requested_impl, use_impl
from fastris.preflight.alone import run_alone
from fastris.runtime import float16_sums

CPU = torch.device("cpu")


def surroundings() -> dict[str, object]:
    """All that a caller may have set, and a proof must neither see nor change."""
    return {
        "autocast": torch.is_autocast_enabled("cpu"),
        "grad": torch.is_grad_enabled(),
        "inference": torch.is_inference_mode_enabled(),
        "dtype": torch.get_default_dtype(),
        "device": torch.get_default_device(),
        "deterministic": torch.get_deterministic_debug_mode(),
        "float16 sums": float16_sums._get(),
        "path": requested_impl(),
        "functorch": torch._C._are_functorch_transforms_active(),
        "modes": torch._C._len_torch_dispatch_stack(),
    }


@pytest.fixture
def fresh():
    """What a process has set from the start."""
    return surroundings()


def test_proof_sees_nothing_of_its_caller_and_leaves_all_as_it_was(fresh):
    seen = []

    def proof(device, dtype):
        seen.append(surroundings())
        torch.manual_seed(99)
        torch.rand(7)

    before_dtype = torch.get_default_dtype()
    try:
        torch.set_default_dtype(torch.float64)
        torch.set_deterministic_debug_mode("warn")
        torch.manual_seed(1)
        with (
            torch.autocast("cpu", torch.bfloat16),
            torch.inference_mode(),
            torch.device("meta"),
            use_impl("reference"),
        ):
            before, drawn = surroundings(), torch.get_rng_state()
            run_alone(proof, CPU, torch.float32)
            assert surroundings() == before
            assert torch.equal(torch.get_rng_state(), drawn)
    finally:
        torch.set_default_dtype(before_dtype)
        torch.set_deterministic_debug_mode("default")
    assert before != fresh and seen == [fresh]


def test_error_of_a_proof_reaches_the_caller_who_finds_all_as_it_was():
    def proof(device, dtype):
        torch.rand(3)
        raise KeyError(device, dtype)

    states = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()
    with pytest.raises(KeyError, match="float16"):
        run_alone(proof, CPU, torch.float16)
    assert states == (random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist())


@pytest.mark.parametrize("late", [0.0, 0.2])
def test_ctrl_c_waits_for_the_proof_so_that_all_is_as_it_was(late):
    def proof(device, dtype):
        time.sleep(late)
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(0.2)
        torch.manual_seed(99)

    torch.manual_seed(1)
    drawn = torch.get_rng_state()
    with pytest.raises(KeyboardInterrupt):
        run_alone(proof, CPU, torch.float32)
    time.sleep(0.3)
    assert torch.equal(torch.get_rng_state(), drawn)


def test_proof_may_differentiate_where_its_caller_may_not():
    def proof(device, dtype):
        x = torch.ones(2, dtype=dtype, requires_grad=True)
        assert torch.autograd.grad((x * x).sum(), x)[0].tolist() == [2.0, 2.0]

    with torch.no_grad():
        run_alone(proof, CPU, torch.float32)
