"""Try the snippets of one page: see :mod:`snippets` for what is tried, and how a page says otherwise."""

from __future__ import annotations

import importlib.util
import io
import re
from collections.abc import Sequence
from contextlib import redirect_stdout
from typing import Any

from snippet_shell import statements, try_statement
from snippets import PYTHON, SHELL, Block, SnippetError


def try_blocks(blocks: Sequence[Block]) -> list[str]:
    """Try the blocks of a page in order, in the current folder. Raises SnippetError for the first that is wrong.

    Returns what was passed over, because a library that it needs is not installed.
    """
    namespace: dict[str, Any] = {"__name__": "__main__"}
    passed_over, printed = [], ""
    for block in blocks:
        absent = [name for name in " ".join(block.values("needs")).split() if importlib.util.find_spec(name) is None]
        if absent:
            passed_over.append(f"{block.where} needs {', '.join(absent)}")
        elif block.values("printed"):
            check_printed(block, printed)
        elif block.language in PYTHON:
            printed = _try_python(block, namespace)
        elif block.language in SHELL:
            printed = _try_shell(block, namespace)
        else:
            raise SnippetError(
                f"{block.where}: a block of {block.language or 'no language'} has a mark that says to try it"
            )
    return passed_over


def _try_python(block: Block, namespace: dict[str, Any]) -> str:
    code = _with_small_names(block)
    with redirect_stdout(io.StringIO()) as out:
        try:
            compiled = compile("\n" * (block.line - 1) + code, block.page, "exec")
            if block.runs:
                _run_code(block, "first", namespace)
                exec(compiled, namespace)
                _run_code(block, "then", namespace)
        except Exception as error:
            line = _line_of(error, block)
            raise SnippetError(
                f"{block.page}:{line}: {type(error).__name__}: {error}; mend it, or mark what cannot run here: "
                "tests/snippets.py says how"
            ) from error
    return out.getvalue()


def _try_shell(block: Block, namespace: dict[str, Any]) -> str:
    small = Block(block.page, block.line, block.language, _with_small_names(block), block.clauses)
    if block.runs:
        _run_code(block, "first", namespace)
    printed = ""
    for where, text in statements(small):
        run = not block.only_read(text)
        for clause in block.clauses:
            if run and clause.kind == "add to" and re.sub(r"\s+", " ", text).startswith(clause.of):
                text = f"{text.partition(' #')[0].rstrip()} {clause.value}"
        printed += try_statement(text, where, run)
    if block.runs:
        _run_code(block, "then", namespace)
    return printed


def _with_small_names(block: Block) -> str:
    code = block.code
    for value in block.values("take"):
        small, large = value.split(" for ", 1)
        if large not in code:
            raise SnippetError(f"{block.where}: its mark takes {small!r} for {large!r}, which the block does not have")
        code = code.replace(large, small)
    return code


def _run_code(block: Block, kind: str, namespace: dict[str, Any]) -> None:
    for code in block.values(kind):
        exec(compile(code, f"<{kind} of {block.where}>", "exec"), namespace)


def _line_of(error: Exception, block: Block) -> int:
    """The line of the page that raised: the innermost one there is."""
    if isinstance(error, SyntaxError) and error.filename == block.page:
        return error.lineno or block.line
    line, trace = block.line, error.__traceback__
    while trace is not None:
        if trace.tb_frame.f_code.co_filename == block.page:
            line = trace.tb_lineno
        trace = trace.tb_next
    return line


def check_printed(block: Block, printed: str) -> None:
    """Each line of the block is a line of what was printed, in that order; ``...`` stands for anything."""
    lines = [" ".join(line.split()) for line in printed.splitlines()]
    for number, line in enumerate(block.code.splitlines()):
        wanted = re.escape(" ".join(line.split())).replace(re.escape("..."), ".*")
        while wanted and lines and not re.fullmatch(wanted, lines[0]):
            lines.pop(0)
        if wanted and not lines:
            where = f"{block.page}:{block.line + number}"
            raise SnippetError(f"{where}: `{line.strip()}` is not what the snippet before it prints:\n{printed}")
