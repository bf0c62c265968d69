"""The model card (README.md in Hugging Face's format): training data, scores and the rule behind them."""

from __future__ import annotations

from pathlib import Path

from fastris.models.ancestry import public_name
from fastris.models.card import model_card
from fastris.models.config import ModelConfig
from fastris.models.pretrained import CARD
from fastris.runtime.storage import replacing

__all__ = ["CARD", "card_path", "model_card", "unknown_card", "write_card"]


def unknown_card(config: ModelConfig, source: str, hub_id: str = "") -> str:
    """The card of converted weights of which the training is not known; of a path it tells the file's name alone."""
    name = public_name(source, hub_id)
    told = name if " " in name else f"`{name}`"
    body = f"Converted by fastris from {told}, which does not say how it was trained."
    return model_card(config, body, base_models=[hub_id] if hub_id else [])


def card_path(target: Path, kind: str) -> Path:
    """The card's path for a model that is written to `target`: in its folder, or beside its file."""
    return target / CARD if kind == "folder" else target.with_suffix(".md")


def write_card(path: Path, text: str) -> Path:
    """Write a card in one step. Raises OSError where it cannot be written."""
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")
    return path
