"""Options of ``python -m pytest bench --benchmark-only``."""

from __future__ import annotations

import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("fastris bench")
    group.addoption("--bench-device", default="auto", help="auto, cpu, cuda, cuda:1, ...")
    group.addoption("--bench-dtype", default="float32", choices=["float32", "bfloat16", "float16"])
    group.addoption("--bench-arms", default="", help="comma-separated; without compiled arms on a CPU if empty")
    group.addoption("--bench-sizes", default="auto", choices=["auto", "small", "full"], help="auto: small on a CPU")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if {"case", "arm", "place"} <= set(metafunc.fixturenames):
        from .test_cases import parameters

        metafunc.parametrize(("case", "arm", "place"), parameters(metafunc.config))
