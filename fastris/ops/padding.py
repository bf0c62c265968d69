"""Masks of padded words: what operators demand of them, and where a batch of sentences ends."""

from __future__ import annotations

import torch
from torch import Tensor

from fastris.ops.checks import check_is_tensor, check_shape


def check_padding_mask(operator: str, padding_mask: Tensor, like_name: str, like: Tensor, words: int) -> None:
    """Raise unless the mask is bool (B, L), on the device of the argument ``like``, whose first dimension is B."""
    check_shape(operator, "padding_mask", padding_mask, (like.shape[0], words))
    if padding_mask.dtype is not torch.bool:
        raise TypeError(
            f"{operator}: padding_mask must be bool, True where a word is padding, got {padding_mask.dtype}; "
            "compare the tokens with the padding id"
        )
    if padding_mask.device != like.device:
        raise ValueError(
            f"{operator}: padding_mask is on {padding_mask.device} but {like_name} is on {like.device}; "
            "move them to one device"
        )


def check_valid(operator: str, valid: Tensor, like_name: str, like: Tensor, words: int) -> None:
    """Raise unless the mask of words that are no padding is (B, L), on the device of the argument ``like``."""
    check_is_tensor(operator, "valid", valid)
    check_shape(operator, "valid", valid, (like.shape[0], words))
    if valid.device != like.device:
        raise ValueError(
            f"{operator}: valid is on {valid.device} but {like_name} is on {like.device}; move them to one device"
        )


def longest(padding_mask: Tensor) -> int:
    """The length of the longest real sentence of (B, L), at least 1: words behind it have no weight anywhere.

    Of PyTorch's fake tensors, which have no values, all L.
    """
    if type(padding_mask) is not Tensor:
        return padding_mask.shape[1]
    real = (~padding_mask).any(dim=0).nonzero()
    return int(real[-1]) + 1 if len(real) else 1
