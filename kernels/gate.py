"""The compile gate: build every kernel in every configuration for every card, without a GPU, and read what it costs.

``python -m fastris.kernels.gate`` prints registers, shared memory and stack of each build and fails when one would not
run well: more shared memory than a block may have, or registers spilled to the stack or to local memory.
A kernel file announces its builds in a function ``gate_specs(shared_class, dtype) -> list[GateSpec]``.
"""

from __future__ import annotations

import argparse
import importlib
import multiprocessing
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from ..operators import OPERATORS
from .configs import HIP_SHARED_LIMIT, SHARED_LIMIT, Config, shared_class

MODULES = tuple(dict.fromkeys(operator.kernels for operator in OPERATORS.values() if operator.kernels))
CUDA_ARCHS = tuple(SHARED_LIMIT)
HIP_ARCHS = {"gfx1100": 32, "gfx942": 64}
POINTER = {torch.float32: "*fp32", torch.float16: "*fp16", torch.bfloat16: "*bf16"}


@dataclass(frozen=True)
class GateSpec:
    """One build of a kernel: argument types (Triton's names, e.g. ``*bf16``, ``i32``), constexpr values and launch.

    ``signature`` maps every non-constexpr argument to its type, in the kernel's order or not; ``constexprs`` holds the
    rest, apart from the tile sizes that ``config`` brings.
    """

    name: str
    kernel: Any
    signature: dict[str, str]
    constexprs: dict[str, Any]
    config: Config
    divisible_by_16: tuple[str, ...] = field(default=())


@dataclass(frozen=True)
class Build:
    """What one build needs: bytes of shared memory per block, registers per thread, bytes of stack and local memory."""

    name: str
    num_warps: int
    arch: str
    dtype: str
    shared: int
    registers: int
    stack: int
    limit: int

    @property
    def fits(self) -> bool:
        return self.shared <= self.limit and self.stack == 0


def specs_for(shared: str, dtype: torch.dtype, modules: tuple[str, ...] = MODULES) -> Iterator[GateSpec]:
    """All builds that the tables can choose on cards of class ``shared``."""
    for name in modules:
        yield from importlib.import_module(f"{__package__}.{name}").gate_specs(shared, dtype)


def build(spec: GateSpec, arch: int | str, dtype: torch.dtype) -> Build:
    """Compile one spec to machine code for ``arch`` (80, 86, ... or a gfx name) and measure it."""
    constexprs = {**spec.constexprs, **dict(spec.config.blocks)}
    names = spec.kernel.arg_names
    signature = {name: spec.signature.get(name, "constexpr") for name in names}
    unnamed = [n for n in names if signature[n] == "constexpr" and n not in constexprs]
    if unnamed:
        raise ValueError(f"{spec.name}: the spec gives no type or value for {', '.join(unnamed)}")
    attrs = {
        (i,): [["tt.divisibility", 16]]
        for i, name in enumerate(names)
        if signature[name].startswith("*") or name in spec.divisible_by_16
    }
    source = ASTSource(
        fn=spec.kernel, signature=signature, constexprs={k: v for k, v in constexprs.items() if k in names}, attrs=attrs
    )
    options = {"num_warps": spec.config.num_warps, "num_stages": spec.config.num_stages}
    compiled = triton.compile(source, target=_target(arch), options=options)
    usage = _hip_usage(compiled.asm["amdgcn"]) if isinstance(arch, str) else _cuda_usage(compiled.asm["cubin"])
    registers, stack = usage
    return Build(
        spec.name,
        spec.config.num_warps,
        arch if isinstance(arch, str) else f"sm_{arch}",
        str(dtype).removeprefix("torch."),
        compiled.metadata.shared,
        registers,
        stack,
        shared_limit(arch),
    )


def shared_limit(arch: int | str) -> int:
    """Bytes of shared memory that one block may use on ``arch``."""
    return HIP_SHARED_LIMIT if isinstance(arch, str) else SHARED_LIMIT[arch]


def _target(arch: int | str) -> GPUTarget:
    return GPUTarget("hip", arch, HIP_ARCHS[arch]) if isinstance(arch, str) else GPUTarget("cuda", arch, 32)


def _cuda_usage(cubin: bytes) -> tuple[int, int]:
    """(registers, stack + local bytes) that the wheel's own cuobjdump reports."""
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        report = subprocess.run([str(tool), "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
    found = re.findall(r"REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", report)
    if not found:
        raise RuntimeError(f"cuobjdump reported no resource usage:\n{report}")
    registers, stack, local = map(int, found[-1])
    return registers, stack + local


def _hip_usage(assembly: str) -> tuple[int, int]:
    registers = re.search(r"\.vgpr_count:\s*(\d+)", assembly)
    scratch = re.search(r"ScratchSize:\s*(\d+)", assembly)
    if registers is None or scratch is None:
        raise RuntimeError("the AMD assembly names no register count or scratch size")
    return int(registers.group(1)), int(scratch.group(1))


def builds(arch: int | str, dtype: torch.dtype) -> list[Build]:
    """Every build of every kernel for one card and dtype."""
    return [build(spec, arch, dtype) for spec in specs_for(shared_class(shared_limit(arch)), dtype)]


def _row(build: Build) -> str:
    return (
        f"{build.name:34} {build.arch:8} {build.dtype:9} {build.num_warps:5} {build.shared:7} {build.limit:7} "
        f"{build.registers:5} {build.stack:5}{'' if build.fits else '  DOES NOT FIT'}"
    )


def main() -> int:
    """Print the table of all builds; exit status 1 when one does not fit."""
    parser = argparse.ArgumentParser(prog="python -m fastris.kernels.gate", description=main.__doc__)
    parser.add_argument(
        "--processes", type=int, default=os.cpu_count(), help="that compile at once (default: all cores)"
    )
    processes = parser.parse_args().processes
    if os.environ.get("TRITON_INTERPRET") == "1":
        print("the gate compiles; unset TRITON_INTERPRET", file=sys.stderr)
        return 2
    print(f"{'kernel':34} {'card':8} {'dtype':9} {'warps':>5} {'shared':>7} {'limit':>7} {'regs':>5} {'stack':>5}")
    failures = 0
    jobs = [(arch, dtype) for arch in (*CUDA_ARCHS, *HIP_ARCHS) for dtype in POINTER]
    # Fresh processes: a fork would inherit the threads of whatever was imported before.
    with ProcessPoolExecutor(processes, multiprocessing.get_context("spawn")) as pool:
        for results in pool.map(builds, *zip(*jobs, strict=True)):
            failures += sum(not result.fits for result in results)
            print("\n".join(map(_row, results)), flush=True)
    print(f"{failures} builds do not fit" if failures else "every build fits")
    return 1 if failures else 0


if __name__ == "__main__":
    raise SystemExit(main())
