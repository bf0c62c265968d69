"""The command line, ``fastris COMMAND ...``: each command is a config dataclass and a function of it."""

from __future__ import annotations

import difflib
import importlib
import inspect
import io
import os
import sys
import warnings
from collections.abc import Sequence
from typing import Any, NamedTuple, TextIO

from fastris.options.declare import describe, load_options, usage
from fastris.runtime.host_memory import keep_freed_memory
from fastris.runtime.plain import printable
from fastris.runtime.processes import report
from fastris.version import __version__


class Command(NamedTuple):
    """Where a command lives. Its module is imported only when it is the one chosen."""

    module: str
    config: str
    help: str
    function: str = "run"


COMMANDS = {
    "demo": Command(
        "fastris.commands.demo", "DemoConfig", "train a tiny CRIS on drawn scenes and show what it learned"
    ),
    "train": Command("fastris.commands.train", "TrainConfig", "train CRIS, by default with the published recipe"),
    "eval": Command("fastris.commands.eval", "EvalConfig", "mIoU, oIoU and Pr@50-90 of a model on a data set"),
    "predict": Command("fastris.commands.predict", "PredictConfig", "find what phrases name in pictures of yours"),
    "app": Command("fastris.commands.app", "AppConfig", "a page for the browser: a picture and phrases in, masks out"),
    "data": Command(
        "fastris.commands.data", "DataConfig", "look at, check or convert a data set: inspect, check, convert"
    ),
    "convert": Command(
        "fastris.commands.convert", "ConvertConfig", "rewrite a checkpoint as another kind", "run_convert"
    ),
    "export": Command("fastris.commands.export", "ExportConfig", "write a model as ONNX or .pt2 for a product"),
    "push": Command("fastris.commands.push", "PushConfig", "publish a model and its card on the Hugging Face hub"),
    "bench": Command(
        "fastris.bench.command", "BenchConfig", "check and time every operator and the model on this device"
    ),
    "tune": Command(
        "fastris.commands.tune", "TuneConfig", "measure where the kernels are faster on this GPU, for `auto` to know"
    ),
    "doctor": Command("fastris.commands.doctor", "DoctorConfig", "versions, devices, and the path each operator takes"),
}

REPEATING = ("demo", "train", "eval", "predict", "app")
"""Commands that do the same many times, for which freed memory is worth keeping."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code: 0, 2 for a mistake told in one line, 130 after Ctrl-C.

    141 where the reader of its output has gone (``| head``), as shells have it. Output that was closed before the start
    (``>&-``) goes nowhere, and what the output's encoding does not hold comes escaped.
    """
    args = list(sys.argv[1:] if argv is None else argv)
    _open_streams()
    try:
        code = _main(args)
        sys.stdout.flush()
        return code
    except BrokenPipeError:
        _discard(sys.stdout, sys.stderr)
        return 141
    except OSError as error:  # of the output itself: _run tells all others
        _discard(sys.stdout)
        print(f"fastris: cannot write the output: {error.strerror or error}; send it elsewhere", file=sys.stderr)
        return 2


def _open_streams() -> None:
    """Give the process the streams that it was started without, before a file takes their place; errors never stop it.

    A file opened while descriptor 1 is free would get that number, and with it all that is printed below Python.
    """
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, mode))  # noqa: SIM115 - stays open as long as the process
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # as stderr is from the start


def _discard(*streams: TextIO) -> None:
    """Let what is still to be written there go nowhere: the interpreter flushes once more as it ends."""
    for stream in streams:
        try:
            descriptor = stream.fileno()
        except (OSError, ValueError):  # no file behind it
            continue
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, descriptor)
        os.close(nowhere)


def _main(args: list[str]) -> int:
    name, *rest = args or ["--help"]
    if name in ("-h", "--help"):
        print(_overview())
    elif name == "--version":
        print(f"fastris {__version__}")
    elif name not in COMMANDS:
        close = difflib.get_close_matches(name, COMMANDS, n=1)
        hint = f"did you mean {close[0]}? " if close else ""
        order = [*close, *(c for c in COMMANDS if c not in close)]
        print(f"fastris: unknown command {name!r}; {hint}Commands: {', '.join(order)}", file=sys.stderr)
        return 2
    else:
        with warnings.catch_warnings():
            warnings.showwarning = lambda message, *_: _warn(name, message)
            return _run(name, rest)
    return 0


def _run(name: str, args: list[str]) -> int:
    command = COMMANDS[name]
    try:
        module = importlib.import_module(command.module)
        cls = getattr(module, command.config)
        if {"-h", "--help"} & set(args[: args.index("--")] if "--" in args else args):
            print(f"usage: fastris {name} {usage(cls)}\n\n{inspect.getdoc(cls)}\n\n{describe(cls)}")
            return 0
        options = load_options(cls, args)
        if name in REPEATING:
            keep_freed_memory()
        return getattr(module, command.function)(options) or 0
    except (BrokenPipeError, NotImplementedError, RecursionError):
        raise
    except KeyboardInterrupt:
        print(f"fastris {name}: stopped", file=sys.stderr)
        return 130
    except (ValueError, OSError, RuntimeError) as error:
        if os.environ.get("FASTRIS_DEBUG", "") not in ("", "0"):
            raise
        report(name, _message(error), error)
        return 2


def _warn(name: str, message: Any) -> None:
    print(f"fastris {name}: warning: {printable(message)}", file=sys.stderr)


def _message(error: Any) -> str:
    """What an error says, in one line."""
    if isinstance(error, OSError) and error.strerror:
        return printable(error.strerror if error.filename is None else f"{error.filename}: {error.strerror}")
    text = str(error)
    if isinstance(error, RuntimeError):  # PyTorch's own have several lines
        text = " ".join(text.split("\n"))
    return printable(text) or type(error).__name__


def _overview() -> str:
    commands = "\n".join(f"  {name:<9}{command.help}" for name, command in COMMANDS.items())
    footer = (
        "No weights trained on photographs are released: without model= a tiny one of drawn shapes answers.\n"
        "Give CRIS checkpoints trained elsewhere as model=best_model.pth (predict, eval) or weight=... (train);\n"
        "what a training on RefCOCO takes is in docs/recipe.md.\n\n"
    )
    footer += "`fastris COMMAND --help` lists its options; FASTRIS_DEBUG=1 shows where an error comes from."
    return f"fastris {__version__}: a picture and a phrase in, a mask out\n\n{commands}\n\n{footer}"
