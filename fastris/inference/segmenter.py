"""A picture and phrases in, masks out: :class:`fastris.Segmenter`."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from fastris.data.letterbox import Letterbox, to_square
from fastris.data.tokens import find_tokenizer
from fastris.inference.images import read_image
from fastris.inference.masks import THRESHOLD, check_threshold
from fastris.inference.phrases import check_phrases
from fastris.inference.prediction import Prediction, Segment
from fastris.inference.presence import UNMEASURED, Presence
from fastris.inference.runner import IMAGES_AT_ONCE, PHRASES_AT_ONCE, Runner, checked_dtype
from fastris.models.inputs import inputs_of
from fastris.runtime.device import choose_device

if TYPE_CHECKING:
    from fastris.inference.images import ImageSource
    from fastris.models.base import ReferringModel

__all__ = ["IMAGES_AT_ONCE", "PHRASES_AT_ONCE", "Look", "Prediction", "Segment", "Segmenter"]


class Segmenter:
    """Finds what phrases name in pictures: ``Segmenter.from_pretrained("demo/model")("photo.jpg", "the cup")``.

    Args:
        model: a :class:`fastris.CRIS`, or a model of another system. It is moved to ``device`` and put in eval mode.
            Without one, the tiny model that comes with fastris, which knows drawn shapes only, with a warning that
            says so.
        device: "auto" (the first CUDA GPU, else the CPU), "cpu", "cuda", "cuda:1", "mps"; None leaves the model where
            it is.
        threshold: the probability, from 0 to 1, above which a pixel belongs to the mask; None for the one that the
            model's system was published with.
        dtype: of weights and arithmetic: "float32", "bfloat16", "float16", "float64", or PyTorch's. A model of another
            is copied, and stays as it is. None leaves it.
        compile: run the model through torch.compile; the first call takes minutes.
        cuda_graph: capture and replay CUDA graphs, one for 1, 2, 4, ... phrases: less overhead for small models.
        presence: the scale of :attr:`.Prediction.presence`.

    Raises ValueError for options that are wrong or do not fit the device.
    """

    def __init__(
        self,
        model: ReferringModel | None = None,
        *,
        device: str | torch.device | None = None,
        threshold: float | None = None,
        dtype: str | torch.dtype | None = None,
        compile: bool = False,
        cuda_graph: bool = False,
        presence: Presence = UNMEASURED,
    ):
        wanted = None if dtype is None else checked_dtype(dtype)
        if model is None:
            device = choose_device(str(device or "auto"))
            model = _shipped()
        elif isinstance(model, (str, Path)):
            raise TypeError(f"model must be a model; Segmenter.from_pretrained({str(model)!r}) loads one")
        if threshold is None:
            threshold = getattr(model.config, "threshold", THRESHOLD)
        check_threshold(threshold)
        if wanted is not None and wanted != next(model.parameters()).dtype:
            model = copy.deepcopy(model).to(wanted)
        self.model = model.eval() if device is None else model.to(choose_device(str(device))).eval()
        self.threshold = threshold
        self.scale = presence
        self._run = Runner(self.model, compile, cuda_graph)

    @classmethod
    def from_pretrained(
        cls, source: str | Path | None = None, *, device: str | torch.device = "auto", **options: Any
    ) -> Segmenter:
        """Load a folder, a checkpoint file or a Hugging Face id, as :func:`fastris.weights.load.load_model` does.

        Without a ``source``, the tiny model that comes with fastris. ``options``: those of :class:`Segmenter`.
        """
        from fastris.weights.load import load_model

        found = choose_device(str(device))  # before the model: it takes long to load
        return cls(None if source is None else load_model(source), device=found, **options)

    def __call__(self, image: ImageSource, phrases: str | Sequence[str]) -> Prediction:
        """:meth:`predict`."""
        return self.predict(image, phrases)

    def __repr__(self) -> str:
        parameter = next(self.model.parameters())
        name = getattr(self.model, "in_words", type(self.model).__name__)
        how = "".join(f", {each}" for each in ("compile", "cuda_graph") if getattr(self._run, each))
        words = name() if callable(name) else name
        return f"Segmenter({words}, {parameter.device}, {str(parameter.dtype)[6:]}, threshold {self.threshold}{how})"

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
        tokens = self._tokens(checked)
        warp, square = self._square(rgb)
        return self._prediction(rgb, checked, self._run(square, tokens), warp)

    def look(self, image: ImageSource) -> Look:
        """Encode a picture once, for phrases that come later: ``look(phrases)`` is what :meth:`predict` returns.

        Raises ValueError for an unreadable image, and for a segmenter with ``cuda_graph``; TypeError for other types.
        """
        return self.look_checked(read_image(image))

    def look_checked(self, rgb: np.ndarray) -> Look:
        """:meth:`look` for a picture from :func:`read_image`, which the look and its predictions keep."""
        warp, square = self._square(rgb)
        return Look(self, rgb, warp, self._run.encode(square))

    def _square(self, rgb: np.ndarray) -> tuple[Letterbox, torch.Tensor]:
        inputs = inputs_of(self.model.config)
        height, width = rgb.shape[:2]
        warp = to_square(height, width, self.model.config.input_size, inputs)
        return warp, warp.warp_image(rgb, inputs)

    def _tokens(self, checked: tuple[str, ...]) -> torch.Tensor:
        config = self.model.config
        tokens, truncated = find_tokenizer(inputs_of(config).tokenizer)(checked, config.word_len)
        for phrase, cut in zip(checked, truncated, strict=True):
            if cut:
                marked = f"{config.word_len} tokens, marks of start and end included"
                warnings.warn(f"phrase {phrase!r} is too long and was cut: the model reads {marked}", stacklevel=4)
        return tokens

    def _prediction(
        self, rgb: np.ndarray, checked: tuple[str, ...], logits: torch.Tensor, warp: Letterbox
    ) -> Prediction:
        if not logits.isfinite().all():
            raise RuntimeError("the model's output is not finite; its weights are damaged or overflow in this dtype")
        return Prediction(rgb, checked, logits.numpy(), warp, self.threshold, self.scale)


class Look:
    """A picture that a :class:`Segmenter` has encoded: ``look(phrases)`` answers without encoding it again.

    The answers are those of :meth:`Segmenter.predict`. The encoding stays in the memory of the model's device as long
    as this object. A model whose ``shares_image`` is False, such as MagNet, reads the picture together with each
    phrase, so that nothing is saved.

    Attributes:
        image: the picture (H, W, 3) uint8 RGB, upright.
        warp: the letterbox between the picture and the model's square.
    """

    def __init__(self, segmenter: Segmenter, image: np.ndarray, warp: Letterbox, features: Any):
        self.image, self.warp = image, warp
        self._segmenter, self._features = segmenter, features

    def __call__(self, phrases: str | Sequence[str]) -> Prediction:
        """Find what each phrase names. Raises as :meth:`Segmenter.predict` does for phrases."""
        checked = check_phrases(phrases)
        tokens = self._segmenter._tokens(checked)
        logits = self._segmenter._run.answer(self._features, tokens)
        return self._segmenter._prediction(self.image, checked, logits, self.warp)

    def __repr__(self) -> str:
        height, width = self.image.shape[:2]
        return f"Look({width} x {height} pixels, {self._segmenter!r})"


def _shipped() -> ReferringModel:
    """The tiny model that comes with fastris, with a warning that says what it knows."""
    from fastris.weights.load import load_model
    from fastris.weights.shipped import NOTICE, shipped_model

    folder = shipped_model()
    warnings.warn(NOTICE, stacklevel=3)
    return load_model(folder)
