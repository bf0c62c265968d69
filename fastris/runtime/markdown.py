"""Tables in Markdown: model cards, benchmarks, pages."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any


def markdown_table(columns: Sequence[str], rows: Iterable[Sequence[Any]], aligned: bool = False) -> str:
    """A table in Markdown; ``aligned`` pads its source, so that it reads well on a terminal, too."""
    cells = [[str(cell).replace("|", "\\|") for cell in row] for row in (columns, *rows)]
    widths = [max(3, *(len(row[i]) for row in cells)) if aligned else 1 for i in range(len(columns))]
    head, *body = [
        "| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) + " |" for row in cells
    ]
    return "\n".join([head, "|" + "|".join("-" * (width + 2) for width in widths) + "|", *body])
