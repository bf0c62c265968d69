"""``python -m fastris.kernels.listing``: print what each kernel's machine code says, card by card."""

from __future__ import annotations

import argparse
import os

from .builds import CUDA_ARCHS
from .command import in_processes, interpreting
from .listing import LISTED, Row
from .scenarios import DTYPES

HEAD = (
    f"{'kernel':58} {'dtype':8} {'regs':>4} {'stack':>5} {'shared':>6} {'warps':>5} {'limit':13} {'MMA':>4} "
    f"{'loads':>20} {'again':>5} {'store B':>7} {'instr/out':>9} {'memory':>8} {'compute':>8} {'issue':>8} bound"
)


def line(row: Row) -> str:
    return (
        f"{row.name:58} {row.dtype:8} {row.registers:4} {row.stack:5} {row.shared:6} {row.warps:5} {row.limit:13} "
        f"{row.matrix:4} {row.widths:>20} {row.redundant:5} {row.store_bytes:7} {row.per_output:9} {row.memory:8} "
        f"{row.compute:8} {row.issue:8} {row.bound}, {row.of_roofline} x roofline"
    )


def main() -> int:
    """Registers, occupancy, tensor-core instructions, widths of loads and a modelled bound of each kernel."""
    parser = argparse.ArgumentParser(prog="python -m fastris.kernels.listing", description=main.__doc__)
    parser.add_argument(
        "--card", choices=list(LISTED), action="append", help="as sm_90; may be repeated (default: all)"
    )
    parser.add_argument("--kernel", default="", help="only builds with this in their name, as 'taps: train'")
    parser.add_argument("--dtype", choices=[str(dtype).removeprefix("torch.") for dtype in DTYPES], default="bfloat16")
    parser.add_argument("--processes", type=int, default=os.cpu_count())
    arguments = parser.parse_args()
    if interpreting("the listing"):
        return 2
    cards = arguments.card or list(LISTED)
    dtype = next(dtype for dtype in DTYPES if str(dtype).endswith("." + arguments.dtype))
    jobs = [(arch, dtype) for arch in CUDA_ARCHS if f"sm_{arch}" in cards]
    for (arch, _), built in zip(jobs, in_processes(jobs, arguments.processes, arguments.kernel), strict=True):
        card = LISTED[f"sm_{arch}"][0]
        print(f"\nsm_{arch}, as of the {card.name}; times are modelled from its data sheet, us a picture\n{HEAD}")
        print("\n".join(line(row) for _, row in built if row), flush=True)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
