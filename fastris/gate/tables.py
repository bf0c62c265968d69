"""The committed tables, one a card, and what counts as worse than them."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable
from dataclasses import asdict, fields
from pathlib import Path

import triton

from .listing import LISTED, Row

FOLDER = Path(__file__).resolve().parent / "tables"
REFRESH = "python -m fastris.kernels.gate --refresh"
_KINDS = {"int": int, "float": float, "str": str}


def path_of(card: str) -> Path:
    return FOLDER / f"{card}.csv"


def text(card: str, rows: Iterable[Row], version: str = triton.__version__) -> str:
    """A card's table as CSV, its first line saying what made it."""
    out = io.StringIO()
    out.write(f"# {LISTED[card][0].name}, Triton {version}; modelled, not measured; {REFRESH}\n")
    writer = csv.DictWriter(out, [field.name for field in fields(Row)], lineterminator="\n")
    writer.writeheader()
    writer.writerows(asdict(row) for row in sorted(rows, key=lambda row: (row.name, row.dtype)))
    return out.getvalue()


def read(path: Path) -> tuple[str, dict[tuple[str, str], Row]]:
    """(Triton's version, (name, dtype) -> row). Raises ValueError, naming the file, for anything else."""
    try:
        first, _, rest = path.read_text().partition("\n")
        version = first.split("Triton ")[1].split(";")[0]
        rows = [
            Row(**{field.name: _KINDS[str(field.type)](entry[field.name]) for field in fields(Row)})
            for entry in csv.DictReader(io.StringIO(rest))
        ]
    except (KeyError, IndexError, TypeError, ValueError) as error:
        raise ValueError(f"{path} is no table of the compile gate ({error!r}); write it again: {REFRESH}") from error
    return version, {(row.name, row.dtype): row for row in rows}


def worse(now: Row, before: Row) -> list[str]:
    """In words, how a kernel got worse than its table: it spills more, fewer warps stay, or it moves less at once."""
    checks = (
        (now.stack > before.stack, f"{now.stack} bytes of stack, {before.stack} in the table"),
        (now.warps < before.warps, f"{now.warps} warps stay ({now.limit}), {before.warps} in the table"),
        (now.load_bytes < 0.99 * before.load_bytes, f"loads of {now.load_bytes} bytes, {before.load_bytes} before"),
        (
            now.store_bytes < 0.99 * before.store_bytes,
            f"stores of {now.store_bytes} bytes, {before.store_bytes} before",
        ),
    )
    return [words for is_worse, words in checks if is_worse]


def compare(
    card: str, rows: Iterable[Row], path: Path | None = None, whole: bool = True
) -> tuple[list[str], list[str]]:
    """(what got worse, remarks) of a card's builds, all of them or not, against its committed table, a line each."""
    path = path or path_of(card)
    if not path.exists():
        return [], [f"{card}: there is no table to compare with; {REFRESH}"]
    version, table = read(path)
    if version != triton.__version__:
        about = f"{card}: the table is of Triton {version}, this is {triton.__version__}"
        return [], [f"{about}: nothing but spills was compared"]
    failures, unknown, found = [], 0, set()
    for row in rows:
        found.add((row.name, row.dtype))
        before = table.get((row.name, row.dtype))
        unknown += before is None
        for words in worse(row, before) if before else ():
            failures.append(f"{row.name} ({row.dtype}) on {card} got worse: {words}; if it must be: {REFRESH}")
    gone = len(set(table) - found) if whole else 0
    remarks = [f"{card}: {unknown} builds are not in the table and {gone} of its rows are gone; {REFRESH}"]
    return failures, remarks if unknown or gone else []
