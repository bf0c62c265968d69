"""``fastris demo``: a tiny model learns to follow phrases on a laptop's CPU, and shows whether it does.

Nothing is pretrained here, so the recipe is one of its own (:mod:`fastris.training.from_scratch`); what is measured is
the published model under the published evaluation rule. The second evaluation is the test of language: each object is
scored against the phrase of *another* object of its scene. A model that only finds things to segment would do as well
on it.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from fastris.data.scenes.dataset import REFERENCES, SyntheticExpressions
from fastris.data.scenes.other_phrases import OtherPhrases
from fastris.options.declare import option
from fastris.runtime.interrupt import StopSignal
from fastris.runtime.runlock import locked

if TYPE_CHECKING:
    from fastris.evaluation.evaluate import EvalResult
    from fastris.models.base import ReferringModel
    from fastris.training.from_scratch import Track

FAMILIES = ("attribute", "place", "relation")
STOPPED = "finishing this step, then showing what was learnt; once more stops at once"


class Lesson(NamedTuple):
    """How a preset learns in minutes: training steps, scenes in a step, highest learning rate.

    ``losses`` are the weights of the system's further losses, fields of its configuration, as its paper has them.
    """

    steps: int
    images: int
    lr: float
    losses: Mapping[str, float] = {}


LESSONS = {
    "tiny": Lesson(900, 16, 1e-3),
    "alignformer_tiny": Lesson(3000, 8, 1e-3),
    "magnet_tiny": Lesson(1600, 8, 1e-3, {"mask_grounding": 1.0, "alignment_loss": 0.5}),
}
"""By preset: those that a laptop's CPU can train."""


def _lesson_option(name: str, help: str, unit: str = "") -> Any:
    values = ", ".join(f"{preset} {getattr(lesson, name)}" for preset, lesson in LESSONS.items())
    return option(None, f"{help}; {values}", unit, default_text="the model's")


@dataclass
class DemoConfig:
    """Trains a tiny model on drawn scenes, and scores and draws what it finds by the right and by the wrong phrases."""

    model: str = option("tiny", f"preset to train: {', '.join(LESSONS)}; tiny is a CRIS")
    out: str = option("demo", "folder for the model, the metrics and the pictures")
    steps: int = _lesson_option("steps", "training steps", "steps")
    scenes: int = option(3000, "training scenes, drawn before the training", "scenes")
    held_out: int = option(100, "scenes that are shown and scored, of no training scene's shapes", "scenes")
    images: int = _lesson_option("images", "scenes in a step; three expressions are asked about each", "scenes")
    lr: float = _lesson_option("lr", "highest learning rate")
    seed: int = option(0, "seed of scenes, weights and order")
    threads: int = option(2, "CPU threads", "threads")
    compact: bool = option(
        False, "write matrices as float16 and, of CLIP's tokens, those of the scenes' words: the model in the package"
    )
    progress: bool = option(True, "show a progress bar")

    def __post_init__(self) -> None:
        if self.model not in LESSONS:
            raise ValueError(f"model={self.model!r} is none that learns in minutes; choose from {', '.join(LESSONS)}")
        for name in ("steps", "images", "lr"):
            if getattr(self, name) is None:
                setattr(self, name, getattr(LESSONS[self.model], name))
        if self.steps < 1 or self.images < 2 or self.scenes < self.images or self.held_out < 1:
            raise ValueError("steps and held_out must be at least 1, images at least 2, scenes at least images")
        if not 1 <= self.threads <= 1024:
            raise ValueError(f"threads={self.threads} must lie in 1..1024")
        if not 0 < self.lr < math.inf:
            raise ValueError(f"lr={self.lr} must be a finite number above 0")


@dataclass(frozen=True)
class Learnt:
    """What the demo shows: the trained model, and what it scored on ``held_out`` by ``right`` and ``wrong`` phrases.

    ``hidden_words`` is what a model with Mask Grounding guesses of them; see
    :func:`fastris.training.from_scratch.guess_hidden_words`.
    """

    model: ReferringModel
    held_out: SyntheticExpressions
    right: EvalResult
    wrong: EvalResult
    hidden_words: dict[str, float]
    losses: list[float]
    seconds: float


def run(config: DemoConfig) -> int:
    """Train, evaluate on held-out scenes with right and with wrong phrases, and write everything to ``config.out``.

    Raises:
        ValueError: another demo is writing into the folder.
    """
    import torch

    threads = torch.get_num_threads()
    with locked(Path(config.out), ("out",)):
        torch.set_num_threads(config.threads)
        try:
            learnt = learn(config)
            write_results(config, learnt)
        finally:
            torch.set_num_threads(threads)
    return 0


def learn(
    config: DemoConfig,
    losses: Mapping[str, float] | None = None,
    *,
    stop: StopSignal | None = None,
    track: Track | None = None,
) -> Learnt:
    """Train and score what ``config`` asks for, on PyTorch's threads as they are, and write nothing.

    Args:
        losses: weights of the system's further losses, fields of its configuration; None for those of its lesson.
        stop: ends the training after a step; None to end it at the first Ctrl-C, and to score what was learnt by then.
        track: shows how far it is, as :func:`fastris.training.from_scratch.train` asks it to; None for what
            ``config.progress`` says.
    """
    import torch

    from fastris.data.scenes.speaker import words_in_use
    from fastris.data.tokens import token_ids
    from fastris.evaluation.evaluate import evaluate
    from fastris.models.registry import create, preset
    from fastris.training.from_scratch import guess_hidden_words, train
    from fastris.weights.compact import compact

    started = time.monotonic()
    torch.manual_seed(config.seed)
    weights = LESSONS[config.model].losses if losses is None else losses
    model = create(preset(config.model).to_dict() | dict(weights))
    size = model.config.input_size
    scenes = min(config.scenes, config.steps * config.images)
    train_set = SyntheticExpressions("train", seed=config.seed, scenes=scenes, size=size)
    held_out = SyntheticExpressions("val", seed=config.seed, scenes=config.held_out, size=size)
    with StopSignal(STOPPED) if stop is None else nullcontext(stop) as stopped:
        trained = train(
            model,
            train_set,
            steps=config.steps,
            images=config.images,
            lr=config.lr,
            seed=config.seed,
            stop=stopped,
            track=_progress(config.progress) if track is None else track,
        )
    hidden_words = guess_hidden_words(model, held_out, config.images, config.seed)
    model.eval()
    if config.compact:  # what is scored and shown is what is written
        model = compact(model, token_ids(words_in_use()))
    right, wrong = (
        evaluate(model, data, progress=config.progress, batch_size=16, workers=0)
        for data in (held_out, OtherPhrases(held_out))
    )
    return Learnt(model, held_out, right, wrong, hidden_words, trained, time.monotonic() - started)


def write_results(config: DemoConfig, learnt: Learnt) -> None:
    """The model, ``metrics.json``, the gallery and three scenes to try ``fastris predict`` on; and say where."""
    from PIL import Image

    from fastris.pictures.gallery import save_gallery
    from fastris.runtime.storage import replacing
    from fastris.weights.card import CARD, write_card
    from fastris.weights.compact import write_compact

    out, held_out, right, wrong = Path(config.out), learnt.held_out, learnt.right, learnt.wrong
    steps, kinds = len(learnt.losses), by_kind(held_out, right)
    if config.compact:
        write_compact(learnt.model, out / "model")
    else:
        learnt.model.save_pretrained(out / "model")
    write_card(out / "model" / CARD, _card(config, learnt))
    with replacing(out / "metrics.json") as path:
        path.write_text(json.dumps(metrics(config, learnt, kinds), indent=2) + "\n")
    rows = gallery_rows(learnt.model, held_out, right, scenes=min(8, held_out.scenes))
    summary = (
        f"right phrase: mIoU {100 * right.scores.mIoU:.1f} %; another object's phrase: {100 * wrong.scores.mIoU:.1f} %"
    )
    gallery = save_gallery(out / "gallery.png", rows, f"fastris demo, {steps} steps", f"Held-out scenes; {summary}")
    examples = []
    for scene in range(min(3, held_out.scenes)):
        examples.append(out / f"scene_{scene}.png")
        with replacing(examples[-1]) as path:
            Image.fromarray(held_out.image(REFERENCES * scene)).save(path, format="PNG")
    phrase = held_out.reference(0).sentences[0]
    print(f"the right phrase:          {right.scores}")
    print(f"another object's phrase:   {wrong.scores}")
    print("mIoU by kind of phrase:    " + "  ".join(f"{kind} {100 * iou:.1f} %" for kind, iou in kinds.items()))
    if learnt.hidden_words:
        guessed, share = (100 * learnt.hidden_words[name] for name in ("masked_accuracy", "most_frequent_share"))
        print(f"hidden words guessed:      {guessed:.1f} %; the most frequent word is {share:.1f} % of them")
    print(f"{steps} steps in {learnt.seconds:.0f} s altogether")
    print(f"  pictures  {gallery}\n  metrics   {out / 'metrics.json'}\n  model     {out / 'model'}")
    print(f'try:  fastris predict {examples[0]} "{phrase}" model={out / "model"}')


def metrics(config: DemoConfig, learnt: Learnt, kinds: dict[str, float]) -> dict[str, Any]:
    """The content of ``metrics.json``; scores are fractions of 1."""
    import torch

    losses = learnt.losses
    return {
        "right_phrase": learnt.right.scores.as_dict(),
        "other_objects_phrase": learnt.wrong.scores.as_dict(),
        "right_phrase_by_kind": kinds,
        **({"hidden_words": learnt.hidden_words} if learnt.hidden_words else {}),
        "model": config.model,
        "steps": len(losses),
        "last_loss": losses[-1] if losses else None,
        "seconds": round(learnt.seconds, 1),
        "seed": config.seed,
        "threads": config.threads,
        "torch": torch.__version__,
    }


def _card(config: DemoConfig, learnt: Learnt) -> str:
    from fastris.evaluation.evaluate import versions
    from fastris.training.card import training_card

    data = {"dataset": "synthetic", "train_split": "train", "references": REFERENCES * config.scenes}
    recipe = data | {"manual_seed": config.seed, "batch_size": REFERENCES * config.images, "base_lr": config.lr}
    scores, found, step = learnt.right.scores, versions(), len(learnt.losses)
    card = training_card(
        learnt.model.config, recipe, epoch=None, step=step, scores=scores, device="CPU", versions=found
    )
    return f"{card.rstrip()}\n\n{_made_by(config, learnt)}"


def _made_by(config: DemoConfig, learnt: Learnt) -> str:
    """The card's paragraph on the command that makes the same model, and on what it knows."""
    names = ("model", "steps", "scenes", "held_out", "images", "lr", "seed", "threads", "compact")
    options = " ".join(f"{name}={str(getattr(config, name)).lower()}" for name in names)
    kept = getattr(learnt.model.config, "kept_tokens", ())
    known = f" Its vocabulary is {len(kept)} of CLIP's tokens: the words of these scenes." if kept else ""
    other = 100 * learnt.wrong.scores.mIoU
    return (
        f"It knows drawn shapes only, no photographs.{known} With the phrase of another object of the "
        f"scene in place of the right one, its mIoU is {other:.2f} %.\n\n"
        f"Made by\n\n```\nfastris demo {options}\n```\n"
    )


def by_kind(dataset: SyntheticExpressions, result: EvalResult) -> dict[str, float]:
    """mIoU of the phrases by attributes, by place and by relation; a kind without phrases is left out."""
    found: dict[str, list[float]] = {kind: [] for kind in FAMILIES}
    for sample in result.samples:
        found[dataset.phrases(sample.index)[sample.sentence_number].family].append(sample.iou)
    return {kind: float(np.mean(values)) for kind, values in found.items() if values}


def gallery_rows(model: ReferringModel, dataset: SyntheticExpressions, result: EvalResult, scenes: int) -> list[Any]:
    """The first scenes with two objects each, one phrase an object, so that one sees the same image asked twice."""
    from fastris.inference.segmenter import Segmenter
    from fastris.pictures.gallery import GalleryRow

    segmenter, rows = Segmenter(model), []
    iou = {(sample.index, sample.sentence_number): sample.iou for sample in result.samples}
    for scene in range(scenes):
        for which in range(2):
            index = REFERENCES * scene + which
            number = (scene + which) % len(dataset.reference(index).sentences)
            phrase = dataset.reference(index).sentences[number]
            image = dataset.image(index)
            mask = segmenter.predict(image, phrase).masks[0]
            rows.append(GalleryRow(image, phrase, dataset.mask(index), mask, iou[index, number]))
    return rows


def _progress(show: bool) -> Track:
    """Iterates over a sequence with a progress bar that shows the mean of the last 50 losses, or without a bar."""

    def plain(sequence: Any, title: str, losses: list[float] | None = None) -> Any:
        return sequence

    def bar(sequence: Any, title: str, losses: list[float] | None = None) -> Any:
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        columns = (
            TextColumn(title),
            BarColumn(),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[loss]}"),
        )
        with Progress(*columns) as progress:
            task = progress.add_task(title, total=len(sequence), loss="")
            for item in sequence:
                yield item
                recent = f"loss {np.mean(losses[-50:]):.4f}" if losses else ""
                progress.update(task, advance=1, loss=recent)

    return bar if show else plain
