"""How a system was published to be trained and scored: the defaults of ``fastris train``, by system."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Optimizer = Literal["adam", "adamw"]
Schedule = Literal["steps", "poly", "cosine"]


@dataclass(frozen=True)
class Recipe:
    """A training recipe under the names of the options of ``fastris train``; the defaults are CRIS's.

    Attributes:
        epochs: passes over the training references. batch_size: references of an optimizer step.
        optimizer: ``adam``, or ``adamw``, whose weight decay is apart from the gradient.
        base_lr: learning rate of the group "head". lr_multi: factor on it for all other groups.
        schedule: ``steps``, the rate drops at some epochs; or ``poly``, after each step it is
            base_lr * (1 - step / all steps)^0.9; or ``cosine``, half a cosine over all steps, after a warm-up.
        val_rule: the rule of its published numbers, a name in :data:`fastris.evaluation.rules.RULES`.
        val_sentences: whose sentences its best weights are chosen by: the ``first`` of each object, or ``all``.
    """

    epochs: int = 50
    batch_size: int = 64
    optimizer: Optimizer = "adam"
    base_lr: float = 1e-4
    lr_multi: float = 0.1
    weight_decay: float = 0.0
    schedule: Schedule = "steps"
    val_rule: str = "cris"
    val_sentences: Literal["all", "first"] = "first"
