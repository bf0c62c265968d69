"""A picture and phrases in, masks out: :class:`fastris.Segmenter`, and ``fastris predict`` on the command line."""

from __future__ import annotations

import json
import os
import re
import warnings
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch

from fastris.data.letterbox import Letterbox, letterbox
from fastris.data.tokens import find_tokenizer
from fastris.inference.images import FORMATS, read_image
from fastris.inference.masks import THRESHOLD, probability_on_image
from fastris.models.inputs import inputs_of
from fastris.options.declare import REQUIRED, option
from fastris.runtime.device import choose_device
from fastris.runtime.plain import json_text, printable
from fastris.runtime.storage import replacing

if TYPE_CHECKING:
    from PIL import Image

    from fastris.inference.images import ImageSource
    from fastris.models.base import ReferringModel

PHRASES_AT_ONCE = 32
IMAGES_AT_ONCE = 8
"""The same for a model that encodes the picture anew for every phrase."""


class Segment(NamedTuple):
    """What one phrase found.

    Attributes:
        phrase: the phrase.
        mask: (H, W) bool, at the picture's own size.
        probability: (H, W) float32 in [0, 1]. Cubic interpolation may overshoot; the mask is decided before clipping.
        score: mean probability inside the mask, 0 if the mask is empty.
    """

    phrase: str
    mask: np.ndarray
    probability: np.ndarray
    score: float


@dataclass(frozen=True, eq=False, repr=False)
class Prediction(Sequence[Segment]):
    """What N phrases found in one picture: a sequence of :class:`Segment`, or all of it as arrays.

    Full-size maps are made when they are asked for: ``for segment in prediction`` holds one at a time in memory, while
    ``masks`` and ``probabilities`` make and keep N of them.

    Attributes:
        image: (H, W, 3) uint8 RGB, upright: the size that the masks have.
        phrases: the N phrases.
        logits: (N, h, w) float32, as the model gave them for the letterboxed square.
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
        """The picture with the mask of phrase ``i`` (of all phrases for None) tinted by ``alpha`` and outlined.

        ``caption``: write the phrase below, and enlarge a tiny picture or shrink a huge one so that it can be read;
        otherwise the overlay has the picture's size.
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
    """A model ready to be asked: ``Segmenter.from_pretrained("demo/model").predict("photo.jpg", "the red cup")``.

    Args:
        model: a :class:`fastris.CRIS`, or one of another system. The segmenter owns it: it is moved to ``device`` and
            put in eval mode.
        device: "auto" (the first GPU, else the CPU), "cpu", "cuda:1", ...; None leaves the model where it is.
        threshold: the probability, from 0 to 1, above which a pixel belongs to the mask.
    """

    def __init__(
        self, model: ReferringModel, *, device: str | torch.device | None = None, threshold: float = THRESHOLD
    ):
        if not 0 <= threshold <= 1:
            raise ValueError(f"threshold must lie in 0..1 (a probability), got {threshold}")
        self.model = model.eval() if device is None else model.to(choose_device(str(device))).eval()
        self.threshold = threshold

    @classmethod
    def from_pretrained(
        cls, source: str | Path, *, device: str | torch.device = "auto", threshold: float = THRESHOLD
    ) -> Segmenter:
        """Load what :func:`fastris.weights.load.load_model` loads: a folder, a checkpoint file or a Hugging Face id."""
        from fastris.weights.load import load_model

        found = choose_device(str(device))  # before the model: it takes long to load
        return cls(load_model(source), device=found, threshold=threshold)

    def predict(self, image: ImageSource, phrases: str | Sequence[str]) -> Prediction:
        """Find what each phrase names. The image is encoded once for all of them.

        Args:
            image: anything that :func:`.images.read_image` reads: a path, a PIL image, a uint8 array in RGB.
            phrases: one phrase or several. One with more words than the model reads is cut, with a warning.

        Raises ValueError for an unreadable image, no phrases, or a phrase without words; TypeError for other types.
        """
        checked = check_phrases(phrases)
        return self._predict(read_image(image), checked)

    def _predict(self, rgb: np.ndarray, checked: tuple[str, ...]) -> Prediction:
        """:meth:`predict` for what :func:`read_image` and :func:`check_phrases` return; keeps ``rgb``."""
        config = self.model.config
        inputs = inputs_of(config)
        tokens, truncated = find_tokenizer(inputs.tokenizer)(checked, config.word_len)
        for phrase, cut in zip(checked, truncated, strict=True):
            if cut:
                read = config.word_len - 2
                warnings.warn(f"phrase {phrase!r} is too long: only its first {read} tokens are read", stacklevel=3)
        height, width = rgb.shape[:2]
        warp = letterbox(height, width, config.input_size)
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


def check_phrases(phrases: str | Sequence[str]) -> tuple[str, ...]:
    """The phrases as a tuple. Raises ValueError or TypeError, if there is none or one is unusable."""
    checked = (phrases,) if isinstance(phrases, str) else tuple(phrases)
    if not checked:
        raise ValueError("phrases is empty; give at least one, such as 'the red cup on the left'")
    for i, phrase in enumerate(checked):
        if not isinstance(phrase, str):
            raise TypeError(f"phrases[{i}] must be text, got {type(phrase).__name__}")
        if not phrase.strip():
            raise ValueError(f"phrases[{i}] is {phrase!r}, which names nothing; write what to look for")
        if any("\ud800" <= character <= "\udfff" for character in phrase):
            raise ValueError(f"phrases[{i}] is {phrase!r}, which is no text in UTF-8; write it again")
    return checked


@dataclass
class PredictConfig:
    """Finds what each phrase names in a picture: mask, probability and overlay as PNG, and a table.

    fastris predict photo.jpg "the red cup" "man on the left" model=demo/model

    Only name=value whose name is an option below is an option, so "the sign 1+1=2" is a phrase. A phrase that could be
    mistaken for an option (it begins with - or with an option's name and =, or ends in .yaml) goes after --, as does
    everything that follows it:  fastris predict photo.jpg model=demo/model -- "out=3 on the board" "--"
    """

    image: str = option(REQUIRED, f"the picture: {', '.join(FORMATS)}", positional=True)
    phrases: tuple[str, ...] = option(REQUIRED, "what to look for; quote each phrase", positional=True)
    model: str = option(
        REQUIRED,
        "model folder (`fastris demo` trains and writes one), CRIS checkpoint (.pth, .safetensors) or Hugging Face id",
    )
    out: str = option("predictions", "folder for the pictures and predictions.json")
    threshold: float = option(THRESHOLD, "pixels above it belong to the mask", "probability, 0..1")
    device: str = option("auto", "auto, cpu, cuda, cuda:1, ...")


def run(config: PredictConfig) -> int:
    """Predict, write three pictures per phrase and ``predictions.json`` to ``config.out``, print a table."""
    phrases = check_phrases(config.phrases)
    rgb = read_image(config.image)
    out = Path(config.out).expanduser()
    known = _read_records(out)  # before the model: it takes long to load
    segmenter = Segmenter.from_pretrained(config.model, device=config.device, threshold=config.threshold)
    prediction = segmenter._predict(rgb, phrases)
    records: list[dict[str, Any]] = []
    try:
        for i in range(len(prediction)):
            records.append(_write(prediction, i, config, out))
    finally:  # what is written is noted, should a later phrase find the disk full
        if records:
            _write_records(out, known, records)
    _print_table(records, rgb, out)
    return 0


def _write(prediction: Prediction, i: int, config: PredictConfig, out: Path) -> dict[str, Any]:
    """Write the pictures of phrase ``i``, all three or none, and return its entry for predictions.json."""
    import cv2
    from PIL import Image

    from fastris.pictures.overlay import view

    phrase, mask, probability, score = prediction[i]
    name = _file_name(config.image, i, phrase)
    numbers = {"share": float(mask.mean()), "score": score, "highest_probability": float(probability.max())}
    levels = cv2.convertScaleAbs(probability, alpha=255)
    del probability  # the largest map
    pictures = {
        "overlay": view(prediction.image, [(i, phrase, mask)]),
        "probability": Image.fromarray(levels),
        "mask": Image.fromarray(np.multiply(mask, np.uint8(255), out=mask.view(np.uint8))),
    }
    with ExitStack() as files:
        for kind, picture in pictures.items():
            picture.save(files.enter_context(replacing(out / f"{name}_{kind}.png")), format="PNG")
    return {
        "image": str(config.image),
        "phrase": phrase,
        "model": config.model,
        "threshold": prediction.threshold,
        **numbers,
        **{kind: f"{name}_{kind}.png" for kind in ("mask", "probability", "overlay")},
    }


def _file_name(image: str, i: int, phrase: str) -> str:
    """How the names of phrase ``i``'s pictures begin: short enough for a file system, whatever the image is called."""
    stem = Path(image).stem[:80]
    while len(os.fsencode(stem)) > 120:
        stem = stem[:-1]
    slug = re.sub(r"[^a-z0-9]+", "-", phrase.lower())[:40].strip("-") or "phrase"
    return f"{stem}_{i + 1}_{slug}"


def _read_records(out: Path) -> list[dict[str, Any]]:
    """What earlier runs noted in the folder, if it is there."""
    if out.exists() and not out.is_dir():
        raise FileExistsError(f"out={out} is a file; give a folder")
    path = out / "predictions.json"
    if not path.exists():
        return []
    try:
        records: list[dict[str, Any]] = json.loads(path.read_text(encoding="utf-8"))
        if isinstance(records, list) and all(isinstance(r["mask"] + r["image"], str) for r in records):
            return records
    except (ValueError, TypeError, KeyError):
        pass
    raise ValueError(f"{path} was not written by `fastris predict`; move it away or give another out=")


def _write_records(out: Path, known: list[dict[str, Any]], records: list[dict[str, Any]]) -> None:
    """Keep the entries of other pictures and phrases, so that several runs can share a folder."""
    written = {record["mask"]: record["image"] for record in records}
    kept = [record for record in known if record["mask"] not in written]
    replaced = {record["image"] for record in known if record["image"] != written.get(record["mask"], record["image"])}
    for image in sorted(replaced):
        warnings.warn(f"replaced pictures of {image}, which has the same name; give another out=", stacklevel=2)
    with replacing(out / "predictions.json") as temporary:
        temporary.write_text(json_text(kept + records) + "\n", encoding="utf-8")


def _print_table(records: list[dict[str, Any]], rgb: np.ndarray, out: Path) -> None:
    phrases = [printable(record["phrase"]) for record in records]
    width = max(len("phrase"), *map(len, phrases))
    image = printable(records[0]["image"])
    print(f"{image}: {rgb.shape[1]} x {rgb.shape[0]} pixels, written to {printable(out)}")
    print(f"{'phrase':<{width}}  {'share':>6}  {'score':>5}  files")
    for phrase, record in zip(phrases, records, strict=True):
        files = printable(record["mask"]).removesuffix("mask.png") + "{mask,probability,overlay}.png"
        print(f"{phrase:<{width}}  {record['share']:>6.1%}  {record['score']:>5.2f}  {files}")
    for phrase, record in zip(phrases, records, strict=True):
        if not record["share"]:
            highest = f"{record['highest_probability']:.2f}"
            print(f"nothing found for '{phrase}': probabilities reach {highest}, not {record['threshold']}")
