"""Recorded launches compiled to machine code for a card that is not here, and what that code needs."""

from __future__ import annotations

import functools
import re
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, make_backend
from triton.runtime.jit import create_function_from_signature

from fastris.kernels.configs import HIP_SHARED_LIMIT, SHARED_LIMIT, kernel_name, shared_class
from fastris.kernels.launch import ENABLE_FP_FUSION, Launch, Pointer

from .scenarios import recorded

CUDA_ARCHS = tuple(SHARED_LIMIT)
HIP_ARCHS = {"gfx1100": 32, "gfx942": 64}
# Their compilers' output differs from a sibling's, sm_86 and sm_100, in little more than its name: no rare scenario.
SIBLINGS = (89, 103)
ARCHS: tuple[int | str, ...] = (*CUDA_ARCHS, *HIP_ARCHS)


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


@dataclass(frozen=True)
class Compiled:
    """A launch with its machine code: a cubin, or AMD's assembly."""

    build: Build
    launch: Launch
    code: bytes | str


def named_launches(arch: int | str, dtype: torch.dtype) -> dict[str, Launch]:
    """Name -> launch of everything to be compiled for a card: each program once, under its first scenario's name.

    Names read "<operator> <kernel>: <scenario>", with a number behind where a scenario launches a kernel in several
    ways, and with the tiles of an alternative of the launch table.
    """
    found: dict[str, Launch] = {}
    programs = set()
    for scenario, launch, tiles in _recorded(shared_class(shared_limit(arch)), dtype):
        if arch in SIBLINGS and (scenario.rare or tiles):
            continue
        program = launch.kernel, str(_specialised(launch, arch)), launch.config
        if program not in programs:
            programs.add(program)
            found[_unused(f"{kernel_name(launch.kernel)}: {scenario.name}{tiles}", found)] = launch
    return found


@functools.cache
def _recorded(shared: str, dtype: torch.dtype) -> tuple[Any, ...]:
    return tuple(recorded(shared, dtype))


def _unused(name: str, names: dict[str, Launch]) -> str:
    number = 1
    while (numbered := f"{name} #{number}" if number > 1 else name) in names:
        number += 1
    return numbered


def compiled(name: str, launch: Launch, arch: int | str, dtype: torch.dtype) -> Compiled:
    """Machine code of one launch for ``arch`` (80, 86, ... or a gfx name), and what it needs."""
    source = ASTSource(launch.kernel, *_specialised(launch, arch))
    config = launch.config
    options = {
        "num_warps": config.num_warps,
        "num_stages": config.num_stages,
        "enable_fp_fusion": ENABLE_FP_FUSION,
    }
    binary = triton.compile(source, target=_target(arch), options=options)
    code = binary.asm["amdgcn" if isinstance(arch, str) else "cubin"]
    registers, stack = _hip_usage(code) if isinstance(arch, str) else _cuda_usage(code)
    build = Build(
        name,
        config.num_warps,
        arch if isinstance(arch, str) else f"sm_{arch}",
        str(dtype).removeprefix("torch."),
        binary.metadata.shared,
        registers,
        stack,
        shared_limit(arch),
    )
    return Compiled(build, launch, code)


def shared_limit(arch: int | str) -> int:
    """Bytes of shared memory that one block may use on ``arch``."""
    return HIP_SHARED_LIMIT if isinstance(arch, str) else SHARED_LIMIT[arch]


def _target(arch: int | str) -> GPUTarget:
    return GPUTarget("hip", arch, HIP_ARCHS[arch]) if isinstance(arch, str) else GPUTarget("cuda", arch, 32)


def _specialised(launch: Launch, arch: int | str) -> tuple[dict[str, str], dict[str, Any], dict[tuple[int], Any]]:
    """Triton's own answer to what it would compile for these arguments: their types, constants and attributes.

    An integer that is 1 becomes a constant, and what is a multiple of 16 is known to be.
    """
    binder, backend = _binder(launch.kernel, arch)
    values, specialisation, _ = binder(*(_stand_in(value) for _, value in launch.arguments))
    names = list(values)
    signature = {name: kind for name, (kind, _) in zip(names, specialisation, strict=True)}
    constants = {name: values[name] for name in names if signature[name] == "constexpr"}
    attributes = {
        (i,): backend.parse_attr(known)
        for i, (kind, known) in enumerate(specialisation)
        if kind != "constexpr" and isinstance(known, str)
    }
    return signature, constants, attributes


@functools.cache
def _binder(kernel: Any, arch: int | str) -> tuple[Any, Any]:
    backend = make_backend(_target(arch))
    return create_function_from_signature(kernel.signature, kernel.params, backend), backend


def _stand_in(value: Any) -> Any:
    """A small tensor like the one that was given."""
    if not isinstance(value, Pointer):
        return value
    tensor = torch.empty(32, dtype=value.dtype)
    return tensor if value.aligned else tensor[1:]


def _cuda_usage(cubin: bytes) -> tuple[int, int]:
    """(registers, stack + local bytes) that the wheel's own cuobjdump reports."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [str(nvidia_tool("cuobjdump")), "-res-usage", file.name]
        report = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found = re.findall(r"REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", report)
    if not found:
        raise RuntimeError(f"cuobjdump reported no resource usage:\n{report}")
    registers, stack, local = map(int, found[-1])
    return registers, stack + local


def nvidia_tool(name: str) -> Path:
    """A program that Triton's wheel brings: cuobjdump, nvdisasm or ptxas."""
    return Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name


def _hip_usage(assembly: str) -> tuple[int, int]:
    registers = re.search(r"\.vgpr_count:\s*(\d+)", assembly)
    scratch = re.search(r"ScratchSize:\s*(\d+)", assembly)
    if registers is None or scratch is None:
        raise RuntimeError("the AMD assembly names no register count or scratch size")
    return int(registers.group(1)), int(scratch.group(1))
