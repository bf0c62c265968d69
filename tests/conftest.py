"""Shared set-up: test helpers are importable by name, and no test depends on another's random state."""

from __future__ import annotations

import os
import signal
import sys
from contextlib import nullcontext
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))


@pytest.fixture(scope="session", autouse=True)
def _suite() -> None:
    """One thread, since the tensors are tiny, and no waiting for the disk: no test's files outlive the machine.

    Ctrl-C interrupts here and in what tests start, though a shell's background jobs begin with it switched off.
    """
    import torch  # here, since the process that only hands out the tests needs none of it

    torch.set_num_threads(1)
    os.fsync = lambda descriptor: None
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(autouse=True)
def _fixed_seed() -> None:
    import torch

    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _nothing_compiled_before() -> None:
    """After another test's sizes, torch.compile makes sizes symbols: a whole model of symbols takes hours to trace."""
    if "torch._dynamo" in sys.modules:
        sys.modules["torch._dynamo"].reset()


@pytest.fixture(autouse=True, scope="session")
def _ieee_float32():
    """On CUDA, convolutions are TF32 by default, which meets no bound of these tests."""
    import torch

    from fastris.runtime.float32_precision import ieee_float32

    with ieee_float32() if torch.cuda.is_available() else nullcontext():
        yield
