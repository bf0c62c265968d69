"""Evaluation under one of the published rules, with everything saved that any other metric needs."""

from __future__ import annotations

import csv
import platform
import time
from collections.abc import Collection, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from fastris.data.base import ReferringDataset
from fastris.data.samples import EvalSamples, worker_init
from fastris.evaluation.metrics import Scores, per_sample_iou, score
from fastris.evaluation.rules import RULES, Rule, Sentences, find_rule
from fastris.models.inputs import inputs_of
from fastris.runtime import distributed
from fastris.runtime.device import Precision
from fastris.runtime.plain import check_at_least, json_text, printable
from fastris.runtime.storage import replacing

if TYPE_CHECKING:
    from fastris.models.base import ReferringModel


@dataclass(frozen=True)
class SampleResult:
    """One scored expression, as its rule counts it.

    Attributes:
        intersection, union: in pixels at the size that the rule scores at.
        no_target: whether the expression has none; rejected: whether the prediction said so.
        iou: a fraction of 1.
    """

    index: int
    ref_id: int | str
    image_id: int | str
    sentence_number: int
    sentence: str
    truncated: bool
    intersection: int
    union: int
    no_target: bool
    rejected: bool
    iou: float


CSV_COLUMNS = ("ref_id", "image_id", "sentence_number", "sentence", "truncated", "intersection", "union", "no_target",
               "rejected", "iou")  # fmt: skip


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
        settings: device, precision, input size, word length and number of processes in use.
        masks: (index, sentence number) -> predicted mask, bool at the scored size, of the expressions asked for.
    """

    scores: Scores
    samples: list[SampleResult]
    images: int
    references: int
    truncated: int
    skipped: dict[str, list[int | str]]
    seconds: float
    settings: dict[str, Any] = field(default_factory=dict)
    masks: dict[tuple[int, int], np.ndarray] = field(default_factory=dict)

    def summary(self) -> str:
        """The scores on one line, and a further line for each thing that a reader must know about them."""
        lines = [str(self.scores)]
        if self.truncated:
            word_len = self.settings.get("word_len")
            lines.append(f"{self.truncated} expressions are longer than word_len={word_len} tokens and were cut")
        lines += [f"{len(refs)} references left out: {printable(why)}" for why, refs in self.skipped.items() if refs]
        return "\n".join(lines)

    def save(self, folder: str | Path, **facts: Any) -> Path:
        """Write `per_sample.csv` and `metrics.json` into `folder`, each in one step; `facts` go into the latter."""
        folder = Path(folder)
        with (
            replacing(folder / "per_sample.csv") as path,
            path.open("w", newline="", encoding="utf-8", errors="backslashreplace") as file,
        ):
            writer = csv.writer(file)
            writer.writerow(CSV_COLUMNS)
            writer.writerows(
                [int(value) if isinstance(value, bool) else value for value in (getattr(s, c) for c in CSV_COLUMNS)]
                for s in self.samples
            )
        with replacing(folder / "metrics.json") as path:
            path.write_text(json_text(self.as_dict() | facts) + "\n", encoding="utf-8")
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
    model: ReferringModel,
    dataset: ReferringDataset,
    *,
    sentences: Sentences = "all",
    rule: str | None = None,
    device: torch.device | str | None = None,
    amp: str = "off",
    workers: int = 0,
    batch_size: int = 32,
    images_per_batch: int = 8,
    input_size: int | None = None,
    word_len: int | None = None,
    progress: bool = False,
    keep: Collection[tuple[int, int]] = (),
) -> EvalResult:
    """Score a model on every reference of a data set; each image is encoded once for all its expressions.

    Where `torch.distributed` is initialised, every process must call it: each scores its share of the images, every
    expression once, and all get the whole result, the one that a single process finds.

    Args:
        model: moved to `device` if one is given; left in the mode (train or eval) that it came in.
        dataset: images and masks at their own size.
        sentences: "all" of each reference, or only its "first" (as the published validation during training).
        rule: a key of :data:`fastris.evaluation.rules.RULES`; None for that of the model's system.
        amp: precision of the forward pass: "off" (as published), "auto", "bf16", "fp16"; scoring is always float32.
        workers: processes that read and warp images; 0 does it here.
        batch_size: expressions segmented at once. images_per_batch: images encoded at once.
        input_size, word_len: in pixels and tokens; the model's own where None.
        progress: show a progress bar (only on a terminal, and for the first process).
        keep: (index, sentence number) of the expressions whose predicted masks the result holds.

    Raises:
        ValueError: unknown rule, sentence rule or precision, a number too small, or a data set without references.
    """
    if rule is not None:
        find_rule(rule)
    if sentences not in ("all", "first"):
        raise ValueError(f"sentences={sentences!r} is unknown; choose all or first")
    check_at_least(0, workers=workers)
    check_at_least(1, batch_size=batch_size, images_per_batch=images_per_batch)
    if not len(dataset):
        raise ValueError(f"dataset {dataset.name} {dataset.split} is empty: there is no expression to score")
    started = time.perf_counter()
    rule = rule or model.config.recipe.val_rule
    method = find_rule(rule)
    device = next(model.parameters()).device if device is None else torch.device(device)
    precision = Precision.choose(amp, device)
    input_size, word_len = input_size or model.config.input_size, word_len or model.config.word_len
    truth = _WithTruth(EvalSamples(dataset, input_size, word_len, sentences, inputs_of(model.config)), dataset)
    rank, world = distributed.rank(), distributed.world_size()
    loader = _loader(truth, images_per_batch, workers, rank, world)

    def scored() -> Iterator[tuple[SampleResult, np.ndarray | None]]:
        for images in _progress(loader, progress and rank == 0, f"{dataset.name} {dataset.split}"):
            for image, item, mask in predict_batch(model, images, precision, batch_size, method):
                yield _score(dataset, image, item, mask, method), mask if item[:2] in wanted else None

    wanted, was_training = set(keep), model.training
    model.to(device).eval()
    try:
        with distributed.together():
            own = list(scored())
        found = [pair for share in distributed.gather(own) for pair in share]
    finally:
        model.train(was_training)
    settings = {
        "input_size": input_size,
        "word_len": word_len,
        "amp": precision.name,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else str(device),
        "processes": world,
    }
    return _result(found, dataset, rule, sentences, settings, seconds=time.perf_counter() - started)


def _result(
    found: list[tuple[SampleResult, np.ndarray | None]],
    dataset: ReferringDataset,
    rule: str,
    sentences: Sentences,
    settings: dict[str, Any],
    seconds: float,
) -> EvalResult:
    """The result of all processes' samples, each with its mask where that was asked for, in the data set's order."""
    found = sorted(found, key=lambda pair: (pair[0].index, pair[0].sentence_number))
    samples = [sample for sample, _ in found]
    return EvalResult(
        scores=score(
            [s.intersection for s in samples],
            [s.union for s in samples],
            rule=rule,
            dataset=dataset.name,
            split=dataset.split,
            sentences=sentences,
            no_target=[s.no_target for s in samples],
            rejected=[s.rejected for s in samples],
        ),
        samples=samples,
        images=len({s.image_id for s in samples}),
        references=len({s.index for s in samples}),
        truncated=sum(s.truncated for s in samples),
        skipped=dataset.skipped,
        seconds=seconds,
        settings=settings,
        masks={(sample.index, sample.sentence_number): mask for sample, mask in found if mask is not None},
    )


Item = tuple[int, int, str, Tensor]
"""Dataset index, sentence number, sentence, tokens (L,)."""


@torch.inference_mode()
def predict_batch(
    model: ReferringModel, images: list[dict[str, Any]], precision: Precision, batch_size: int, rule: Rule
) -> Iterator[tuple[dict[str, Any], Item, np.ndarray]]:
    """Encode samples of :class:`EvalSamples` together, then segment their expressions `batch_size` at a time.

    Yields (sample, item, mask): the last is bool at the size that the rule scores at.
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
        for (number, item), square in zip(chunk, rule.to_square(logits, pixels.shape[-1]), strict=True):
            yield images[number], item, rule.to_image(square, images[number]["letterbox"]) > rule.cut


def _score(dataset: ReferringDataset, image: dict[str, Any], item: Item, mask: np.ndarray, rule: Rule) -> SampleResult:
    index, number, sentence, _ = item
    reference = dataset.reference(index)
    no_target = bool(getattr(reference, "no_target", False))
    found = rule.compare(mask, rule.truth(image["masks"][index]), no_target)
    iou = per_sample_iou(np.array(found.intersection), np.array(found.union), rule.epsilon)
    return SampleResult(
        index=index,
        ref_id=reference.ref_id,
        image_id=reference.image_id,
        sentence_number=number,
        sentence=sentence,
        truncated=image["cut"][index, number],
        intersection=found.intersection,
        union=found.union,
        no_target=no_target,
        rejected=found.rejected,
        iou=1.0 if no_target and found.rejected else float(iou),
    )


class _WithTruth(Dataset):
    """Items of :class:`EvalSamples` and what scoring needs, so that worker processes read and decode the masks too."""

    def __init__(self, samples: EvalSamples, dataset: ReferringDataset):
        self.samples, self.dataset = samples, dataset

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, position: int) -> dict[str, Any]:
        sample = self.samples[position]
        items = sample["items"]
        masks = {index: self.dataset.mask(index) for index in {item[0] for item in items}}
        truncated = self.samples.tokenize([item[2] for item in items]).truncated
        cut = {(item[0], item[1]): flag for item, flag in zip(items, truncated, strict=True)}
        return sample | {"masks": masks, "cut": cut}


def _loader(samples: _WithTruth, images_per_batch: int, workers: int, rank: int, world: int) -> DataLoader:
    """Every `world`-th batch: whole batches are shared out, so that their numbers do not depend on `world` at all."""
    numbers = range(len(samples))
    batches = [list(numbers[start : start + images_per_batch]) for start in numbers[::images_per_batch]]
    return DataLoader(
        samples,
        batch_sampler=batches[rank::world],
        num_workers=workers,
        collate_fn=list,
        worker_init_fn=worker_init,
        generator=torch.Generator(),  # the loader draws from it, and so leaves the global one alone
    )


def _progress(loader: DataLoader, show: bool, title: str) -> Iterator[Any]:
    """The loader's batches, with a bar that counts images where `show` is set and there is a terminal."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeRemainingColumn

    console = Console(stderr=True)
    columns = ("{task.description}", BarColumn(), MofNCompleteColumn(), "images", TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True, disable=not (show and console.is_terminal)) as bar:
        total = sum(len(batch) for batch in cast(list[list[int]], loader.batch_sampler))
        task = bar.add_task(f"evaluate {title}", total=total)
        for batch in loader:
            yield batch
            bar.advance(task, len(batch))


def versions() -> dict[str, str]:
    """Versions of what can change the numbers."""
    import cv2

    from fastris.version import __version__

    return {
        "fastris": __version__,
        "torch": torch.__version__,
        "opencv": cv2.__version__,
        "numpy": np.__version__,
        "python": platform.python_version(),
    }
