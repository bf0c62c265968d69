"""Summing float16 products in float16 is asked for explicitly, says where it does nothing, and can be taken back."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

import fastris
from fastris.runtime.float16_sums import fp16_accumulation_obstacle

sys.path.append(str(Path(__file__).parents[2]))  # bench/ is no installed package: it is run from a checkout

from bench.studies import float16_sums as accumulation

ON_GPU = fp16_accumulation_obstacle() is None
SETTING = torch.backends.cuda.matmul


def test_off_by_default_and_switching_off_never_fails():
    assert not SETTING.allow_fp16_accumulation
    fastris.allow_fp16_accumulation(False)
    with fastris.allow_fp16_accumulation(False):
        assert not SETTING.allow_fp16_accumulation


@pytest.mark.skipif(torch.cuda.is_available(), reason="is about machines without CUDA")
def test_without_cuda_it_says_that_it_has_no_effect(capsys):
    with pytest.raises(RuntimeError, match="no effect here: it needs a CUDA device, and PyTorch finds none"):
        fastris.allow_fp16_accumulation(True)
    assert not SETTING.allow_fp16_accumulation
    assert accumulation.main() == 2
    assert "nothing to show: it needs a CUDA device" in capsys.readouterr().err


def test_it_names_a_device_and_a_dtype_that_it_does_not_reach():
    assert "on cpu are summed in float32" in fp16_accumulation_obstacle("cpu")
    assert "float16 products, not bfloat16" in fp16_accumulation_obstacle("cuda", torch.bfloat16)
    with pytest.raises(RuntimeError, match="on cpu"):
        fastris.allow_fp16_accumulation(True, device="cpu")


def test_anything_but_true_and_false_is_refused():
    with pytest.raises(TypeError, match="enabled must be True or False, got 'on'"):
        fastris.allow_fp16_accumulation("on")


def test_block_restores_what_was_set_before_after_an_exception_too(monkeypatch):
    monkeypatch.setattr("fastris.runtime.float16_sums.fp16_accumulation_obstacle", lambda device: None)
    with pytest.raises(KeyError), fastris.allow_fp16_accumulation(True):
        assert SETTING.allow_fp16_accumulation
        with fastris.allow_fp16_accumulation(False):
            assert not SETTING.allow_fp16_accumulation
        assert SETTING.allow_fp16_accumulation
        raise KeyError
    assert not SETTING.allow_fp16_accumulation


@pytest.mark.gpu
@pytest.mark.skipif(not ON_GPU, reason="needs a CUDA device of compute capability 7.0")
def test_float16_sums_stay_within_a_hundredth_and_leave_no_trace():
    sizes, device = (512, 2048, 512), torch.device("cuda")
    before = accumulation.product_error(*sizes, device)
    with fastris.allow_fp16_accumulation(True):
        assert accumulation.product_error(*sizes, device) < 1e-2
    assert accumulation.product_error(*sizes, device) == before
