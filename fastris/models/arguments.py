"""Checks of what a model is called with, and the padding that no sentence of a batch needs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastris.dispatch import requested_impl


def check_is_tensor(name: str, value: Any) -> None:
    """Raise TypeError, naming the argument, unless ``value`` is a tensor."""
    if isinstance(value, (str, Path)) or (isinstance(value, (list, tuple)) and value and isinstance(value[0], str)):
        what = "token ids, not text" if name == "word" else "a tensor of pixels, not a file's name"
        raise TypeError(
            f"{name} must be {what}; fastris.Segmenter(model).predict(image, 'the cat on the left') takes pictures and "
            "phrases"
        )
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(value).__name__}; convert it with torch.as_tensor")


def check_mask(mask: Tensor | None, images: int, expressions: int) -> None:
    """Raise ValueError or TypeError unless ``mask`` is a floating-point (E, 1, H, W) tensor, E = ``expressions``."""
    if mask is None:
        raise ValueError("mask (B, 1, H, W) is needed in training mode; call model.eval() to segment without one")
    check_is_tensor("mask", mask)
    if mask.ndim != 4 or mask.shape[:2] != (expressions, 1):
        each = "" if expressions == images else f" ({expressions // max(1, images)} expressions per image)"
        raise ValueError(f"mask must be ({expressions}, 1, H, W){each}, got {tuple(mask.shape)}")
    if not mask.is_floating_point():
        raise TypeError(f"mask must be floating point in [0, 1], got {mask.dtype}; convert it with mask.float()")
    if not mask.shape[2] * mask.shape[3]:
        raise ValueError(f"mask must have pixels, got {tuple(mask.shape)}")


def check_known(known: Tensor, images: int) -> None:
    """Raise ValueError or TypeError unless ``known`` is a (B, 1, H, W) tensor with pixels, B = ``images``."""
    check_is_tensor("known", known)
    if known.ndim != 4 or known.shape[:2] != (images, 1) or not known.shape[2] * known.shape[3]:
        raise ValueError(f"known must be ({images}, 1, H, W) with pixels, one of each image, got {tuple(known.shape)}")


def check_images(images: Tensor, weights: torch.dtype, statistics: str, multiple: int = 1) -> None:
    """Raise ValueError or TypeError unless ``images`` are (B, 3, H, W), B > 0, for weights of that dtype.

    ``statistics`` says in messages whose mean and deviation normalise them; H and W must be multiples of ``multiple``.
    """
    check_is_tensor("img", images)
    if images.ndim != 4 or images.shape[1] != 3:
        raise ValueError(f"img must be (B, 3, H, W), got {tuple(images.shape)}")
    height, width = images.shape[-2:]
    if height % multiple or width % multiple or not height or not width:
        needed = f"height and width must be multiples of {multiple}" if multiple > 1 else "it must have some"
        raise ValueError(f"img is {height}x{width} pixels, but {needed}; letterbox it first (fastris.data.letterbox)")
    if not images.is_floating_point():
        raise TypeError(f"img must be floating point and normalised with {statistics} mean and std, got {images.dtype}")
    if not images.shape[0]:
        raise ValueError(f"img holds no images, got {tuple(images.shape)}; give at least one")
    casts = torch.is_autocast_enabled(images.device.type) and torch.float64 not in (images.dtype, weights)
    if images.dtype != weights and not casts:
        raise TypeError(
            f"img is {images.dtype} but the model's weights are {weights}; convert it with img.to({weights}), or run "
            "float32 weights under torch.autocast"
        )


def check_tokens(tokens: Tensor, longest: int, vocabulary: int, why: str) -> None:
    """Raise ValueError or TypeError unless ``tokens`` are ids (E, L) below ``vocabulary``, with L up to ``longest``.

    ``why`` says in the message what bounds the length. Values are looked at on a CPU only: elsewhere it would wait.
    """
    check_is_tensor("word", tokens)
    if tokens.ndim != 2:
        raise ValueError(f"word must be token ids (B, L), got {tuple(tokens.shape)}")
    if tokens.dtype not in (torch.int64, torch.int32):
        raise TypeError(f"word must hold integer token ids, int64 or int32, got {tokens.dtype}; use word.long()")
    if not 1 <= tokens.shape[1] <= longest:
        raise ValueError(
            f"word has {tokens.shape[1]} tokens a sentence, but {why} 1 to {longest}; cut it with "
            "fastris.data.tokens.tokenize(sentences, word_len)"
        )
    if tokens.numel() and tokens.device.type == "cpu" and _has_values(tokens):
        low, high, last = int(tokens.min()), int(tokens.max()), vocabulary - 1
        if low < 0 or high > last:
            raise ValueError(f"word must hold token ids 0 to {last}, got {low} to {high}; tokenize for this model")


def check_index(index: Tensor | None, images: int, expressions: int) -> None:
    """Raise ValueError unless ``index`` (E,) names an image for each expression, or None fits their numbers."""
    if index is None:
        if images != expressions:
            raise ValueError(
                f"there are {images} images and {expressions} expressions; pass index (E,) to say which image each "
                "expression belongs to"
            )
        return
    if index.shape != (expressions,) or index.dtype not in (torch.int64, torch.int32):
        raise ValueError(
            f"index must be int64 of shape ({expressions},), got {index.dtype} of shape {tuple(index.shape)}"
        )
    if index.device.type == "cpu" and _has_values(index) and len(index):
        low, high = int(index.min()), int(index.max())
        if not 0 <= low <= high < images:
            raise ValueError(f"index must name images 0 to {images - 1}, got {low} to {high}")


def without_shared_padding(tokens: Tensor) -> Tensor:
    """Cut off the last columns of token ids (E, L) that are padding in every sentence, where that changes nothing.

    It changes nothing where no word attends to padding behind it (CLIP's text encoder is causal, BERT's masks it) and
    all that follows masks it, too. It is done on a CPU only, where reading the ids does not wait for a device, and not
    on the reference path, while compiling or under PyTorch's fake tensors, which have no values.
    """
    if tokens.device.type != "cpu" or not _has_values(tokens) or requested_impl() == "reference":
        return tokens
    used = tokens.ne(0).any(dim=0).nonzero()
    return tokens[:, : int(used.max()) + 1 if len(used) else 1]


def _has_values(tensor: Tensor) -> bool:
    return type(tensor) is Tensor and not torch.compiler.is_compiling()
