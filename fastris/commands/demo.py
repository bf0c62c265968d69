"""``fastris demo``: a tiny CRIS learns to follow phrases on a laptop's CPU, and shows whether it does.

Nothing is pretrained here, so the recipe is not the published one: AdamW with warm-up and cosine decay at a learning
rate ten times higher, for encoders too, and masks resized with aligned corners. What is the same is everything that is
measured: the model, its loss, and the published evaluation rule. The second evaluation is the test of language: each
object is scored against the phrase of *another* object of its scene. A model that only finds things to segment would do
as well on it.
"""

from __future__ import annotations

import json
import math
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from fastris.data.base import Reference, ReferringDataset
from fastris.data.letterbox import letterbox
from fastris.data.scenes.dataset import REFERENCES, SyntheticExpressions
from fastris.data.tokens import tokenize
from fastris.options.declare import option
from fastris.runtime.interrupt import StopSignal
from fastris.runtime.runlock import locked

if TYPE_CHECKING:
    from fastris.evaluation.evaluate import EvalResult
    from fastris.models.cris.model import CRIS

FAMILIES = ("attribute", "place", "relation")


@dataclass
class DemoConfig:
    """Options of ``fastris demo``."""

    out: str = option("demo", "folder for the model, the metrics and the pictures")
    steps: int = option(900, "training steps", "steps")
    scenes: int = option(3000, "training scenes, drawn before the training", "scenes")
    held_out: int = option(100, "scenes that are shown and scored, of no training scene's shapes", "scenes")
    images: int = option(16, "scenes in a step; three expressions are asked about each", "scenes")
    lr: float = option(1e-3, "highest learning rate")
    seed: int = option(0, "seed of scenes, weights and order")
    threads: int = option(2, "CPU threads", "threads")
    progress: bool = option(True, "show a progress bar")


class OtherPhrases(ReferringDataset):
    """The same objects and masks under the phrases of the next object of the same scene."""

    def __init__(self, dataset: SyntheticExpressions):
        self.dataset = dataset
        self.name, self.split, self.skipped = f"{dataset.name}, another object's phrases", dataset.split, {}

    def __len__(self) -> int:
        return len(self.dataset)

    def reference(self, index: int) -> Reference:
        own = self.dataset.reference(index)
        other = self.dataset.reference(index - index % REFERENCES + (index + 1) % REFERENCES)
        return Reference(own.ref_id, own.image_id, other.sentences)

    def image(self, index: int) -> np.ndarray:
        return self.dataset.image(index)

    def mask(self, index: int) -> np.ndarray:
        return self.dataset.mask(index)

    def by_image(self) -> list[list[int]]:
        return self.dataset.by_image()


@dataclass
class Scenes:
    """Training scenes in memory: images (N, S, S, 3) uint8, masks (N, 3, S, S) bool, tokens (N, 3, 3, L)."""

    images: Tensor
    masks: Tensor
    tokens: Tensor

    @classmethod
    def draw(cls, dataset: SyntheticExpressions, word_len: int, track: Any) -> Scenes:
        images, masks, sentences = [], [], []
        for scene in track(range(dataset.scenes), "drawing scenes"):
            own = range(REFERENCES * scene, REFERENCES * (scene + 1))
            images.append(dataset.image(own[0]))
            masks.append(np.stack([dataset.mask(index) for index in own]))
            sentences += [sentence for index in own for sentence in dataset.reference(index).sentences]
        tokens = tokenize(sentences, word_len).tokens.reshape(len(images), REFERENCES, -1, word_len)
        return cls(torch.from_numpy(np.stack(images)), torch.from_numpy(np.stack(masks)), tokens)


def run(config: DemoConfig) -> int:
    """Train, evaluate on held-out scenes with right and with wrong phrases, and write everything to ``config.out``.

    Raises:
        ValueError: options out of range, or another demo is writing into the folder.
    """
    if config.steps < 1 or config.images < 2 or config.scenes < config.images or config.held_out < 1:
        raise ValueError("steps and held_out must be at least 1, images at least 2, scenes at least images")
    if not 1 <= config.threads <= 1024:
        raise ValueError(f"threads={config.threads} must lie in 1..1024")
    if not 0 < config.lr < math.inf:
        raise ValueError(f"lr={config.lr} must be a finite number above 0")
    with locked(Path(config.out), ("out",)):
        return _run(config)


def _run(config: DemoConfig) -> int:
    from fastris.evaluation.evaluate import evaluate
    from fastris.models.registry import create

    started = time.monotonic()
    threads = torch.get_num_threads()
    torch.set_num_threads(config.threads)
    try:
        torch.manual_seed(config.seed)
        model = create("tiny")
        size = model.config.input_size
        scenes = min(config.scenes, config.steps * config.images)
        train_set = SyntheticExpressions("train", seed=config.seed, scenes=scenes, size=size)
        held_out = SyntheticExpressions("val", seed=config.seed, scenes=config.held_out, size=size)
        with StopSignal("finishing this step, then showing what was learnt; once more stops at once") as stop:
            losses = train(model, train_set, config, stop)
        model.eval()
        right, wrong = (
            evaluate(model, data, progress=config.progress, batch_size=16, workers=0)
            for data in (held_out, OtherPhrases(held_out))
        )
        write_results(config, model, held_out, right, wrong, losses, time.monotonic() - started)
    finally:
        torch.set_num_threads(threads)
    return 0


def train(model: CRIS, dataset: SyntheticExpressions, config: DemoConfig, stop: StopSignal) -> list[float]:
    """The losses of the steps that were done; ``stop`` ends it after a step."""
    prepare_from_scratch(model)
    track = _tracker(config.progress)
    scenes = Scenes.draw(dataset, model.config.word_len, track)
    optimizer = torch.optim.AdamW(model.parameters(), lr=config.lr, betas=(0.9, 0.99), weight_decay=0.0, fused=True)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: _rate(step, config.steps))
    rng = np.random.default_rng(config.seed)
    model.train()
    losses: list[float] = []
    for _ in track(range(config.steps), "learning", losses):
        chosen = torch.from_numpy(rng.choice(len(scenes.images), config.images, replace=False))
        images, tokens, masks, index = _batch(scenes, chosen, rng, model.config.input_size)
        loss, _ = model.loss(model.encode_image(images), tokens, masks, index)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        losses.append(loss.item())
        if stop.requested:
            break
    return losses


def prepare_from_scratch(model: CRIS) -> None:
    """Start values for training without CLIP's weights: every block does something, and every pixel is unlikely alike.

    A random text kernel would begin with large logits, and a good part of a short training goes into shrinking them.
    """
    for name, parameter in model.named_parameters():
        if name.endswith("bn3.weight"):
            torch.nn.init.constant_(parameter, 0.5)
    with torch.no_grad():
        model.proj.txt.weight.zero_()
        model.proj.txt.bias.zero_()
        model.proj.txt.bias[-1] = -3.0


def _rate(step: int, steps: int) -> float:
    warm_up = min((step + 1) / 20, 1.0)
    return warm_up * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * step / steps)))


def _batch(
    scenes: Scenes, chosen: Tensor, rng: np.random.Generator, size: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Images, one sentence about each of their objects, masks, and each sentence's image."""
    count = scenes.tokens.shape[2]
    sentence = torch.from_numpy(rng.integers(0, count, (len(chosen), REFERENCES)))
    tokens = scenes.tokens[chosen[:, None], torch.arange(REFERENCES), sentence].flatten(0, 1)
    tokens = tokens[:, : int((tokens != 0).sum(dim=1).max())]
    height, width = scenes.images.shape[1:3]
    warp = letterbox(height, width, size)
    images = torch.stack([warp.warp_image(image) for image in scenes.images[chosen].numpy()])
    masks = _targets(scenes.masks[chosen].flatten(0, 1)[:, None].float(), size // 4)
    index = torch.arange(len(chosen)).repeat_interleave(REFERENCES)
    return images, tokens, masks, index


def _targets(masks: Tensor, size: int) -> Tensor:
    """Masks at the logits' size, where the published prediction samples them: bilinear with aligned corners.

    The published nearest-neighbour target is shifted against that by up to half a logit. It costs little at 104 x 104
    logits, and a tenth of the IoU at the 24 x 24 of this model.
    """
    smooth = F.avg_pool2d(masks, 3, 1, 1)
    return F.interpolate(smooth, (size, size), mode="bilinear", align_corners=True)


def write_results(
    config: DemoConfig,
    model: CRIS,
    held_out: SyntheticExpressions,
    right: EvalResult,
    wrong: EvalResult,
    losses: list[float],
    seconds: float,
) -> None:
    """The model, ``metrics.json``, the gallery and three scenes to try ``fastris predict`` on; and say where."""
    from PIL import Image

    from fastris.pictures.gallery import save_gallery
    from fastris.runtime.storage import replacing
    from fastris.weights.card import CARD, write_card

    out = Path(config.out)
    model.save_pretrained(out / "model")
    write_card(out / "model" / CARD, _card(config, model, right, len(losses)))
    metrics: dict[str, Any] = {"right_phrase": right.scores.as_dict(), "other_objects_phrase": wrong.scores.as_dict()}
    metrics["right_phrase_by_kind"] = by_kind(held_out, right)
    metrics |= {"steps": len(losses), "last_loss": losses[-1] if losses else None, "seconds": round(seconds, 1)}
    metrics |= {"seed": config.seed, "threads": config.threads, "torch": torch.__version__}
    with replacing(out / "metrics.json") as path:
        path.write_text(json.dumps(metrics, indent=2) + "\n")
    rows = gallery_rows(model, held_out, right, scenes=min(8, held_out.scenes))
    summary = (
        f"right phrase: mIoU {100 * right.scores.mIoU:.1f} %; another object's phrase: {100 * wrong.scores.mIoU:.1f} %"
    )
    gallery = save_gallery(
        out / "gallery.png", rows, f"fastris demo, {len(losses)} steps", f"Held-out scenes; {summary}"
    )
    examples = []
    for scene in range(min(3, held_out.scenes)):
        examples.append(out / f"scene_{scene}.png")
        with replacing(examples[-1]) as path:
            Image.fromarray(held_out.image(REFERENCES * scene)).save(path, format="PNG")
    phrase = held_out.reference(0).sentences[0]
    print(f"the right phrase:          {right.scores}")
    print(f"another object's phrase:   {wrong.scores}")
    print(
        "mIoU by kind of phrase:    "
        + "  ".join(f"{k} {100 * v:.1f} %" for k, v in metrics["right_phrase_by_kind"].items())
    )
    print(
        f"{len(losses)} steps in {seconds:.0f} s altogether\n  pictures  {gallery}\n  metrics   {out / 'metrics.json'}"
    )
    print(f'  model     {out / "model"}\ntry:  fastris predict {examples[0]} "{phrase}" model={out / "model"}')


def _card(config: DemoConfig, model: CRIS, result: EvalResult, steps: int) -> str:
    from fastris.evaluation.evaluate import versions
    from fastris.training.card import training_card

    data = {"dataset": "synthetic", "train_split": "train", "references": REFERENCES * config.scenes}
    recipe = data | {"manual_seed": config.seed, "batch_size": REFERENCES * config.images, "base_lr": config.lr}
    scores, found = result.scores, versions()
    return training_card(model.config, recipe, epoch=None, step=steps, scores=scores, device="CPU", versions=found)


def by_kind(dataset: SyntheticExpressions, result: EvalResult) -> dict[str, float]:
    """mIoU of the phrases by attributes, by place and by relation; a kind without phrases is left out."""
    found: dict[str, list[float]] = {kind: [] for kind in FAMILIES}
    for sample in result.samples:
        found[dataset.phrases(sample.index)[sample.sentence_number].family].append(sample.iou)
    return {kind: float(np.mean(values)) for kind, values in found.items() if values}


def gallery_rows(model: CRIS, dataset: SyntheticExpressions, result: EvalResult, scenes: int) -> list[Any]:
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


def _tracker(show: bool) -> Any:
    """``track(sequence, text, losses)``: iterate with a progress bar that shows the last losses' mean, or without."""

    def plain(sequence: Any, text: str, losses: list[float] | None = None) -> Any:
        return sequence

    def bar(sequence: Any, text: str, losses: list[float] | None = None) -> Any:
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        columns = (
            TextColumn(text),
            BarColumn(),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[loss]}"),
        )
        with Progress(*columns) as progress:
            task = progress.add_task(text, total=len(sequence), loss="")
            for item in sequence:
                yield item
                recent = f"loss {np.mean(losses[-50:]):.4f}" if losses else ""
                progress.update(task, advance=1, loss=recent)

    return bar if show else plain
