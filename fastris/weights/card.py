"""The model card: what a model was trained on, how it scored and by which rule, in Hugging Face's form (README.md)."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fastris.evaluation.metrics import Scores
from fastris.models.cris.config import CRISConfig
from fastris.runtime.storage import replacing

CARD = "README.md"
TAGS = ["referring-image-segmentation", "cris"]

_HYPERPARAMETERS = ("batch_size", "accumulate", "expressions_per_image", "base_lr", "lr_multi", "milestones",
                    "lr_decay", "weight_decay", "max_norm", "amp", "input_size", "word_len", "dropout")  # fmt: skip


def training_card(
    config: CRISConfig,
    recipe: Mapping[str, Any],
    *,
    epoch: int | None,
    step: int,
    scores: Scores | None,
    device: str,
    versions: Mapping[str, str],
) -> str:
    """The card of a model that `fastris train` made.

    Args:
        config: of the model.
        recipe: the run's settings (:func:`fastris.training.recipe.identity`), data and seed among them.
        epoch, step: how many of them the weights have seen; no epoch where that is no unit of the training.
        scores: of the validation that chose them; None if there was none.
        device: what it was trained on. versions: of the libraries.
    """
    data = f"{recipe['dataset']}, split {recipe['train_split']}, {recipe['references']} references"
    facts = {
        "training data": data,
        "validation data": "none" if scores is None else f"{scores.dataset}, split {scores.split}",
        "seed": recipe["manual_seed"],
        **({} if epoch is None else {"epochs": epoch}),
        "optimizer steps": step,
        **{name: recipe[name] for name in _HYPERPARAMETERS if name in recipe},
        "trained on": device,
        "versions": ", ".join(f"{name} {version}" for name, version in versions.items()),
    }
    return _card(config, scores, "## Training\n\n" + _table(("setting", "value"), facts.items()), [recipe["dataset"]])


def unknown_card(config: CRISConfig, source: str) -> str:
    """The card of weights that say nothing about their training."""
    return _card(config, None, f"Converted by fastris from `{source}`, which does not say how it was trained.", [])


def card_path(target: Path, kind: str) -> Path:
    """Where the card of a model belongs that is written to `target`: in its folder, or beside its file."""
    return target / CARD if kind == "folder" else target.with_suffix(".md")


def write_card(path: Path, text: str) -> Path:
    """Write a card in one step; OSError if that cannot be done."""
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")
    return path


def _card(config: CRISConfig, scores: Scores | None, body: str, datasets: list[str]) -> str:
    layers = "-".join(map(str, config.clip.vision_layers))
    encoder = {"3-4-6-3": "RN50", "3-4-23-3": "RN101"}.get(layers, f"ResNet of {layers} blocks")
    sections = [
        f"---\n{_metadata(scores, datasets)}\n---",
        f"# CRIS, CLIP {encoder}",
        "Finds what a phrase names in a picture: referring image segmentation with CRIS (CVPR 2022, arXiv 2111.15174), "
        f"at {config.input_size} x {config.input_size} pixels and up to {config.word_len} tokens.",
        "## Evaluation\n\n" + _evaluation(scores),
        body,
        "## Use\n\n```python\nimport fastris\n\n"
        'segmenter = fastris.Segmenter.from_pretrained("PATH OR ID OF THIS MODEL")\n'
        'segmenter.predict("photo.jpg", "the red cup on the left").overlay().save("overlay.png")\n```',
    ]
    return "\n\n".join(sections) + "\n"


def _evaluation(scores: Scores | None) -> str:
    if scores is None:
        return "No validation of these weights is on record."
    which = {"all": "all sentences", "first": "the first sentence of each object"}.get(scores.sentences)
    percent = {name: "-" if value is None else f"{100 * value:.2f} %" for name, value in _metrics(scores).items()}
    table = _table(
        (*percent, "rule", "data", "split", "sentences"),
        [(*percent.values(), scores.rule, scores.dataset, scores.split, which)],
    )
    missing = f", {scores.no_target} of them without a target" if scores.no_target else ""
    return f"{table}\n\n{scores.expressions} expressions{missing}. Rule: {_rule_text(scores.rule)}."


def _rule_text(name: str) -> str:
    from fastris.evaluation.rules import find_rule

    return find_rule(name).text


def _metrics(scores: Scores) -> dict[str, float | None]:
    precision = {f"Pr@{level}": value for level, value in scores.precision.items()}
    return {"mIoU": scores.mIoU, "oIoU": scores.oIoU, **precision, **scores.generalised}


def _metadata(scores: Scores | None, datasets: list[str]) -> str:
    """The YAML head, with the scores as Hugging Face's model index."""
    from huggingface_hub import EvalResult, ModelCardData

    results = None
    if scores is not None:
        common: dict[str, Any] = {
            "task_type": "image-segmentation",
            "task_name": "Referring image segmentation",
            "dataset_type": scores.dataset,
            "dataset_name": scores.dataset,
            "dataset_split": scores.split,
        }
        results = [
            EvalResult(
                **common,
                metric_type=name,
                metric_value=round(100 * value, 2),
                metric_name=f"{name}, % (rule {scores.rule}, {scores.sentences} sentences)",
            )
            for name, value in _metrics(scores).items()
            if value is not None
        ]
    head = ModelCardData(
        library_name="fastris",
        pipeline_tag="image-segmentation",
        tags=TAGS,
        datasets=datasets or None,
        model_name="CRIS" if results else None,
        eval_results=results,
    )
    return head.to_yaml()


def _table(head: tuple[str, ...], rows: Any) -> str:
    lines = [head, tuple("---" for _ in head), *rows]
    return "\n".join("| " + " | ".join(str(cell).replace("|", "\\|") for cell in line) + " |" for line in lines)
