"""The compile gate can fail: a tile too large for a card, and a kernel that spills, are both caught."""

from __future__ import annotations

import os

import pytest
import torch

triton = pytest.importorskip("triton")
pytestmark = pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="the interpreter compiles nothing")

import triton.language as tl  # noqa: E402

from fastris.kernels.configs import SHARED_LIMIT, Config, shared_class  # noqa: E402
from fastris.kernels.gate import GateSpec, build, specs_for  # noqa: E402


@triton.jit
def product(out_ptr, x_ptr, rows, BLOCK: tl.constexpr, STEPS: tl.constexpr):
    index = tl.arange(0, BLOCK)[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :]
    total = tl.zeros((BLOCK, BLOCK), tl.float32)
    for step in range(STEPS):
        x = tl.load(x_ptr + step * BLOCK * BLOCK + index)
        total = tl.dot(x, tl.trans(x), total)
    tl.store(out_ptr + index, total)


def spec(block: int, warps: int) -> GateSpec:
    signature = {"out_ptr": "*fp32", "x_ptr": "*bf16", "rows": "i32"}
    config = Config((("BLOCK", block),), num_warps=warps, num_stages=4)
    return GateSpec("product", product, signature, {"STEPS": 8}, config)


def test_tile_that_fits_passes_with_its_cost_measured():
    result = build(spec(64, 4), 86, torch.bfloat16)
    assert result.fits and 0 < result.shared <= SHARED_LIMIT[86] and result.registers > 0 and result.stack == 0


def test_tile_past_the_shared_memory_of_a_consumer_card_is_caught():
    assert not build(spec(256, 8), 86, torch.bfloat16).fits


def test_spilled_registers_are_caught():
    result = build(spec(256, 4), 90, torch.bfloat16)
    assert result.stack > 0 and not result.fits


def test_missing_type_in_a_spec_is_named():
    broken = GateSpec("product", product, {"out_ptr": "*fp32", "x_ptr": "*bf16"}, {"STEPS": 8}, spec(64, 4).config)
    with pytest.raises(ValueError, match="no type or value for rows"):
        build(broken, 86, torch.bfloat16)


@pytest.mark.parametrize("arch", [86, 90])
def test_every_kernel_file_announces_builds(arch):
    names = {
        spec.name.split("_")[0].split("/")[0] for spec in specs_for(shared_class(SHARED_LIMIT[arch]), torch.bfloat16)
    }
    assert len(names) >= 3
