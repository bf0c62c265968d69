"""What a training run does with a validation: pictures of some predictions, and the card of the best weights."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch

from fastris.data import ReferringDataset
from fastris.evaluation.evaluate import EvalResult, versions
from fastris.evaluation.metrics import Scores
from fastris.runtime import distributed
from fastris.training.card import training_card

if TYPE_CHECKING:
    from fastris.pictures.gallery import GalleryRow
    from fastris.training.run import Run


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


def card_of(run: Run, scores: Scores | None) -> str:
    """The model card of a run's weights as they are, after the epoch that they are in."""
    position, device = run.position, run.precision.device
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    processes = distributed.world_size()
    return training_card(
        run.model.config,
        run.recipe,
        epoch=position.epoch + (position.batch > 0),
        step=position.step,
        scores=scores,
        device=name if processes == 1 else f"{processes} x {name}",
        versions=versions(),
    )
