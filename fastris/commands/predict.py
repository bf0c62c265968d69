"""``fastris predict``: a picture and phrases in, pictures of the masks and a table out."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastris.inference.images import FORMATS, read_image
from fastris.inference.masks import check_threshold
from fastris.inference.phrases import check_phrases
from fastris.options.declare import REQUIRED, option
from fastris.runtime.plain import printable
from fastris.weights.shipped import NAME, shipped_model

if TYPE_CHECKING:
    import numpy as np


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
    model: str | None = option(
        None,
        "model folder (`fastris demo` trains and writes one), CRIS checkpoint (.pth, .safetensors) or Hugging Face id; "
        "without it a tiny model that knows drawn shapes only: no weights trained on photographs come with fastris",
        default_text="shapes",
    )
    out: str = option("predictions", "folder for the pictures and predictions.json")
    threshold: float = option(
        None, "pixels above it belong to the mask", "probability, 0..1", default_text="the system's"
    )
    device: str = option("auto", "auto, cpu, cuda, cuda:1, ...")

    def __post_init__(self) -> None:
        if self.threshold is not None:
            check_threshold(self.threshold)


def run(config: PredictConfig) -> int:
    """Predict, write three pictures per phrase and ``predictions.json`` to ``config.out``, print a table."""
    phrases = check_phrases(config.phrases)
    if config.model is None:
        shipped_model()  # before anything slow
    rgb = read_image(config.image)
    # Only now: they bring PyTorch, which takes seconds, and nobody should wait for it to hear of a wrong picture.
    from fastris.inference.segmenter import Segmenter
    from fastris.inference.write import read_records, write_phrase, write_records

    out = Path(config.out).expanduser()
    known = read_records(out)  # before the model: it takes long to load
    segmenter = Segmenter.from_pretrained(config.model, device=config.device, threshold=config.threshold)
    prediction = segmenter.predict_checked(rgb, phrases)
    records: list[dict[str, Any]] = []
    try:
        for i in range(len(prediction)):
            records.append(write_phrase(prediction, i, out, image=config.image, model=config.model or NAME))
    finally:  # what is written is noted, should a later phrase find the disk full
        if records:
            write_records(out, known, records)
    _print_table(records, rgb, out)
    return 0


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
