"""The layer that both of AlignFormer's decoders are stacks of: cross-attention between different widths, post-norm."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

from fastris.nn.lean_linear import Linear, normed_linear
from fastris.reference import SeparateAttentionWeights


class SeparateAttention(nn.Module):
    """The parameters of ``nn.MultiheadAttention(width, heads, kdim, vdim)`` where key and value have ``key_width``.

    PyTorch's own module would change its names where the two widths happen to be equal.
    """

    def __init__(self, width: int, key_width: int):
        super().__init__()
        self.q_proj_weight = nn.Parameter(torch.empty(width, width))
        self.k_proj_weight = nn.Parameter(torch.empty(width, key_width))
        self.v_proj_weight = nn.Parameter(torch.empty(width, key_width))
        self.in_proj_bias = nn.Parameter(torch.zeros(3 * width))
        self.out_proj = nn.Linear(width, width)
        nn.init.zeros_(self.out_proj.bias)

    def weights(self) -> SeparateAttentionWeights:
        """They, for :mod:`fastris.reference.few_query_attention`."""
        return SeparateAttentionWeights(
            self.q_proj_weight,
            self.k_proj_weight,
            self.v_proj_weight,
            self.in_proj_bias,
            self.out_proj.weight,
            self.out_proj.bias,
        )


class CrossAttentionLayer(nn.Module):
    """``x = LN(x + attended)``, then ``x = LN(x + FFN(x))``; who attends to what is the caller's."""

    def __init__(self, width: int, key_width: int, hidden: int):
        super().__init__()
        self.cross_attn = SeparateAttention(width, key_width)
        none = nn.Identity()  # a dropout of 0 in the released code, hence the numbers 0 and 3
        self.ffn = nn.Sequential(nn.Linear(width, hidden), nn.ReLU(), none, Linear(hidden, width))
        self.norm_ca = nn.LayerNorm(width)
        self.norm_ffn = nn.LayerNorm(width)
        xavier(self)

    def after(self, x: Tensor, attended: Tensor) -> Tensor:
        """The layer's output (..., width) from its input and what that has read."""
        first: Any
        first, activation, _, second = self.ffn
        x, hidden = normed_linear(x + attended, self.norm_ca, first)
        return self.norm_ffn(x + second(activation(hidden)))


def xavier(module: nn.Module) -> None:
    """Xavier's uniform initialisation of every matrix in a module."""
    for parameter in module.parameters():
        if parameter.ndim > 1:
            nn.init.xavier_uniform_(parameter)


def stacked(layer: nn.Module, count: int) -> Any:
    """An ``nn.ModuleList`` of layers that start as copies of one another, as in the released code."""
    return nn.ModuleList(copy.deepcopy(layer) for _ in range(count))
