"""The text of a model card (README.md in Hugging Face's format): metadata as YAML, then sections of Markdown."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from fastris.models.config import ModelConfig

UNNAMED = "PATH OR ID OF THIS MODEL"
"""What the snippet of a card says where the model has no name yet that others could use."""

_HEAD = re.compile(r"\A---[ \t]*\r?\n(.*?\n)?---[ \t]*(?:\r?\n|\Z)", re.DOTALL)
_SNIPPET = re.compile(r"""(Segmenter\.from_pretrained\(\s*)(["'])(.*?)\2""")
_CHANGED = "## Changed since"


def model_card(
    config: ModelConfig,
    body: str,
    *,
    evaluation: str = "No validation of these weights is on record.",
    results: Sequence[Any] = (),
    datasets: Sequence[str] = (),
    base_models: Sequence[str] = (),
    name: str = UNNAMED,
) -> str:
    """The text of a model card.

    Args:
        config: the model's configuration.
        body: the section about where the weights come from, in Markdown.
        evaluation: their scores, in Markdown.
        results: the same scores as huggingface_hub's `EvalResult`s.
        datasets: the data sets that they were trained on.
        base_models: ids on the hub of the models that the training started from.
        name: what the snippet loads.
    """
    source = f" ({config.published})" if config.published else ""
    sections = [
        f"---\n{_metadata(config, results, datasets, base_models)}\n---",
        f"# {config.in_words()}",
        f"Finds what a phrase names in a picture: referring image segmentation with {config.title}{source}, "
        f"at {config.input_size} x {config.input_size} pixels and up to {config.word_len} tokens.",
        f"## Evaluation\n\n{evaluation}",
        body,
        use_section(name),
    ]
    return "\n\n".join(sections) + "\n"


def use_section(name: str) -> str:
    """The section with the lines of Python that load the model ``name`` and ask it."""
    return (
        "## Use\n\n```python\nimport fastris\n\n"
        f'segmenter = fastris.Segmenter.from_pretrained("{name}")\n'
        'segmenter.predict("photo.jpg", "the red cup on the left").overlay().save("overlay.png")\n```'
    )


def _metadata(config: ModelConfig, results: Sequence[Any], datasets: Sequence[str], base_models: Sequence[str]) -> str:
    """The YAML header, with the results as Hugging Face's model index."""
    from huggingface_hub import ModelCardData

    head = ModelCardData(
        library_name="fastris",
        pipeline_tag="image-segmentation",
        tags=["referring-image-segmentation", config.system],
        datasets=list(datasets) or None,
        base_model=list(base_models) or None,
        model_name=config.title if results else None,
        eval_results=list(results) or None,
    )
    return head.to_yaml()


def read_head(card: str) -> tuple[dict[str, Any], str]:
    """(metadata, body) of a card; no metadata where it has none. Raises ValueError for metadata that cannot be read."""
    import yaml

    found = _HEAD.match(card)
    if found is None:
        return {}, card
    try:
        head = yaml.safe_load(found[1] or "")
    except (yaml.YAMLError, RecursionError, ValueError) as error:
        reason = " ".join(str(error).split())[:200]
        raise ValueError(f"the card's metadata (the YAML between --- at its top) cannot be read: {reason}") from error
    if not isinstance(head or {}, Mapping):
        raise ValueError(
            "the card's metadata (the YAML between --- at its top) must be a mapping, such as license: mit"
        )
    return dict(head or {}), card[found.end() :]


def with_head(card: str, **changes: Any) -> str:
    """The card with these entries of its metadata changed; None removes one. Raises ValueError as read_head does."""
    import yaml

    head, body = read_head(card)
    wanted = {name: value for name, value in {**head, **changes}.items() if value is not None}
    if wanted == head:
        return card
    text = yaml.safe_dump(wanted, sort_keys=False, allow_unicode=True, width=1000)
    return f"---\n{text}---\n{body if body.startswith((chr(10), chr(13))) else chr(10) + body}"


def listed(head: Mapping[str, Any], name: str) -> list[str]:
    """The texts of an entry that may be one text or a list of them, such as ``base_model``."""
    value = head.get(name)
    values = value if isinstance(value, list) else [value]
    return [each for each in values if isinstance(each, str) and each]


def metadata_of(card: str) -> dict[str, Any]:
    """A card's metadata; empty where it cannot be read."""
    try:
        return read_head(card)[0]
    except ValueError:
        return {}


def unique(names: Iterable[str]) -> list[str]:
    """Each once, in order."""
    return list(dict.fromkeys(names))


def section(card: str, title: str) -> str:
    """The text of the section ``## title`` of a card, without its heading; empty where there is none."""
    found = re.search(rf"^## {re.escape(title)}[ \t]*\n(.*?)(?=^## |\Z)", card, re.DOTALL | re.MULTILINE)
    return found[1].strip() if found else ""


def with_name(card: str, name: str) -> str:
    """The card whose snippet loads the model ``name``; a snippet is added where there is none."""
    renamed, count = _SNIPPET.subn(lambda found: f"{found[1]}{found[2]}{name}{found[2]}", card)
    return renamed if count else f"{card.rstrip()}\n\n{use_section(name)}\n"


def changed_card(card: str, name: str, base_models: Sequence[str]) -> str:
    """The card of weights that were changed after they were loaded from ``name``: it says so, and claims no score.

    The scores of before stay in its text, below a section that says whose they are, and leave its metadata.
    """
    head, _ = read_head(card)
    bases = unique(base_models or listed(head, "base_model"))
    card = with_head(card, **{"model-index": None, "base_model": bases or None})
    note = (
        f"{_CHANGED}\n\nThese weights were loaded from {name} and changed afterwards. Everything else on this card, "
        "its scores too, is about the weights as they were before."
    )
    if note in card:
        return card
    head_end = found.end() if (found := _HEAD.match(card)) else 0
    title = re.compile(r"^# .*\n?", re.MULTILINE).search(card, head_end)
    place = title.end() if title else head_end
    return f"{card[:place].rstrip()}\n\n{note}\n\n{card[place:].lstrip()}"
