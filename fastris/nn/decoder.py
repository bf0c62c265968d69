"""The vision-language decoder (CRIS section 3.3): pixels attend to each other, then to the words."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from fastris import reference
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
        vis = reference.self_attention(
            vis,
            vis_pos,
            _attention_weights(self.norm1, self.self_attn, self.self_attn_norm),
            self.self_attn.num_heads,
            dropout=self.dropout1.p,
            attention_dropout=self.self_attn.dropout,
            training=self.training,
        )
        vis = reference.cross_attention(
            vis,
            txt,
            vis_pos,
            txt_pos,
            pad_mask,
            _attention_weights(self.norm2, self.multihead_attn, self.cross_attn_norm),
            self.multihead_attn.num_heads,
            dropout=self.dropout2.p,
            attention_dropout=self.multihead_attn.dropout,
            training=self.training,
        )
        return reference.feed_forward(
            vis,
            _feed_forward_weights(self.norm3, self.ffn),
            dropout=self.dropout3.p,
            inner_dropout=_inner_dropout(self.ffn),
            training=self.training,
        )


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
        _, dim, height, width = vis.shape
        vis_pos = reference.sine_positions_2d(height, width, dim)[:, None]
        txt_pos = reference.sine_positions_1d(txt.shape[1], dim)[:, None]
        pixels, words = vis.flatten(2).permute(2, 0, 1), txt.permute(1, 0, 2)
        outputs = []
        for layer in self.layers:
            pixels = layer(pixels, words, vis_pos, txt_pos, pad_mask)
            if self.return_intermediate:
                outputs.append(self.norm(pixels).permute(1, 2, 0))
        return outputs if self.return_intermediate else self.norm(pixels).permute(1, 2, 0)


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


def _inner_dropout(ffn: Any) -> float:
    return ffn[2].p
