"""Cross-attention with one key: ETRIS's hierarchical alignment, in which pixels attend to one sentence vector.

A softmax over one key is 1, whatever the query. So the attention's output is the same for every pixel: the projected
value of that key, with which the pixels are gated. Queries, keys and scores are not computed; the gradient of their
weights is zero, as in the original.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn


def one_key_attention(attention: nn.MultiheadAttention, memory: Tensor) -> Tensor:
    """The output (1, B, D) of ``attention`` for any query when ``memory`` (1, B, D) is its only key and value.

    Holds only without dropout, which would set that single weight to 0 for some queries and heads.
    """
    width, output, bias = attention.embed_dim, attention.out_proj, attention.in_proj_bias
    value = F.linear(memory, attention.in_proj_weight[2 * width :], None if bias is None else bias[2 * width :])
    return F.linear(value, output.weight, output.bias)


def gate_forward(find: Callable[[Any], nn.MultiheadAttention], join: Callable, batch_first: bool) -> Callable:
    """A fast forward for a module that returns ``join(pixels, attention to one key)``.

    ``find(module)`` returns the attention in the module. In training with dropout on the attention's weights, the
    module's own forward runs.
    """

    def forward(gate: Any, tgt: Tensor, memory: Tensor) -> Tensor:
        attention = find(gate)
        if attention.training and attention.dropout:
            return type(gate).forward(gate, tgt, memory)
        if batch_first:
            return join(tgt, one_key_attention(attention, memory.transpose(0, 1)).transpose(0, 1))
        return join(tgt, one_key_attention(attention, memory))

    return forward
