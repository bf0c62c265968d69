"""Shared set-up: test helpers are importable by name, and no test depends on another's random state."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))


@pytest.fixture(scope="session", autouse=True)
def _suite() -> None:
    """One thread, since the tensors are tiny, and no waiting for the disk: no test's files outlive the machine."""
    import torch  # here, since the process that only hands out the tests needs none of it

    torch.set_num_threads(1)
    os.fsync = lambda descriptor: None


@pytest.fixture(autouse=True)
def _fixed_seed() -> None:
    import torch

    torch.manual_seed(0)
