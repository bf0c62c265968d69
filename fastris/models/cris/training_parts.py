"""What only training adds to a CRIS, as switches: Mask Grounding and a cross-modal alignment loss (arXiv 2312.12198).

The paper has them on a model of its own; their places on CRIS are ours. Nothing of them runs in inference, and files
for others have neither their weights nor their switches.

Mask Grounding hides words and guesses them (:mod:`fastris.nn.mask_grounding`). Words are hidden in a second pass of the
text encoder, which is independent of the image, so that the segmentation keeps whole sentences. A hidden token keeps
its id, and only its row of the embedding is replaced: where the sentence ends, and what is padding, stays known. CLIP's
text encoder is causal, but the predictor is not, and states to the right of a hidden word carry what follows it. The
image context is C5, the only one of CRIS's maps, with its neck's projections, that has not heard the clean sentence.

The alignment loss compares pixels of the decoder's map with each other and with the sentence
(:func:`fastris.ops.pixel_contrast`).
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastris.models.cris.config import ALIGNMENT_WIDTH, HEADS, CRISConfig
from fastris.nn.loss_meter import LossMeter
from fastris.nn.mask_grounding import MaskGrounding
from fastris.nn.masked_words import Masking, choose, draw_ahead, move_on, words_by_ends
from fastris.ops.pixel_contrast import pixel_contrast


class GroundingFeatures(NamedTuple):
    """:class:`fastris.models.cris.ImageFeatures` with C5 (B, E, H/32, W/32), which Mask Grounding reads in training."""

    f3: Tensor
    f4: Tensor
    f5: Tensor
    c5: Tensor

    def select(self, index: Tensor | None) -> GroundingFeatures:
        """The features of the images at the positions ``index`` (E,), in that order; all images for None."""
        return self if index is None else GroundingFeatures(*(level[index] for level in self))


class HiddenWords(NamedTuple):
    """Sentences with hidden words: which they are, and the text encoder's states (E, L, D) of those sentences."""

    masking: Masking
    states: Tensor


class SentenceGrounding(MaskGrounding):
    """Mask Grounding of CLIP's sentences."""

    word_ends: Tensor | None

    def __init__(self, config: CRISConfig):
        clip = config.clip
        super().__init__(
            clip.vocab_size, clip.transformer_width, clip.embed_dim, layers=config.predictor_layers, heads=HEADS
        )
        self.rate = config.mask_rate
        ends = word_ends() if config.whole_words else ()
        known = torch.tensor(ends, dtype=torch.uint8) if len(ends) == clip.vocab_size else None
        self.register_buffer("word_ends", known, persistent=False)

    def hide(self, tokens: Tensor) -> Masking:
        """Choose words of sentences (E, L); see :func:`fastris.nn.masked_words.draw_ahead` for the random numbers."""
        ends = torch.ones_like(tokens) if self.word_ends is None else self.word_ends[tokens]
        words = words_by_ends(spoken(tokens, len(self.head.bias)), ends)
        return choose(words, draw_ahead(len(tokens), tokens.shape[1], tokens.device), self.rate)

    def loss(
        self, hidden: HiddenWords, tokens: Tensor, c5: Tensor, mask: Tensor, embedding: Tensor, index: Tensor | None
    ) -> Tensor:
        """The loss of :meth:`forward`; the random numbers that :meth:`hide` looked at are behind us then."""
        move_on(len(tokens), tokens.shape[1])
        return self(hidden.states, tokens, tokens != 0, hidden.masking.selected, c5, mask, embedding, index)


class Alignment(nn.Module):
    """The alignment loss with its two projections."""

    def __init__(self, config: CRISConfig):
        super().__init__()
        self.vocabulary = config.clip.vocab_size
        self.pixel_projection = nn.Linear(config.vis_dim, ALIGNMENT_WIDTH)
        self.text_projection = nn.Linear(config.vis_dim, ALIGNMENT_WIDTH)
        self.meter = LossMeter()

    def forward(
        self, pixels: Tensor, words: Tensor, tokens: Tensor, mask: Tensor, known: Tensor | None = None
    ) -> Tensor:
        """Of the decoder's map (E, D, h, w), the words (E, L, D) it heard, their ids (E, L) and masks (E, 1, H, W).

        The sentence is the mean of its words, without the tokens of its start and end. ``known`` (E, 1, H, W) is 0 on a
        letterbox's border, which is no background.
        """
        said = spoken(tokens, self.vocabulary).to(words.dtype)[..., None]
        sentence = self.text_projection((said * words).sum(1) / said.sum(1).clamp_min(1))
        weight, bias = self.pixel_projection.weight, self.pixel_projection.bias
        loss = pixel_contrast(F.conv2d(pixels, weight[:, :, None, None], bias), sentence, mask, known=known)
        self.meter.count(loss.detach())
        return loss


def spoken(tokens: Tensor, vocabulary: int) -> Tensor:
    """Which tokens (E, L) are of words: all but padding, start, and the end with what may lie behind it.

    CLIP's last two ids are start and end; 0 is padding.
    """
    places = torch.arange(tokens.shape[1], device=tokens.device)
    return (tokens > 0) & (tokens < vocabulary - 2) & (places < tokens.argmax(1, keepdim=True))


@functools.cache
def word_ends() -> tuple[bool, ...]:
    """By id, whether a piece of CLIP's vocabulary ends a word."""
    from open_clip.tokenizer import SimpleTokenizer

    pieces = SimpleTokenizer().decoder
    return tuple(pieces[number].endswith("</w>") for number in range(len(pieces)))
