"""What a model is: all that predicting, training, scoring, saving and loading know of one.

A system is a dataclass under :class:`fastris.models.config.ModelConfig`, a class under :class:`ReferringModel` and a
row in :mod:`fastris.models.registry`. It must write ``segment``, and ``encode_image`` unless its image encoding depends
on the phrase; everything else here has a default that it may replace.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, ClassVar, NamedTuple, TypeVar

import torch
import torch.nn.functional as F
from huggingface_hub import PyTorchModelHubMixin
from torch import Tensor, nn

from fastris.models.config import ModelConfig
from fastris.models.pretrained import SAFETENSORS, load_pretrained
from fastris.models.state_dicts import Adopted
from fastris.reference import resize_target
from fastris.runtime.safetensors_files import write_safetensors

HEAD = "head"
"""The parameter group that trains at the full learning rate; every other one at ``lr_multi`` times it."""

M = TypeVar("M", bound="ReferringModel")


class Pixels(NamedTuple):
    """Images (B, 3, H, W) as they are: the "encoding" of a system that must know the phrase to look at them."""

    images: Tensor

    def select(self, index: Tensor | None) -> Pixels:
        """The images that ``index`` (E,) names, in its order; all of them for None."""
        return self if index is None else Pixels(self.images[index])


class ReferringModel(
    nn.Module,
    PyTorchModelHubMixin,
    library_name="fastris",
    license="mit",
    tags=["referring-image-segmentation"],
    pipeline_tag="image-segmentation",
):
    """A model that finds what phrases name in images.

    ``model(img, word, mask)`` follows the published contract: in training mode ``(pred.detach(), target, loss)``, where
    ``target`` is the mask at the logits' size; in eval mode the logits (B, 1, h, w), detached.

    Callers that have several expressions about one image take the two halves::

        features = model.encode_image(images)               # (B, 3, H, W) -> something with .select(index)
        logits = model.segment(features, tokens, index)     # tokens (E, L), index (E,): the image of each expression

    Attributes:
        config_class: of the configurations that it is built from.
        shares_image: whether the images' encoding serves every phrase. Where it is False, :meth:`encode_image` hands
            the pixels on, and :meth:`segment` encodes them once for each expression; callers do the same for both.
        starts_from: in words, the other model's weights that :meth:`adopt` takes.
    """

    config_class: ClassVar[type[ModelConfig]]
    shares_image: ClassVar[bool] = True
    starts_from: ClassVar[str] = ""

    config: Any

    def __init__(self, config: Any):
        super().__init__()
        kind = self.config_class
        if isinstance(config, Mapping):  # as huggingface_hub hands over the contents of config.json
            config = kind.from_dict(config, source="config.json")
        if not isinstance(config, kind):
            presets = kind.presets or ("NAME",)
            raise TypeError(
                f'config must be a {kind.__name__} such as {kind.__name__}.preset("{next(iter(presets))}"), '
                f"got {type(config).__name__}"
            )
        self.config = config

    # Segmenting.

    def encode_image(self, images: Tensor) -> Any:
        """Everything that depends on the images (B, 3, H, W) alone, with ``select(index)`` to repeat and order it."""
        if self.shares_image:
            raise NotImplementedError(f"{type(self).__name__} must define encode_image, or say shares_image = False")
        return Pixels(images)

    def encode_text(self, tokens: Tensor) -> Any:
        """Everything that depends on token ids (E, L) alone; NotImplementedError where it cannot stand alone."""
        raise NotImplementedError(f"{type(self).__name__} has no text encoding that stands alone; call segment")

    def segment(self, features: Any, tokens: Tensor, index: Tensor | None = None) -> Tensor:
        """Logits (E, 1, h, w) of the expressions ``tokens`` (E, L) about encoded images.

        ``index`` (E,) int64 says which image each expression belongs to; without it they correspond one to one.
        """
        raise NotImplementedError(f"{type(self).__name__} must define segment")

    # Training.

    def loss(self, features: Any, tokens: Tensor, mask: Tensor, index: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """(loss, logits) of expressions about encoded images; as :meth:`segment`, with their masks (E, 1, H, W).

        The mean binary cross entropy over all pixels and expressions, unless a system says otherwise.
        """
        logits = self.segment(features, tokens, index)
        target = resize_target(mask, logits.shape[-2:]).to(logits.dtype)
        return F.binary_cross_entropy_with_logits(logits, target), logits

    def parameter_groups(self) -> dict[str, list[nn.Parameter]]:
        """All parameters by group: "head" at the full learning rate, each other one at ``lr_multi`` times it."""
        return {HEAD: list(self.parameters())}

    def check_training(self, expressions: int) -> None:
        """ValueError where so many expressions are too few for a training step."""
        if expressions == 0:
            raise ValueError("word holds no expressions, so there is no loss; give at least two in training mode")

    def without_weights(self) -> str:
        """What to tell who trains it without any weights to start from; empty where that is as published."""
        return ""

    def forward(self, img: Tensor, word: Tensor, mask: Tensor | None = None) -> Tensor | tuple[Tensor, Tensor, Tensor]:
        """Published contract; see the class. ``img`` (B, 3, H, W), ``word`` (B, L) int64, ``mask`` (B, 1, H, W).

        With K expressions about each image, ``word`` (B, K, L) and ``mask`` (B, K, 1, H, W), images are encoded once;
        the results are those of B*K expressions, image by image.
        """
        check_is_tensor("word", word)
        index, word, mask = _by_expression(word, mask)
        if not self.training:
            return self.segment(self.encode_image(img), word, index).detach()
        check_is_tensor("img", img)
        check_mask(mask, len(img), len(word))
        self.check_training(len(word))
        assert mask is not None
        loss, logits = self.loss(self.encode_image(img), word, mask, index)
        return logits.detach(), resize_target(mask, logits.shape[-2:]), loss

    # Files.

    @classmethod
    def recognises(cls, names: Iterable[str]) -> bool:
        """Whether these are the names of a whole model of this system."""
        parts = tuple(f"{part}." for part in cls.config_class.parts)
        return not parts or any(name.startswith(parts) for name in names)

    @classmethod
    def adopt(cls, state: Mapping[str, Tensor]) -> Adopted | None:
        """Another model's weights under the names of the part that they start; None where they are not its."""
        return None

    @classmethod
    def infer_config(cls, state: Mapping[str, Tensor]) -> Any:
        """The configuration that the weights' shapes tell; ValueError where they cannot."""
        raise ValueError(f"these weights carry no configuration, and shapes do not tell a {cls.config_class.title}'s")

    @classmethod
    def encoder_of(cls, state: Mapping[str, Tensor]) -> str:
        """What the image encoder of these weights looks like, in words; empty where there is no telling."""
        return ""

    def in_words(self) -> str:
        """What kind of model it is, for whoever has just made or converted it."""
        return self.config.in_words()

    @classmethod
    def from_pretrained(
        cls: type[M],
        pretrained_model_name_or_path: str | Path,
        *,
        strict: bool = True,
        config: Any = None,
        map_location: str | torch.device = "cpu",
        **download: Any,
    ) -> M:
        """The model of a folder or a Hugging Face id, in eval mode; ``config`` in place of the one that it carries.

        ``download`` goes to huggingface_hub: ``revision``, ``token``, ``cache_dir``, ``force_download``,
        ``local_files_only``. Weights that do not fit are an error unless ``strict=False``.
        """
        model: Any = load_pretrained(cls, pretrained_model_name_or_path, config, strict, **download)
        return model.to(map_location)

    def save_pretrained(self, save_directory: str | Path, *, config: Any = None, **options: Any) -> str | None:
        """huggingface_hub's, with the configuration as :meth:`ModelConfig.to_dict` has it: with its system's name."""
        return super().save_pretrained(save_directory, config=config or self.config.to_dict(), **options)

    def _save_pretrained(self, save_directory: Path) -> None:
        """What huggingface_hub's ``save_pretrained`` calls for the weights."""
        write_safetensors(Path(save_directory) / SAFETENSORS, self.state_dict(), {})


def _by_expression(word: Tensor, mask: Tensor | None) -> tuple[Tensor | None, Tensor, Tensor | None]:
    """(index, word (E, L), mask (E, 1, H, W)) as ``segment`` takes them; no index for one word per image."""
    if word.ndim != 3:
        return None, word, mask
    images, several = word.shape[:2]
    index = torch.arange(images, device=word.device).repeat_interleave(several)
    if mask is not None and mask.ndim == 5:
        mask = mask.flatten(0, 1)
    return index, word.flatten(0, 1), mask


def check_is_tensor(name: str, value: Any) -> None:
    """TypeError that names the argument where it is no tensor."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(value).__name__}; convert it with torch.as_tensor")


def check_mask(mask: Tensor | None, images: int, expressions: int) -> None:
    """ValueError or TypeError where these are no masks (E, 1, H, W) in [0, 1] of so many expressions."""
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
