"""The parts that a model is exported as, and inputs to trace and to check them with.

Where one encoding of an image serves every phrase these are the image encoder and the head, so that a picture is still
encoded once; else the whole model is one. ``index`` says of each phrase which picture it is about, so that any number
of phrases may be about any number of pictures, and phrases about one picture pass zeros.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fastris.models.base import ReferringModel

PICTURES, PHRASES = "pictures", "phrases"
"""Names of the two dimensions whose size is left open."""

LOGITS = "logits"


class Part(NamedTuple):
    """A part of a model.

    Attributes:
        name: of its file, without suffix.
        module: what is traced.
        inputs: its arguments' names; features of several tensors are one argument, a tuple.
        outputs: names of its tensors, in order.
        features: names of the features' tensors, where it takes or makes them.
    """

    name: str
    module: nn.Module
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    features: tuple[str, ...] = ()

    def flat_inputs(self) -> tuple[str, ...]:
        """The names of all input tensors, in order."""
        return tuple(name for each in self.inputs for name in (self.features if each == "features" else (each,)))

    def dimensions(self) -> dict[str, Any]:
        """By argument, the name of the dimension 0 of its tensors."""
        own: dict[str, Any] = {
            "images": {0: PICTURES},
            "tokens": {0: PHRASES},
            "index": {0: PHRASES},
            "features": tuple({0: PICTURES} for _ in self.features),
        }
        return {name: own[name] for name in self.inputs}


class Asked(NamedTuple):
    """Pictures (B, 3, S, S), token ids (E, L), and the picture (E,) of each phrase."""

    images: Tensor
    tokens: Tensor
    index: Tensor  # type: ignore[assignment]  # which hides a method of tuples that nobody needs here


class _Encoder(nn.Module):
    def __init__(self, model: ReferringModel):
        super().__init__()
        self.model = model

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        return tuple(self.model.encode_image(images))


class _Head(nn.Module):
    def __init__(self, model: ReferringModel, kind: Any):
        super().__init__()
        self.model, self.kind = model, kind

    def forward(self, features: Sequence[Tensor], tokens: Tensor, index: Tensor) -> Tensor:
        return self.model.segment(self.kind(*features), tokens, index)


class _Whole(nn.Module):
    def __init__(self, model: ReferringModel):
        super().__init__()
        self.model = model

    def forward(self, images: Tensor, tokens: Tensor, index: Tensor) -> Tensor:
        return self.model.segment(self.model.encode_image(images), tokens, index)


def parts_of(model: ReferringModel) -> list[Part]:
    """The parts of a model in eval mode. Raises ValueError where features are no named tuple of tensors."""
    if not model.shares_image:
        return [Part("model", _Whole(model), ("images", "tokens", "index"), (LOGITS,))]
    with torch.no_grad():
        features = model.encode_image(draw(model, 1, 1).images)
    names = getattr(features, "_fields", ())
    if not names or not all(isinstance(each, Tensor) for each in features):
        raise ValueError(
            f"{type(model).__name__}.encode_image returns {type(features).__name__}, and only a NamedTuple of tensors "
            "can be handed from an exported encoder to an exported head"
        )
    return [
        Part("encoder", _Encoder(model), ("images",), tuple(names), tuple(names)),
        Part("head", _Head(model, type(features)), ("features", "tokens", "index"), (LOGITS,), tuple(names)),
    ]


def draw(model: ReferringModel, pictures: int, phrases: int) -> Asked:
    """Random pictures and token ids of several lengths: the largest id last, as CLIP's end, and padding behind it.

    The phrases are about the pictures in turn, from the last to the first. The same numbers give the same inputs.
    """
    size, length = model.config.input_size, model.config.word_len
    largest = max(each.num_embeddings for each in model.modules() if isinstance(each, nn.Embedding)) - 1
    random = torch.Generator().manual_seed(1000 * pictures + phrases)
    tokens = torch.zeros(phrases, length, dtype=torch.int64)
    for row, count in enumerate(_lengths(phrases, length)):
        tokens[row, :count] = torch.randint(1, max(2, largest), (count,), generator=random)
        tokens[row, count - 1] = largest
    index = torch.tensor([(pictures - 1 - row) % pictures for row in range(phrases)], dtype=torch.int64)
    return Asked(torch.randn(pictures, 3, size, size, generator=random), tokens, index)


def _lengths(phrases: int, longest: int) -> Iterator[int]:
    """From 3 tokens to all, in steps that differ from phrase to phrase."""
    return (min(longest, 3 + 5 * row % max(1, longest - 2)) for row in range(phrases))
