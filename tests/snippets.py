"""The snippets of README.md and docs/: every fenced block of Python or shell, and the marks that say how it is tried.

The blocks of a page run in order, in one folder with a few files (:mod:`snippet_folder`) and one namespace, as a reader
would type them. Names such as ``best_model.pth`` and ``my_data`` are small files there. A block that needs more has a
mark right before it, an HTML comment that no reader sees::

    <!-- test: only read: it takes hours on a GPU -->
    <!-- test
    take: tiny for cris_r50
    add to fastris train: epochs=1 workers=0
    -->

Each line of a mark is a clause:

only read: REASON               the block is not run. Python is compiled; of shell, commands and their options are read
only read torchrun: REASON      only the lines that have that word
take: SMALL for LARGE           put SMALL in LARGE's place
add to COMMAND: OPTIONS         add options to lines that begin so (`fastris train`), to make them small
needs: MODULE MODULE            passed over where one of these is not installed; the test then counts as skipped
first: PYTHON                   runs before the block, in its namespace; all further lines of the mark belong to it
then: PYTHON                    the same, after it; for assertions about what the block has made
printed: above                  of a block of any language: the snippet before it prints these lines; ... is anything
"""

from __future__ import annotations

import re
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]

PYTHON = ("python", "py", "pycon")
SHELL = ("bash", "sh", "shell", "console")

CODE = ("first", "then")
"""Clauses whose value is code, up to the end of the mark or the next of them."""

KNOWN = ("only read", "take", "add to", "needs", "printed", *CODE)

_MARK = re.compile(r"^<!-- test(?::(?P<one>.*?)|\n(?P<many>.*?))-->[ \t]*\n(?:[ \t]*\n)*", re.S | re.M)
_FENCE = re.compile(
    r"^(?P<indent>[ \t]*)(?P<ticks>`{3,})(?P<language>[\w-]*)[^\n`]*\n(?P<code>.*?)^(?P=indent)(?P=ticks)[ \t]*$",
    re.S | re.M,
)
_COMMAND = re.compile(r"^(?: {4,}|\t)(?:\$ )?(?:fastris|python -m|torchrun) .*", re.M)


class SnippetError(Exception):
    """A snippet is wrong; the message begins with its page and line."""


@dataclass(frozen=True)
class Clause:
    """One line of a mark: ``add to fastris train: epochs=1`` has the kind, whom it is for, and the value."""

    kind: str
    of: str
    value: str


@dataclass(frozen=True)
class Block:
    """One fenced block: its page, the line of its first line there, its language, code, and what its mark says."""

    page: str
    line: int
    language: str
    code: str
    clauses: tuple[Clause, ...] = field(default=())

    @property
    def where(self) -> str:
        return f"{self.page}:{self.line}"

    def values(self, kind: str) -> list[str]:
        return [clause.value for clause in self.clauses if clause.kind == kind]

    @property
    def runs(self) -> bool:
        """Whether any of it is run, and not only read."""
        return not any(clause.kind == "only read" and not clause.of for clause in self.clauses)

    def only_read(self, line: str) -> bool:
        """Whether this line of shell is not to be run."""
        return any(clause.kind == "only read" and clause.of in line for clause in self.clauses)


def pages(root: Path = ROOT) -> list[Path]:
    """README.md and every page of docs/."""
    return [root / "README.md", *sorted((root / "docs").rglob("*.md"))]


def blocks(path: Path, root: Path = ROOT) -> list[Block]:
    """The snippets of a page in order: Python, shell, and other blocks that have a mark.

    Raises SnippetError for a mark that is before no block or says what nobody knows, and for a command that stands in
    an indented block, where it would go untried.
    """
    text, page = path.read_text(encoding="utf-8"), path.relative_to(root).as_posix()

    def line_of(position: int) -> int:
        return text.count("\n", 0, position) + 1

    marks = {found.end(): found for found in _MARK.finditer(text)}
    told, inside = [], []
    for fence in _FENCE.finditer(text):
        inside.append(range(*fence.span()))
        mark = marks.pop(fence.start(), None)
        language = fence["language"].lower()
        if mark is not None or language in PYTHON + SHELL:
            clauses = (
                () if mark is None else tuple(_clauses(mark["one"] or mark["many"], f"{page}:{line_of(mark.start())}"))
            )
            told.append(Block(page, line_of(fence.start("code")), language, textwrap.dedent(fence["code"]), clauses))
    for mark in marks.values():
        if not any(mark.start() in span for span in inside):
            raise SnippetError(
                f"{page}:{line_of(mark.start())}: this mark stands before no fenced block; put it right before one"
            )
    for found in _COMMAND.finditer(text):
        if not any(found.start() in span for span in inside):
            raise SnippetError(
                f"{page}:{line_of(found.start())}: a command in an indented block is not tried; put it into ```bash"
            )
    return told


def _clauses(text: str, where: str) -> Iterator[Clause]:
    kind, lines = "", []
    for line in [*textwrap.dedent(text).strip().splitlines(), ""]:
        begun = re.match(rf"\s*({'|'.join(CODE)}):(.*)", line)
        if kind and not begun:
            lines.append(line)
            continue
        if kind:
            yield Clause(kind, "", textwrap.dedent("\n".join(lines)))
        if begun:
            kind, lines = begun[1], [begun[2].strip()]
        elif line.strip():
            yield _clause(line.strip(), where)
    if kind:
        yield Clause(kind, "", textwrap.dedent("\n".join(lines)))


def _clause(line: str, where: str) -> Clause:
    head, colon, value = line.partition(":")
    kind = next((kind for kind in KNOWN if head == kind or head.startswith(kind + " ")), None)
    if kind is None or not colon or not value.strip():
        raise SnippetError(f"{where}: {line!r} is no clause of a mark; there are {', '.join(KNOWN)}, each with a value")
    if kind == "take" and not re.fullmatch(r".+ for .+", value.strip()):
        raise SnippetError(f"{where}: {line!r} must read `take: SMALL for LARGE`")
    return Clause(kind, head[len(kind) :].strip(), value.strip())
