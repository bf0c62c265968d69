"""MagNet's pixel decoder: deformable attention over all four maps, and nothing behind it.

Shapes: B batch, D width, M pixels of the maps one behind the other (low to high resolution).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fastris import reference
from fastris.models.magnet.config import LEVELS, POINTS
from fastris.models.swin_bert import NORM_GROUPS
from fastris.nn.deformable import DeformableLayer
from fastris.nn.lean_deformable import lean_stack
from fastris.nn.positions import box_positions
from fastris.nn.recompute import recomputed
from fastris.nn.separate_attention import stacked


class Decoded(NamedTuple):
    """Three maps (B, D, h, w) from low to high resolution, and the map (B, D, H/4, W/4) before ``mask_features``.

    Whoever scores that map folds the convolution into the kernels.
    """

    levels: tuple[Tensor, ...]
    pixels: Tensor


class Encoder(nn.Module):
    """The layers, which keep little for the backward pass: see :mod:`fastris.nn.lean_deformable`.

    ``recompute`` is set by :meth:`fastris.MagNet.set_recompute`; ``"stages"`` computes each again by itself.
    """

    layers: Any
    recompute = "none"

    def __init__(self, width: int, layers: int, hidden: int, heads: int):
        super().__init__()
        self.layers = stacked(DeformableLayer(width, hidden, heads, LEVELS, POINTS), layers)

    def forward(self, y: Tensor, positions: Tensor, sizes: Sequence[tuple[int, int]], places: Tensor) -> Tensor:
        """(B, M, D) to (B, M, D); ``positions`` (M, D) with their level's embedding, ``places`` (M, 2)."""
        if self.recompute != "stages":
            decoded = lean_stack(self.layers, y, positions, sizes, places)
            if decoded is not None:
                return decoded
        for layer in self.layers:

            def run(y: Tensor, positions: Tensor, layer: Any = layer) -> Tensor:
                return layer(y, positions, sizes, places)

            y = recomputed([layer], self.recompute, run, y, positions, whole=self.recompute == "stages")
        return y


class PixelTransformer(nn.Module):
    """The encoder and the embedding of the four resolutions."""

    def __init__(self, encoder: Encoder, width: int):
        super().__init__()
        self.encoder = encoder
        self.level_embed = nn.Parameter(torch.empty(LEVELS, width))


class PixelDecoder(nn.Module):
    """See the module. ``widths`` are those of the four maps, from high to low resolution."""

    input_proj: Any
    mask_features: Any

    def __init__(self, widths: Sequence[int], width: int, layers: int, hidden: int, heads: int):
        super().__init__()
        self.input_proj = nn.ModuleList(
            nn.Sequential(nn.Conv2d(each, width, 1), nn.GroupNorm(NORM_GROUPS, width)) for each in reversed(widths)
        )
        self.transformer = PixelTransformer(Encoder(width, layers, hidden, heads), width)
        self.mask_features = nn.Conv2d(width, width, 1)
        self._reset()

    def _reset(self) -> None:
        """The released initialisation."""
        nn.init.normal_(self.transformer.level_embed)
        for projection in self.input_proj:
            nn.init.xavier_uniform_(projection[0].weight)
            nn.init.zeros_(projection[0].bias)
        nn.init.kaiming_uniform_(self.mask_features.weight, a=1)
        nn.init.zeros_(self.mask_features.bias)

    def forward(self, maps: Sequence[Tensor]) -> Decoded:
        """Decode the encoder's four maps (B, C, h, w), given from high to low resolution.

        Runs in the weights' dtype: autocast is off, as released.
        """
        with torch.autocast(maps[0].device.type, enabled=False):
            dtype = self.mask_features.weight.dtype
            projected = [project(each.to(dtype)) for project, each in zip(self.input_proj, maps[::-1], strict=True)]
            sizes = [(each.shape[-2], each.shape[-1]) for each in projected]
            y = torch.cat([each.flatten(2).transpose(1, 2) for each in projected], dim=1)
            positions = torch.cat(
                [
                    box_positions(*size, y.shape[-1], y.device).to(dtype) + level
                    for size, level in zip(sizes, self.transformer.level_embed, strict=True)
                ]
            )
            places = reference.pixel_centres(sizes, y.device, torch.promote_types(dtype, torch.float32))
            y = self.transformer.encoder(y, positions, sizes, places)
            parts = y.split([height * width for height, width in sizes], dim=1)
            *levels, pixels = (p.transpose(1, 2).unflatten(2, size) for p, size in zip(parts, sizes, strict=True))
            return Decoded(tuple(levels), pixels)
