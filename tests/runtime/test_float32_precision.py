"""Proofs run in IEEE float32 whatever is set, and leave what is set as it was."""

from __future__ import annotations

import pytest
import torch

from fastris.runtime.float32_precision import _SETTINGS, float32_precision, ieee_float32

CUDA, CPU = torch.device("cuda"), torch.device("cpu")
IEEE = {"matmul": "ieee", "convolution": "ieee"}
backends = torch.backends


def switch(read):
    try:
        return read()
    except RuntimeError:
        return "contradicts its setting"


def everything():
    """All settings and switches."""
    reads = (
        torch.get_float32_matmul_precision,
        lambda: backends.cuda.matmul.allow_tf32,
        lambda: backends.cudnn.allow_tf32,
    )
    return [backends.fp32_precision, *(s.fp32_precision for s in _SETTINGS), *map(switch, reads)]


@pytest.fixture(autouse=True)
def untouched():
    """PyTorch's own settings, before and after each test."""

    def reset():
        torch.set_float32_matmul_precision("highest")
        backends.cudnn.allow_tf32 = True
        for setting in (backends, *_SETTINGS):
            setting.fp32_precision = "none"
        backends.cudnn.conv.fp32_precision = backends.cudnn.rnn.fp32_precision = "tf32"

    before = [setting.fp32_precision for setting in (backends, *_SETTINGS)], backends.cudnn.allow_tf32
    reset()
    yield
    reset()
    backends.cudnn.allow_tf32 = before[1]
    for setting, value in zip((backends, *_SETTINGS), before[0], strict=True):
        setting.fp32_precision = value


def set_switches():
    backends.cuda.matmul.allow_tf32 = True
    backends.cudnn.allow_tf32 = True


def set_medium():
    torch.set_float32_matmul_precision("medium")


def set_one_setting():
    backends.cuda.matmul.fp32_precision = "tf32"


def set_all_settings():
    backends.fp32_precision = "tf32"


ways = pytest.mark.parametrize(
    "prepare",
    [
        lambda: None,
        set_switches,
        lambda: torch.set_float32_matmul_precision("medium"),
        set_one_setting,
        set_all_settings,
    ],
    ids=["default", "switches", "medium", "one setting", "all settings"],
)


@ways
def test_products_are_ieee_within_the_block_and_as_before_behind_it(prepare):
    prepare()
    before = everything()
    with pytest.raises(KeyError), ieee_float32():
        assert float32_precision(CUDA) == float32_precision(CPU) == IEEE
        with ieee_float32():
            pass
        assert float32_precision(CUDA) == IEEE, "an inner block ended the outer one"
        raise KeyError
    assert everything() == before


def test_within_the_block_the_older_switches_can_be_read_as_torch_compile_does():
    with ieee_float32():
        assert not backends.cudnn.allow_tf32 and not backends.cuda.matmul.allow_tf32
        assert torch.get_float32_matmul_precision() == "highest"


def test_what_is_set_is_told_by_product_and_device():
    assert float32_precision(CUDA) == {"matmul": "ieee", "convolution": "tf32"}  # as PyTorch comes
    assert float32_precision(CPU) == IEEE
    set_switches()
    assert float32_precision(CUDA) == {"matmul": "tf32", "convolution": "tf32"}
    set_medium()
    assert float32_precision(CPU) == {"matmul": "bf16", "convolution": "ieee"}


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_convolution_on_a_gpu_meets_the_bound_of_the_proofs_within_the_block():
    x, weight = torch.randn(2, 256, 26, 26), torch.randn(256, 256, 3, 3) / 48
    truth = torch.nn.functional.conv2d(x.double(), weight.double(), padding=1)
    with ieee_float32():
        found = torch.nn.functional.conv2d(x.cuda(), weight.cuda(), padding=1).cpu()
    assert (found - truth).abs().max() < 1e-5 * truth.abs().max()
