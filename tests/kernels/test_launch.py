"""Every kernel goes through one launch, which can be recorded; measured tiles take the place of the table's."""

from __future__ import annotations

import re
import threading
from pathlib import Path

import pytest
import torch

triton = pytest.importorskip("triton")

import triton.language as tl  # noqa: E402

from fastris import dispatch  # noqa: E402
from fastris.kernels import configs, launch, similarity  # noqa: E402
from fastris.kernels.configs import Choice, Config  # noqa: E402
from fastris.kernels.launch import Pointer, recording  # noqa: E402
from fastris.ops.similarity import text_to_pixel_similarity  # noqa: E402

KERNELS = Path(similarity.__file__).parent
TABLE = Config((("BLOCK", 64),), alternatives=(Config((("BLOCK", 128),)),))


@triton.jit
def _double_kernel(out_ptr, x_ptr, count, BLOCK: tl.constexpr):
    index = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(out_ptr + index, 2 * tl.load(x_ptr + index, mask=index < count), mask=index < count)


class Spy:
    """Stands for a compiled kernel: keeps how it was launched."""

    def __init__(self):
        self.fn = _double_kernel.fn
        self.arg_names = ["out_ptr", "x_ptr", "count", "BLOCK"]
        self.launches = []

    def __getitem__(self, grid):
        return lambda *arguments, **keywords: self.launches.append((grid, keywords))


def test_every_launch_pins_fused_multiply_add_and_passes_its_configuration():
    spy, x = Spy(), torch.zeros(5)
    launch.launch(spy, (3,), x, x, 5, config=Config((("BLOCK", 64),), num_warps=2, num_stages=3))
    assert spy.launches == [((3,), {"BLOCK": 64, "num_warps": 2, "num_stages": 3, "enable_fp_fusion": True})]


def test_no_kernel_file_launches_by_itself():
    for path in sorted(KERNELS.glob("*.py")):
        found = re.findall(r"_kernel\[.*", path.read_text())
        assert not found, f"{path.name} launches without kernels/launch.py: {found}"


def test_recording_runs_nothing_and_knows_what_a_compiled_kernel_would():
    spy, x = Spy(), torch.zeros(8, dtype=torch.bfloat16)
    with recording() as found:
        launch.launch(spy, (1,), x[1:], x, 7, config=TABLE)
    assert not spy.launches and len(found) == 1
    assert dict(found[0].arguments) == {
        "out_ptr": Pointer(torch.bfloat16, aligned=False),
        "x_ptr": Pointer(torch.bfloat16, aligned=True),
        "count": 7,
        "BLOCK": 64,
    }
    launch.launch(spy, (1,), x, x, 7, config=TABLE)
    assert len(spy.launches) == len(found) == 1


def test_recording_names_an_argument_that_is_missing():
    with recording(), pytest.raises(TypeError, match="takes out_ptr, x_ptr, count, BLOCK; given were out_ptr, BLOCK"):
        launch.launch(Spy(), (1,), torch.zeros(1), config=TABLE)


def choose(size: int, device: str = "cpu", dtype: torch.dtype = torch.float32) -> Config:
    return configs.choose(_double_kernel, TABLE, torch.device(device), dtype, size)


def choice(size: int) -> Choice:
    return Choice("test_launch double", "", "float32", size)


OTHER, THIRD = Config((("BLOCK", 128),)), Config((("BLOCK", 256),), num_warps=8)


def test_table_holds_until_a_configuration_is_replaced_and_after_the_block():
    with configs.replaced({choice(64): OTHER}):
        assert choose(64) == OTHER
        assert choose(64, dtype=torch.float16) == TABLE
        with configs.replaced({choice(64): THIRD}):
            assert choose(64) == THIRD
        assert choose(64) == OTHER
    assert choose(64) == TABLE


def test_sizes_between_the_measured_ones_take_the_nearest():
    with configs.replaced({choice(64): OTHER, choice(4096): THIRD}):
        taken = [choose(size) for size in (1, 64, 300, 1000, 10**6)]
    assert taken == [OTHER, OTHER, OTHER, THIRD, THIRD]


def test_one_gpu_may_have_configurations_of_its_own():
    try:
        configs.replace({choice(64): OTHER}, device=1)
        configs.replace({choice(64): THIRD})
        assert [choose(64, "cuda:0"), choose(64, "cuda:1")] == [THIRD, OTHER]
    finally:
        configs.replace({}, device=1)
        configs.replace({})
    assert choose(64, "cuda:1") == TABLE


def test_other_threads_see_the_replacement_since_backward_runs_in_one():
    taken = []
    with configs.replaced({choice(64): OTHER}):
        thread = threading.Thread(target=lambda: taken.append(choose(64)))
        thread.start()
        thread.join()
    assert taken == [OTHER]


def test_tiles_of_another_kernel_are_refused_by_name():
    with (
        configs.replaced({choice(64): Config((("BLOCK_N", 16),))}),
        pytest.raises(ValueError, match=r"test_launch double//float32/64: its tiles are \{'BLOCK': 64\}"),
    ):
        choose(64)


def test_choices_and_configurations_survive_a_file():
    assert Choice.parse(choice(64).text()) == choice(64)
    assert Config.from_dict(THIRD.as_dict()) == THIRD


def test_an_operator_tells_what_it_chooses_and_launches_what_replaces_it():
    def run() -> list[launch.Launch]:
        with recording() as found, dispatch.every_device_has_triton():
            features = torch.zeros(1, 8, 6, 5, requires_grad=True)
            kernel = torch.zeros(1, 8, 3, 3, requires_grad=True)
            text_to_pixel_similarity(features, kernel, impl="triton").sum().backward()
        return found

    with configs.watched() as seen:
        run()
    names = {each.kernel for each in seen}
    assert names == {f"similarity {name}" for name in ("taps", "shift", "features gradient", "kernel gradient")}
    taps = next(each for each in seen if each.kernel == "similarity taps")
    assert (taps.variant, taps.dtype, taps.size) == ("N16", "float32", 32)
    other = Config(tuple((n, 2 * v if n == "BLOCK_P" else v) for n, v in seen[taps].blocks), num_warps=2)
    with configs.replaced({taps: other}):
        first = run()[0]
    assert first.config == other and dict(first.arguments)["BLOCK_P"] == other["BLOCK_P"]
