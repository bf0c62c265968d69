"""``fastris doctor``: what is installed, on which devices, which kernels are right there, which path each takes.

Never fails.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import json
import os
import platform
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

from fastris.operators import OPERATORS
from fastris.options.declare import option
from fastris.version import __version__

# Module -> the package to install.
NEEDED = {
    "torch": "torch",
    "torchvision": "torchvision",
    "open_clip": "open_clip_torch",
    "numpy": "numpy",
    "cv2": "opencv-python-headless",
    "PIL": "pillow",
    "pycocotools": "pycocotools",
    "huggingface_hub": "huggingface_hub",
    "safetensors": "safetensors",
    "yaml": "pyyaml",
    "rich": "rich",
}
OPTIONAL = {name: name for name in ("triton", "lmdb", "pyarrow", "tensorboard", "wandb")}
VARIABLES = ("FASTRIS_IMPL", "FASTRIS_DEBUG", "TRITON_INTERPRET", "CUDA_VISIBLE_DEVICES", "HF_HUB_OFFLINE")


@dataclass
class DoctorConfig:
    """Says what fastris runs on: versions, devices, and the path that each operator takes and why.

    On every GPU the kernels of each operator are proved first: compiled, run forward and backward, and held against
    float64, in float32, float16 and bfloat16. The first time on a machine this takes about a minute for each GPU.
    """

    json: bool = option(False, "print one JSON object instead of a page")


def run(config: DoctorConfig) -> int:
    """Print the report. What is broken is a line of the report, not an error."""
    found = report()
    print(json.dumps(found, indent=2) if config.json else _page(found))
    return 0


def report() -> dict[str, dict[str, Any]]:
    """Sections of (name -> text): versions, optional, devices, environment; and by device: operators, kernels.

    operators: device -> name -> path and reason. kernels: GPU -> "name, dtype" -> "right" or what is wrong.
    """
    devices = _guarded(_devices)
    gpus = [name for name in devices if _is_gpu(name)]
    kernels = {name: _guarded(partial(_kernels, name)) for name in gpus}  # before the paths, which follow from it
    return {
        "versions": {
            "fastris": __version__,
            "python": f"{platform.python_version()} ({sys.executable})",
            "system": platform.platform(),
            **{module: _version(module, package) for module, package in NEEDED.items()},
        },
        "optional": {module: _version(module, package) for module, package in OPTIONAL.items()},
        "devices": devices,
        "environment": {name: os.environ[name] for name in VARIABLES if name in os.environ},
        "kernels": kernels,
        "operators": {name: _guarded(partial(_operators, name)) for name in ["cpu", *gpus]},
    }


def _guarded(probe: Callable[[], dict[str, str]]) -> dict[str, str]:
    """What the probe found, or how it failed: on a broken machine the rest of the report is worth having."""
    try:
        return probe()
    except Exception as error:
        return {"broken": _in_a_line(error)}


def _in_a_line(error: Exception) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())[:300]


def _version(module: str, package: str) -> str:
    """The version of a package that really imports, or what is wrong with it."""
    try:
        if importlib.util.find_spec(module) is None:
            return f"not installed (pip install {package})"
        imported = importlib.import_module(module)
    except Exception as error:  # anything can go wrong in somebody else's import, and that is what is asked
        return f"broken: {_in_a_line(error)} (pip install --force-reinstall {package})"
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:  # another distribution brings the same module
        return str(getattr(imported, "__version__", "installed, version unknown"))


def _devices() -> dict[str, str]:
    import torch

    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    devices = {
        "cpu": f"{os.cpu_count()} cores, {usable} of them usable; PyTorch runs {torch.get_num_threads()} threads"
    }
    for index in range(torch.cuda.device_count()):
        gpu = torch.cuda.get_device_properties(index)
        name = f"cuda:{index}"
        devices[name] = f"{gpu.name}, {gpu.total_memory / 2**30:.1f} GiB, compute capability {gpu.major}.{gpu.minor}"
    if len(devices) == 1:
        builds = {"CUDA": torch.version.cuda, "ROCm": torch.version.hip}
        build = " and ".join(f"{name} {version}" for name, version in builds.items() if version) or "the CPU only"
        devices["gpu"] = f"none found; PyTorch {torch.__version__} is built for {build}"
    return devices


def _is_gpu(device: str) -> bool:
    return device.startswith("cuda:")


def _kernels(device: str) -> dict[str, str]:
    """The proof of every operator's kernels in every dtype they know; one whose obstacle is known is not tried."""
    import torch

    import fastris.ops  # noqa: F401 - makes the proofs known
    from fastris import dispatch

    gpu, found = torch.device(device), dict[str, str]()
    for name in (operator.name for operator in OPERATORS.values() if operator.kernels):
        for dtype in dispatch.KERNEL_DTYPES:
            wrong = dispatch.unproved_obstacle(gpu, dtype) or dispatch.prove(name, gpu, dtype)
            found[f"{name}, {str(dtype).removeprefix('torch.')}"] = str(wrong or "right")
    return found


def _operators(device: str) -> dict[str, str]:
    from fastris.dispatch import chosen_paths

    return {operator: f"{path}: {reason}" for operator, path, reason in chosen_paths(device)}


def _page(found: dict[str, dict[str, Any]]) -> str:
    by_device = ("kernels", "operators")
    sections = {name: lines for name, lines in found.items() if name not in by_device}
    for section in by_device:
        sections |= {f"{section} on {device}": lines for device, lines in found[section].items()}
    width = max(len(name) for lines in sections.values() for name in lines)
    return "\n\n".join(
        "\n".join([title, *(f"  {name:<{width}}  {text}" for name, text in lines.items())])
        for title, lines in sections.items()
        if lines
    )
