"""Evaluation at the images' own size under the published rule, with everything saved that any other metric needs."""

from __future__ import annotations

import csv
import json
import platform
import time
from collections.abc import Iterator, Sized
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, cast

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from fastris.config import REQUIRED, option
from fastris.data import DATASETS, ReferringDataset, load_dataset
from fastris.data.samples import EvalSamples, worker_init
from fastris.data.tokens import tokenize
from fastris.metrics import Scores, overlap, per_sample_iou, score
from fastris.optim import Amp, Precision, choose_device, choose_workers

if TYPE_CHECKING:
    from fastris.models.cris import CRIS

Sentences = Literal["all", "first"]


@dataclass(frozen=True)
class Rule:
    """How logits become a mask that is scored: sigmoid, resized to the input square, warped back, and cut here.

    Attributes:
        threshold: a pixel belongs to the object where its probability lies strictly above.
        text: the rule in words, for the files that it leads to.
    """

    threshold: float
    text: str


RULES = {
    "cris": Rule(
        0.35,
        "sigmoid; bicubic (align_corners=True) to the input size; inverse letterbox warp (cubic) to the image's size; "
        "probability > 0.35; against the mask at the image's own size; IoU = intersection / (union + 1e-6)",
    )
}
"""Scoring rules by name. "cris" is the one behind CRIS's published numbers."""


@dataclass(frozen=True)
class SampleResult:
    """One scored expression; intersection and union are in pixels of the original image."""

    index: int
    ref_id: int | str
    image_id: int | str
    sentence_number: int
    sentence: str
    truncated: bool
    intersection: int
    union: int

    @property
    def iou(self) -> float:
        return float(per_sample_iou(np.array(self.intersection), np.array(self.union)))


CSV_COLUMNS = ("ref_id", "image_id", "sentence_number", "sentence", "truncated", "intersection", "union", "iou")


@dataclass(frozen=True)
class EvalResult:
    """What :func:`evaluate` returns.

    Attributes:
        scores: the metrics over all expressions.
        samples: one entry per expression, in the data set's order.
        images: number of images, each of which was encoded once.
        references: number of references (objects) scored.
        truncated: number of expressions that were longer than the model's `word_len` and were cut.
        skipped: problem -> ids of references that the data set left out on request.
        seconds: duration.
        settings: device, precision, input size and word length in use.
    """

    scores: Scores
    samples: list[SampleResult]
    images: int
    references: int
    truncated: int
    skipped: dict[str, list[int | str]]
    seconds: float
    settings: dict[str, Any] = field(default_factory=dict)

    def summary(self) -> str:
        """The scores on one line, and a further line for each thing that a reader must know about them."""
        lines = [str(self.scores)]
        if self.truncated:
            word_len = self.settings.get("word_len")
            lines.append(f"{self.truncated} expressions are longer than word_len={word_len} tokens and were cut")
        lines += [f"{len(refs)} references left out: {problem}" for problem, refs in self.skipped.items() if refs]
        return "\n".join(lines)

    def save(self, folder: str | Path, **facts: Any) -> Path:
        """Write `per_sample.csv` and `metrics.json` into `folder`, each in one step; `facts` go into the latter."""
        from fastris.checkpoint import replacing

        folder = Path(folder)
        with replacing(folder / "per_sample.csv") as path, path.open("w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file)
            writer.writerow(CSV_COLUMNS)
            writer.writerows(
                [int(value) if isinstance(value, bool) else value for value in (getattr(s, c) for c in CSV_COLUMNS)]
                for s in self.samples
            )
        with replacing(folder / "metrics.json") as path:
            path.write_text(json.dumps(self.as_dict() | facts, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
        return folder

    def as_dict(self) -> dict[str, Any]:
        """The content of `metrics.json`; scores are fractions of 1."""
        return {
            **self.scores.as_dict(),
            "rule_text": RULES[self.scores.rule].text,
            "images": self.images,
            "references": self.references,
            "truncated": self.truncated,
            "skipped": {problem: len(refs) for problem, refs in self.skipped.items()},
            "skipped_ref_ids": self.skipped,
            "seconds": round(self.seconds, 1),
            **self.settings,
            "versions": versions(),
        }


def evaluate(
    model: CRIS,
    dataset: ReferringDataset,
    *,
    sentences: Sentences = "all",
    rule: str = "cris",
    device: torch.device | str | None = None,
    amp: str = "off",
    workers: int = 0,
    batch_size: int = 32,
    images_per_batch: int = 8,
    input_size: int | None = None,
    word_len: int | None = None,
    progress: bool = False,
) -> EvalResult:
    """Score a model on every reference of a data set; each image is encoded once for all its expressions.

    Args:
        model: moved to `device` if one is given; left in the mode (train or eval) that it came in.
        dataset: images and masks at their own size.
        sentences: "all" of each reference, or only its "first" (as the published validation during training).
        rule: a key of `RULES`.
        amp: precision of the forward pass: "off" (as published), "auto", "bf16", "fp16"; scoring is always float32.
        workers: processes that read and warp images; 0 does it here.
        batch_size: expressions segmented at once. images_per_batch: images encoded at once.
        input_size, word_len: in pixels and tokens; the model's own where None.
        progress: show a progress bar (only on a terminal).

    Raises:
        ValueError: unknown rule, sentence rule or precision, or a data set without references.
    """
    if rule not in RULES:
        raise ValueError(f"rule={rule!r} is unknown; choose one of {', '.join(RULES)}")
    if sentences not in ("all", "first"):
        raise ValueError(f"sentences={sentences!r} is unknown; choose all or first")
    if not len(dataset):
        raise ValueError(f"dataset {dataset.name} {dataset.split} is empty: there is no expression to score")
    started = time.perf_counter()
    device = next(model.parameters()).device if device is None else torch.device(device)
    precision = Precision.choose(amp, device)
    input_size, word_len = input_size or model.config.input_size, word_len or model.config.word_len
    truth = _WithTruth(EvalSamples(dataset, input_size, word_len, sentences), dataset, word_len)
    loader = _loader(truth, images_per_batch, workers)

    was_training = model.training
    model.to(device).eval()
    samples: list[SampleResult] = []
    try:
        for images in _progress(loader, progress, f"{dataset.name} {dataset.split}"):
            for image, item, probability in predict_batch(model, images, precision, batch_size):
                samples.append(_score(dataset, image, item, probability, RULES[rule].threshold))
    finally:
        model.train(was_training)

    samples.sort(key=lambda sample: (sample.index, sample.sentence_number))
    return EvalResult(
        scores=score(
            [s.intersection for s in samples],
            [s.union for s in samples],
            rule=rule,
            dataset=dataset.name,
            split=dataset.split,
            sentences=sentences,
        ),
        samples=samples,
        images=len({s.image_id for s in samples}),
        references=len({s.index for s in samples}),
        truncated=sum(s.truncated for s in samples),
        skipped=dataset.skipped,
        seconds=time.perf_counter() - started,
        settings={
            "input_size": input_size,
            "word_len": word_len,
            "amp": precision.name,
            "device": torch.cuda.get_device_name(device) if device.type == "cuda" else str(device),
        },
    )


Item = tuple[int, int, str, Tensor]
"""Dataset index, sentence number, sentence, tokens (L,)."""


@torch.inference_mode()
def predict_batch(
    model: CRIS, images: list[dict[str, Any]], precision: Precision, batch_size: int
) -> Iterator[tuple[dict[str, Any], Item, np.ndarray]]:
    """Encode samples of :class:`EvalSamples` together, then segment their expressions `batch_size` at a time.

    Yields (sample, item, probability): the last is (H, W) float32 at the image's own size, the expression's map as the
    published rule makes it, before the threshold.
    """
    with precision.autocast():
        pixels = torch.stack([image["image"] for image in images]).to(precision.device, non_blocking=True)
        features = model.encode_image(pixels)
    expressions = [(number, item) for number, image in enumerate(images) for item in image["items"]]
    for start in range(0, len(expressions), batch_size):
        chunk = expressions[start : start + batch_size]
        tokens = torch.stack([item[3] for _, item in chunk]).to(precision.device)
        index = torch.tensor([number for number, _ in chunk], device=precision.device)
        with precision.autocast():
            logits = model.segment(features, tokens, index)
        for (number, item), probability in zip(chunk, to_input_size(logits, pixels.shape[-1]), strict=True):
            yield images[number], item, images[number]["letterbox"].unwarp(probability)


def to_input_size(logits: Tensor, input_size: int) -> np.ndarray:
    """Logits (E, 1, h, w) to probabilities (E, S, S) float32: the sigmoid first, then bicubic, as published."""
    probability = logits.float().sigmoid()
    if probability.shape[-1] != input_size:
        size = (input_size, input_size)
        probability = F.interpolate(probability, size=size, mode="bicubic", align_corners=True)
    return probability[:, 0].cpu().numpy()


def _score(
    dataset: ReferringDataset, image: dict[str, Any], item: Item, probability: np.ndarray, threshold: float
) -> SampleResult:
    index, number, sentence, _ = item
    intersection, union = overlap(probability > threshold, image["masks"][index])
    reference = dataset.reference(index)
    cut = image["cut"][index, number]
    return SampleResult(index, reference.ref_id, reference.image_id, number, sentence, cut, intersection, union)


class _WithTruth(Dataset):
    """Items of :class:`EvalSamples` and what scoring needs, so that worker processes read and decode the masks too."""

    def __init__(self, samples: EvalSamples, dataset: ReferringDataset, word_len: int):
        self.samples, self.dataset, self.word_len = samples, dataset, word_len

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, position: int) -> dict[str, Any]:
        sample = self.samples[position]
        items = sample["items"]
        masks = {index: self.dataset.mask(index) for index in {item[0] for item in items}}
        truncated = tokenize([item[2] for item in items], self.word_len).truncated
        cut = {(item[0], item[1]): flag for item, flag in zip(items, truncated, strict=True)}
        return sample | {"masks": masks, "cut": cut}


def _loader(samples: Dataset, images_per_batch: int, workers: int) -> DataLoader:
    return DataLoader(
        samples,
        batch_size=images_per_batch,
        num_workers=workers,
        collate_fn=list,
        worker_init_fn=worker_init,
        generator=torch.Generator(),  # the loader draws from it, and so leaves the global one alone
    )


def _progress(loader: DataLoader, show: bool, title: str) -> Iterator[Any]:
    """The loader's batches, with a bar that counts images where `show` is set and there is a terminal."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    console = Console(stderr=True)
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("images"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console, transient=True, disable=not (show and console.is_terminal)) as bar:
        task = bar.add_task(f"evaluate {title}", total=len(cast(Sized, loader.dataset)))
        for batch in loader:
            yield batch
            bar.advance(task, len(batch))


def versions() -> dict[str, str]:
    """Versions of what can change the numbers."""
    import cv2

    import fastris

    return {
        "fastris": fastris.__version__,
        "torch": torch.__version__,
        "opencv": cv2.__version__,
        "numpy": np.__version__,
        "python": platform.python_version(),
    }


@dataclass
class EvalConfig:
    """Options of `fastris eval`."""

    model: str = option(REQUIRED, "checkpoint (.pth), folder or .safetensors file, or Hugging Face id of the model")
    dataset: str = option("refcoco", "data set: " + ", ".join(DATASETS))
    data_root: str | None = option(None, "folder of the data set's files; synthetic needs none")
    split: str = option("val", "split of the data set, such as val, testA, testB, test")
    sentences: Sentences = option("all", "sentences of each object that are scored")
    rule: str = option("cris", "prediction and scoring rule: " + ", ".join(RULES))
    on_error: Literal["raise", "skip"] = option("raise", "what to do about references whose annotation is unusable")
    out: Path | None = option(
        None, "folder for metrics.json and per_sample.csv; none: runs/eval/DATASET_SPLIT_SENTENCES"
    )
    device: str = option("auto", "auto, cpu, cuda, cuda:1, ...")
    amp: Amp = option("off", "precision of the forward pass; off (float32) as published")
    batch_size: int = option(32, "segmented at once", "expressions")
    images_per_batch: int = option(8, "encoded at once", "images")
    workers: int | None = option(None, "that read images and masks; 0: no extra one; none: up to 4", "processes")
    input_size: int | None = option(None, "side of the letterboxed square; none: the model's", "pixels")
    word_len: int | None = option(None, "length that a sentence is cut to; none: the model's", "tokens")
    progress: bool = option(True, "show a progress bar on a terminal")


def run(config: EvalConfig) -> None:
    """`fastris eval`: score a model on a data set, print the scores, and write them with every sample's numbers."""
    from fastris.checkpoint import load_model

    device = choose_device(config.device)
    dataset = load_dataset(config.dataset, config.split, config.data_root, on_error=config.on_error)
    result = evaluate(
        load_model(config.model),
        dataset,
        sentences=config.sentences,
        rule=config.rule,
        device=device,
        amp=config.amp,
        workers=choose_workers(config.workers),
        batch_size=config.batch_size,
        images_per_batch=config.images_per_batch,
        input_size=config.input_size,
        word_len=config.word_len,
        progress=config.progress,
    )
    name = f"{config.dataset}_{config.split}_{config.sentences}"
    folder = result.save(config.out or Path("runs/eval") / name, model=config.model, data_root=config.data_root)
    print(result.summary())
    print(
        f"saved {folder / 'metrics.json'} and {folder / 'per_sample.csv'} (intersection and union of every expression)"
    )
