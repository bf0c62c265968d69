"""The cross-modal neck (CRIS section 3.2, equations 2 to 5): three image maps and the sentence become one pixel map."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastris.nn.blocks import CoordConv, conv_layer, linear_layer


class FPN(nn.Module):
    """CRIS's neck, under its published name, arguments and state-dict keys.

    Args:
        in_channels: widths of C3, C4, C5; the last is also the width of the sentence ``state``.
        out_channels: widths of f3, f4, f5; the middle one is the width of the result.

    ``forward(imgs, state)`` takes (C3 (B, c3, 4h, 4w), C4 (B, c4, 2h, 2w), C5 (B, c5, h, w)) and ``state`` (B, c5) and
    returns (B, out_channels[1], 2h, 2w). Only step 1 joins image and text, so the forward is split: :meth:`project` is
    the part that an image needs once however many expressions ask about it, :meth:`fuse` is the rest.
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
        """The image's own part: C3, C4, C5 -> f3 and f4 at stride 16, f5 at stride 32, before any text."""
        c3, c4, c5 = imgs
        return F.avg_pool2d(self.f3_v_proj(c3), 2, 2), self.f2_v_proj(c4), self.f1_v_proj(c5)

    def fuse(self, projected: Sequence[Tensor], state: Tensor) -> Tensor:
        """Join the projected maps with the sentence ``state`` (B, c5): (B, out_channels[1], 2h, 2w)."""
        f3, f4, f5 = projected
        f5 = self.norm_layer(f5 * self.txt_proj(state)[:, :, None, None])
        f4 = self.f2_cat(torch.cat([f4, _up2(f5)], dim=1))
        f3 = self.f3_cat(torch.cat([f3, f4], dim=1))
        fq = torch.cat([self.f4_proj3(f3), self.f4_proj4(f4), _up2(self.f4_proj5(f5))], dim=1)
        return self.coordconv(self.aggr(fq))

    def forward(self, imgs: Sequence[Tensor], state: Tensor) -> Tensor:
        return self.fuse(self.project(imgs), state)


def _up2(x: Tensor) -> Tensor:
    return F.interpolate(x, scale_factor=2, mode="bilinear")
