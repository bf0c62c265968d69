"""``python -m bench.studies.float16_sums``: what summing float16 products in float16 costs in digits and gains in time.

The error is that of one matrix product against float64, at the sizes of CRIS's own products.
"""

from __future__ import annotations

import statistics
import sys

import torch

from fastris.runtime.float16_sums import allow_fp16_accumulation, fp16_accumulation_obstacle

from ..timing.harness import timed

PRODUCTS = {
    "projector, 512 -> 3x512 taps": (16 * 26 * 26, 512, 3 * 512),
    "projector, 512 -> 3x256 taps": (16 * 52 * 52, 512, 3 * 256),
    "decoder, 512 -> 2048": (16 * 26 * 26, 512, 2048),
    "decoder, 2048 -> 512": (16 * 26 * 26, 2048, 512),
    "projector's weight gradient": (512, 16 * 26 * 26, 3 * 512),
}
"""Title -> (rows, summed, columns), B=16 at 416x416."""

ROUNDS = 20


def product_error(rows: int, summed: int, columns: int, device: torch.device) -> float:
    """Norm of the error of a float16 product of normal numbers over the norm of the float64 result."""
    generator = torch.Generator(device).manual_seed(0)
    left = torch.randn(rows, summed, device=device, generator=generator).half()
    right = (torch.randn(summed, columns, device=device, generator=generator) / summed**0.5).half()
    truth = left[:512].double() @ right.double()
    return float(((left @ right)[:512].double() - truth).norm() / truth.norm())


def product_seconds(rows: int, summed: int, columns: int, device: torch.device) -> float:
    """Median seconds of one such product."""
    left = torch.randn(rows, summed, device=device, dtype=torch.float16)
    right = torch.randn(summed, columns, device=device, dtype=torch.float16)
    seconds = [timed(lambda: left @ right, 5, lambda: torch.cuda.synchronize(device)) for _ in range(ROUNDS)]
    return statistics.median(seconds)


def main() -> int:
    obstacle = fp16_accumulation_obstacle()
    if obstacle:
        print(f"bench.studies.float16_sums: nothing to show: {obstacle}", file=sys.stderr)
        return 2
    device = torch.device("cuda")
    print(f"{torch.cuda.get_device_name(device)}\n")
    print("| product | error, float32 sums | error, float16 sums | times faster |\n| --- | --- | --- | --- |")
    for title, sizes in PRODUCTS.items():
        error, seconds = product_error(*sizes, device), product_seconds(*sizes, device)
        with allow_fp16_accumulation(True):
            half_error, half_seconds = product_error(*sizes, device), product_seconds(*sizes, device)
        print(f"| {title} | {error:.1e} | {half_error:.1e} | {seconds / half_seconds:.2f}x |")
    return 0


if __name__ == "__main__":
    sys.exit(main())
