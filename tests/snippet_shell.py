"""Shell snippets, in this process: what a line's words are, whether its command takes them, and what it prints.

Commands of fastris (``fastris``, ``python -m fastris``, those of ``bench`` and of the compile gate) are read by their
own option loaders, so that no option is misspelt or missing. Commands of fastris alone can be run.
"""

from __future__ import annotations

import argparse
import glob
import importlib
import inspect
import io
import itertools
import os
import re
import shlex
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

from snippets import ROOT, Block, SnippetError

from fastris.commands.cli import COMMANDS, main
from fastris.options.declare import load_options

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

_TOKEN = re.compile(r"""\s*(?:(?P<comment>\#.*)|(?P<operator>&&|[|;])|(?P<word>(?:[^\s"'|&;<>()]|"[^"]*"|'[^']*')+))""")

_SETTING = re.compile(r"[A-Z_]+=.*")

_WHERE = {
    "fastris.kernels.gate": "fastris.gate.command",
    "fastris.kernels.listing": "fastris.gate.listing_command",
    "fastris.gate": "fastris.gate.command",
}
"""Module of a ``python -m`` -> the one that has its ``main``."""

_DOES = {"bench.report.docs": ("check", "write")}
"""Module -> the functions that do its work, once its arguments are read."""

ELLIPSIS = "..."
"""In a line that is only read, it stands for options that the page leaves out."""


class Step(NamedTuple):
    """One simple command of a line: its words, which of them were quoted, and whether its output feeds the next."""

    words: list[str]
    quoted: list[bool]
    piped: bool


def statements(block: Block) -> Iterator[tuple[str, str]]:
    """``page:line`` and text of each statement of a shell block: continued lines are joined, comments left out.

    In a ``console`` block commands begin with ``$ ``, and all else is what they print.
    """
    whole, start = "", 0
    for number, line in enumerate(block.code.splitlines()):
        if block.language == "console" and not whole:
            if not line.startswith("$ "):
                continue
            line = line[2:]
        start = start if whole else number
        whole += line
        if whole.endswith("\\"):
            whole = whole[:-1] + " "
            continue
        if whole.strip() and not whole.lstrip().startswith("#"):
            yield f"{block.page}:{block.line + start}", whole.strip()
        whole = ""


def steps(text: str) -> list[Step]:
    """The simple commands of a statement. Raises ValueError for shell beyond words, quotes, ``&&``, ``;`` and ``|``."""
    found: list[Step] = [Step([], [], False)]
    position = 0
    while text[position:].strip():
        token = _TOKEN.match(text, position)
        if token is None:
            raise ValueError(f"{text[position:].strip()!r} is more shell than a test reads")
        position = token.end()
        if token["operator"]:
            found[-1] = found[-1]._replace(piped=token["operator"] == "|")
            found.append(Step([], [], False))
        elif token["word"]:
            found[-1].words.append("".join(shlex.split(token["word"])))
            found[-1].quoted.append(token["word"][0] in "'\"")
    return [step for step in found if step.words]


def try_statement(text: str, where: str, run: bool) -> str:
    """Read the options of a statement's commands, and run them if asked to; returns what they printed."""
    printed, feed = "", b""
    if not run and "fastris" not in text and " -m " not in text:
        text = text if _readable(text) else ":"
    try:
        for step in steps(text):
            if run and step.words[0] == "cat" and step.piped:
                feed = b"".join(Path(name).read_bytes() for name in step.words[1:])
            elif run:
                printed, feed = printed + _run(list(_globbed(step)), feed), b""
            else:
                _read([word for word in step.words if word != ELLIPSIS])
    except (ValueError, OSError, SystemExit) as error:
        mend = "; mend it, or mark what cannot run here: tests/snippets.py says how" if run else ""
        raise SnippetError(f"{where}: `{text}`: {error}{mend}") from error
    return printed


def _readable(text: str) -> bool:
    try:
        return bool(steps(text))
    except ValueError:
        return False


def _globbed(step: Step) -> Iterator[str]:
    """The step's words, with names of files in place of patterns that are not quoted."""
    for word, quoted in zip(step.words, step.quoted, strict=True):
        matches = [] if quoted or not set("*?") & set(word) else sorted(glob.glob(word))
        yield from matches or [word]


def _run(words: Sequence[str], feed: bytes) -> str:
    """What a command prints on stdout. Raises ValueError where it is none of ours, or ends with another code than 0."""
    settings = list(itertools.takewhile(_SETTING.fullmatch, words))
    with mock.patch.dict(os.environ, dict(word.split("=", 1) for word in settings)):
        work = _read(list(words))
        if work is None or ELLIPSIS in words:
            raise ValueError("it is not run here" if work is None else f"{ELLIPSIS} is no option")
        stdin = io.TextIOWrapper(io.BytesIO(feed))
        with (
            redirect_stdout(io.StringIO()) as out,
            redirect_stderr(io.StringIO()) as errors,
            mock.patch.object(sys, "stdin", stdin),
        ):
            code = work()
    if code:
        raise ValueError(f"exit code {code}: {errors.getvalue().strip()[-2000:] or out.getvalue().strip()[-2000:]}")
    return out.getvalue()


def _read(words: list[str]) -> Callable[[], int] | None:
    """Check a command's words, and return what runs it; None for a program that is none of ours."""
    words = list(itertools.dropwhile(_SETTING.fullmatch, words))
    if "-m" in words and words[0] in ("torchrun", "srun"):  # several processes run the rest
        words = ["python", *words[words.index("-m") :]]
    match words:
        case ["python", "-m", "fastris", *arguments] | ["fastris", *arguments]:
            return _read_command(arguments)
        case ["python", "-m", "bench", *arguments]:
            return _read_command(["bench", *arguments])
        case ["python", "-m", module, *arguments] if module.partition(".")[0] in ("bench", "fastris"):
            return _read_module(module, arguments)
        case ["python", "-m", "pytest", *arguments]:
            _check_paths(part for part in arguments if part.startswith(("tests", "bench")))
        case ["bash", script, *_] if not script.startswith("-"):
            _check_paths([script])
        case ["pip", "install", *arguments]:
            _check_extras(arguments)
    return None


def _read_command(arguments: list[str]) -> Callable[[], int]:
    name, *rest = arguments or ["--help"]
    if not name.startswith("-"):
        if name not in COMMANDS:
            raise ValueError(f"unknown command {name!r}; there are {', '.join(COMMANDS)}")
        if not {"-h", "--help"} & set(rest):
            command = COMMANDS[name]
            options = load_options(getattr(importlib.import_module(command.module), command.config), rest)
            getattr(options, "check", lambda: None)()
    return lambda: main(arguments)


class _Told(Exception):
    """An argparse command has understood its arguments."""


def _read_module(module: str, arguments: list[str]) -> Callable[[], int]:
    """As `_read`, of ``python -m MODULE``: its ``main`` is called with all that does the work taken out."""
    name = _WHERE.get(module, module)
    name = f"fastris.{name}" if name.startswith("bench") else name
    try:
        found: Any = importlib.import_module(name)
        takes = len(inspect.signature(found.main).parameters)
    except (ImportError, AttributeError):
        raise ValueError(f"there is no command python -m {module}") from None
    parse = argparse.ArgumentParser.parse_args

    def options(command: str, config: type, run: Any, given: Sequence[str]) -> int:
        getattr(load_options(config, given), "check", lambda: None)()
        return 0

    def parsed(parser: argparse.ArgumentParser, *given: Any) -> None:
        parse(parser, *given)
        raise _Told

    instead: dict[str, Any] = {name: lambda *_: 0 for name in _DOES.get(module, ())}
    instead |= {"with_options": options, "with_arguments": lambda command, wanted, fits, work: 0 if fits else 2}
    with ExitStack() as stack:
        for name, each in instead.items():
            if hasattr(found, name):
                stack.enter_context(mock.patch.object(found, name, each))
        stack.enter_context(mock.patch.object(argparse.ArgumentParser, "parse_args", parsed))
        stack.enter_context(mock.patch.object(sys, "argv", [module, *arguments]))
        told = stack.enter_context(redirect_stderr(io.StringIO()))
        try:
            if not takes and arguments and "parse_args" not in inspect.getsource(found.main):
                raise ValueError(f"python -m {module} takes no arguments")
            code = found.main(arguments) if takes else found.main()
        except _Told:
            code = 0
        except SystemExit:
            code = 2
    if code:
        raise ValueError(told.getvalue().strip() or f"python -m {module} does not take {' '.join(arguments)}")
    return lambda: found.main(arguments)


def _check_paths(names: Any) -> None:
    for name in names:
        if not (ROOT / name.partition("::")[0]).exists():
            raise ValueError(f"there is no {name}")


def _check_extras(arguments: Sequence[str]) -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    for argument in arguments:
        found = re.fullmatch(r"(?:fastris|\.)\[([\w,-]+)\]", argument)
        for extra in found[1].split(",") if found else ():
            if extra not in project["optional-dependencies"]:
                raise ValueError(f"fastris has no extra {extra!r}")
