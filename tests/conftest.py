"""Shared set-up: test helpers are importable by name, and no test depends on another's random state."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))
torch.set_num_threads(1)  # the tests' tensors are tiny: a second thread costs more than it brings


@pytest.fixture(autouse=True)
def _fixed_seed():
    torch.manual_seed(0)
