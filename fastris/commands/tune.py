"""`fastris tune`: measure on this GPU where the Triton kernels are faster, and with which tiles, for `auto` to know."""

from __future__ import annotations

import os
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from fastris.options.declare import option

if TYPE_CHECKING:
    from fastris.tuned.files import Tuning
    from fastris.tuning.bench import Bench


REHEARSED = "Triton's interpreter"
"""What stands for the GPU's name where there is none."""


@dataclass
class TuneConfig:
    """Measures on this GPU which path of each operator is faster, in about two minutes, and keeps it for `auto`.

    For every operator, precision and size of batch the kernels are proved first, then timed against plain PyTorch with
    some of the tiles that they may use. What is measured is kept at once: Ctrl-C loses nothing, and another run goes
    on with what is missing. `--show` prints what is known.

    Without a GPU, `TRITON_INTERPRET=1 fastris tune device=cpu` rehearses it on tiny sizes, for nobody's use.
    """

    device: str = option("auto", "the GPU: auto, cuda or cuda:1")
    minutes: float = option(2.0, "begin nothing more after so long; more time tries more tiles", "min")
    show: bool = option(False, "measure nothing: print the choices and gains that are kept")


def run(config: TuneConfig) -> int:
    """Measure and keep, or show. Raises ValueError where there is no GPU, or none that the kernels run on."""
    if config.show:
        print(shown())
        return 0
    if not config.minutes > 0:
        raise ValueError(f"minutes={config.minutes} must be more than 0")
    return tune(config)


def tune(config: TuneConfig) -> int:
    """Measure one GPU for as long as is asked, and keep it in the user's file for that GPU."""
    from fastris import dispatch
    from fastris.tuned.files import own_file
    from fastris.tuning.measure import Plan, jobs, measure

    gpu, bench = open_bench(config.device)
    path = own_file(gpu)
    tuning = begun(path, gpu)
    tuning.write(path)  # an error before the work, not after it
    total = len(jobs(tuning))
    print(f"measuring {gpu} for about {config.minutes:g} minutes; kept in {path}")
    print("how many times faster the kernels are, forward and backward, by batch:", flush=True)
    end = time.monotonic() + 60 * config.minutes
    plan = Plan(bench, tuning, end, lambda line: print(line, flush=True), lambda: tuning.write(path), time.monotonic)
    left = measure(plan)
    dispatch.forget()
    if plan.failed and len(left) == total:
        print("fastris tune: nothing was measured to its end; what failed stands above", file=sys.stderr)
        return 1
    if left:
        print(f"{total - len(left)} of {total} measured; run it again to go on with the others, or give more minutes")
    used = "a rehearsal, which no GPU goes by" if gpu == REHEARSED else "`auto` follows this from the next start on"
    print(f"{used}; `fastris tune --show` prints it")
    return 0


def open_bench(device: str) -> tuple[str, Bench]:
    """The GPU's name, and what proves and times on it."""
    import torch

    from fastris import dispatch
    from fastris.runtime.device import choose_device

    gpu = choose_device(device)
    if device == "cpu" and os.environ.get("TRITON_INTERPRET") == "1":
        from fastris.tuning.bench import Rehearsal

        return REHEARSED, Rehearsal()
    if gpu.type != "cuda":
        found = "PyTorch finds no GPU here" if device == "auto" else f"device={device} is no GPU"
        raise ValueError(f"{found} to measure; run it where the GPU is, or see what is known with --show")
    gpu = torch.device("cuda", torch.cuda.current_device() if gpu.index is None else gpu.index)
    if obstacle := dispatch.unproved_obstacle(gpu, torch.float32):
        raise ValueError(f"there is nothing to tune on {gpu}: {obstacle}")
    from fastris.tuning.bench import DeviceBench

    return torch.cuda.get_device_name(gpu), DeviceBench(gpu)


def begun(path: Path, gpu: str) -> Tuning:
    """What is kept of this GPU and still holds, or nothing yet."""
    from fastris.tuned.files import Tuning, identity_of, read

    identity = identity_of(gpu)
    try:
        kept = read(path)
    except (OSError, ValueError):
        kept = None
    return kept if kept is not None and kept.identity == identity else Tuning(identity)


def shown() -> str:
    """Every GPU that is known, with choices and gains: by the user's own files, and by those that come with fastris."""
    from fastris.tuned import files

    folder = files.cache_folder() / "tuned"
    pages = [_page(path) for place in (folder, files.CARDS) for path in sorted(place.glob("*.json"))]
    return "\n\n".join(pages) or f"nothing was measured: no file in {folder}; run `fastris tune` where the GPU is"


def _page(path: Path) -> str:
    from fastris.tuned import files

    try:
        tuning = files.read(path)
    except (OSError, ValueError) as error:
        return f"{path} is damaged or no file of `fastris tune` ({error})"
    made, here = tuning.identity, files.identity_of(tuning.identity.gpu)
    lines = [made.gpu, f"  {path}", f"  PyTorch {made.torch}, Triton {made.triton}, driver {made.driver}"]
    names = ("gpu", "kernels") if path.parent == files.CARDS else ("gpu", "torch", "triton", "driver", "kernels")
    if other := made.differences(here, names):
        lines.append(f"  not used here: measured with {', '.join(other)}")
    for row in tuning.rows.values():
        took = f"{1e3 * row.torch:9.3f} ms by torch"
        if row.triton is not None:
            took += f" {1e3 * row.triton:9.3f} ms by triton {row.gain:6.2f}x"
        path_taken = "triton" if row.takes_triton else "torch"
        lines.append(
            f"  {row.precision:<16} {row.operator:<31} {row.bucket:<11} {path_taken:<7}{took} {row.note}".rstrip()
        )
    lines += [f"  tiles of {name}: {config}" for name, config in tuning.tiles.items()]
    return "\n".join(lines)
