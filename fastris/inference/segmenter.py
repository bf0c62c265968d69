"""A picture and phrases in, masks out: :class:`fastris.Segmenter`."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch

from fastris.data.letterbox import Letterbox, to_square
from fastris.data.tokens import find_tokenizer
from fastris.inference.images import read_image
from fastris.inference.masks import THRESHOLD, check_threshold, probability_on_image
from fastris.inference.phrases import check_phrases
from fastris.models.inputs import inputs_of
from fastris.runtime.device import choose_device

if TYPE_CHECKING:
    from PIL import Image

    from fastris.inference.images import ImageSource
    from fastris.models.base import ReferringModel

PHRASES_AT_ONCE = 32
"""Phrases in one batch, for a model that encodes the picture once."""

IMAGES_AT_ONCE = 8
"""Phrases in one batch, for a model that encodes the picture again for every phrase."""


class Segment(NamedTuple):
    """The result for one phrase.

    Attributes:
        phrase: the phrase.
        mask: (H, W) bool, at the picture's own size.
        probability: (H, W) float32 in [0, 1]. The mask comes from the values before they are clipped to that range,
            which cubic interpolation can leave.
        score: mean probability inside the mask, 0 if the mask is empty.
    """

    phrase: str
    mask: np.ndarray
    probability: np.ndarray
    score: float


@dataclass(frozen=True, eq=False, repr=False)
class Prediction(Sequence[Segment]):
    """The results for N phrases about one picture: a sequence of :class:`Segment`, or all of them as arrays.

    Full-size maps are computed on access: ``for segment in prediction`` holds one at a time in memory, while ``masks``
    and ``probabilities`` compute and keep N of them.

    Attributes:
        image: the picture (H, W, 3) uint8 RGB, upright; masks have its size.
        phrases: the N phrases.
        logits: (N, h, w) float32, the model's output for the letterboxed square.
        warp: the letterbox between the picture and the square.
        threshold: the probability above which a pixel belongs to a mask.
    """

    image: np.ndarray
    phrases: tuple[str, ...]
    logits: np.ndarray
    warp: Letterbox
    threshold: float = THRESHOLD

    def __len__(self) -> int:
        return len(self.phrases)

    def __getitem__(self, i: Any) -> Any:
        """The :class:`Segment` of phrase ``i``; a list of them for a slice."""
        if isinstance(i, slice):
            return [self[k] for k in range(*i.indices(len(self)))]
        probability = probability_on_image(self.logits[i], self.warp)
        mask = probability > self.threshold
        np.clip(probability, 0, 1, out=probability)
        score = float(probability.mean(where=mask, dtype=np.float64)) if mask.any() else 0.0
        return Segment(self.phrases[i], mask, probability, score)

    def __repr__(self) -> str:
        height, width = self.image.shape[:2]
        return f"Prediction({width} x {height} pixels, {len(self)} phrases: {', '.join(map(repr, self.phrases))})"

    @cached_property
    def masks(self) -> np.ndarray:
        """(N, H, W) bool."""
        return np.stack([segment.mask for segment in self])

    @cached_property
    def probabilities(self) -> np.ndarray:
        """(N, H, W) float32 in [0, 1]."""
        return np.stack([segment.probability for segment in self])

    @cached_property
    def scores(self) -> np.ndarray:
        """(N,) float32: the mean probability inside each mask, 0 for an empty one."""
        return np.array([segment.score for segment in self], np.float32)

    def overlay(self, i: int | None = None, alpha: float = 0.5, caption: bool = False) -> Image.Image:
        """The picture with the mask of phrase ``i`` (all masks for None) tinted by ``alpha``, 0 to 1, and outlined.

        ``caption``: write the phrase below, and enlarge a tiny picture or shrink a huge one so that it can be read;
        otherwise the overlay has the picture's size. Raises IndexError for a phrase that does not exist.
        """
        from PIL import Image

        from fastris.pictures.overlay import paint, view

        if not 0 <= alpha <= 1:
            raise ValueError(f"alpha must lie in 0..1 (strength of the tint), got {alpha}")
        numbers = list(range(len(self)))[slice(None) if i is None else slice(i, i + 1 or None)]
        if not numbers:
            raise IndexError(f"i must name one of the {len(self)} phrases, got {i}")
        if caption:
            return view(self.image, [(k, self.phrases[k], self[k].mask) for k in numbers], alpha)
        return Image.fromarray(paint(self.image, [(k, self[k].mask) for k in numbers], alpha))


class Segmenter:
    """Finds what phrases name in pictures: ``Segmenter.from_pretrained("demo/model").predict("photo.jpg", "the cup")``.

    Args:
        model: a :class:`fastris.CRIS`, or a model of another system. It is moved to ``device`` and put in eval mode.
            Without one, the tiny model that comes with fastris, which knows drawn shapes only, with a warning that
            says so.
        device: "auto" (the first GPU, else the CPU), "cpu", "cuda:1", ...; None leaves the model where it is.
        threshold: the probability, from 0 to 1, above which a pixel belongs to the mask; None for the one that the
            model's system was published with.
    """

    def __init__(
        self,
        model: ReferringModel | None = None,
        *,
        device: str | torch.device | None = None,
        threshold: float | None = None,
    ):
        if model is None:
            device = choose_device(str(device or "auto"))
            model = _shipped()
        if threshold is None:
            threshold = getattr(model.config, "threshold", THRESHOLD)
        check_threshold(threshold)
        self.model = model.eval() if device is None else model.to(choose_device(str(device))).eval()
        self.threshold = threshold

    @classmethod
    def from_pretrained(
        cls, source: str | Path | None = None, *, device: str | torch.device = "auto", threshold: float | None = None
    ) -> Segmenter:
        """Load a folder, a checkpoint file or a Hugging Face id, as :func:`fastris.weights.load.load_model` does.

        Without a ``source``, the tiny model that comes with fastris.
        """
        from fastris.weights.load import load_model

        found = choose_device(str(device))  # before the model: it takes long to load
        return cls(None if source is None else load_model(source), device=found, threshold=threshold)

    def predict(self, image: ImageSource, phrases: str | Sequence[str]) -> Prediction:
        """Find what each phrase names. The image is encoded once for all of them.

        Args:
            image: anything that :func:`.images.read_image` reads: a path, a PIL image, a uint8 array in RGB.
            phrases: one phrase or several. One with more tokens than the model reads is cut, with a warning.

        Raises ValueError for an unreadable image, no phrases, or a phrase without words; TypeError for other types.
        """
        checked = check_phrases(phrases)
        return self.predict_checked(read_image(image), checked)

    def predict_checked(self, rgb: np.ndarray, checked: tuple[str, ...]) -> Prediction:
        """:meth:`predict` for a picture from :func:`read_image` and phrases from :func:`check_phrases`.

        The prediction keeps ``rgb`` itself, not a copy.
        """
        config = self.model.config
        inputs = inputs_of(config)
        tokens, truncated = find_tokenizer(inputs.tokenizer)(checked, config.word_len)
        for phrase, cut in zip(checked, truncated, strict=True):
            if cut:
                marked = f"{config.word_len} tokens, marks of start and end included"
                warnings.warn(f"phrase {phrase!r} is too long and was cut: the model reads {marked}", stacklevel=3)
        height, width = rgb.shape[:2]
        warp = to_square(height, width, config.input_size, inputs)
        return Prediction(rgb, checked, self._logits(warp.warp_image(rgb, inputs), tokens), warp, self.threshold)

    @torch.inference_mode()
    def _logits(self, square: torch.Tensor, tokens: torch.Tensor) -> np.ndarray:
        """(N, h, w) float32 for one image (3, S, S) and tokens (N, L)."""
        self.model.eval()
        parameter = next(self.model.parameters())
        features = self.model.encode_image(square[None].to(parameter))
        at_once = PHRASES_AT_ONCE if getattr(self.model, "shares_image", True) else IMAGES_AT_ONCE
        chunks = []
        for chunk in tokens.to(parameter.device).split(at_once):
            index = torch.zeros(len(chunk), dtype=torch.int64, device=parameter.device)
            chunks.append(self.model.segment(features, chunk, index)[:, 0].float().cpu())
        logits = torch.cat(chunks)
        if not logits.isfinite().all():
            raise RuntimeError("the model's output is not finite; its weights are damaged or overflow in this dtype")
        return logits.numpy()


def _shipped() -> ReferringModel:
    """The tiny model that comes with fastris, with a warning that says what it knows."""
    from fastris.weights.load import load_model
    from fastris.weights.shipped import NOTICE, shipped_model

    folder = shipped_model()
    warnings.warn(NOTICE, stacklevel=3)
    return load_model(folder)
