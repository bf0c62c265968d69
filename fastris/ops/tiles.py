"""Measured tiles on their way to the kernels: what :mod:`fastris.tuned` has read, in the kernels' own terms."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def use_tiles(index: int, tiles: Mapping[str, Mapping[str, Any]]) -> None:
    """Make the kernels launch with ``tiles`` on GPU ``index``; see :func:`fastris.kernels.configs.replace`."""
    from fastris.kernels.configs import Choice, Config, replace

    replace({Choice.parse(name): Config.from_dict(config) for name, config in tiles.items()}, device=index)
