"""The building blocks of the published neck and projector, with their published state-dict names."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from fastris.ops.coord_conv import coord_conv


def conv_layer(in_dim: int, out_dim: int, kernel_size: int = 1, padding: int = 0, stride: int = 1) -> nn.Sequential:
    """Convolution without bias, BatchNorm, ReLU: keys ``0.*`` and ``1.*``."""
    return nn.Sequential(
        nn.Conv2d(in_dim, out_dim, kernel_size, stride, padding, bias=False),
        nn.BatchNorm2d(out_dim),
        nn.ReLU(True),
    )


def linear_layer(in_dim: int, out_dim: int, bias: bool = False) -> nn.Sequential:
    """Linear, BatchNorm over the batch, ReLU: keys ``0.*`` and ``1.*``."""
    return nn.Sequential(nn.Linear(in_dim, out_dim, bias), nn.BatchNorm1d(out_dim), nn.ReLU(True))


class CoordConv(nn.Module):
    """Convolution, BatchNorm and ReLU of a map with its coordinates x and y in [-1, 1] appended as two channels.

    (B, in_channels, H, W) -> (B, out_channels, H, W). Source: CRIS section 3.2; published ``CoordConv``.
    """

    def __init__(self, in_channels: int, out_channels: int, kernel_size: int = 3, padding: int = 1, stride: int = 1):
        super().__init__()
        self.conv1 = conv_layer(in_channels + 2, out_channels, kernel_size, padding, stride)

    def forward(self, x: Tensor) -> Tensor:
        return coord_block(self.conv1, x)


def coord_block(block: Any, x: Tensor) -> Tensor:
    """Apply a :func:`conv_layer`, ``block``, to ``x`` (B, C, H, W) with its coordinates appended."""
    convolution, norm, activation = block
    padding, stride = convolution.padding[0], convolution.stride[0]
    return activation(norm(coord_conv(x, convolution.weight, convolution.bias, padding=padding, stride=stride)))
