"""Cross-attention with one key: ETRIS's hierarchical alignment, in which pixels attend to one sentence vector.

A softmax over one key is 1, whatever the query. So every pixel gets the same answer, the key's value, projected: the
sentence's gate. Queries, keys and scores are never computed, and their weights get the zero gradient that they have.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn


def one_key_attention(attention: nn.MultiheadAttention, memory: Tensor) -> Tensor:
    """What ``attention`` answers to every query when ``memory`` (1, B, D) is its only key and value: (1, B, D).

    True as long as no dropout is on: dropout on the weights takes that one weight from some queries and heads.
    """
    width, output, bias = attention.embed_dim, attention.out_proj, attention.in_proj_bias
    value = F.linear(memory, attention.in_proj_weight[2 * width :], None if bias is None else bias[2 * width :])
    return F.linear(value, output.weight, output.bias)


def gate_forward(find: Callable[[Any], nn.MultiheadAttention], join: Callable, batch_first: bool) -> Callable:
    """The forward of a module that joins pixels with their attention to one key: ``join(pixels, attention)``.

    In training with dropout on the attention's weights it is the module's own: what it then joins is left to it.
    """

    def forward(gate: Any, tgt: Tensor, memory: Tensor) -> Tensor:
        attention = find(gate)
        if attention.training and attention.dropout:
            return type(gate).forward(gate, tgt, memory)
        if batch_first:
            return join(tgt, one_key_attention(attention, memory.transpose(0, 1)).transpose(0, 1))
        return join(tgt, one_key_attention(attention, memory))

    return forward
