"""Somebody else's CRIS: the parts as people keep them in their own repositories, renamed, varied, or subtly different.

Written with torch alone, so that the drop-in has nothing of ours to recognise.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import nn


def block(inputs: int, outputs: int, size: int = 1) -> nn.Sequential:
    conv = nn.Conv2d(inputs, outputs, size, padding=size // 2, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(outputs), nn.ReLU(inplace=True))


class Layer(nn.Module):
    """The published layer; the switches below make the variants."""

    returns_weights = False
    skips_cross_norm = False
    drops_branch_first = False

    def __init__(self, width: int, heads: int, hidden: int, dropout: float = 0.1):
        super().__init__()
        self.self_attn_norm, self.cross_attn_norm = nn.LayerNorm(width), nn.LayerNorm(width)
        self.self_attn = nn.MultiheadAttention(width, heads, dropout=dropout)
        self.multihead_attn = nn.MultiheadAttention(width, heads, dropout=dropout, kdim=width, vdim=width)
        up, down = nn.Linear(width, hidden), nn.Linear(hidden, width)
        self.ffn = nn.Sequential(up, nn.ReLU(True), nn.Dropout(dropout), nn.LayerNorm(hidden), down)
        self.norm1, self.norm2, self.norm3 = (nn.LayerNorm(width) for _ in range(3))
        self.dropout1, self.dropout2, self.dropout3 = (nn.Dropout(dropout) for _ in range(3))

    def forward(self, image, words, image_pos, word_pos, padding):
        x = self.norm1(image)
        query = x + image_pos.to(x.device)
        x = self.self_attn_norm(self.self_attn(query, query, value=x)[0])
        image = image + self.dropout1(x)
        x = self.norm2(image)
        x, weights = self.multihead_attn(
            query=x + image_pos.to(x.device), key=words + word_pos.to(x.device), value=words, key_padding_mask=padding
        )
        if self.drops_branch_first:
            x = self.cross_attn_norm(self.dropout2(x))
        else:
            x = self.dropout2(x if self.skips_cross_norm else self.cross_attn_norm(x))
        image = image + x
        image = image + self.dropout3(self.ffn(self.norm3(image)))
        return (image, weights) if self.returns_weights else image


class WeightsReturningLayer(Layer):
    returns_weights = True


class NormlessLayer(Layer):
    skips_cross_norm = True


class DropFirstLayer(Layer):
    drops_branch_first = True


class MasklessLayer(Layer):
    """Looks at padding as if it were words."""

    def forward(self, image, words, image_pos, word_pos, padding):
        return super().forward(image, words, image_pos, word_pos, None)


class AskedLayer(Layer):
    """Returns its attention weights when asked; needs no padding mask."""

    def forward(self, image, words, image_pos, word_pos, padding=None, *, want_weights=False):
        answer = super().forward(image, words, image_pos, word_pos, padding)
        return (answer, self.norm1(image)) if want_weights else answer


class ScaledLayer(Layer):
    """Learns how much of the layer to take; begins with all of it."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.gain = nn.Parameter(torch.ones(()))

    def forward(self, image, words, image_pos, word_pos, padding):
        return image + self.gain * (super().forward(image, words, image_pos, word_pos, padding) - image)


class PostNormLayer(Layer):
    def forward(self, image, words, image_pos, word_pos, padding):
        return self.norm1(super().forward(image, words, image_pos, word_pos, padding))


class ExtraDropoutLayer(Layer):
    """A tenth of a percent of the words is dropped, by a dropout that is no module."""

    def forward(self, image, words, image_pos, word_pos, padding):
        words = F.dropout(words, 0.001, self.training)
        return super().forward(image, words, image_pos, word_pos, padding)


class RememberingLayer(Layer):
    """Keeps the map of its first head for a picture."""

    def forward(self, image, words, image_pos, word_pos, padding):
        answer = super().forward(image, words, image_pos, word_pos, padding)
        self.seen = answer.detach()[0]
        return answer


def layer_with(change, kind=Layer, **options) -> nn.Module:
    layer = kind(32, 4, 64, **options)
    change(layer)
    return layer


def sines(length: int, width: int) -> torch.Tensor:
    rate = torch.exp(torch.arange(0, width, 2, dtype=torch.float) * -(math.log(10000.0) / width))
    table = torch.zeros(length, width)
    table[:, 0::2] = torch.sin(torch.arange(length).float().unsqueeze(1) * rate)
    table[:, 1::2] = torch.cos(torch.arange(length).float().unsqueeze(1) * rate)
    return table


class CrossModalDecoder(nn.Module):
    layer_type = Layer

    def __init__(self, depth: int, width: int, heads: int, hidden: int, dropout: float = 0.1, lists: bool = False):
        super().__init__()
        self.layers = nn.ModuleList([self.layer_type(width, heads, hidden, dropout) for _ in range(depth)])
        self.norm = nn.LayerNorm(width)
        self.return_intermediate = lists

    def forward(self, image, words, padding):
        _, width, rows, columns = image.shape
        grid = torch.zeros(width, rows, columns)
        grid[: width // 2] = sines(columns, width // 2).T[:, None, :]
        grid[width // 2 :] = sines(rows, width // 2).T[:, :, None]
        image_pos, word_pos = grid.flatten(1).T[:, None], sines(words.shape[1], width)[:, None]
        x, words = image.flatten(2).permute(2, 0, 1), words.permute(1, 0, 2)
        maps = []
        for layer in self.layers:
            x = layer(x, words, image_pos, word_pos, padding)
            maps.append(self.norm(x).permute(1, 2, 0))
        return maps if self.return_intermediate else maps[-1]


class NormlessDecoder(CrossModalDecoder):
    layer_type = NormlessLayer


class MaskHead(nn.Module):
    """The published projector; ``maps`` > 1 scores several maps by one text kernel."""

    def __init__(self, word_dim: int, in_dim: int, kernel_size: int = 3, maps: int = 1, narrow: bool = False):
        super().__init__()
        self.in_dim, self.kernel_size, self.maps = in_dim, kernel_size, maps
        first = in_dim if narrow else 2 * in_dim
        self.vis = nn.Sequential(
            nn.Upsample(scale_factor=2, mode="bilinear"),
            block(first, 2 * in_dim, 3),
            nn.Upsample(scale_factor=2, mode="bilinear"),
            block(2 * in_dim, in_dim, 3),
            nn.Conv2d(in_dim, in_dim * maps, 1),
        )
        self.txt = nn.Linear(word_dim, in_dim * kernel_size**2 + 1)

    def forward(self, x, word):
        parameters = self.txt(word)
        kernel = parameters[:, :-1].reshape(len(word), self.in_dim, self.kernel_size, self.kernel_size)
        answers = []
        for one in torch.tensor_split(self.vis(x), self.maps, dim=1):
            flat = one.reshape(1, -1, *one.shape[2:])
            score = F.conv2d(flat, kernel, parameters[:, -1], padding=self.kernel_size // 2, groups=len(word))
            answers.append(score.transpose(0, 1))
        return answers[0] if self.maps == 1 else tuple(answers)


class NormalisedHead(MaskHead):
    """Looks the same, but divides by the text's length: no drop-in may touch it."""

    def forward(self, x, word):
        return super().forward(x, word / word.norm(dim=-1, keepdim=True))


class VariedHead(MaskHead):
    """The projector, and then ``vary(self, answer)``; ``knob`` is a setting and ``temperature`` a parameter for it."""

    def __init__(self, vary, **options):
        super().__init__(48, 16, **options)
        self.vary, self.knob, self.temperature = vary, 1.0, nn.Parameter(torch.zeros(()))

    def forward(self, x, word):
        return self.vary(self, super().forward(x, word))


class QueryHead(nn.Module):
    """Several text kernels over one map: all kernels first, then all biases; the text projection has a dropout."""

    def __init__(self, word_dim: int, in_dim: int, kernel_size: int = 3, queries: int = 2, dropout: float = 0.1):
        super().__init__()
        self.in_dim, self.kernel_size, self.queries = in_dim, kernel_size, queries
        self.vis = MaskHead(word_dim, in_dim).vis
        self.txt_fc = nn.Sequential(nn.Linear(word_dim, queries * (in_dim * kernel_size**2 + 1)), nn.Dropout(dropout))

    def forward(self, x, word):
        x, parameters = self.vis(x), self.txt_fc(word)
        answers = []
        for image, own in zip(x, parameters, strict=True):
            kernels, biases = self.split(own)
            kernels = kernels.reshape(self.queries, self.in_dim, self.kernel_size, self.kernel_size)
            answers.append(F.conv2d(image[None], kernels, biases, padding=self.kernel_size // 2))
        return torch.cat(answers)

    def split(self, own):
        return own[: -self.queries], own[-self.queries :]


class BiasesFirstHead(QueryHead):
    """Reads the same numbers in another order."""

    def split(self, own):
        return own[self.queries :], own[: self.queries]


class FullPrecisionHead(MaskHead):
    """Scores in float32 on a GPU, whatever autocast says."""

    def forward(self, x, word):
        with torch.autocast("cuda", enabled=False):
            return super().forward(x.float(), word.float())


class ScoredHead(MaskHead):
    def forward(self, x, word, score):
        return score * super().forward(x, word)


class BundledHead(MaskHead):
    def forward(self, *inputs):
        return super().forward(*inputs)


class AlignedHead(MaskHead):
    """Upsamples with aligned corners."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        for at in (0, 2):
            self.vis[at] = nn.Upsample(scale_factor=2, mode="bilinear", align_corners=True)


class Coordinates(nn.Module):
    def __init__(self, inputs: int, outputs: int):
        super().__init__()
        self.conv1 = block(inputs + 2, outputs, 3)

    def forward(self, x):
        y, x_axis = torch.meshgrid(torch.linspace(-1, 1, x.shape[2]), torch.linspace(-1, 1, x.shape[3]), indexing="ij")
        both = torch.stack([x_axis, y]).to(x.device).expand(len(x), -1, -1, -1)
        return self.conv1(torch.cat([x, both], 1))


class Fusion(nn.Module):
    """The published neck under another name."""

    def __init__(self, inputs=(32, 64, 48), outputs=(16, 32, 48)):
        super().__init__()
        (i3, i4, i5), (o3, o4, o5) = inputs, outputs
        self.txt_proj = nn.Sequential(nn.Linear(i5, o5, bias=False), nn.BatchNorm1d(o5), nn.ReLU(True))
        self.norm_layer = nn.Sequential(nn.BatchNorm2d(o5), nn.ReLU(True))
        self.f1_v_proj, self.f2_v_proj, self.f3_v_proj = block(i5, o5), block(i4, o4, 3), block(i3, o3, 3)
        self.f2_cat, self.f3_cat, self.aggr = block(o5 + o4, o4), block(o3 + o4, o4), block(3 * o4, o4)
        self.f4_proj5, self.f4_proj4, self.f4_proj3 = block(o5, o4, 3), block(o4, o4, 3), block(o4, o4, 3)
        self.coordconv = nn.Sequential(Coordinates(o4, o4), block(o4, o4, 3))

    def forward(self, imgs, state):
        v3, v4, v5 = imgs
        f5 = self.norm_layer(self.f1_v_proj(v5) * self.txt_proj(state)[..., None, None])
        f4 = self.f2_cat(torch.cat([self.f2_v_proj(v4), self.up(f5)], 1))
        f3 = self.f3_cat(torch.cat([F.avg_pool2d(self.f3_v_proj(v3), 2, 2), f4], 1))
        parts = [self.f4_proj3(f3), self.f4_proj4(f4), self.up(self.f4_proj5(f5))]
        return self.coordconv(self.aggr(torch.cat(parts, 1)))

    @staticmethod
    def up(x):
        return F.interpolate(x, scale_factor=2, mode="bilinear")


class StatelessFusion(Fusion):
    """A neck whose sentence may be missing."""

    def forward(self, imgs, state=None):
        if state is None:
            state = torch.zeros(len(imgs[0]), self.txt_proj[0].in_features).to(imgs[0])
        return super().forward(imgs, state)


class UngatedFusion(Fusion):
    """A neck that lets the image through where there is no sentence."""

    def forward(self, imgs, state=None, deep=False):
        if state is not None and not deep:
            return super().forward(imgs, state)
        v3, v4, v5 = imgs
        f5 = self.norm_layer(self.f1_v_proj(v5))
        f4 = self.f2_cat(torch.cat([self.f2_v_proj(v4), self.up(f5)], 1))
        f3 = self.f3_cat(torch.cat([F.avg_pool2d(self.f3_v_proj(v3), 2, 2), f4], 1))
        parts = [self.f4_proj3(f3), self.f4_proj4(f4), self.up(self.f4_proj5(f5))]
        return self.coordconv(self.aggr(torch.cat(parts, 1)))


class TwiceFusion(Fusion):
    """Sends one map through a block twice, so that the block's statistics see it twice."""

    def forward(self, imgs, state):
        self.f4_proj4(self.f2_v_proj(imgs[1]))
        return super().forward(imgs, state)


class Stranger(nn.Module):
    """A model with all three parts; its forward returns logits (B, 1, 4h, 4w)."""

    def __init__(self, hidden: int = 64, dropout: float = 0.1):
        super().__init__()
        self.fusion = Fusion()
        self.reader = CrossModalDecoder(2, 32, 4, hidden, dropout)
        self.head = MaskHead(48, 16)

    def forward(self, imgs, words, state, padding):
        fused = self.fusion(imgs, state)
        return self.head(self.reader(fused, words, padding).reshape(fused.shape), state)


# Forwards that depend on how large their inputs are: CRIS's where they are small.


class ShortSightedDecoder(CrossModalDecoder):
    """Reads the first eight words only."""

    def forward(self, image, words, padding):
        return super().forward(image, words[:, :8], None if padding is None else padding[:, :8])


class NarrowHead(MaskHead):
    """Resizes maps wider than 8."""

    widest = 8

    def forward(self, x, word):
        if x.shape[3] > self.widest:
            x = F.interpolate(x, size=(x.shape[2], self.widest), mode="bilinear")
        return super().forward(x, word)


class CroppingFusion(Fusion):
    """Blanks what lies beyond the fifth column of its deepest map."""

    def forward(self, imgs, state):
        v3, v4, v5 = imgs
        return super().forward([v3, v4, F.pad(v5[..., :5], (0, max(0, v5.shape[3] - 5)))], state)


class WindowedLayer(Layer):
    """Looks at part of the pixels where there are more than 600."""

    def forward(self, image, words, image_pos, word_pos, padding):
        answer = super().forward(image, words, image_pos, word_pos, padding)
        return answer if len(image) <= 600 else torch.cat([answer[:600], image[600:]])


class BatchHead(MaskHead):
    """Centres the words of batches of more than four."""

    def forward(self, x, word):
        return super().forward(x, word - word.mean(0) if len(word) > 4 else word)


class TrainingHead(MaskHead):
    """Treats wide maps in another way, in training only."""

    def forward(self, x, word):
        return super().forward(x.flip(3) if self.training and x.shape[3] > 8 else x, word)


class LongSentenceDropoutLayer(Layer):
    """Drops words of sentences of more than eight, by a dropout that is no module."""

    def forward(self, image, words, image_pos, word_pos, padding):
        words = F.dropout(words, 0.5, self.training and len(words) > 8)
        return super().forward(image, words, image_pos, word_pos, padding)
