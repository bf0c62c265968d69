"""A reader's own CRIS: small, and with nothing of fastris in it."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from strangers import CrossModalDecoder, Fusion, MaskHead, block
from torch import Tensor, nn


class ReadersCRIS(nn.Module):
    """Called as the published CRIS: images (B, 3, 64, 64), tokens (B, L) and, in training, masks (B, 1, 64, 64)."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = block(3, 32, 3)
        self.deeper = nn.ModuleList([block(32, 64, 3), block(64, 48, 3)])
        self.words = nn.Embedding(99, 32, padding_idx=0)
        self.sentence = nn.Linear(32, 48)
        self.neck, self.decoder, self.proj = Fusion(), CrossModalDecoder(3, 32, 4, 64), MaskHead(48, 16)

    def forward(self, images: Tensor, tokens: Tensor, masks: Tensor | None = None) -> Tensor | tuple[Tensor, ...]:
        maps = [F.avg_pool2d(self.stem(images), 8)]
        for layer in self.deeper:
            maps.append(F.avg_pool2d(layer(maps[-1]), 2))
        words = self.words(tokens)
        state = self.sentence(words.mean(1))
        fused = self.neck(maps, state)
        logits = self.proj(self.decoder(fused, words, tokens == 0).reshape(fused.shape), state)
        if masks is None:
            return logits
        target = F.interpolate(masks, logits.shape[-2:])
        return logits.detach(), target, F.binary_cross_entropy_with_logits(logits, target)


def readers_batch() -> tuple[Tensor, Tensor, Tensor]:
    """Images, tokens and masks of four pairs."""
    return torch.randn(4, 3, 64, 64), torch.randint(1, 99, (4, 9)), torch.rand(4, 1, 64, 64).round()
