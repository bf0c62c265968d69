"""Named settings of `fastris train`, for what they are good for. Imports no torch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

PRESETS: Mapping[str, Mapping[str, Any]] = {
    # From trained weights, on tens to some thousands of pictures of one's own.
    "finetune": {
        "epochs": 30,
        "batch_size": 8,
        "optimizer": "adamw",
        "weight_decay": 0.01,
        "schedule": "cosine",
        "warmup": 0.1,
        "max_norm": 1.0,
        "freeze": "2",
        "ema": 0.999,
        "patience": 15,
        "split": 0.2,
        "augment": True,
    },
}
"""By name: options that it gives where the user gives none."""

DEFAULTS: Mapping[str, Any] = {
    "warmup": 0.0,
    "max_norm": 0.0,
    "freeze": "",
    "ema": 0.0,
    "patience": 0,
    "split": 0.0,
    "augment": False,
}
"""What those options are that no system's recipe has, where neither the user nor a preset gives them."""
