"""The model card (README.md in Hugging Face's format): training data, scores and the rule behind them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fastris.models.config import ModelConfig
from fastris.models.pretrained import CARD
from fastris.runtime.storage import replacing


def unknown_card(config: ModelConfig, source: str) -> str:
    """The card of converted weights of which the training is not known."""
    return model_card(config, f"Converted by fastris from `{source}`, which does not say how it was trained.")


def card_path(target: Path, kind: str) -> Path:
    """The card's path for a model that is written to `target`: in its folder, or beside its file."""
    return target / CARD if kind == "folder" else target.with_suffix(".md")


def write_card(path: Path, text: str) -> Path:
    """Write a card in one step. Raises OSError where it cannot be written."""
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")
    return path


def model_card(
    config: ModelConfig,
    body: str,
    *,
    evaluation: str = "No validation of these weights is on record.",
    results: Sequence[Any] = (),
    datasets: Sequence[str] = (),
) -> str:
    """The text of a model card.

    Args:
        config: the model's configuration.
        body: the section about where the weights come from, in Markdown.
        evaluation: their scores, in Markdown.
        results: the same scores as huggingface_hub's `EvalResult`s.
        datasets: the data sets that they were trained on.
    """
    source = f" ({config.published})" if config.published else ""
    sections = [
        f"---\n{_metadata(config, results, datasets)}\n---",
        f"# {config.in_words()}",
        f"Finds what a phrase names in a picture: referring image segmentation with {config.title}{source}, "
        f"at {config.input_size} x {config.input_size} pixels and up to {config.word_len} tokens.",
        f"## Evaluation\n\n{evaluation}",
        body,
        "## Use\n\n```python\nimport fastris\n\n"
        'segmenter = fastris.Segmenter.from_pretrained("PATH OR ID OF THIS MODEL")\n'
        'segmenter.predict("photo.jpg", "the red cup on the left").overlay().save("overlay.png")\n```',
    ]
    return "\n\n".join(sections) + "\n"


def _metadata(config: ModelConfig, results: Sequence[Any], datasets: Sequence[str]) -> str:
    """The YAML header, with the results as Hugging Face's model index."""
    from huggingface_hub import ModelCardData

    head = ModelCardData(
        library_name="fastris",
        pipeline_tag="image-segmentation",
        tags=["referring-image-segmentation", config.system],
        datasets=list(datasets) or None,
        model_name=config.title if results else None,
        eval_results=list(results) or None,
    )
    return head.to_yaml()
