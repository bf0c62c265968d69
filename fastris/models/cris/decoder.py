"""The vision-language decoder (CRIS section 3.3): pixels attend to each other, then to the words."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from fastris import reference
from fastris.dispatch import requested_impl
from fastris.nn.positions import pixel_positions, word_positions
from fastris.ops.cross_attention import cross_attention
from fastris.ops.feed_forward import feed_forward
from fastris.ops.self_attention import self_attention
from fastris.reference import AttentionWeights, FeedForwardWeights


class TransformerDecoderLayer(nn.Module):
    """One decoder layer under its published name, arguments, defaults and state-dict keys.

    ``forward(vis, txt, vis_pos, txt_pos, pad_mask)`` takes sequence-first tensors, as published: ``vis`` (N, B, D),
    ``txt`` (L, B, D), ``vis_pos`` (N, 1, D), ``txt_pos`` (L, 1, D), ``pad_mask`` (B, L) True where a word is padding;
    it returns (N, B, D).
    """

    def __init__(self, d_model: int = 512, nhead: int = 9, dim_feedforward: int = 2048, dropout: float = 0.1):
        super().__init__()
        self.self_attn_norm = nn.LayerNorm(d_model)
        self.cross_attn_norm = nn.LayerNorm(d_model)
        self.self_attn = nn.MultiheadAttention(d_model, nhead, dropout=dropout)
        self.multihead_attn = nn.MultiheadAttention(d_model, nhead, dropout=dropout, kdim=d_model, vdim=d_model)
        self.ffn = nn.Sequential(
            nn.Linear(d_model, dim_feedforward),
            nn.ReLU(True),
            nn.Dropout(dropout),
            nn.LayerNorm(dim_feedforward),
            nn.Linear(dim_feedforward, d_model),
        )
        self.norm1 = nn.LayerNorm(d_model)
        self.norm2 = nn.LayerNorm(d_model)
        self.norm3 = nn.LayerNorm(d_model)
        self.dropout1 = nn.Dropout(dropout)
        self.dropout2 = nn.Dropout(dropout)
        self.dropout3 = nn.Dropout(dropout)

    def forward(self, vis: Tensor, txt: Tensor, vis_pos: Tensor, txt_pos: Tensor, pad_mask: Tensor | None) -> Tensor:
        return decoder_layer_forward(self, vis, txt, vis_pos, txt_pos, pad_mask)


class TransformerDecoder(nn.Module):
    """The stack of decoder layers under its published name, arguments and state-dict keys.

    ``forward(vis, txt, pad_mask)`` takes ``vis`` (B, D, H, W), ``txt`` (B, L, D), ``pad_mask`` (B, L) and returns
    (B, D, H*W); with ``return_intermediate=True`` a list of one such tensor per layer.
    """

    def __init__(
        self,
        num_layers: int,
        d_model: int,
        nhead: int,
        dim_ffn: int,
        dropout: float,
        return_intermediate: bool = False,
    ):
        super().__init__()
        self.layers = nn.ModuleList(
            TransformerDecoderLayer(d_model, nhead, dim_ffn, dropout) for _ in range(num_layers)
        )
        self.num_layers = num_layers
        self.norm = nn.LayerNorm(d_model)
        self.return_intermediate = return_intermediate

    def forward(self, vis: Tensor, txt: Tensor, pad_mask: Tensor | None) -> Tensor | list[Tensor]:
        return decoder_forward(self, vis, txt, pad_mask)


def decoder_layer_forward(
    layer: Any, vis: Tensor, txt: Tensor, vis_pos: Tensor, txt_pos: Tensor, pad_mask: Tensor | None
) -> Tensor:
    """The forward of any module with the attributes of :class:`TransformerDecoderLayer`."""
    words = txt.transpose(0, 1)
    positions, word_positions = _table_for(vis, vis_pos[:, 0]), _table_for(vis, txt_pos[:, 0])
    pixels = _attend_to_pixels(layer, vis, positions)
    pixels = cross_attention(
        pixels,
        words,
        positions,
        word_positions,
        pad_mask,
        _attention_weights(layer.norm2, layer.multihead_attn, layer.cross_attn_norm),
        layer.multihead_attn.num_heads,
        dropout=_probability(layer.dropout2, layer.dropout2.p),
        attention_dropout=_probability(layer.multihead_attn, layer.multihead_attn.dropout),
        training=True,
        eps=layer.norm2.eps,
    )
    return _feed_forward(layer, pixels.transpose(0, 1))


def decoder_layer_forward_with_weights(
    layer: Any, vis: Tensor, txt: Tensor, vis_pos: Tensor, txt_pos: Tensor, pad_mask: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Return :func:`decoder_layer_forward`'s result and the cross-attention weights (B, N, L), averaged over the heads.

    The fast cross-attention does not compute that average, so this sub-layer runs as published; the other two are fast.
    """
    pixels = _attend_to_pixels(layer, vis, _table_for(vis, vis_pos[:, 0])).transpose(0, 1)
    query, key = layer.norm2(pixels) + vis_pos.to(vis.device), txt + txt_pos.to(txt.device)
    branch, weights = layer.multihead_attn(query, key, txt, key_padding_mask=pad_mask)
    return _feed_forward(layer, pixels + layer.dropout2(layer.cross_attn_norm(branch))), weights


def maskless(forward: Callable) -> Callable:
    """Wrap a decoder layer's ``forward`` so that it takes no padding mask: every word is attended to."""

    def without_mask(layer: Any, vis: Tensor, txt: Tensor, vis_pos: Tensor, txt_pos: Tensor) -> Any:
        return forward(layer, vis, txt, vis_pos, txt_pos, None)

    return without_mask


def _attend_to_pixels(layer: Any, vis: Tensor, positions: Tensor) -> Tensor:
    """The self-attention sub-layer: (N, B, D) -> (B, N, D)."""
    return self_attention(
        vis.transpose(0, 1),
        positions,
        _attention_weights(layer.norm1, layer.self_attn, layer.self_attn_norm),
        layer.self_attn.num_heads,
        dropout=_probability(layer.dropout1, layer.dropout1.p),
        attention_dropout=_probability(layer.self_attn, layer.self_attn.dropout),
        training=True,
        eps=layer.norm1.eps,
    )


def _feed_forward(layer: Any, pixels: Tensor) -> Tensor:
    """The feed-forward sub-layer: (N, B, D) -> (N, B, D)."""
    in_published_order = requested_impl() == "reference"  # batch-first on the fast paths, where it needs no copy
    pixels = feed_forward(
        pixels if in_published_order else pixels.transpose(0, 1),
        _feed_forward_weights(layer.norm3, layer.ffn),
        dropout=_probability(layer.dropout3, layer.dropout3.p),
        inner_dropout=_probability(layer.ffn[2], layer.ffn[2].p),
        training=True,
        eps=layer.norm3.eps,
    )
    return pixels if in_published_order else pixels.transpose(0, 1)


def _probability(owner: nn.Module, dropout: float) -> float:
    """The dropout probability; 0 where its ``owner``, whose mode may differ from the layer's, is in eval mode."""
    return dropout if owner.training else 0.0


def _table_for(x: Tensor, table: Tensor) -> Tensor:
    """Move a float32 position table to x's device and dtype; under autocast it stays float32, as published."""
    if torch.is_autocast_enabled(x.device.type):
        return table.to(x.device)
    return table.to(x)


def decoder_forward(decoder: Any, vis: Tensor, txt: Tensor, pad_mask: Tensor | None) -> Tensor | list[Tensor]:
    """The forward of any module with the attributes of :class:`TransformerDecoder`."""
    outputs = []
    for pixels, _ in run_layers(decoder, vis, txt, pad_mask):
        if decoder.return_intermediate:
            outputs.append(normed(decoder, pixels))
    return outputs if decoder.return_intermediate else normed(decoder, pixels)


def normed(decoder: Any, pixels: Tensor) -> Tensor:
    """The decoder's final LayerNorm and output order: (N, B, D) -> (B, D, N).

    The norm runs along memory, in which the layers keep a sample's pixels together. Otherwise it would copy its input,
    forward and backward, and return a map that the projector has to copy as well.
    """
    by_sample = pixels.transpose(0, 1)
    if by_sample.is_contiguous():
        return decoder.norm(by_sample).transpose(1, 2)
    return decoder.norm(pixels).permute(1, 2, 0)


def run_layers(decoder: Any, vis: Tensor, txt: Tensor, *pad_mask: Tensor | None) -> Iterator[tuple[Tensor, Any]]:
    """Run the layers in order; after each, yield its output (N, B, D) and its second result, None if it has none.

    ``pad_mask`` (B, L) is passed on only if given: layers of some variants take none.
    """
    _, dim, height, width = vis.shape
    vis_pos, txt_pos = _positions(height, width, txt.shape[1], dim, vis.device)
    pixels, words = vis.flatten(2).permute(2, 0, 1), txt.permute(1, 0, 2)
    if requested_impl() != "reference":  # one copy to batch-first memory, so that norms and sums read contiguous rows
        pixels = pixels.transpose(0, 1).contiguous().transpose(0, 1)
    for layer in decoder.layers:
        result = layer(pixels, words, vis_pos, txt_pos, *pad_mask)
        pixels, second = result if isinstance(result, tuple) else (result, None)
        yield pixels, second


def _positions(height: int, width: int, length: int, dim: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Position tables of the pixels (N, 1, D) and words (L, 1, D), cached per size.

    The reference path rebuilds them on the CPU at every call, as published.
    """
    if requested_impl() == "reference":
        pixels, words = reference.sine_positions_2d(height, width, dim), reference.sine_positions_1d(length, dim)
    else:
        pixels, words = pixel_positions(height, width, dim, device), word_positions(length, dim, device)
    return pixels[:, None], words[:, None]


def _attention_weights(norm: nn.LayerNorm, attention: nn.MultiheadAttention, post: nn.LayerNorm) -> AttentionWeights:
    return AttentionWeights(
        norm.weight,
        norm.bias,
        attention.in_proj_weight,
        attention.in_proj_bias,
        attention.out_proj.weight,
        attention.out_proj.bias,
        post.weight,
        post.bias,
    )


def _feed_forward_weights(norm: nn.LayerNorm, ffn: Any) -> FeedForwardWeights:
    up, _, _, inner, down = ffn
    return FeedForwardWeights(
        norm.weight, norm.bias, up.weight, up.bias, inner.weight, inner.bias, down.weight, down.bias
    )
