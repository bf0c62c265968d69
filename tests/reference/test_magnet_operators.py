"""MagNet's formulas where the golden numbers cannot see: the released mask's arithmetic, padding, and pooled maps."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from fastris import reference
from fastris.nn.cam import VisionSide
from fastris.reference import PixelWordWeights, WordPixelWeights

B, N, C, L, T = 2, 30, 8, 6, 12
VALID = torch.tensor([[1, 1, 1, 1, 0, 0], [1, 1, 0, 0, 0, 0]], dtype=torch.bool)


def drawn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed + sum(shape)), dtype=torch.float64)


def word_weights() -> WordPixelWeights:
    shapes = [(T, T), (T, T), (T, C), (T, C), (T, T), (T, T)]
    layers = ((drawn(*shape, seed=n) / 3, drawn(shape[0], seed=n)) for n, shape in enumerate(shapes))
    return WordPixelWeights(*(each for layer in layers for each in layer))


def pixel_weights() -> PixelWordWeights:
    shapes = [(C, C), (C, C), (C,), (C, T), (C, T), (C, C), (C,), (C, C)]
    layers = ((drawn(*shape, seed=n), drawn(shape[0], seed=20 + n)) for n, shape in enumerate(shapes))
    return PixelWordWeights(*(each for layer in layers for each in layer))


def as_released(words: torch.Tensor, pixels: torch.Tensor, weights: WordPixelWeights) -> torch.Tensor:
    """The released arithmetic: BERT's additive mask where a mask of ones and zeros was meant."""
    w = weights
    mask = ((1 - VALID.double()) * -10000)[..., None]

    def normed(rows: torch.Tensor) -> torch.Tensor:
        return F.instance_norm(rows.transpose(1, 2)).transpose(1, 2)

    query = mask * F.linear(words, w.query_weight, w.query_bias)
    key = normed(F.linear(pixels, w.key_weight, w.key_bias))
    value = normed(F.linear(pixels, w.value_weight, w.value_bias))
    attention = torch.softmax(query @ key.mT / T**0.5 + (1e4 * mask - 1e4), dim=-1)
    heard = normed(F.linear(attention @ value, w.out_weight, w.out_bias))
    seen = F.gelu(F.linear(words, w.project_weight, w.project_bias))
    return F.gelu(F.linear(seen * heard, w.mixed_weight, w.mixed_bias))


def test_released_rule_is_the_released_arithmetic_with_its_gradients():
    weights, words, pixels = word_weights(), drawn(B, L, T), drawn(B, N, C)
    leaves = [words, pixels, *weights]
    for leaf in leaves:
        leaf.requires_grad_()
    answers = []
    for answer in (
        reference.word_pixel_attention(words, pixels, VALID, weights, "released"),
        as_released(words, pixels, weights),
    ):
        gradients = torch.autograd.grad(answer.square().sum(), leaves, allow_unused=True)
        answers.append([answer, *(torch.zeros(()) if g is None else g for g in gradients)])
    for (name, mine), theirs in zip(zip(("answer", "words", "pixels", *weights._fields), answers[0]), answers[1]):  # noqa: B905
        torch.testing.assert_close(mine.expand_as(theirs).to(theirs), theirs, rtol=1e-6, atol=1e-6, msg=name)


def test_masked_rule_does_not_see_padding_and_the_intended_one_does():
    weights, words, pixels = word_weights(), drawn(B, L, T), drawn(B, N, C)
    for rule, same in (("masked", True), ("intended", False)):
        whole = reference.word_pixel_attention(words, pixels, VALID, weights, rule)[:, :4][VALID[:, :4]]
        cut = reference.word_pixel_attention(words[:, :4], pixels, VALID[:, :4], weights, rule)[VALID[:, :4]]
        assert torch.allclose(whole, cut, rtol=1e-9, atol=1e-9) is same
    lone = VALID & (torch.arange(L) == 0)
    found = reference.word_pixel_attention(words, pixels, lone, weights, "masked")
    torch.testing.assert_close(found, F.gelu(weights.mixed_bias).expand_as(found))


def test_pixels_do_not_hear_padding_and_nothing_but_padding_is_heard_as_zeros():
    weights, words, pixels = pixel_weights(), drawn(B, L, T), drawn(B, N, C)
    found = reference.pixel_word_attention(pixels, words, VALID, weights)
    other = torch.where(VALID[..., None], words, 100 * drawn(B, L, T, seed=9))
    torch.testing.assert_close(reference.pixel_word_attention(pixels, other, VALID, weights), found)
    torch.testing.assert_close(reference.pixel_word_attention(pixels, words[:, :4], VALID[:, :4], weights), found)
    silent = reference.pixel_word_attention(pixels, words, torch.zeros_like(VALID), weights)
    zero_value = weights._replace(value_weight=0 * weights.value_weight, value_bias=0 * weights.value_bias)
    torch.testing.assert_close(silent, reference.pixel_word_attention(pixels, words, VALID, zero_value))


@pytest.mark.parametrize("size", [(5, 7), (1, 1), (12, 3)])
def test_pooled_maps_spread_by_one_product_equal_resized_ones(size):
    side = VisionSide(8, T).double()
    torch.nn.init.normal_(side.mixer[0].weight)
    pooled = [drawn(B, p * p, 2, seed=p).requires_grad_() for p in (1, 2, 3, 6)]
    residual = drawn(B, size[0] * size[1], 8).requires_grad_()
    first = side.mixer[0]
    from fastris.dispatch import use_impl

    answers = []
    for impl in ("torch", "reference"):
        with use_impl(impl):
            answer = side.mix(pooled, residual, size)
        answers.append([answer, *torch.autograd.grad(answer.square().sum(), [*pooled, residual, first.weight])])
    for fast, published in zip(*answers, strict=True):
        torch.testing.assert_close(fast, published, rtol=1e-10, atol=1e-10)
