"""The proofs that a GPU's kernels go through, on a GPU or interpreted: right kernels pass, wrong ones fail."""

from __future__ import annotations

import os
import warnings

import pytest
import torch

from fastris import dispatch
from fastris.dispatch import resolve
from fastris.ops import text_to_pixel_similarity
from fastris.ops.proofs import PROOFS
from fastris.preflight import verdicts
from fastris.testing import WrongNumber

HAS_GPU = torch.cuda.is_available()
if not HAS_GPU and os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("needs a CUDA device, or TRITON_INTERPRET=1 to run the kernels on a CPU", allow_module_level=True)

from fastris.kernels import (  # noqa: E402
    bidirectional_attention,
    contrastive,
    cross_attention,
    few_query_attention,
    pixel_contrast,
    pixel_word_attention,
    region_contrast,
    similarity_backward,
    upsample_conv,
    upsampled_bce,
    word_attention,
)
from fastris.kernels import deformable_attention as deformable_kernels  # noqa: E402
from fastris.kernels import deformable_attention_backward as deformable_backward  # noqa: E402
from fastris.kernels import similarity as similarity_kernels  # noqa: E402

DEVICE = torch.device("cuda", 0) if HAS_GPU else torch.device("cpu")
DTYPES = [torch.float32, torch.float16, *([torch.bfloat16] if HAS_GPU else [])]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("operator", PROOFS)
def test_kernels_pass_their_proof(operator, dtype):
    PROOFS[operator](DEVICE, dtype)


def scaled(monkeypatch, module, name: str, which: int | None = None) -> None:
    """Make a launcher answer a hundredth too much, in one of its tensors or in its only one."""
    made = getattr(module, name)

    def wrong(*args):
        result = made(*args)
        if which is None:
            return 1.01 * result
        return (*result[:which], 1.01 * result[which], *result[which + 1 :])

    monkeypatch.setattr(module, name, wrong)


@pytest.mark.parametrize(
    ("operator", "module", "name", "which", "told"),
    [
        ("text_to_pixel_similarity", similarity_kernels, "launch_taps", None, "output 0"),
        ("text_to_pixel_similarity", similarity_backward, "_features_gradient", None, "gradient of features"),
        ("text_to_pixel_contrastive_loss", contrastive, "launch_taps", None, "output 0"),
        ("text_to_pixel_contrastive_loss", similarity_backward, "_kernel_gradient", 0, "gradient of"),
        ("cross_attention", cross_attention, "branch_backward", 0, "gradient of"),
        ("cross_attention", cross_attention, "query_backward", 0, "gradient of x"),
        ("upsample2x_conv3x3", upsample_conv, "_combine", 1, "output 3"),
        ("upsample2x_conv3x3", upsample_conv, "_gradients", 1, "gradient of weight"),
        ("few_query_attention", few_query_attention, "_combined", 0, "output 0"),
        ("few_query_attention", few_query_attention, "gradients", 0, "gradient of pixels"),
        ("bidirectional_attention", bidirectional_attention, "read", 1, "output 0"),
        ("bidirectional_attention", bidirectional_attention, "read", 3, "output 1"),
        ("bidirectional_attention", bidirectional_attention, "read_backward", 0, "gradient of"),
        ("multiscale_deformable_attention", deformable_backward, "_value_gradient", None, "gradient of value"),
        ("multiscale_deformable_attention", deformable_kernels, "deformable_gradients", 2, "gradient of offsets"),
        ("word_attention", word_attention, "_answer", None, "output 0"),
        ("word_attention", word_attention, "gradients", 0, "gradient of query"),
        ("word_attention", word_attention, "gradients", 2, "gradient of"),
        ("region_contrast", region_contrast, "_sums", None, "output 0"),
        ("region_contrast", region_contrast, "gradient", None, "gradient of features"),
        ("pixel_word_attention", pixel_word_attention, "listen", 0, "output 0"),
        ("pixel_word_attention", pixel_word_attention, "listen", 2, "gradient of"),
        ("pixel_word_attention", pixel_word_attention, "gradients", 1, "gradient of"),
        ("pixel_word_attention", pixel_word_attention, "gradients", 4, "gradient of"),
        ("pixel_word_attention", pixel_word_attention, "gradients", 5, "gradient of"),
        ("word_pixel_attention", bidirectional_attention, "read_columns", 1, "gradient of"),
        ("word_pixel_attention", bidirectional_attention, "read_columns_backward", 0, "gradient of"),
        ("word_pixel_attention", bidirectional_attention, "read_columns_backward", 1, "gradient of"),
        ("pixel_contrast", pixel_contrast, "cosines", None, "output 0"),
        ("pixel_contrast", pixel_contrast, "norms", 0, "output 0"),
        ("pixel_contrast", pixel_contrast, "sums", None, "gradient of"),
        ("pixel_contrast", pixel_contrast, "gradient", None, "gradient of features"),
        ("upsampled_bce_with_logits", upsampled_bce, "_upsampled_bce", 0, "output 0"),
        ("upsampled_bce_with_logits", upsampled_bce, "_gradient", None, "gradient of logits"),
    ],
)
def test_kernel_that_is_a_hundredth_off_fails_its_proof(monkeypatch, operator, module, name, which, told):
    scaled(monkeypatch, module, name, which)
    with pytest.raises(WrongNumber, match=told):
        PROOFS[operator](DEVICE, torch.float32)


@pytest.mark.parametrize(
    ("operator", "row", "told"),
    [
        ("text_to_pixel_similarity", similarity_backward.NORM_ROWS - 1, "output 0"),
        ("text_to_pixel_contrastive_loss", similarity_backward.NORM_ROWS + 1, "gradient of features"),
    ],
)
def test_norm_that_the_kernels_read_wrongly_fails_the_proof(monkeypatch, operator, row, told):
    """Its bias, and what goes back through the statistics of the batch."""

    def spoilt(made, place: int):
        def wrong(*args):
            norm = args[place]
            if norm is not None and len(norm) > row:
                norm = norm.clone()
                norm[row] *= 1.01
            return made(*args[:place], norm, *args[place + 1 :])

        return wrong

    monkeypatch.setattr(similarity_kernels, "launch_taps", spoilt(similarity_kernels.launch_taps, 3))
    monkeypatch.setattr(similarity_backward, "_features_gradient", spoilt(similarity_backward._features_gradient, 3))
    with pytest.raises(WrongNumber, match=told):
        PROOFS[operator](DEVICE, torch.float32)


def test_mask_of_dropout_that_differs_in_the_backward_pass_fails_the_proof(monkeypatch):
    made = cross_attention.branch_backward

    def without_mask(upstream, weights, values, affine, statistics, seeds, *dropouts):
        return made(upstream, weights, values, affine, statistics, None if seeds is None else seeds + 1, *dropouts)

    monkeypatch.setattr(cross_attention, "branch_backward", without_mask)
    with pytest.raises(WrongNumber, match="gradient"):
        PROOFS["cross_attention"](DEVICE, torch.float32)


def test_wrong_kernel_is_left_with_one_notice_and_refused_by_its_name(monkeypatch):
    scaled(monkeypatch, similarity_kernels, "launch_taps")
    monkeypatch.setattr(verdicts, "settled", {})
    monkeypatch.setattr(dispatch.preflight, "settled", verdicts.settled)
    monkeypatch.setattr(verdicts, "_told", set())
    monkeypatch.setattr(dispatch, "_interpreting", False)
    monkeypatch.setattr(dispatch, "triton_obstacle", lambda device, dtype: None)
    monkeypatch.setattr(dispatch.tuned, "preference", lambda *asked: dispatch.tuned.Preference(True, "for the test"))
    monkeypatch.setattr(dispatch.tuned, "tuning_of", lambda index: None)
    features, kernel = torch.randn(1, 4, 5, 5, device=DEVICE), torch.randn(1, 4, 3, 3, device=DEVICE)
    with pytest.warns(UserWarning, match="of text_to_pixel_similarity in float32 .* numbers are wrong") as told:
        taken = [resolve("text_to_pixel_similarity", DEVICE, torch.float32) for _ in range(3)]
        assert torch.equal(
            text_to_pixel_similarity(features, kernel), text_to_pixel_similarity(features, kernel, impl="torch")
        )
    assert taken == ["torch"] * 3 and len(told) == 1
    with pytest.raises(RuntimeError, match=r'impl="triton" cannot run: their numbers are wrong'):
        text_to_pixel_similarity(features, kernel, impl="triton")


def test_proof_leaves_the_random_numbers_alone(monkeypatch):
    monkeypatch.setattr(verdicts, "settled", {})
    torch.manual_seed(5)
    expected = torch.rand(3, device=DEVICE)
    torch.manual_seed(5)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert verdicts.prove("cross_attention", DEVICE, torch.float32) is None
    assert torch.equal(torch.rand(3, device=DEVICE), expected)
