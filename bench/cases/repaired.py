"""The published code with what its authors could have repaired in an afternoon, and none of fastris's algebra.

A comparison with the published code as it stands would credit fastris with mistakes that have nothing to do with its
ideas. This baseline keeps the published formulas and mends what costs time for nothing: attention weights that nobody
reads are not asked for, so that PyTorch's fused attention runs, dropout included; position tables are computed once and
not nine times a forward. With it come the settings of :attr:`bench.cases.arms.Arm.tuned`: fused Adam and, on CUDA,
channels_last and cudnn.benchmark.
"""

from __future__ import annotations

import copy
import types
from collections.abc import Callable
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastris import reference
from fastris.models.cris import TransformerDecoder, TransformerDecoderLayer

from .builders import CrossAttention, SelfAttention

M = TypeVar("M", bound=nn.Module)


def repair(module: M) -> M:
    """A copy of ``module`` whose attention is repaired; parameters and buffers are the original's own, not copies."""
    own = {id(tensor): tensor for tensor in (*module.parameters(), *module.buffers())}
    repaired = copy.deepcopy(module, own)
    for part in repaired.modules():
        forward = FORWARDS.get(type(part))
        if forward is not None:
            part.__dict__["forward"] = types.MethodType(forward, part)
    return repaired


def _attend(attention: nn.MultiheadAttention, query: Tensor, key: Tensor, value: Tensor, **options: Any) -> Tensor:
    """Sequence-first attention through ``scaled_dot_product_attention``: the one repair is ``need_weights=False``."""
    output, _ = attention(query, key, value, need_weights=False, **options)
    return output


def _self_attention(
    x: Tensor, positions: Tensor, norm: nn.LayerNorm, attention: nn.MultiheadAttention, post: nn.LayerNorm, drop: float
) -> Tensor:
    """The published first sub-layer, sequence-first: ``x`` (N, B, D), ``positions`` (N, 1, D)."""
    normed = norm(x)
    query = normed + positions
    branch = post(_attend(attention, query, query, normed))
    return x + F.dropout(branch, drop, post.training)


def _cross_attention(
    x: Tensor,
    text: Tensor,
    positions: Tensor,
    text_positions: Tensor,
    padding_mask: Tensor | None,
    norm: nn.LayerNorm,
    attention: nn.MultiheadAttention,
    post: nn.LayerNorm,
    drop: float,
) -> Tensor:
    """The published second sub-layer, sequence-first: ``text`` (L, B, D), ``padding_mask`` (B, L)."""
    query, key = norm(x) + positions, text + text_positions
    branch = post(_attend(attention, query, key, text, key_padding_mask=padding_mask))
    return x + F.dropout(branch, drop, post.training)


def _layer(self: Any, vis: Tensor, txt: Tensor, vis_pos: Tensor, txt_pos: Tensor, pad_mask: Tensor | None) -> Tensor:
    vis = _self_attention(vis, vis_pos, self.norm1, self.self_attn, self.self_attn_norm, self.dropout1.p)
    text = txt, vis_pos, txt_pos, pad_mask
    vis = _cross_attention(vis, *text, self.norm2, self.multihead_attn, self.cross_attn_norm, self.dropout2.p)
    return vis + self.dropout3(self.ffn(self.norm3(vis)))


def _decoder(self: Any, vis: Tensor, txt: Tensor, pad_mask: Tensor | None) -> Tensor:
    _, dim, height, width = vis.shape
    vis_pos, txt_pos = tables(height, width, txt.shape[1], dim, str(vis.device), vis.dtype is torch.float64)
    pixels, words = vis.flatten(2).permute(2, 0, 1), txt.permute(1, 0, 2)
    for layer in self.layers:
        pixels = layer(pixels, words, vis_pos, txt_pos, pad_mask)
    return self.norm(pixels).permute(1, 2, 0)


def _self_attention_case(self: Any, x: Tensor, positions: Tensor) -> Tensor:
    parts = self.norm, self.attention, self.post_norm
    return _self_attention(x.transpose(0, 1), positions[:, None], *parts, 0.0).transpose(0, 1)


def _cross_attention_case(
    self: Any, x: Tensor, text: Tensor, positions: Tensor, text_positions: Tensor, padding_mask: Tensor
) -> Tensor:
    parts = self.norm, self.attention, self.post_norm
    given = x.transpose(0, 1), text.transpose(0, 1), positions[:, None], text_positions[:, None], padding_mask
    return _cross_attention(*given, *parts, 0.0).transpose(0, 1)


_tables: dict[tuple[int | str | bool, ...], tuple[Tensor, Tensor]] = {}


@torch.compiler.assume_constant_result
def tables(height: int, width: int, length: int, dim: int, device: str, double: bool) -> tuple[Tensor, Tensor]:
    """The published position tables (N, 1, D) and (L, 1, D), computed once per size; constants to torch.compile."""
    key = height, width, length, dim, device, double
    if key not in _tables:
        dtype = torch.float64 if double else torch.float32
        with torch.inference_mode(False):
            pixels, words = reference.sine_positions_2d(height, width, dim), reference.sine_positions_1d(length, dim)
            _tables[key] = pixels[:, None].to(device, dtype), words[:, None].to(device, dtype)
    return _tables[key]


FORWARDS: dict[type[nn.Module], Callable[..., Tensor]] = {
    TransformerDecoder: _decoder,
    TransformerDecoderLayer: _layer,
    CrossAttention: _cross_attention_case,
    SelfAttention: _self_attention_case,
}
"""Repaired forwards by the class whose instances get them; every other module runs as published."""
