"""The cross-modal neck (CRIS section 3.2, equations 2 to 5): three image maps and the sentence become one pixel map."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from fastris.nn.blocks import CoordConv, conv_layer, coord_block, linear_layer
from fastris.ops.pointwise_conv import pointwise_conv_cat


class FPN(nn.Module):
    """CRIS's neck, under its published name, arguments and state-dict keys.

    Args:
        in_channels: widths of C3, C4, C5; the last is also the width of the sentence ``state``.
        out_channels: widths of f3, f4, f5; the middle one is the width of the result.

    ``forward(imgs, state)`` takes (C3 (B, c3, 4h, 4w), C4 (B, c4, 2h, 2w), C5 (B, c5, h, w)) and ``state`` (B, c5) and
    returns (B, out_channels[1], 2h, 2w). It is split in two: :meth:`project` uses no text and runs once per image,
    however many expressions ask about it; :meth:`fuse` runs once per expression.
    """

    def __init__(self, in_channels: Sequence[int] = (512, 1024, 1024), out_channels: Sequence[int] = (256, 512, 1024)):
        super().__init__()
        in3, in4, in5 = in_channels
        out3, out4, out5 = out_channels
        self.txt_proj = linear_layer(in5, out5)
        self.f1_v_proj = conv_layer(in5, out5)
        self.norm_layer = nn.Sequential(nn.BatchNorm2d(out5), nn.ReLU(True))
        self.f2_v_proj = conv_layer(in4, out4, 3, 1)
        self.f2_cat = conv_layer(out5 + out4, out4)
        self.f3_v_proj = conv_layer(in3, out3, 3, 1)
        self.f3_cat = conv_layer(out3 + out4, out4)
        self.f4_proj5 = conv_layer(out5, out4, 3, 1)
        self.f4_proj4 = conv_layer(out4, out4, 3, 1)
        self.f4_proj3 = conv_layer(out4, out4, 3, 1)
        self.aggr = conv_layer(3 * out4, out4)
        self.coordconv = nn.Sequential(CoordConv(out4, out4, 3, 1), conv_layer(out4, out4, 3, 1))

    def project(self, imgs: Sequence[Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """The part that uses no text: C3, C4, C5 -> f3 and f4 at stride 16, f5 at stride 32."""
        return neck_project(self, imgs)

    def fuse(self, projected: Sequence[Tensor], state: Tensor) -> Tensor:
        """Join the projected maps with the sentence ``state`` (B, c5): (B, out_channels[1], 2h, 2w)."""
        return neck_fuse(self, projected, state)

    def forward(self, imgs: Sequence[Tensor], state: Tensor) -> Tensor:
        return neck_forward(self, imgs, state)


def neck_forward(neck: Any, imgs: Sequence[Tensor], state: Tensor | None) -> Tensor:
    """The forward of any module with the attributes of :class:`FPN`; None as ``state`` leaves C5 ungated by text."""
    return neck_fuse(neck, neck_project(neck, imgs), state)


def neck_project(neck: Any, imgs: Sequence[Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    """:meth:`FPN.project` of any module with the attributes of :class:`FPN`."""
    c3, c4, c5 = imgs
    return F.avg_pool2d(neck.f3_v_proj(c3), 2, 2), neck.f2_v_proj(c4), neck.f1_v_proj(c5)


def neck_fuse(neck: Any, projected: Sequence[Tensor], state: Tensor | None) -> Tensor:
    """:meth:`FPN.fuse` of any module with the attributes of :class:`FPN`."""
    f3, f4, f5 = projected
    f5 = neck.norm_layer(f5 if state is None else f5 * neck.txt_proj(state)[:, :, None, None])
    f4 = _cat_block(neck.f2_cat, [f4], [f5])
    f3 = _cat_block(neck.f3_cat, [f3, f4])
    fq = _cat_block(neck.aggr, [neck.f4_proj3(f3), neck.f4_proj4(f4)], [neck.f4_proj5(f5)])
    return neck.coordconv[1:](coord_block(neck.coordconv[0].conv1, fq))


def _cat_block(block: Any, full: Sequence[Tensor], half: Sequence[Tensor] = ()) -> Tensor:
    """A :func:`conv_layer` with a 1x1 convolution over the concatenation of ``full`` and the upsampled ``half``."""
    convolution, norm, activation = block
    return activation(norm(pointwise_conv_cat(full, half, convolution.weight, convolution.bias)))
