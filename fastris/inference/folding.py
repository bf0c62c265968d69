"""A model for asking, not for training: every BatchNorm folded into the convolution in front of it.

In eval mode a BatchNorm is a fixed scale and shift of each channel, ``s (W x) + t = (s W) x + t``, so the weights can
carry it. About sixty passes over the image encoder's, neck's and projector's maps disappear, and what is left runs in
channels_last, the layout that convolutions like best. Values stay the same up to rounding.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

import torch
from torch import nn
from torch.nn.utils.fusion import fuse_conv_bn_eval, fuse_linear_bn_eval

M = TypeVar("M", bound=nn.Module)

FOLDED: dict[type, tuple[type, Callable]] = {
    nn.Conv2d: (nn.BatchNorm2d, fuse_conv_bn_eval),
    nn.Linear: (nn.BatchNorm1d, fuse_linear_bn_eval),
}


def for_inference(model: M) -> M:
    """A copy of a CRIS model in eval mode, with its BatchNorms folded into the layers in front of them.

    For many images with the same weights, as in ``fastris eval``. The copy answers as the model does in eval mode;
    later changes of the model do not reach it. It has other state-dict keys, so save the model itself. It cannot be
    trained: ``train()`` on it raises RuntimeError. A norm without running statistics follows the batch even in eval
    mode and stays as it is.
    """
    folded = copy.deepcopy(model).eval().requires_grad_(False)
    for parent, first, second in list(_pairs(folded)):
        layer, norm = getattr(parent, first), getattr(parent, second)
        _, fuse = FOLDED[type(layer)]
        setattr(parent, first, fuse(layer, norm))
        setattr(parent, second, nn.Identity())
    folded.train = _refuse_training  # type: ignore[method-assign, assignment]
    return folded.to(memory_format=torch.channels_last)


def _refuse_training(mode: bool = True) -> None:
    if mode:
        raise RuntimeError("this model was made by for_inference and cannot be trained; train the model it came from")


def _pairs(model: nn.Module) -> Iterator[tuple[nn.Module, str, str]]:
    """(parent, name, name) of each layer and the BatchNorm that reads it alone.

    Such a norm follows its layer in a Sequential; in CLIP's ResNet ``bn1`` follows ``conv1`` by name.
    """
    for parent in model.modules():
        children = dict(parent.named_children())
        candidates: Iterable[tuple[str, str]]
        if isinstance(parent, nn.Sequential):
            candidates = zip(list(children), list(children)[1:], strict=False)
        else:
            candidates = ((name, name.replace("conv", "bn")) for name in children if name.startswith("conv"))
        for first, second in candidates:
            layer, norm = children[first], children.get(second)
            if norm is not None and type(layer) in FOLDED and type(norm) is FOLDED[type(layer)][0] and _is_fixed(norm):
                yield parent, first, second


def _is_fixed(norm: nn.Module) -> bool:
    """Whether the norm uses running statistics in eval mode; without them it follows the batch even there."""
    return getattr(norm, "running_mean", None) is not None
