"""Inputs and calls that the test files of the text-to-pixel operators share."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from fastris.ops.contrastive import text_to_pixel_contrastive_loss
from fastris.ops.similarity import text_to_pixel_similarity


@dataclass(frozen=True)
class Case:
    """One problem. ``pointwise`` is the width that a 1x1 convolution before the text kernels makes; 0 is none."""

    batch: int
    queries: int
    channels: int
    height: int
    width: int
    size: int = 3
    pointwise: int = 0

    def __str__(self) -> str:
        pointwise = f"-1x1.{self.pointwise}" if self.pointwise else ""
        return f"B{self.batch}-Q{self.queries}-C{self.channels}-{self.height}x{self.width}-k{self.size}{pointwise}"

    @property
    def logits_shape(self) -> tuple[int, int, int, int]:
        return self.batch, self.queries, self.height, self.width

    def inputs(self, scale: float = 1.0) -> dict[str, Tensor]:
        """Random tensors under the operators' own argument names; the logits grow with ``scale``."""
        generator = torch.Generator().manual_seed(0)
        inner = self.pointwise or self.channels
        shapes = {
            "features": (self.batch, self.channels, self.height, self.width),
            "kernel": (self.batch, self.queries, inner, self.size, self.size),
            "bias": (self.batch, self.queries),
        }
        if self.pointwise:
            shapes |= {"pointwise_weight": (inner, self.channels, 1, 1), "pointwise_bias": (inner,)}
        tensors = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
        tensors["kernel"] *= scale * inner**-0.5
        if self.pointwise:
            tensors["pointwise_weight"] *= self.channels**-0.5
        return tensors

    def target(self, height: int | None = None, width: int | None = None) -> Tensor:
        """Soft masks, of the logits' size unless another is given; a third of the pixels is exactly 0 or 1."""
        generator = torch.Generator().manual_seed(1)
        shape = (self.batch, self.queries, height or self.height, width or self.width)
        return (1.6 * torch.rand(shape, generator=generator) - 0.3).clamp(0, 1)

    def ignore_mask(self) -> Tensor:
        """About a third of the pixels, at the logits' size."""
        return torch.rand(self.logits_shape, generator=torch.Generator().manual_seed(2)) < 0.3


def similarity(impl: str) -> Callable[..., Tensor]:
    """``text_to_pixel_similarity`` by one path, as a function of its named tensors."""
    return lambda **tensors: text_to_pixel_similarity(**tensors, impl=impl)


def contrastive(impl: str, target: Tensor, **options) -> Callable[..., tuple[Tensor, Tensor]]:
    """``text_to_pixel_contrastive_loss`` by one path against ``target``, as a function of its other tensors."""
    return lambda **tensors: text_to_pixel_contrastive_loss(target=target, **tensors, **options, impl=impl)


def layouts(x: Tensor) -> dict[str, Tensor]:
    """The same map (B, C, H, W) in the memory layouts that callers bring."""
    batch, channels, height, width = x.shape
    wide = torch.zeros(batch, 2 * channels, height, width + 3, dtype=x.dtype, device=x.device)
    wide[:, ::2, :, :width] = x
    thick = torch.cat([x, x], dim=1)
    return {
        "channels_last": x.contiguous(memory_format=torch.channels_last),
        "slice of the channels": thick[:, :channels],
        "every second channel of a wider map": wide[:, ::2, :, :width],
        "transposed": x.transpose(2, 3).contiguous().transpose(2, 3),
        "expanded": x[:1].expand_as(x),
    }
