"""Recognise modules that may be CRIS's neck, or a gate of ETRIS's neck, whose other parts are as fast as ours."""

from __future__ import annotations

import operator
from typing import Any

from torch import Tensor, nn

from fastris.dropin.cris.alignment import gate_forward
from fastris.dropin.parts import BLOCK, FLOAT32_TABLES, Part, arguments, is_chain, normal, owns_parameters
from fastris.models.cris.neck import neck_forward

_BLOCKS = ("f1_v_proj", "f2_v_proj", "f2_cat", "f3_v_proj", "f3_cat", "f4_proj5", "f4_proj4", "f4_proj3", "aggr")
NECK = ("txt_proj", "norm_layer", "coordconv", *_BLOCKS)


def necks(neck: Any) -> list[Part]:
    """Candidates for CRIS's neck, by the published names."""
    obstacle = _coordconv_obstacle(neck)
    if not all(is_chain(getattr(neck, name), BLOCK) for name in _BLOCKS):
        obstacle = "its blocks are not Conv2d, BatchNorm2d, ReLU"
    elif not (isinstance(neck.txt_proj, nn.Sequential) and isinstance(next(iter(neck.txt_proj), None), nn.Linear)):
        obstacle = "its txt_proj does not begin with torch.nn.Linear"
    return [Part("FPN", neck_forward, _neck_inputs, _neck_takes, obstacle, (1,), FLOAT32_TABLES)]


def _coordconv_obstacle(neck: Any) -> str | None:
    coordconv = neck.coordconv
    first = getattr(next(iter(coordconv), None), "conv1", None) if isinstance(coordconv, nn.Sequential) else None
    return None if is_chain(first, BLOCK) else "its coordconv does not begin with a CoordConv"


def _neck_inputs(neck: Any) -> tuple:
    widths = [getattr(neck, name)[0].in_channels for name in ("f3_v_proj", "f2_v_proj", "f1_v_proj")]
    maps = [normal(2, width, 2 * scale, 3 * scale) for width, scale in zip(widths, (4, 2, 1), strict=True)]
    return maps, normal(2, neck.txt_proj[0].in_features)


def _neck_takes(imgs: Any, state: Tensor | None) -> bool:
    return (
        isinstance(imgs, (list, tuple))
        and len(imgs) == 3
        and all(isinstance(image, Tensor) and image.ndim == 4 for image in imgs)
        and (state is None or state.ndim == 2)
    )


def gates(module: nn.Module) -> list[Part]:
    """Candidates for a gate: a module of any name around one nn.MultiheadAttention, called with pixels and one key."""
    children = list(module.named_children())
    if len(children) != 1 or sum(p.default is p.empty for p in arguments(module)) != 2:
        return []
    name, attention = children[0]
    if not isinstance(attention, nn.MultiheadAttention) or owns_parameters(module, attention):
        return []
    obstacle = None
    if attention.in_proj_weight is None:  # queries and keys then have own weights, which would get no gradient
        obstacle = "its attention has keys or values of another width"
    elif attention.bias_k is not None or attention.add_zero_attn:
        obstacle = "its attention adds keys of its own"
    first, width = attention.batch_first, attention.embed_dim

    def find(gate: Any) -> nn.MultiheadAttention:
        return getattr(gate, name)

    def inputs(gate: Any) -> tuple:
        return (normal(2, 6, width), normal(2, 1, width)) if first else (normal(6, 2, width), normal(1, 2, width))

    def takes(tgt: Tensor, memory: Tensor) -> bool:
        keys, batch = (1, 0) if first else (0, 1)
        return (
            tgt.ndim == memory.ndim == 3
            and memory.shape[keys] == 1
            and memory.shape[batch] == tgt.shape[batch]
            and memory.shape[2] == tgt.shape[2] == width
        )

    return [
        Part(what, gate_forward(find, join, first), inputs, takes, obstacle)
        for what, join in (
            ("gate by attention to one key", operator.mul),
            ("sum with attention to one key", operator.add),
        )
    ]
