"""Freed memory is used again instead of being mapped anew; counted in page faults, which no busy machine changes."""

from __future__ import annotations

import ctypes
import subprocess
import sys

import pytest

from fastris.runtime.host_memory import keep_freed_memory

COUNT_FAULTS = """
import resource, sys, torch
from fastris.runtime.host_memory import keep_freed_memory
if sys.argv[1] == "keep":
    assert keep_freed_memory()
count = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(12):  # the heap grows for a while until every block has found its place
    torch.ones(16 * 2**20)
before = count()
for _ in range(5):
    torch.ones(16 * 2**20)
print(count() - before)
"""


def faults(mode: str) -> int:
    done = subprocess.run([sys.executable, "-c", COUNT_FAULTS, mode], capture_output=True, text=True, check=True)
    return int(done.stdout)


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "mallopt"), reason="the C library is not glibc")
def test_large_tensors_of_a_loop_find_the_pages_of_the_ones_before():
    assert faults("keep") < faults("default") / 10


def test_another_allocator_is_left_alone(monkeypatch):
    monkeypatch.setattr(ctypes, "CDLL", lambda name: object())
    assert keep_freed_memory() is False
