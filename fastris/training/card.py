"""The model card of a trained model: its data, its recipe, and its scores with the rule they were found by."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastris.evaluation.metrics import Scores
from fastris.evaluation.rules import find_rule
from fastris.models.ancestry import Ancestor, base_models, datasets
from fastris.models.card import UNNAMED, section, unique
from fastris.models.config import ModelConfig
from fastris.runtime.markdown import markdown_table
from fastris.weights.card import model_card

if TYPE_CHECKING:
    from fastris.training.run import Run

_HYPERPARAMETERS = ("batch_size", "accumulate", "expressions_per_image", "optimizer", "base_lr", "lr_multi", "schedule",
                    "milestones", "lr_decay", "weight_decay", "max_norm", "warmup",
                    "freeze", "ema", "augment", "instance_contrast", "published_first_epoch_quirk", "amp",
                    "fp16_accumulation", "input_size", "word_len", "dropout")  # fmt: skip


def training_card(
    config: ModelConfig,
    recipe: Mapping[str, Any],
    *,
    epoch: int | None,
    step: int,
    scores: Scores | None,
    device: str,
    versions: Mapping[str, str],
    ancestry: Sequence[Ancestor] | None = None,
    data_id: str = "",
    name: str = UNNAMED,
) -> str:
    """The card of a model that `fastris train` made.

    Args:
        config: of the model.
        recipe: the run's settings (:attr:`fastris.training.run.Run.recipe`), data and seed among them.
        epoch, step: how many of them the weights have seen; no epoch where that is no unit of the training.
        scores: of the validation that chose them; None if there was none.
        device: what it was trained on. versions: of the libraries.
        ancestry: what the training started from; none of it means random weights; None leaves that out.
        data_id: of the training data on the Hugging Face hub, where it is from there.
        name: what the card's snippet loads.
    """
    data = f"{recipe['dataset']}, split {recipe['train_split']}, {recipe['references']} references"
    data += f", from {data_id} on the Hugging Face hub" if data_id else ""
    ancestry, random = ancestry or (), ancestry is not None and not ancestry
    started = "random weights" if random else "; ".join(each.in_words for each in ancestry)
    facts = {
        **({"started from": started} if started else {}),
        "training data": data,
        "validation data": "none" if scores is None else f"{scores.dataset}, split {scores.split}",
        "seed": recipe["manual_seed"],
        **({} if epoch is None else {"epochs": epoch}),
        "optimizer steps": step,
        **{name: recipe[name] for name in _HYPERPARAMETERS if name in recipe},
        "trained on": device,
        "versions": ", ".join(f"{name} {version}" for name, version in versions.items()),
    }
    found: dict[str, Any] = {} if scores is None else {"evaluation": _evaluation(scores), "results": _results(scores)}
    body = "## Training\n\n" + markdown_table(("setting", "value"), facts.items())
    earlier = [text for each in ancestry if not each.whose and (text := section(each.card, "Training"))]
    body = "\n\n".join([body, *(f"## Earlier training, of what this one started from\n\n{text}" for text in earlier)])
    seen = unique([data_id or recipe["dataset"], *datasets(ancestry)])
    return model_card(config, body, datasets=seen, base_models=base_models(ancestry), name=name, **found)


def card_of(run: Run, scores: Scores | None) -> str:
    """The model card of a run's weights as they are, after the epoch that they are in."""
    import torch

    from fastris.evaluation.evaluate import versions
    from fastris.runtime import distributed

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
        ancestry=run.model.ancestry,
        data_id=run.data_id,
        name=_name_of(run.folder),
    )


def _name_of(folder: Path) -> str:
    """What a run's card calls its folder: as it was given, but nothing that tells where it lies on this machine."""
    return folder.name if folder.is_absolute() or ".." in folder.parts else folder.as_posix()


def _evaluation(scores: Scores) -> str:
    which = {"all": "all sentences", "first": "the first sentence of each object"}.get(scores.sentences)
    percent = {name: "-" if value is None else f"{100 * value:.2f} %" for name, value in _metrics(scores).items()}
    table = markdown_table(
        (*percent, "rule", "data", "split", "sentences"),
        [(*percent.values(), scores.rule, scores.dataset, scores.split, which)],
    )
    missing = f", {scores.no_target} of them without a target" if scores.no_target else ""
    return f"{table}\n\n{scores.expressions} expressions{missing}. Rule: {find_rule(scores.rule).text}."


def _metrics(scores: Scores) -> dict[str, float | None]:
    precision = {f"Pr@{level}": value for level, value in scores.precision.items()}
    return {"mIoU": scores.mIoU, "oIoU": scores.oIoU, **precision, **scores.generalised}


def _results(scores: Scores) -> list[Any]:
    """The scores as Hugging Face's model index has them."""
    from huggingface_hub import EvalResult

    common: dict[str, Any] = {
        "task_type": "image-segmentation",
        "task_name": "Referring image segmentation",
        "dataset_type": scores.dataset,
        "dataset_name": scores.dataset,
        "dataset_split": scores.split,
    }
    return [
        EvalResult(
            **common,
            metric_type=name,
            metric_value=round(100 * value, 2),
            metric_name=f"{name}, % (rule {scores.rule}, {scores.sentences} sentences)",
        )
        for name, value in _metrics(scores).items()
        if value is not None
    ]
