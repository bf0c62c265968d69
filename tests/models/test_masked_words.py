"""Mask Grounding apart from any host: which words are hidden, what the predictor sees, and what is counted."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastris import reference
from fastris.nn.mask_grounding import METRICS, MaskGrounding
from fastris.nn.masked_words import (
    DRAWS,
    centroids,
    choose,
    draw_ahead,
    move_on,
    words_by_ends,
    words_by_starts,
)

NO_WORD = -1
PIECES = torch.tensor([[NO_WORD, 0, 0, 1, 2, NO_WORD], [NO_WORD, 0, NO_WORD, NO_WORD, NO_WORD, NO_WORD]])


def draws_of(*rows: list[float]) -> Tensor:
    """The same numbers for words, pieces and sentences."""
    return torch.tensor(rows).expand(DRAWS, -1, -1)


# The selection.


def test_a_word_is_the_pieces_up_to_its_end_or_from_its_start():
    may = torch.tensor([[False, True, True, True, True, False]])
    ends = torch.tensor([[False, False, True, True, True, False]])
    assert words_by_ends(may, ends).tolist() == [[-1, 0, 0, 1, 2, -1]]
    starts = torch.tensor([[True, True, False, True, True, True]])
    assert words_by_starts(may, starts).tolist() == [[-1, 1, 1, 2, 3, -1]]


def test_words_are_selected_whole_by_the_number_of_their_first_place():
    draws = draws_of([0.1, 0.9, 0.05, 0.5, 0.5, 0.0], [0.9] * 6)
    selected, hidden = choose(PIECES, draws, rate=0.15)
    assert selected.tolist() == [[False, True, True, False, True, False], [False, True] + [False] * 4]
    assert torch.equal(hidden, selected)


def test_a_sentence_without_a_selected_word_gives_its_smallest_number_and_one_without_words_nothing():
    draws = draws_of([0.9, 0.8, 0.7, 0.0, 0.0, 0.0], [0.0] * 6)
    words = torch.stack([PIECES[0], torch.full((6,), NO_WORD)])
    selected, _ = choose(words, draws, rate=0.15)
    assert selected.tolist() == [[False] * 4 + [True, False], [False] * 6]


@pytest.mark.parametrize("rate", [0.15, 0.6])
def test_each_word_is_selected_at_the_rate_and_the_forced_one_uniformly(rate):
    words = PIECES[:1].expand(40000, -1)
    draws = torch.rand(DRAWS, 40000, 6, generator=torch.Generator().manual_seed(0))
    selected, hidden = choose(words, draws, rate, shown=0.1)
    found = selected[:, [1, 3, 4]].double()
    forced = (1 - rate) ** 3 / 3
    assert (found.mean(0) - (rate + forced)).abs().max() < 0.01 and (found.sum(1) >= 1).all()
    assert torch.equal(selected[:, 1], selected[:, 2])
    assert abs(hidden[selected].double().mean() - 0.9) < 0.01
    half, _ = choose(words, draws, rate, sentences=0.5)
    assert abs(half.any(1).double().mean() - 0.5) < 0.01


def test_draws_leave_the_generator_where_it_was_until_the_step_moves_on():
    torch.manual_seed(3)
    state = torch.get_rng_state()
    ahead = draw_ahead(2, 5, torch.device("cpu"))
    assert torch.equal(torch.get_rng_state(), state)
    move_on(2, 5)
    after = torch.get_rng_state()
    torch.set_rng_state(state)
    assert torch.equal(torch.rand(DRAWS, 2, 5), ahead) and torch.equal(torch.get_rng_state(), after)


def test_centroids_are_pixel_centres_in_the_frame_of_the_mask():
    mask = torch.zeros(3, 1, 4, 10)
    mask[0, :, 1, 2:5], mask[1, :, 3, 9] = 1, 0.51
    mask[2] = 0.5
    centre, found = centroids(mask)
    torch.testing.assert_close(centre, torch.tensor([[0.35, 0.375], [0.95, 0.875], [0, 0]]))
    assert found.tolist() == [True, True, False]


# The predictor.


def make(norm_first: bool = True, **options) -> MaskGrounding:
    torch.manual_seed(0)
    return MaskGrounding(11, 8, 6, layers=2, heads=2, norm_first=norm_first, **options).double()


def problem() -> dict[str, Tensor]:
    torch.manual_seed(1)
    tokens = torch.tensor([[9, 4, 5, 10, 0], [9, 6, 10, 0, 0], [9, 7, 8, 3, 10]])
    mask = torch.zeros(3, 1, 8, 12).double()
    mask[0, :, :4, :3], mask[2, :, 5:, 6:] = 1, 1
    selected = torch.zeros(3, 5, dtype=torch.bool)
    selected[[0, 0, 1, 2], [1, 2, 1, 3]] = True
    return {
        "text": torch.randn(3, 5, 8).double(),
        "tokens": tokens,
        "valid": tokens != 0,
        "selected": selected,
        "image": torch.randn(2, 6, 2, 3).double(),
        "mask": mask,
        "embedding": torch.randn(11, 8).double(),
        "index": torch.tensor([1, 0, 1]),
    }


@pytest.mark.parametrize("norm_first", [True, False])
def test_loss_is_that_of_the_formula_written_out(norm_first):
    """One sentence at a time, with the padding cut off; the second has no object, and so no loss."""
    model, given = make(norm_first, dropout=0.0, eps=1e-5), problem()
    for parameter in model.parameters():  # no bias stays zero, no scale one
        nn.init.normal_(parameter, std=0.5)
    state, losses = dict(model.named_parameters()), []

    def norm(x: Tensor, name: str) -> Tensor:
        return F.layer_norm(x, (8,), state[f"{name}.weight"], state[f"{name}.bias"], 1e-5)

    def linear(x: Tensor, name: str) -> Tensor:
        return x @ state[f"{name}.weight"].T + state[f"{name}.bias"]

    def attend(x: Tensor, name: str) -> Tensor:
        q, k, v = (x @ state[f"{name}.in_proj_weight"].T + state[f"{name}.in_proj_bias"]).chunk(3, -1)
        heads = [(q[:, h] @ k[:, h].T / 2).softmax(-1) @ v[:, h] for h in (slice(0, 4), slice(4, 8))]
        return linear(torch.cat(heads, -1), f"{name}.out_proj")

    def feed(x: Tensor, name: str) -> Tensor:
        return linear(F.gelu(linear(x, f"{name}.linear1")), f"{name}.linear2")

    for row, length, centre in ((0, 4, (0.125, 0.25)), (2, 5, (0.75, 0.8125))):
        kinds = model.type_embedding.weight
        pixels = given["image"][given["index"][row]].flatten(1).T
        positions = reference.sine_positions_of_box(2, 3, 8).double()
        mark = F.gelu(linear(torch.tensor(centre).double(), "centroid.0"))
        mark = linear(mark, "centroid.2")
        pixels = linear(pixels, "image_projection") + positions + kinds[1]
        x = torch.cat([given["text"][row, :length] + kinds[0], pixels, (mark + kinds[2])[None]])
        x = x if norm_first else norm(x, "norm")
        for number in range(2):
            name = f"layers.{number}"
            if norm_first:
                x = x + attend(norm(x, f"{name}.norm1"), f"{name}.self_attn")
                x = x + feed(norm(x, f"{name}.norm2"), name)
            else:
                x = norm(x + attend(x, f"{name}.self_attn"), f"{name}.norm1")
                x = norm(x + feed(x, name), f"{name}.norm2")
        x = norm(x, "norm") if norm_first else x
        for place in given["selected"][row].nonzero()[:, 0]:
            hidden = norm(F.gelu(linear(x[place], "head.dense")), "head.norm")
            logits = given["embedding"] @ hidden + model.head.bias
            losses.append(logits.logsumexp(0) - logits[given["tokens"][row, place]])
    assert len(losses) == 3
    torch.testing.assert_close(model.train()(**given), sum(losses) / 3, rtol=1e-10, atol=0)


def test_every_parameter_learns_and_a_batch_without_hidden_words_gives_zeros():
    model, given = make(), problem()
    model(**given).backward()
    assert all(p.grad.abs().max() > 0 for name, p in model.named_parameters() if name != "mask_embedding")
    model.zero_grad()
    loss = model(**given | {"mask": torch.zeros_like(given["mask"])})
    loss.backward()
    assert loss == 0 and all(not p.grad.any() for name, p in model.named_parameters() if name != "mask_embedding")


def test_padding_of_sentences_is_no_key():
    model, given = make(dropout=0.0), problem()
    expected = model(**given)
    given["text"][0, 4] += 100
    assert torch.equal(model(**given), expected)


def test_first_weights_are_those_of_bert():
    model = MaskGrounding(500, 64, 32, heads=4)
    for name, parameter in model.named_parameters():
        if parameter.ndim > 1 or name == "mask_embedding":
            assert 0.01 < parameter.std() < 0.03, name
        else:
            assert (parameter == float("norm" in name and name.endswith("weight"))).all(), name
    assert MaskGrounding(5, 8, 4, heads=2, mask_embedding=False).mask_embedding is None


def test_metrics_are_of_the_words_since_the_last_time_and_the_share_is_of_the_whole_run():
    model = make()
    for rights in ((4, 4, 5), (4, 6)):
        targets = torch.tensor([4, 4, 6][: len(rights)])
        logits = F.one_hot(torch.tensor(rights), 11).double()
        model.tally.count(torch.tensor(float(len(rights))), logits, targets)
    found = model.take_metrics()
    assert tuple(found) == METRICS
    assert list(found.values()) == pytest.approx([2.5, 3 / 5, 4 / 5])
    other = make()
    other.tally.restore(model.tally.state())
    other.tally.count(torch.tensor(1.0), F.one_hot(torch.tensor([1] * 5), 11), torch.full((5,), 7))
    assert list(other.take_metrics().values()) == pytest.approx([1, 0, 5 / 10])
    assert not [name for name in model.state_dict() if name.startswith("tally")]
