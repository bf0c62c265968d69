"""What is compared: every arm runs the same case, by one path of fastris, tuned or as published, perhaps compiled.

    reference         the published formulas as published, operation by operation
    repaired          the published formulas, repaired in an afternoon and tuned: see :func:`repaired_formulas`
    compiled          repaired, under torch.compile
    max_autotune      repaired, under torch.compile(mode="max-autotune")
    torch             fastris's algebra in plain PyTorch
    triton            fastris's algebra with its Triton kernels
    fastris_compiled  whatever path fastris chooses by itself, under torch.compile

Where the whole model only answers, fastris's arms run it as ``fastris eval`` does, through ``for_inference``.

All but the first are tuned alike: fused Adam and, on CUDA, channels_last and cudnn.benchmark. On a CPU channels_last
stays off in training for everybody: :func:`fastris.runtime.device.layout_for` says why.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastris import for_inference, reference
from fastris.dispatch import triton_obstacle, use_impl
from fastris.models.cris import decoder

from ..options import BASELINE
from .problem import Problem

COMPILE_CAPABILITY = (7, 0)
"""The least compute capability that torch.compile makes code for."""


@dataclass(frozen=True)
class Arm:
    """One way to run every case.

    Attributes:
        name: as on the command line and in the tables.
        impl: the path that the operators take, see :func:`fastris.use_impl`.
        repaired: whether they are :func:`repaired_formulas`.
        tuned: whether it has the settings that everybody would choose: see above.
        compile: keyword arguments of ``torch.compile``, or None to run eagerly.
        asked: device types where it runs only when asked for by name.
    """

    name: str
    impl: str
    repaired: bool = False
    tuned: bool = True
    compile: Mapping[str, Any] | None = None
    asked: tuple[str, ...] = ()

    def prepare(self, problem: Problem) -> tuple[Problem, Callable[..., Any]]:
        """``problem`` as this arm computes it, on the same parameters, and what is called in its module's place."""
        if self.name == BASELINE and problem.published is not None:
            problem = problem.with_module(problem.published(problem.module))
        if self.impl != "reference" and not problem.training and _is_whole_model(problem.module):
            problem = problem.with_module(for_inference(problem.module))
        if self.compile is None:
            return problem, problem.module
        return problem, torch.compile(problem.module, dynamic=False, **self.compile)

    @contextmanager
    def active(self, new_step: bool = True) -> Iterator[None]:
        """Within this block fastris takes this arm's path, under this arm's settings.

        CUDA graphs may write over what the step before left, unless it is no ``new_step``.
        """
        with ExitStack() as stack:
            stack.enter_context(use_impl(self.impl))
            if self.tuned:
                stack.enter_context(swapped(torch.backends.cudnn, "benchmark", True))
            if self.repaired:
                stack.enter_context(repaired_formulas())
            if self.compile is not None and new_step:
                torch.compiler.cudagraph_mark_step_begin()
            yield

    def obstacle(self, device: torch.device, dtype: torch.dtype) -> str | None:
        """Why the arm cannot run on ``device`` in ``dtype``, or None."""
        if self.impl == "triton" and (why := triton_obstacle(device, dtype)):
            return why
        return compile_obstacle(device) if self.compile is not None else None


@contextmanager
def compiled_or_failed() -> Iterator[None]:
    """Within this block code that was compiled too often fails; it would fall back to eager, and be timed as compiled.

    Kept out of :meth:`Arm.active`, which is timed.
    """
    import torch._dynamo

    with torch._dynamo.config.patch(fail_on_recompile_limit_hit=True):
        yield


def _is_whole_model(module: nn.Module) -> bool:
    from fastris.models.base import ReferringModel  # it needs huggingface_hub, and operators do not

    return isinstance(module, ReferringModel)


def compile_obstacle(device: torch.device) -> str | None:
    """Why ``torch.compile`` cannot make code for ``device``, or None."""
    if device.type == "cpu":
        wanted = os.environ.get("CXX") or "g++"
        if shutil.which(wanted) or ("CXX" not in os.environ and shutil.which("clang++")):
            return None
        return f"torch.compile needs a C++ compiler on a CPU, and {wanted} is not found (install g++, or set CXX)"
    if importlib.util.find_spec("triton") is None:
        return "torch.compile needs Triton on a GPU (pip install triton)"
    if torch.version.hip is None and torch.cuda.get_device_capability(device) < COMPILE_CAPABILITY:
        needed = ".".join(map(str, COMPILE_CAPABILITY))
        return f"torch.compile needs compute capability {needed}, which {torch.cuda.get_device_name(device)} lacks"
    return None


ARMS = {
    arm.name: arm
    for arm in (
        Arm(BASELINE, "reference", tuned=False),
        Arm("repaired", "reference", repaired=True),
        Arm("compiled", "reference", repaired=True, compile={}),
        Arm("max_autotune", "reference", repaired=True, compile={"mode": "max-autotune"}, asked=("cpu",)),
        Arm("torch", "torch"),
        Arm("triton", "triton"),
        Arm("fastris_compiled", "auto", compile={}),
    )
}


def choose_arms(names: tuple[str, ...], device: torch.device, dtype: torch.dtype) -> list[Arm]:
    """The arms called ``names``, with the baseline first; for no names, all that run on ``device`` in ``dtype``.

    Raises ValueError for a name that is unknown or that cannot run, with the ones that can.
    """
    obstacles = {name: arm.obstacle(device, dtype) for name, arm in ARMS.items()}
    usable = [name for name, obstacle in obstacles.items() if obstacle is None]
    for name in names:
        if name not in ARMS:
            raise ValueError(f"there is no arm {name!r}; the arms are {', '.join(ARMS)}")
        if obstacles[name]:
            raise ValueError(f"arm {name} cannot run: {obstacles[name]}. Here these can: {', '.join(usable)}")
    chosen = [name for name in usable if (name in names if names else device.type not in ARMS[name].asked)]
    return [ARMS[name] for name in dict.fromkeys((BASELINE, *chosen))]


@contextmanager
def repaired_formulas() -> Iterator[None]:
    """The published formulas without what costs time for nothing, within this block.

    A comparison with the published code as it stands would credit fastris with mistakes that have nothing to do with
    its ideas. Attention weights that nobody reads are not asked for, so that PyTorch's fused attention runs, dropout
    included, and position tables are computed once and not nine times a forward.
    """
    with attention_without_weights(), swapped(decoder, "_positions", _positions):
        yield


def attention_without_weights() -> AbstractContextManager[None]:
    """Within this block attention does not give the weights that nobody reads."""
    return swapped(F, "multi_head_attention_forward", _without_weights)


_WITH_WEIGHTS = F.multi_head_attention_forward


def _without_weights(*tensors: Any, **options: Any) -> Any:
    return _WITH_WEIGHTS(*tensors, **{**options, "need_weights": False})


def _positions(height: int, width: int, length: int, dim: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """The decoder's tables (N, 1, D) and (L, 1, D), from those that were computed once."""
    return position_tables(height, width, length, dim, str(device))


_tables: dict[tuple[int | str, ...], tuple[Tensor, Tensor]] = {}


@torch.compiler.assume_constant_result
def position_tables(height: int, width: int, length: int, dim: int, device: str) -> tuple[Tensor, Tensor]:
    """The published position tables, computed once per size; constants to torch.compile."""
    key = height, width, length, dim, device
    if key not in _tables:
        with torch.inference_mode(False):
            pixels, words = reference.sine_positions_2d(height, width, dim), reference.sine_positions_1d(length, dim)
            _tables[key] = pixels[:, None].to(device), words[:, None].to(device)
    return _tables[key]


@contextmanager
def swapped(owner: Any, name: str, value: Any) -> Iterator[None]:
    """An attribute's value within this block; quicker than a mock, as steps of a fraction of a millisecond enter it."""
    before = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, before)
