"""What the ``python -m bench.*`` commands share: a usage, and mistakes told in one line with exit code 2."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Sequence
from typing import TypeVar

from fastris.options.declare import describe, load_options

T = TypeVar("T")


def told(command: str, work: Callable[[], int]) -> int:
    """The exit code of ``work``; 2, and one line, where it raises what whoever called it can mend."""
    try:
        return work()
    except (ValueError, OSError) as error:
        print(f"{command}: {error}", file=sys.stderr)
        return 2


def with_options(command: str, config: type[T], run: Callable[[T], int], arguments: Sequence[str]) -> int:
    """Run a command whose options are a dataclass, as those of ``fastris`` are: see :mod:`fastris.options.declare`."""
    if {"-h", "--help"} & set(arguments):
        print(f"usage: python -m {command} [name=value ...]\n\n{inspect.getdoc(config)}\n\n{describe(config)}")
        return 0
    return told(command, lambda: run(load_options(config, arguments)))


def with_arguments(command: str, wanted: str, fits: bool, work: Callable[[], int]) -> int:
    """Run a command without options where its arguments are those ``wanted``; else print its usage."""
    if not fits:
        print(f"usage: python -m {command} {wanted}".rstrip(), file=sys.stderr)
        return 2
    return told(command, work)
