"""``fastris bench`` as the command line sees it; PyTorch comes only where something is measured."""

from __future__ import annotations

from .options import BenchConfig

__all__ = ["BenchConfig", "run"]


def run(config: BenchConfig) -> int:
    """Measure as asked; see :func:`bench.measure.run`."""
    from . import measure

    return measure.run(config)
