"""``python -m bench.gpu_hour out=FOLDER minutes=30``: everything that a GPU is needed for, as one command."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path

from fastris.options.declare import REQUIRED, option

from .hour.plan import STEPS
from .options import with_options

NAMES = tuple(step.name for step in STEPS)


@dataclass
class HourConfig:
    """Proves, times and trains on the GPU at hand within the minutes given; what matters most is on disk first.

    Every step is a process of its own within a time box of its own. A second start with the same folder goes on where
    the first one ended, unless code, versions or device changed. Runs on a CPU, too: smaller, and labelled so.
    The exit code is 1 when something failed, and 130 after Ctrl-C.
    """

    out: Path = option(REQUIRED, "folder for the results, at most 8 files; its summary.md is the one to read")
    minutes: float = option(30.0, "time for all steps together", "min")
    device: str = option("auto", "auto, cpu, cuda, cuda:1, ...")
    steps: tuple[str, ...] = option((), f"only these steps, of {', '.join(NAMES)}; all if empty")
    again: tuple[str, ...] = option((), "steps to do anew, although they are finished")

    def check(self) -> None:
        """Raises ValueError, naming the option."""
        if not 0 < self.minutes <= 24 * 60:
            raise ValueError(f"minutes must lie above 0 and at most at {24 * 60}, got {self.minutes:g}")
        for option_name in ("steps", "again"):
            for name in getattr(self, option_name):
                if name not in NAMES:
                    raise ValueError(f"{option_name}={name} is no step; the steps are {', '.join(NAMES)}")


def run(config: HourConfig) -> int:
    """Do the steps; see :func:`bench.hour.runner.run`."""
    config.check()
    from .hour import runner

    return runner.run(config.out, config.minutes, config.device, config.steps, config.again)


def main(arguments: list[str]) -> int:
    return with_options("bench.gpu_hour", HourConfig, run, arguments)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
