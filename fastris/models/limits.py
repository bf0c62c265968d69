"""Upper limits of a configuration's sizes, so that an untrusted file cannot request a model that fills the memory.

Each system says how large its own fields may be, and how many parameters they make:
:attr:`fastris.models.config.ModelConfig.limits` and :meth:`~fastris.models.config.ModelConfig.parameter_counts`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fastris.options.values import shown

MAX_PARAMETERS = 2_000_000_000
"""The most that are built. For scale: CRIS on RN50x64, the largest of OpenAI's ResNets, has about 0.7 billion."""

SIZES = {"input_size": 16384, "word_len": 4096}
"""Of the fields that every configuration has: pixels of the letterboxed square's side, tokens of a sentence."""


def check_whole(name: str, value: Any, largest: int) -> None:
    """Raise ValueError, naming the field, unless ``value`` is a whole number from 1 to ``largest``."""
    if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= largest:
        raise ValueError(f"{name} must be a whole number from 1 to {largest}, got {shown(value)}")


def whole_numbers(name: str, values: Any, count: int, largest: int) -> tuple[int, ...]:
    """``count`` whole numbers from 1 to ``largest``, as a tuple. Raises ValueError, naming the field, otherwise."""
    if not isinstance(values, (list, tuple)) or len(values) != count:
        raise ValueError(f"{name} must hold {count} whole numbers, got {shown(values)}")
    for index, value in enumerate(values):
        check_whole(f"{name}[{index}]", value, largest)
    return tuple(values)


def check_fields(config: Any, limits: Mapping[str, int], prefix: str = "") -> None:
    """Call :func:`check_whole` for each field in ``limits``; ``prefix`` precedes the names in messages."""
    for name, largest in limits.items():
        check_whole(prefix + name, getattr(config, name), largest)


def check_parameters(parts: Mapping[str, int]) -> None:
    """ValueError where these are more than MAX_PARAMETERS. ``parts``: fields -> about how many parameters they make."""
    total = sum(parts.values())
    if total > MAX_PARAMETERS:
        largest = max(parts, key=lambda name: parts[name])
        raise ValueError(
            f"these sizes make a model of about {total / 1e9:.1f} billion parameters, and at most "
            f"{MAX_PARAMETERS / 1e9:g} are built; make {largest} smaller"
        )
