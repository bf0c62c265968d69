"""Make a copy of a model for inference, with every BatchNorm folded into the convolution or Linear in front of it.

In eval mode a BatchNorm is a fixed scale and shift of each channel, ``s (W x) + t = (s W) x + t``, so it can be merged
into the weights. This removes about sixty passes over the image encoder's, neck's and projector's maps. The copy runs
in channels_last, which convolutions prefer. Values stay the same up to rounding.
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

    For many images with the same weights, as in ``fastris eval``. The copy returns what the model returns in eval mode;
    later changes of the model do not affect it. It has other state-dict keys, so save the model itself. It cannot be
    trained: ``train()`` on it raises RuntimeError. A norm without running statistics uses the batch's even in eval mode
    and is not folded.
    """
    folded = copy.deepcopy(model).eval().requires_grad_(False)
    for part in getattr(getattr(model, "config_class", None), "training_parts", ()):
        setattr(folded, part, None)
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
    """(parent, layer's name, norm's name) of each layer and the BatchNorm behind it.

    In a Sequential the norm is the next module; in CLIP's ResNet it has the layer's number (``conv1``, ``bn1``).
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
    """Whether the norm has running statistics, which it then uses in eval mode."""
    return getattr(norm, "running_mean", None) is not None
