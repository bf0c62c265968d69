"""The validation after an epoch of training: scores on a data set, and pictures of some of the predictions."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np

from fastris.data import ReferringDataset
from fastris.evaluation.evaluate import EvalResult, evaluate
from fastris.evaluation.metrics import Scores
from fastris.runtime import distributed
from fastris.training.run import Run
from fastris.training.trackers import picture_path

if TYPE_CHECKING:
    from fastris.pictures.gallery import GalleryRow


@dataclass(frozen=True)
class Validation:
    """How a run is validated.

    Attributes:
        rule, sentences, batch_size, workers: see :func:`fastris.evaluation.evaluate.evaluate`.
        pictures: how many predictions are drawn; 0 for none.
        progress: show a bar, in the main process on a terminal.
    """

    dataset: ReferringDataset
    rule: str = "cris"
    sentences: Literal["all", "first"] = "first"
    pictures: int = 8
    batch_size: int = 64
    workers: int = 0
    progress: bool = True


def validate(run: Run, validation: Validation) -> Scores:
    """Score the run's model as it is, and draw some predictions into the run's folder; the same in all processes."""
    result = evaluate(
        run.shown,
        validation.dataset,
        sentences=validation.sentences,
        rule=validation.rule,
        keep=pictured(validation.dataset, validation.pictures, validation.sentences),
        device=run.precision.device,
        workers=validation.workers,
        batch_size=validation.batch_size,
        progress=validation.progress and distributed.is_main(),
    )
    epoch, step = run.position.epoch + 1, run.position.step
    with distributed.together():
        draw_predictions(picture_path(run.folder, epoch), validation.dataset, result, f"epoch {epoch}, step {step}")
    return distributed.from_main(lambda: result.scores)


def pictured(dataset: ReferringDataset, count: int, sentences: str) -> list[tuple[int, int]]:
    """(index, sentence number) of at most `count` expressions spread evenly over a data set, always the same ones."""
    count = min(count, len(dataset))
    chosen = []
    for number in range(count):
        index = number * len(dataset) // count
        several = 1 if sentences == "first" else len(dataset.reference(index).sentences)
        chosen.append((index, number % several))
    return chosen


def draw_predictions(path: Path, dataset: ReferringDataset, result: EvalResult, title: str) -> Path | None:
    """Draw the predictions that `result` holds: image, truth, prediction, and both overlaid, above the phrase.

    Returns `path`, or None if it holds none, and in all processes of a run but the first, which draws. A mask scored at
    another size than the image's is shown at the image's.
    """
    if not result.masks or not distributed.is_main():
        return None
    from fastris.pictures.gallery import save_gallery

    samples = [s for s in result.samples if (s.index, s.sentence_number) in result.masks]
    rows = [_row(dataset, s.index, s.sentence, result.masks[s.index, s.sentence_number], s.iou) for s in samples]
    scores = result.scores
    subtitle = f"mIoU {100 * scores.mIoU:.2f} %, oIoU {100 * scores.oIoU:.2f} %: {scores.conditions}"
    return save_gallery(path, rows, title, subtitle, across=min(2, len(rows)))


def _row(dataset: ReferringDataset, index: int, phrase: str, mask: np.ndarray, iou: float) -> GalleryRow:
    from fastris.pictures.gallery import GalleryRow

    image, truth = dataset.image(index), dataset.mask(index)
    if mask.shape != truth.shape:
        rows, columns = (np.arange(side) * scored // side for side, scored in zip(truth.shape, mask.shape, strict=True))
        mask = mask[np.ix_(rows, columns)]
    return GalleryRow(image, phrase, truth, mask, iou)
