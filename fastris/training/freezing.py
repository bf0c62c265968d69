"""Stages of a model that a run leaves as they are: no gradient, no update, and statistics that stay as they were."""

from __future__ import annotations

from collections.abc import Iterable

from fastris.models.base import ReferringModel


def freeze(model: ReferringModel, stages: Iterable[str]) -> None:
    """Take these of the configuration's ``stages`` out of the training, for good."""
    prefixes = _prefixes(model, stages)
    for name, parameter in model.named_parameters():
        if _is_under(name, prefixes):
            parameter.requires_grad_(False)


def set_training(model: ReferringModel, frozen: Iterable[str]) -> None:
    """Training mode, but evaluation mode in the stages that are ``frozen``: no dropout, and no new statistics."""
    model.train()
    prefixes = _prefixes(model, frozen)
    for name, module in model.named_modules():
        if _is_under(name, prefixes):
            module.eval()


def _prefixes(model: ReferringModel, stages: Iterable[str]) -> tuple[str, ...]:
    return tuple(prefix for stage in stages for prefix in model.config.stages[stage])


def _is_under(name: str, prefixes: tuple[str, ...]) -> bool:
    return any(name == prefix or name.startswith(f"{prefix}.") for prefix in prefixes)
