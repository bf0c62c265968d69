"""More of somebody else's CRIS: layers and decoders of models that descend from it, and near misses.

Written with torch alone, like strangers.py.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from strangers import Layer, sines
from torch import nn


class FeedForward(nn.Module):
    def __init__(self, width: int, hidden: int, dropout: float):
        super().__init__()
        self.widen, self.narrow = nn.Linear(width, hidden), nn.Linear(hidden, width)
        self.norm, self.drop = nn.LayerNorm(hidden), nn.Dropout(dropout)

    def forward(self, x):
        return self.narrow(self.norm(self.drop(self.bend(self.widen(x)))))

    def bend(self, x):
        return F.relu(x)


class OtherNamesLayer(nn.Module):
    """The published layer with its norms, dropouts and attentions under other names, in another order."""

    feed_forward_type = FeedForward

    def __init__(self, width: int, heads: int, hidden: int, dropout: float = 0.1):
        super().__init__()
        self.to_words = nn.MultiheadAttention(width, heads, dropout=dropout)
        self.to_pixels = nn.MultiheadAttention(width, heads, dropout=dropout)
        self.after = nn.ModuleList(nn.LayerNorm(width) for _ in range(2))
        self.before = nn.ModuleDict({name: nn.LayerNorm(width) for name in ("mix", "words", "pixels")})
        self.drops = nn.ModuleList(nn.Dropout(dropout) for _ in range(3))
        self.mix = self.feed_forward_type(width, hidden, dropout)

    def forward(self, image, words, image_pos, word_pos, padding):
        x = self.before["pixels"](image)
        query = x + image_pos
        image = image + self.drops[2](self.after[1](self.to_pixels(query, query, x, need_weights=False)[0]))
        query = self.before["words"](image) + image_pos
        x = self.to_words(query, words + word_pos, words, key_padding_mask=padding, need_weights=False)[0]
        image = image + self.drops[1](self.after[0](x))
        return image + self.drops[0](self.mix(self.before["mix"](image)))


class SmoothFeedForward(FeedForward):
    def bend(self, x):
        return F.gelu(x)


class SmoothOtherNamesLayer(OtherNamesLayer):
    feed_forward_type = SmoothFeedForward


class PlacelessWordsLayer(OtherNamesLayer):
    """Words have no positions."""

    def forward(self, image, words, image_pos, word_pos, padding):
        return super().forward(image, words, image_pos, 0 * word_pos, padding)


class OpenLayer(Layer):
    """No padding mask."""

    def forward(self, image, words, image_pos, word_pos):
        return super().forward(image, words, image_pos, word_pos, None)


class OpenWeightsLayer(OpenLayer):
    returns_weights = True


class FirstWordLayer(Layer):
    """Looks at the first half of the words only."""

    def forward(self, image, words, image_pos, word_pos):
        half = len(words) // 2
        return super().forward(image, words[:half], image_pos, word_pos[:half], None)


class OtherDecoder(nn.Module):
    """The published decoder without ``return_intermediate``; the classes below call it and answer in other ways."""

    layer_type = Layer

    def __init__(self, depth: int = 2, width: int = 32, heads: int = 4, hidden: int = 64, dropout: float = 0.1):
        super().__init__()
        self.layers = nn.ModuleList([self.layer_type(width, heads, hidden, dropout) for _ in range(depth)])
        self.norm = nn.LayerNorm(width)

    def run(self, image, words, *padding):
        _, width, rows, columns = image.shape
        grid = torch.zeros(width, rows, columns)
        grid[: width // 2] = sines(columns, width // 2).T[:, None, :]
        grid[width // 2 :] = sines(rows, width // 2).T[:, :, None]
        image_pos, word_pos = grid.flatten(1).T[:, None], sines(words.shape[1], width)[:, None]
        x, words, steps = image.flatten(2).permute(2, 0, 1), words.permute(1, 0, 2), []
        for layer in self.layers:
            answer = layer(x, words, image_pos, word_pos, *padding)
            x, weights = answer if isinstance(answer, tuple) else (answer, None)
            steps.append((self.norm(x).permute(1, 2, 0), weights))
        return steps

    def forward(self, image, words, padding):
        return self.run(image, words, padding)[-1][0]


class NothingBesidesDecoder(OtherDecoder):
    def forward(self, image, words, padding=None, mask=None):
        return self.run(image, words, padding)[-1][0], []


class AllBesidesDecoder(OtherDecoder):
    def forward(self, image, words, padding):
        steps = self.run(image, words, padding)
        return steps[-1][0], [step[0] for step in steps]


class WeightsLayer(Layer):
    returns_weights = True


class WeightsBesidesDecoder(OtherDecoder):
    layer_type = WeightsLayer

    def forward(self, image, words, padding):
        steps = self.run(image, words, padding)
        return steps[-1][0], [step[1] for step in steps]


class OpenDecoder(OtherDecoder):
    """No padding mask anywhere."""

    layer_type = OpenLayer

    def forward(self, image, words):
        return self.run(image, words)[-1][0]


class DeafDecoder(OtherDecoder):
    """Takes the padding mask and does not use it."""

    layer_type = OpenLayer

    def forward(self, image, words, padding):
        return self.run(image, words)[-1][0]


class OtherNamesDecoder(OtherDecoder):
    layer_type = OtherNamesLayer


class RawBesidesDecoder(OtherDecoder):
    """Its last answer is normed, the others are not."""

    def forward(self, image, words, padding):
        steps = self.run(image, words, padding)
        return steps[-1][0], [1.001 * step[0] for step in steps[:-1]] + [steps[-1][0]]


class SummedDecoder(OtherDecoder):
    """Adds up what its layers say."""

    def forward(self, image, words, padding):
        return sum(step[0] for step in self.run(image, words, padding))


class TwiceNormedDecoder(OtherDecoder):
    def forward(self, image, words, padding):
        return self.norm(self.run(image, words, padding)[-1][0].transpose(1, 2)).transpose(1, 2)
