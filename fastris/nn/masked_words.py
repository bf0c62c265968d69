"""Which words of a sentence a training step hides and asks for: the selection of Mask Grounding.

The paper (arXiv 2312.12198) has no public training code; its author points to ovr-cnn's, where each token that is no
mark is selected with a probability of 0.15. Three things are ours: whole words are selected rather than their pieces,
a sentence of which nothing was selected gives one word, drawn uniformly (else half of the short sentences of RefCOCO
would teach nothing), and unknown words are left to the caller to exclude.

Everything here is a function of numbers that are drawn apart, so that it can be tested with given ones.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

DRAWS = 3
"""Uniform numbers for each position: for its word, for its piece, and for its sentence."""


class Masking(NamedTuple):
    """Of sentences (E, L), bool: the tokens to be predicted, and those among them that are hidden from the model."""

    selected: Tensor
    hidden: Tensor


def draw_ahead(rows: int, length: int, device: torch.device) -> Tensor:
    """Uniform numbers (DRAWS, rows, length) that PyTorch's CPU generator will give next; it stays where it is.

    What the model drops out later in the step is then what it would drop out without them. :func:`move_on`, called at
    the end of the step, lets the generator go past them. Its state is part of every checkpoint, and each process has
    its own, so that a resumed run draws the same numbers. Within ``torch.compile``, which cannot look ahead, they are
    drawn here and now.
    """
    if torch.compiler.is_compiling():
        return torch.rand(DRAWS, rows, length).to(device)
    ahead = torch.Generator()
    ahead.set_state(torch.get_rng_state())
    return torch.rand(DRAWS, rows, length, generator=ahead).to(device)


def move_on(rows: int, length: int) -> None:
    """Let the generator go past the numbers of :func:`draw_ahead`."""
    if not torch.compiler.is_compiling():
        torch.rand(DRAWS, rows, length)


def words_by_ends(may_be_selected: Tensor, ends: Tensor) -> Tensor:
    """The number of the word that each position (E, L) belongs to; -1 where it may not be selected.

    ``ends`` is True at the last piece of a word, as CLIP's vocabulary tells. Numbers are below L.
    """
    before = ends.long().cumsum(1) - ends.long()
    return before.masked_fill(~may_be_selected, -1)


def words_by_starts(may_be_selected: Tensor, starts: Tensor) -> Tensor:
    """As :func:`words_by_ends`, where ``starts`` is True at the first piece of a word, as BERT's vocabulary tells."""
    return (starts.long().cumsum(1) - 1).clamp_min(0).masked_fill(~may_be_selected, -1)


def choose(words: Tensor, draws: Tensor, rate: float, shown: float = 0.0, sentences: float = 1.0) -> Masking:
    """Select words to be predicted, each with probability ``rate``, and at least one where there is any.

    Args:
        words: (E, L), the number of each position's word, from 0 to L - 1; -1 where it may not be selected.
        draws: (DRAWS, E, L), uniform in [0, 1).
        rate: the probability of each word.
        shown: the probability with which a selected piece stays visible all the same.
        sentences: the probability with which anything of a sentence is selected at all.

    The one word of a sentence without a selected one is that of the smallest number, which is a uniform choice.
    """
    eligible = words >= 0
    number = draws[0].gather(1, words.clamp_min(0)).masked_fill(~eligible, torch.inf)
    bound = number.amin(1, keepdim=True).clamp_min(rate)
    selected = eligible & (number <= bound) & (draws[2, :, :1] < sentences)
    return Masking(selected, selected & (draws[1] >= shown))


def chosen_rows(chosen: Tensor) -> Tensor:
    """Places (N,) of the True elements of ``chosen`` (E, L), flattened."""
    return chosen.flatten().nonzero()[:, 0]


def centroids(mask: Tensor) -> tuple[Tensor, Tensor]:
    """The centres (x, y) of masks (E, 1, H, W) above 0.5, (E, 2) in [0, 1], and whether there is any such pixel (E,).

    In the frame of the mask; pixel i of n lies at (i + 0.5) / n. The centre of an empty mask is 0. In float32, or
    float64 for float64 masks.
    """
    wide = torch.promote_types(mask.dtype, torch.float32)
    inside = (mask[:, 0] > 0.5).to(wide)
    count = inside.sum((1, 2))
    height, width = inside.shape[1:]

    def mean(along: Tensor, length: int) -> Tensor:
        place = (torch.arange(length, dtype=wide, device=mask.device) + 0.5) / length
        return (along * place).sum(1) / count.clamp_min(1)

    return torch.stack([mean(inside.sum(1), width), mean(inside.sum(2), height)], dim=1), count > 0
