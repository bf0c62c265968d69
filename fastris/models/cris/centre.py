"""A centre embedding on a CRIS, as a switch: AlignFormer's (arXiv 2301.06429), which corrects CRIS's text kernel.

One query starts as the sentence's mean word and reads three maps in turn: the decoder's, halved, the decoder's, and the
projector's behind its first block. What each layer makes of it is *added* to the text projection of CRIS; the last
matrix is zero at first, so that a new model computes what CRIS computes. That place, and that it is a sum, is ours.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from fastris.nn.positions import pixel_positions
from fastris.nn.query_decoder import QueryDecoder


class Centre(QueryDecoder):
    """See the module. ``width`` is that of words and maps, ``outputs`` the length of the projected sentence."""

    table = staticmethod(pixel_positions)

    def __init__(self, width: int, layers: int, hidden: int, outputs: int):
        super().__init__(width, width, layers, hidden)
        self.txt_proj = nn.Linear(width, width)
        last = nn.Linear(width, outputs)
        self.head = nn.Sequential(nn.Linear(width, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(), last)
        nn.init.zeros_(last.weight)
        nn.init.zeros_(last.bias)

    def corrections(self, words: Tensor, valid: Tensor, maps: Sequence[Tensor], all_outputs: bool) -> Tensor:
        """What is added to the projected sentences: (E, Q, outputs), of all ``layers + 1`` embeddings or the last.

        ``words`` (E, L, D), ``valid`` (E, L) False at padding, three ``maps`` (E, D, h, w) from low to high resolution.
        """
        mask = valid.to(words.dtype)[..., None]
        mean = (mask * words).sum(1) / mask.sum(1).clamp_min(1e-6)
        centres = self(self.txt_proj(mean)[:, None], maps)
        return self.head(torch.cat(centres if all_outputs else centres[-1:], dim=1))
