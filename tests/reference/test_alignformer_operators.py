"""AlignFormer's operators where the golden numbers cannot see: masks, sizes, empty regions, and gradients."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fastris import reference
from fastris.reference import BidirectionalAttentionWeights, SeparateAttentionWeights
from fastris.reference.bidirectional_attention import instance_norm
from fastris.reference.region_contrast import info_nce, region_contrast, region_means, regions

B, N, C, L, T = 2, 12, 8, 5, 6


def drawn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed + sum(shape)), dtype=torch.float64)


def bidirectional_weights() -> BidirectionalAttentionWeights:
    shapes = [(C, C), (C, T), (C, T), (C, C), (T, C), (T, T)]
    return BidirectionalAttentionWeights(
        *(each for n, shape in enumerate(shapes) for each in (drawn(*shape, seed=n) / 3, drawn(shape[0], seed=n)))
    )


def test_padding_words_change_nothing_and_are_zero():
    weights, pixels, words = bidirectional_weights(), drawn(B, N, C), drawn(B, L, T)
    valid = torch.tensor([[1, 1, 1, 0, 0], [1, 1, 0, 0, 0]], dtype=torch.bool)
    seen, heard = reference.bidirectional_attention(pixels, words, valid, weights)
    other = torch.where(valid[..., None], words, 100 * drawn(B, L, T, seed=9))
    for one, two in zip((seen, heard), reference.bidirectional_attention(pixels, other, valid, weights), strict=True):
        torch.testing.assert_close(one, two)
    shorter = reference.bidirectional_attention(pixels, words[:, :3], valid[:, :3], weights)
    torch.testing.assert_close((seen, heard[:, :3]), shorter)
    assert not heard[~valid].any()


def test_lone_word_is_exactly_zero_where_asked_and_others_are_not():
    weights = BidirectionalAttentionWeights(*(each.float().requires_grad_() for each in bidirectional_weights()))
    pixels, words = drawn(B, 97, C).float(), drawn(B, L, T).float()
    valid = torch.tensor([[1, 0, 0, 0, 0], [1, 1, 0, 0, 0]], dtype=torch.bool)
    published, _ = reference.bidirectional_attention(pixels, words, valid, weights)
    exact, heard = reference.bidirectional_attention(pixels, words, valid, weights, lone_word_is_zero=True)
    assert not exact[0].any() and heard[0, 0].all() and torch.equal(exact[1], published[1])
    # As published, rounding is divided by sqrt(1e-5), if not in the values then in their gradient.
    noise, none = (
        torch.autograd.grad((seen[0] * drawn(97, C).float()).sum(), weights.value_weight)[0]
        for seen in (published, exact)
    )
    assert noise.any() and noise.abs().max() < 1e-2 and not none.any()
    nothing = torch.zeros(B, L, dtype=torch.bool)
    for tensor in reference.bidirectional_attention(pixels, words, nothing, weights, lone_word_is_zero=True):
        assert not tensor.any()


def test_biases_that_a_norm_takes_out_change_nothing():
    weights, pixels, words = bidirectional_weights(), drawn(B, N, C), drawn(B, L, T)
    valid = torch.tensor([[1, 1, 1, 0, 0], [1, 1, 0, 0, 0]], dtype=torch.bool)
    expected = reference.bidirectional_attention(pixels, words, valid, weights)
    for name in ("query_bias", "value_bias", "out_bias", "sym_value_bias"):
        changed = weights._replace(**{name: getattr(weights, name) + 3.0})
        torch.testing.assert_close(reference.bidirectional_attention(pixels, words, valid, changed), expected)
    changed = weights._replace(key_bias=weights.key_bias + 3.0)
    _, heard = reference.bidirectional_attention(pixels, words, valid, changed)
    assert not torch.allclose(heard, expected[1])


def test_instance_norm_is_pytorchs_and_of_one_pixel_zero():
    x = drawn(B, N, C)
    torch.testing.assert_close(instance_norm(x), nn.InstanceNorm1d(C)(x.transpose(1, 2)).transpose(1, 2))
    assert not instance_norm(x[:, :1]).any()
    half = (x + 300).to(torch.bfloat16)
    torch.testing.assert_close(instance_norm(half).float(), instance_norm(half.float()), atol=2e-2, rtol=2e-2)


def test_few_query_attention_is_pytorchs_on_level_and_positions():
    attention = nn.MultiheadAttention(16, 4, kdim=C, vdim=C, batch_first=True).double()
    nn.init.normal_(attention.in_proj_bias)
    weights = SeparateAttentionWeights(
        attention.q_proj_weight,
        attention.k_proj_weight,
        attention.v_proj_weight,
        attention.in_proj_bias,
        attention.out_proj.weight,
        attention.out_proj.bias,
    )
    query, place, pixels, level, positions = drawn(B, 3, 16), drawn(3, 16), drawn(B, N, C), drawn(C), drawn(N, C)
    found = reference.few_query_attention(query, place, pixels, level, positions, weights, 4)
    values = pixels + level
    torch.testing.assert_close(found, attention(query + place, values + positions, values)[0])


def test_deformable_attention_reads_bilinear_samples_and_zeros_outside():
    sizes = [(4, 6), (2, 3)]
    value = drawn(1, 24 + 6, 2, 3)
    places = torch.tensor([[2.5 / 6, 1.5 / 4], [0.0, 0.5]], dtype=torch.float64)
    offsets = torch.zeros(1, 2, 2, 2, 1, 2, dtype=torch.float64)
    offsets[..., 0, 0, 0] = 1.0  # level 0: one pixel to the right
    offsets[..., 1, 0, 1] = -9.0  # level 1: far above
    logits = torch.tensor([math.log(3.0), 0.0], dtype=torch.float64).expand(1, 2, 2, 2)
    found = reference.multiscale_deformable_attention(value, sizes, places, offsets, logits).view(1, 2, 2, 3)
    first = value[:, :24].view(1, 4, 6, 2, 3)
    torch.testing.assert_close(found[0, 0], 0.75 * first[0, 1, 3])  # a pixel's own centre
    between = (first[0, 1, 0] + first[0, 1, 1] + first[0, 2, 0] + first[0, 2, 1]) / 4
    torch.testing.assert_close(found[0, 1], 0.75 * between)


def test_pixel_centres_and_positions_of_a_box():
    centres = reference.pixel_centres([(2, 4), (1, 1)])
    assert centres[0].tolist() == [0.125, 0.25] and centres[5].tolist() == [0.375, 0.75]
    assert centres[-1].tolist() == [0.5, 0.5]
    table = reference.sine_positions_of_box(3, 5, 8)
    y, x = 2 * math.pi * 2 / 3, 2 * math.pi * 4 / 5  # row 1, column 3
    expected = [f(angle / divisor) for angle in (y, x) for divisor in (1, 100) for f in (math.sin, math.cos)]
    torch.testing.assert_close(table[1 * 5 + 3], torch.tensor(expected), atol=1e-5, rtol=0)


@pytest.mark.parametrize("band", [0, 1])
def test_cells_are_inside_outside_or_ambiguous(band):
    mask = torch.zeros(2, 1, 24, 24)
    mask[0, :, :13, :16] = 1  # rows of cells 0 to 2 whole, row 3 a quarter
    mask[1, :, 5:6, 5:6] = 1  # too small for any cell
    inside, outside = regions(mask, (6, 6), band=band)
    row = [1.0, 1.0, 1.0, 0.0] if not band else [1.0, 1.0, 0.0, 0.0]
    assert inside[0, :4, 0].tolist() == row
    assert outside[0, :, 0].tolist() == [0, 0, 0, 0, 0 if band else 1, 1]
    assert inside[1].sum() == pytest.approx(1 / 16) and inside[1, 1, 1] > 0
    assert outside[1].sum() == (36 - 9 if band else 35)


def test_letterbox_border_is_in_neither_region():
    mask, known = torch.zeros(1, 1, 8, 8), torch.ones(1, 1, 8, 8)
    mask[..., :4, :4] = 1
    known[..., 4:, :] = 0
    inside, outside = regions(mask, (4, 4), known=known)
    assert int(inside.sum()) == 4 and int(outside.sum()) == 4 and not outside[:, 2:].any()


def test_contrast_of_one_object_is_that_against_its_own_background():
    features, centre, mask = drawn(1, 4, 6, 6), drawn(1, 4), torch.zeros(1, 1, 12, 12)
    mask[..., :6, :] = 1
    cells = regions(mask, (6, 6))
    p, n = (region_means(features, each.double()) for each in cells)
    c = F.normalize(centre, dim=-1)
    expected = F.cross_entropy(torch.cat([c @ p.t(), c @ n.t()], 1) / 0.07, torch.tensor([0])) / 2
    torch.testing.assert_close(region_contrast(features, centre, mask), expected)


@pytest.mark.parametrize("kind", ["empty", "whole", "mixed"])
def test_empty_and_whole_masks_have_a_finite_loss_and_gradient(kind):
    features, centres = drawn(3, 4, 6, 6).requires_grad_(), drawn(3, 4).requires_grad_()
    mask = torch.zeros(3, 1, 12, 12) if kind == "empty" else torch.ones(3, 1, 12, 12)
    if kind == "mixed":
        mask[0] = 0
        mask[1, :, :6] = 0
    loss = region_contrast(features, centres, mask)
    gradients = torch.autograd.grad(loss, (features, centres))
    assert loss.isfinite() and all(each.isfinite().all() for each in gradients)
    assert (float(loss.detach()) == 0) == (kind == "empty")
    if kind == "mixed":
        assert not gradients[1][0].any()  # an object without pixels has no target; its background stays a negative


def test_same_reference_is_no_negative_and_other_objects_of_the_image_stay():
    logits = drawn(3, 6)
    yes = torch.ones(3, dtype=torch.bool)
    images, refs = torch.tensor([7, 7, 7]), torch.tensor([1, 1, 2])

    def expected(rows: list[list[int]], words: list[list[int]]) -> torch.Tensor:
        total = torch.zeros((), dtype=torch.float64)
        for row in range(3):
            total += torch.logsumexp(logits[row, rows[row]], 0) - logits[row, row]
            total += torch.logsumexp(logits[words[row], row], 0) - logits[row, row]
        return total / 6

    alone = expected([[0, 1, 2, 3, 4, 5]] * 3, [[0, 1, 2]] * 3)
    torch.testing.assert_close(info_nce(logits, yes, yes), alone)
    known = expected([[0, 2, 3], [1, 2, 4], [0, 1, 2, 5]], [[0, 2], [1, 2], [0, 1, 2]])
    torch.testing.assert_close(info_nce(logits, yes, yes, images, refs), known)
    without_background = expected([[0, 2], [1, 2, 4], [0, 1, 2, 5]], [[0, 2], [1, 2], [0, 1, 2]])
    has = torch.tensor([False, True, True])
    torch.testing.assert_close(info_nce(logits, yes, has, images, refs), without_background)


def test_contrast_is_float32_in_half_precision():
    features, centres, mask = drawn(2, 4, 6, 6), drawn(2, 4), torch.zeros(2, 1, 12, 12)
    mask[..., :6] = 1
    loss = region_contrast(features.bfloat16(), centres.bfloat16(), mask.bfloat16())
    assert loss.dtype == torch.float32
    exact = region_contrast(features.bfloat16().double(), centres.bfloat16().double(), mask)
    torch.testing.assert_close(loss.double(), exact, atol=1e-5, rtol=1e-5)
