"""The compile gate builds what is launched, and can fail: a tile too large for a card, and spills, are both caught."""

from __future__ import annotations

import os
from types import SimpleNamespace

import pytest
import torch

triton = pytest.importorskip("triton")
pytestmark = pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="the interpreter compiles nothing")

import triton.language as tl  # noqa: E402

from fastris import dispatch  # noqa: E402
from fastris.gate import builds, command, scenarios  # noqa: E402
from fastris.kernels.configs import SHARED_LIMIT, Config, kernel_name  # noqa: E402
from fastris.kernels.launch import Launch, launch, recording  # noqa: E402
from fastris.operators import OPERATORS  # noqa: E402


@triton.jit
def _product_kernel(out_ptr, x_ptr, rows, BLOCK: tl.constexpr, STEPS: tl.constexpr):
    index = tl.arange(0, BLOCK)[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :]
    total = tl.zeros((BLOCK, BLOCK), tl.float32)
    for step in range(STEPS):
        x = tl.load(x_ptr + step * BLOCK * BLOCK + index)
        total = tl.dot(x, tl.trans(x), total)
    tl.store(out_ptr + index, total)


def product(block: int, warps: int, rows: int = 5) -> Launch:
    config = Config((("BLOCK", block),), num_warps=warps, num_stages=4)
    with recording() as found:
        launch(_product_kernel, (1,), torch.empty(8), torch.empty(8).bfloat16(), rows, STEPS=8, config=config)
    return found[0]


def build(launched: Launch, arch: int) -> builds.Build:
    return builds.compiled("product", launched, arch, torch.bfloat16).build


def test_tile_that_fits_passes_with_its_cost_measured():
    result = build(product(64, 4), 86)
    assert result.fits and 0 < result.shared <= SHARED_LIMIT[86] and result.registers > 0 and result.stack == 0


def test_tile_past_the_shared_memory_of_a_consumer_card_is_caught():
    assert not build(product(256, 8), 86).fits


def test_spilled_registers_are_caught():
    result = build(product(128, 1), 90)
    assert result.stack > 0 and not result.fits


@pytest.mark.parametrize("rows", [1, 5, 32])
def test_integers_are_specialised_as_triton_does_at_launch(rows):
    signature, constants, attributes = builds._specialised(product(64, 4, rows), 86)
    assert signature["out_ptr"] == "*fp32" and signature["x_ptr"] == "*bf16"
    assert (signature["rows"], constants.get("rows")) == (("constexpr", 1) if rows == 1 else ("i32", None))
    assert bool(attributes.get((2,))) == (rows == 32)


@pytest.fixture(scope="module")
def small() -> dict[str, Launch]:
    """What a step and an evaluation of CRIS-RN50 and of AlignFormer launch on a consumer card in bfloat16."""
    return {
        f"{scenario.name}: {kernel_name(each.kernel)}": each
        for scenario in scenarios.SCENARIOS
        if scenario.name in command.BRIEFLY
        for each in scenarios.launches(scenario, "small", torch.bfloat16)
    }


def test_training_launches_every_operator_that_has_kernels(small):
    operators = {name.split(": ")[1].split()[0] for name in small}
    assert operators == {operator.kernels for operator in OPERATORS.values() if operator.kernels}


def test_autocast_leaves_the_residual_in_float32_as_on_cuda(small):
    arguments = dict(small["train: cross_attention scores"].arguments)
    assert arguments["x_ptr"].dtype is torch.float32 and arguments["keys_ptr"].dtype is torch.bfloat16


def test_sentences_are_as_long_as_a_gpu_launches_them_which_trims_nothing(small):
    assert dict(small["eval: cross_attention scores"].arguments)["WORDS"] == 32
    assert dict(small["eval: cross_attention output"].arguments)["COLUMNS"] == 8 * 32


def test_training_wants_no_gradient_of_the_positions(small):
    assert dict(small["train: cross_attention query backward"].arguments)["d_query_ptr"] is None


def test_evaluation_draws_no_dropout_and_has_no_backward(small):
    evaluated = {name: dict(each.arguments) for name, each in small.items() if name.startswith("eval")}
    assert evaluated["eval: cross_attention scores"]["DROPOUT"] == 0
    assert not any("backward" in name or "gradient" in name or "adjoint" in name for name in evaluated)


def test_recomputing_in_the_backward_pass_launches_nothing_new():
    x, text = torch.zeros(1, 20, 64, requires_grad=True), torch.zeros(1, 3, 64)
    weights = [torch.zeros(*shape) for shape in ((64,), (64,), (192, 64), (192,), (64, 64), (64,), (64,), (64,))]

    def attend(x):
        positions = torch.zeros(20, 64), torch.zeros(3, 64)
        weights_ = scenarios.AttentionWeights(*weights)
        return scenarios.cross_attention(x, text, *positions, None, weights_, 4, dropout=0.1, training=True)

    found = []
    for checkpointed in (False, True):
        with dispatch.every_device_has_triton(), dispatch.use_impl("triton"), recording() as launches:
            run = torch.utils.checkpoint.checkpoint(attend, x, use_reentrant=False) if checkpointed else attend(x)
            run.sum().backward()
        found.append(launches)
    assert set(found[0]) == set(found[1]) and len(found[1]) > len(found[0])


def test_cards_of_every_class_get_their_own_tiles():
    demo = next(scenario for scenario in scenarios.SCENARIOS if scenario.name == "demo")
    tiles = {
        shared: {kernel_name(each.kernel): each.config for each in scenarios.launches(demo, shared, torch.bfloat16)}
        for shared in ("large", "tiny")
    }
    assert tiles["large"]["similarity taps"] != tiles["tiny"]["similarity taps"]


def test_each_program_is_built_once(monkeypatch):
    both = tuple(each for each in scenarios.SCENARIOS if each.name in ("train", "eval"))
    monkeypatch.setattr(scenarios, "SCENARIOS", (*both, *both))
    builds._recorded.cache_clear()
    try:
        names = builds.named_launches(86, torch.bfloat16)
    finally:
        builds._recorded.cache_clear()
    programs = [(each.kernel, str(builds._specialised(each, 86)), each.config) for each in names.values()]
    assert len(set(programs)) == len(programs) > 10
    assert "cross_attention query backward: train" in names


def test_a_brief_gate_builds_training_and_evaluation_and_nothing_rare(monkeypatch):
    names = ["output: train", "output: train #2", "output: train [16, 4 warps]", "output: eval", "output: odd map"]
    monkeypatch.setattr(command, "named_launches", lambda arch, dtype: dict.fromkeys(names, "launch"))
    monkeypatch.setattr(command, "compiled", lambda name, *rest: SimpleNamespace(build=name))
    monkeypatch.setattr(command, "listed", lambda each: None)
    assert [name for name, _ in command.build_all(86, torch.bfloat16, brief=True)] == [*names[:2], names[3]]
    assert len(command.build_all(86, torch.bfloat16)) == len(names)
