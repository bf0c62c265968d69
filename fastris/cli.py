"""The command line, ``fastris COMMAND ...``: each command is a config dataclass and a function of it."""

from __future__ import annotations

import difflib
import importlib
import inspect
import os
import sys
import warnings
from collections.abc import Sequence
from typing import Any, NamedTuple

import fastris
from fastris.config import describe, load_options, usage
from fastris.host_memory import keep_freed_memory


class Command(NamedTuple):
    """Where a command lives. Its module is imported only when it is the one chosen."""

    module: str
    config: str
    help: str
    function: str = "run"


COMMANDS = {
    "demo": Command("fastris.demo", "DemoConfig", "train a tiny CRIS on drawn scenes and show what it learned"),
    "train": Command("fastris.train", "TrainConfig", "train CRIS, by default with the published recipe"),
    "eval": Command("fastris.evaluate", "EvalConfig", "mIoU, oIoU and Pr@50-90 of a model on a data set"),
    "predict": Command("fastris.predict", "PredictConfig", "find what phrases name in a picture of yours"),
    "data": Command(
        "fastris.data.commands", "DataConfig", "look at, check or convert a data set: inspect, check, convert"
    ),
    "convert": Command("fastris.checkpoint", "ConvertConfig", "rewrite a checkpoint as another kind", "run_convert"),
    "bench": Command(
        "fastris.bench.command", "BenchConfig", "check and time every operator and the model on this device"
    ),
    "doctor": Command("fastris.doctor", "DoctorConfig", "versions, devices, and the path each operator takes"),
}

REPEATING = ("demo", "train", "eval", "predict")
"""Commands that do the same many times, for which freed memory is worth keeping."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code: 0, 2 for a mistake told in one line, 130 after Ctrl-C."""
    args = list(sys.argv[1:] if argv is None else argv)
    try:
        code = _main(args)
        sys.stdout.flush()
        return code
    except BrokenPipeError:  # the reader (`| head`) has gone: let the interpreter's last flush go nowhere
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141


def _main(args: list[str]) -> int:
    name, *rest = args or ["--help"]
    if name in ("-h", "--help"):
        print(_overview())
    elif name == "--version":
        print(f"fastris {fastris.__version__}")
    elif name not in COMMANDS:
        close = difflib.get_close_matches(name, COMMANDS, n=1)
        hint = f"did you mean {close[0]}? " if close else ""
        order = [*close, *(c for c in COMMANDS if c not in close)]
        print(f"fastris: unknown command {name!r}; {hint}Commands: {', '.join(order)}", file=sys.stderr)
        return 2
    else:
        with warnings.catch_warnings():
            warnings.showwarning = lambda message, *_: print(f"fastris {name}: warning: {message}", file=sys.stderr)
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
        from fastris.distributed import report

        report(name, _message(error), error)
        return 2


def _message(error: Any) -> str:
    if isinstance(error, OSError) and error.strerror and error.filename is not None:
        return f"{error.filename}: {error.strerror}"
    return str(error) or type(error).__name__


def _overview() -> str:
    commands = "\n".join(f"  {name:<9}{command.help}" for name, command in COMMANDS.items())
    footer = "`fastris COMMAND --help` lists its options; FASTRIS_DEBUG=1 shows where an error comes from."
    return f"fastris {fastris.__version__}: a picture and a phrase in, a mask out\n\n{commands}\n\n{footer}"
