"""What only training adds to a MagNet, as switches: Mask Grounding and the alignment loss (arXiv 2312.12198).

The paper has both and its training code is not public, so that most of this is our choice. Text and image change each
other in MagNet, and a separate pass with hidden words would encode the image twice. So words are hidden in the *main*
pass, of half of the samples: those give the grounding loss, the others train the segmentation and the alignment loss
with whole sentences. Nothing that the predictor sees has heard the hidden words: the text states behind the last stage,
the decoder's smallest map, and the mask's centre. With ``clean_segmentation`` every sample is encoded twice instead.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from fastris.models.magnet.config import MagNetConfig
from fastris.models.magnet.encoders import Encoded
from fastris.models.vocabulary import CONTINUES, MARKS, MASK, read_vocabulary
from fastris.nn.loss_meter import LossMeter
from fastris.nn.mask_grounding import MaskGrounding
from fastris.nn.masked_words import Masking, choose, draw_ahead, move_on, words_by_starts
from fastris.ops.pixel_contrast import pixel_contrast

SHOWN = 0.1
"""The share of the selected pieces that stay as they are."""
SAMPLES = 0.5
"""The share of the samples whose words are hidden in the main pass."""


class Hidden(NamedTuple):
    """Sentences (E, L) as they are, the same with [MASK] in place of the hidden tokens, and which those are."""

    tokens: Tensor
    masked: Tensor
    masking: Masking


class SentenceGrounding(MaskGrounding):
    """Mask Grounding of BERT's sentences. Its vocabulary must have a [MASK]; ValueError otherwise."""

    starts: Tensor
    words: Tensor

    def __init__(self, config: MagNetConfig):
        bert = config.bert
        super().__init__(
            bert.vocab_size,
            bert.hidden_size,
            config.widths[-1],
            layers=config.predictor_layers,
            heads=config.predictor_heads or bert.num_attention_heads,
            hidden=config.predictor_ffn or None,
            norm_first=False,
            eps=1e-12,
            mask_embedding=False,
        )
        self.rate, self.samples = config.mask_rate, 1.0 if config.clean_segmentation else SAMPLES
        ids = read_vocabulary(config.vocabulary)
        if MASK not in ids or ids[MASK] >= bert.vocab_size:
            raise ValueError(
                f"mask_grounding needs a vocabulary with {MASK}, and {config.vocabulary} has none among its first "
                f"{bert.vocab_size} pieces; give another vocabulary, or mask_grounding=0"
            )
        self.mask_id = ids[MASK]
        starts, words = torch.ones(bert.vocab_size, dtype=torch.bool), torch.ones(bert.vocab_size, dtype=torch.bool)
        for piece, number in ids.items():
            if number < bert.vocab_size:
                starts[number] = not (config.whole_words and piece.startswith(CONTINUES))
                words[number] = piece not in (*MARKS, MASK)
        self.register_buffer("starts", starts, persistent=False)
        self.register_buffer("words", words, persistent=False)

    def hide(self, tokens: Tensor) -> Hidden:
        """Choose words of sentences (E, L); see :func:`fastris.nn.masked_words.draw_ahead` for the random numbers."""
        words = words_by_starts(self.words[tokens], self.starts[tokens])
        draws = draw_ahead(len(tokens), tokens.shape[1], tokens.device)
        masking = choose(words, draws, self.rate, SHOWN, self.samples)
        return Hidden(tokens, tokens.masked_fill(masking.hidden, self.mask_id), masking)

    def loss(self, hidden: Hidden, encoded: Encoded, mask: Tensor, embedding: Tensor) -> Tensor:
        """The loss of :meth:`forward`, of what the masked sentences were encoded to.

        The random numbers that :meth:`hide` looked at are behind us then.
        """
        move_on(*hidden.tokens.shape)
        assert encoded.words is not None
        tokens, selected = hidden.tokens, hidden.masking.selected
        return self(encoded.words, tokens, tokens != 0, selected, encoded.maps[-1], mask, embedding)


class Alignment(nn.Module):
    """The contrast of the mask features with each other and with the projected sentence; it has no weights."""

    def __init__(self) -> None:
        super().__init__()
        self.meter = LossMeter()

    def forward(
        self,
        features: Tensor,
        encoded: Encoded,
        sentence: nn.Linear,
        tokens: Tensor,
        mask: Tensor,
        left_out: Tensor | None,
        known: Tensor | None = None,
    ) -> Tensor:
        """The loss of mask features (E, D, h, w) and the last words, whose mean ``sentence`` projects to D.

        The mean is of the tokens between the first and the last, which are marks. ``tokens`` (E, L), ``mask``
        (E, 1, H, W); the samples that are ``left_out`` (E,) give no loss, None leaves out none. ``known``
        (E, 1, H, W) is 0 on a border, which is no background.
        """
        assert encoded.words is not None
        valid = tokens != 0
        places = torch.arange(tokens.shape[1], device=tokens.device)
        inner = valid & (places > 0) & (places < valid.sum(1, keepdim=True) - 1)
        said = inner.to(encoded.words.dtype)[..., None]
        mean = (said * encoded.words).sum(1) / said.sum(1).clamp_min(1)
        if left_out is not None:  # without an object there is no loss
            mask = mask * ~left_out[:, None, None, None]
        loss = pixel_contrast(features, sentence(mean).to(features.dtype), mask, known=known)
        self.meter.count(loss.detach())
        return loss
