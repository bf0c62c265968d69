"""Which modules look like CRIS's parts, by their attributes alone. What they compute is dropin_proof.py's question."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fastris.nn.decoder import decoder_forward, decoder_layer_forward, decoder_layer_forward_with_weights
from fastris.nn.neck import neck_forward
from fastris.nn.projector import projector_forward, text_projection
from fastris.ops.similarity import KERNEL_SIZES

# How far, of the scale, two float64 results may lie apart; where tables of positions enter, those are float32 numbers.
ROUNDING = 1e-10
FLOAT32_TABLES = 1e-6


@dataclass(frozen=True)
class Part:
    """A part of CRIS that a module has the attributes of: how we would run it, and what its proof needs.

    ``forward(module, *inputs)`` is ours; ``inputs(module)`` makes small random float64 inputs, of which those at the
    places ``optional`` may be None; ``takes(*inputs)`` says of a call whether it is of the kind that the proof covers;
    ``obstacle`` is what rules the module out before any proof; ``tolerance`` is what the proof allows for rounding.
    """

    name: str
    forward: Callable
    inputs: Callable[[Any], tuple]
    takes: Callable[..., bool]
    obstacle: str | None = None
    optional: tuple[int, ...] = ()
    tolerance: float = ROUNDING


def parts_like(module: nn.Module) -> list[Part]:
    """The parts of CRIS that ``module`` has the attributes of, likeliest first; empty when it resembles none."""
    for attributes, make in _KINDS:
        if all(hasattr(module, name) for name in attributes):
            return make(module)
    return []


_LAYER = (
    "self_attn", "multihead_attn", "self_attn_norm", "cross_attn_norm", "norm1", "norm2", "norm3", "ffn",
    "dropout1", "dropout2", "dropout3",
)  # fmt: skip


def _layers(layer: Any) -> list[Part]:
    obstacle = _layer_obstacle(layer)
    return [
        Part(name, forward, _layer_inputs, _layer_takes, obstacle, optional=(4,))
        for name, forward in (
            ("TransformerDecoderLayer", decoder_layer_forward),
            ("TransformerDecoderLayer with attention weights", decoder_layer_forward_with_weights),
        )
    ]


def _layer_obstacle(layer: Any) -> str | None:
    attentions = (layer.self_attn, layer.multihead_attn)
    norms = [layer.norm1, layer.norm2, layer.norm3, layer.self_attn_norm, layer.cross_attn_norm]
    if not all(isinstance(a, nn.MultiheadAttention) for a in attentions):
        return "its attentions are not torch.nn.MultiheadAttention"
    if any(a.batch_first or a.in_proj_weight is None or a.bias_k is not None for a in attentions):
        return "its attentions are batch-first, have keys of another width or extra key biases"
    if any(a.in_proj_bias is None or a.add_zero_attn for a in attentions):
        return "its attentions have no biases or add a zero key"
    if not _is_chain(layer.ffn, (nn.Linear, nn.ReLU, nn.Dropout, nn.LayerNorm, nn.Linear)):
        return "its ffn is not Linear, ReLU, Dropout, LayerNorm, Linear"
    norms.append(layer.ffn[3])
    if not all(isinstance(n, nn.LayerNorm) and n.bias is not None for n in norms):
        return "its norms are not torch.nn.LayerNorm with weight and bias"
    if len({n.eps for n in norms}) > 1:
        return "its norms differ in eps"
    if not all(isinstance(d, nn.Dropout) for d in (layer.dropout1, layer.dropout2, layer.dropout3)):
        return "its dropouts are not torch.nn.Dropout"
    return None


def _layer_inputs(layer: Any) -> tuple:
    dim = layer.norm1.normalized_shape[0]
    mask = torch.tensor([[False, False, False, True, True], [False] * 5])
    return _normal(6, 2, dim), _normal(5, 2, dim), _normal(6, 1, dim), _normal(5, 1, dim), mask


def _layer_takes(vis: Tensor, txt: Tensor, vis_pos: Tensor, txt_pos: Tensor, pad_mask: Tensor | None) -> bool:
    """Positions are shared by the batch and the mask is bool; nn.MultiheadAttention takes more than that."""
    return (
        vis.ndim == txt.ndim == 3
        and vis_pos.shape == (vis.shape[0], 1, vis.shape[2])
        and txt_pos.shape == (txt.shape[0], 1, txt.shape[2])
        and (pad_mask is None or (pad_mask.dtype is torch.bool and pad_mask.ndim == 2))
    )


def _decoders(decoder: Any) -> list[Part]:
    obstacle = None
    if not isinstance(decoder.layers, nn.ModuleList) or not len(decoder.layers):
        obstacle = "its layers are no filled torch.nn.ModuleList"
    elif not isinstance(decoder.norm, nn.LayerNorm):
        obstacle = "its norm is not torch.nn.LayerNorm"
    elif not all(hasattr(layer, name) for layer in decoder.layers for name in _LAYER):
        obstacle = "its layers are not CRIS's decoder layers"
    kind = "TransformerDecoder", decoder_forward, _decoder_inputs, _decoder_takes
    return [Part(*kind, obstacle, optional=(2,), tolerance=FLOAT32_TABLES)]


def _decoder_inputs(decoder: Any) -> tuple:
    dim = decoder.norm.normalized_shape[0]
    mask = torch.tensor([[False, False, True, True], [False] * 4])
    return _normal(2, dim, 2, 3), _normal(2, 4, dim), mask


def _decoder_takes(vis: Tensor, txt: Tensor, pad_mask: Tensor | None) -> bool:
    return vis.ndim == 4 and txt.ndim == 3 and vis.shape[1] == txt.shape[2]


_BLOCK = (nn.Conv2d, nn.BatchNorm2d, nn.ReLU)


def _projectors(projector: Any) -> list[Part]:
    return [Part("Projector", projector_forward, _projector_inputs, _projector_takes, _projector_obstacle(projector))]


def _projector_obstacle(projector: Any) -> str | None:
    vis = projector.vis
    if not _is_chain(vis, (nn.Upsample, nn.Sequential, nn.Upsample, nn.Sequential, nn.Conv2d)):
        return "its vis is not Upsample, block, Upsample, block, Conv2d"
    if not (_is_chain(vis[1], _BLOCK) and _is_chain(vis[3], _BLOCK)):
        return "its blocks are not Conv2d, BatchNorm2d, ReLU"
    if any(conv[0].kernel_size != (3, 3) or conv[0].groups != 1 for conv in (vis[1], vis[3])):
        return "its block convolutions are not plain 3x3"
    if vis[4].kernel_size != (1, 1) or vis[4].groups != 1:
        return "its last convolution is not a plain 1x1"
    if not isinstance(projector.in_dim, int) or projector.kernel_size not in KERNEL_SIZES:
        return f"its text kernel is {projector.kernel_size} wide, and fastris has 1, 3 and 5"
    text = text_projection(projector)
    if not (isinstance(text, nn.Linear) or _is_chain(text, (nn.Linear, nn.Dropout))):
        return "its text projection is neither Linear nor Linear, Dropout"
    outputs = (text if isinstance(text, nn.Linear) else text[0]).out_features
    kernels, rest = divmod(outputs, projector.in_dim * projector.kernel_size**2 + 1)
    maps, channels = divmod(vis[4].out_channels, projector.in_dim)
    if not kernels or rest:
        return "its text projection does not give kernels and a bias for each"
    if not maps or channels:
        return "its maps are not as wide as its text kernel"
    if kernels > 1 and maps > 1:
        return "it has several maps and several text kernels"
    return None


def _projector_inputs(projector: Any) -> tuple:
    text = text_projection(projector)
    words = (text if isinstance(text, nn.Linear) else text[0]).in_features
    return _normal(2, projector.vis[1][0].in_channels, 3, 2), _normal(2, words)


def _projector_takes(x: Tensor, word: Tensor) -> bool:
    return x.ndim == 4 and word.ndim == 2


_NECK = ("f1_v_proj", "f2_v_proj", "f2_cat", "f3_v_proj", "f3_cat", "f4_proj5", "f4_proj4", "f4_proj3", "aggr")


def _necks(neck: Any) -> list[Part]:
    obstacle = None
    coordconv = neck.coordconv
    if not all(_is_chain(getattr(neck, name), _BLOCK) for name in _NECK):
        obstacle = "its blocks are not Conv2d, BatchNorm2d, ReLU"
    elif not (isinstance(neck.txt_proj, nn.Sequential) and isinstance(next(iter(neck.txt_proj), None), nn.Linear)):
        obstacle = "its txt_proj does not begin with torch.nn.Linear"
    elif not (isinstance(coordconv, nn.Sequential) and _is_chain(_conv1(coordconv), _BLOCK)):
        obstacle = "its coordconv does not begin with a CoordConv"
    return [Part("FPN", neck_forward, _neck_inputs, _neck_takes, obstacle, optional=(1,), tolerance=FLOAT32_TABLES)]


def _conv1(coordconv: nn.Sequential) -> Any:
    return getattr(next(iter(coordconv), None), "conv1", None)


def _neck_inputs(neck: Any) -> tuple:
    widths = [getattr(neck, name)[0].in_channels for name in ("f3_v_proj", "f2_v_proj", "f1_v_proj")]
    maps = [_normal(2, width, 2 * scale, 3 * scale) for width, scale in zip(widths, (4, 2, 1), strict=True)]
    return maps, _normal(2, neck.txt_proj[0].in_features)


def _neck_takes(imgs: Any, state: Tensor | None) -> bool:
    return (
        isinstance(imgs, (list, tuple))
        and len(imgs) == 3
        and all(isinstance(image, Tensor) and image.ndim == 4 for image in imgs)
        and (state is None or state.ndim == 2)
    )


# The neck stands before the projector: necks that hold a projector's attributes as well exist, the reverse does not.
_KINDS: tuple[tuple[tuple[str, ...], Callable[[Any], list[Part]]], ...] = (
    (_LAYER, _layers),
    (("layers", "norm", "return_intermediate"), _decoders),
    (("txt_proj", "norm_layer", "coordconv", *_NECK), _necks),
    (("vis", "txt", "in_dim", "kernel_size"), _projectors),
    (("vis", "txt_fc", "in_dim", "kernel_size"), _projectors),
)


def _normal(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64)


def _is_chain(module: Any, kinds: tuple[type, ...]) -> bool:
    """A Sequential of exactly these kinds, where SyncBatchNorm may stand for BatchNorm2d."""
    if not isinstance(module, nn.Sequential) or len(module) != len(kinds):
        return False
    allowed = [(kind, nn.SyncBatchNorm) if kind is nn.BatchNorm2d else kind for kind in kinds]
    return all(isinstance(child, kind) for child, kind in zip(module, allowed, strict=True))
