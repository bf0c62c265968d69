"""What is compared: every arm runs the same case, by one path of fastris, tuned or as published, perhaps compiled.

    reference         the published formulas as published, operation by operation
    repaired          the published formulas, repaired in an afternoon and tuned: see :func:`repair`
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

import copy
import importlib.util
import os
import shutil
import types
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastris import for_inference, reference
from fastris.dispatch import triton_obstacle, use_impl
from fastris.models.base import ReferringModel
from fastris.models.cris import TransformerDecoder, TransformerDecoderLayer

from ..options import BASELINE
from .builders import CrossAttention, SelfAttention
from .problem import Problem

M = TypeVar("M", bound=nn.Module)

COMPILE_CAPABILITY = (7, 0)
"""The least compute capability that torch.compile makes code for."""


@dataclass(frozen=True)
class Arm:
    """One way to run every case.

    Attributes:
        name: as on the command line and in the tables.
        impl: the path that the operators take, see :func:`fastris.use_impl`.
        repaired: whether attention is repaired, as :func:`repair` does.
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
        if self.repaired:
            problem = problem.with_module(repair(problem.module))
        if self.impl != "reference" and not problem.training and isinstance(problem.module, ReferringModel):
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
                stack.enter_context(_cudnn_benchmark())
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


@contextmanager
def _cudnn_benchmark() -> Iterator[None]:
    before, torch.backends.cudnn.benchmark = torch.backends.cudnn.benchmark, True
    try:
        yield
    finally:
        torch.backends.cudnn.benchmark = before


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


# The repaired baseline. A comparison with the published code as it stands would credit fastris with mistakes that have
# nothing to do with its ideas. This one keeps the published formulas and mends what costs time for nothing: attention
# weights that nobody reads are not asked for, so that PyTorch's fused attention runs, dropout included; position tables
# are computed once and not nine times a forward.


def repair(module: M) -> M:
    """A copy of ``module`` whose attention is repaired; parameters and buffers are the original's own, not copies."""
    own = {id(tensor): tensor for tensor in (*module.parameters(), *module.buffers())}
    repaired = copy.deepcopy(module, own)
    for part in repaired.modules():
        forward = FORWARDS.get(type(part))
        if forward is not None:
            part.__dict__["forward"] = types.MethodType(forward, part)
    return repaired


def _attend(attention: nn.MultiheadAttention, query: Tensor, key: Tensor, value: Tensor, **options: Any) -> Tensor:
    """Sequence-first attention through ``scaled_dot_product_attention``: the one repair is ``need_weights=False``."""
    output, _ = attention(query, key, value, need_weights=False, **options)
    return output


def _self_attention(
    x: Tensor, positions: Tensor, norm: nn.LayerNorm, attention: nn.MultiheadAttention, post: nn.LayerNorm, drop: float
) -> Tensor:
    """The published first sub-layer, sequence-first: ``x`` (N, B, D), ``positions`` (N, 1, D)."""
    normed = norm(x)
    query = normed + positions
    branch = post(_attend(attention, query, query, normed))
    return x + F.dropout(branch, drop, post.training)


def _cross_attention(
    x: Tensor,
    text: Tensor,
    positions: Tensor,
    text_positions: Tensor,
    padding_mask: Tensor | None,
    norm: nn.LayerNorm,
    attention: nn.MultiheadAttention,
    post: nn.LayerNorm,
    drop: float,
) -> Tensor:
    """The published second sub-layer, sequence-first: ``text`` (L, B, D), ``padding_mask`` (B, L)."""
    query, key = norm(x) + positions, text + text_positions
    branch = post(_attend(attention, query, key, text, key_padding_mask=padding_mask))
    return x + F.dropout(branch, drop, post.training)


def _layer(self: Any, vis: Tensor, txt: Tensor, vis_pos: Tensor, txt_pos: Tensor, pad_mask: Tensor | None) -> Tensor:
    vis = _self_attention(vis, vis_pos, self.norm1, self.self_attn, self.self_attn_norm, self.dropout1.p)
    text = txt, vis_pos, txt_pos, pad_mask
    vis = _cross_attention(vis, *text, self.norm2, self.multihead_attn, self.cross_attn_norm, self.dropout2.p)
    return vis + self.dropout3(self.ffn(self.norm3(vis)))


def _decoder(self: Any, vis: Tensor, txt: Tensor, pad_mask: Tensor | None) -> Tensor:
    _, dim, height, width = vis.shape
    vis_pos, txt_pos = position_tables(height, width, txt.shape[1], dim, str(vis.device), vis.dtype is torch.float64)
    pixels, words = vis.flatten(2).permute(2, 0, 1), txt.permute(1, 0, 2)
    for layer in self.layers:
        pixels = layer(pixels, words, vis_pos, txt_pos, pad_mask)
    return self.norm(pixels).permute(1, 2, 0)


def _self_attention_case(self: Any, x: Tensor, positions: Tensor) -> Tensor:
    parts = self.norm, self.attention, self.post_norm
    return _self_attention(x.transpose(0, 1), positions[:, None], *parts, 0.0).transpose(0, 1)


def _cross_attention_case(
    self: Any, x: Tensor, text: Tensor, positions: Tensor, text_positions: Tensor, padding_mask: Tensor
) -> Tensor:
    parts = self.norm, self.attention, self.post_norm
    given = x.transpose(0, 1), text.transpose(0, 1), positions[:, None], text_positions[:, None], padding_mask
    return _cross_attention(*given, *parts, 0.0).transpose(0, 1)


_tables: dict[tuple[int | str | bool, ...], tuple[Tensor, Tensor]] = {}


@torch.compiler.assume_constant_result
def position_tables(height: int, width: int, length: int, dim: int, device: str, double: bool) -> tuple[Tensor, Tensor]:
    """The published position tables (N, 1, D) and (L, 1, D), computed once per size; constants to torch.compile."""
    key = height, width, length, dim, device, double
    if key not in _tables:
        dtype = torch.float64 if double else torch.float32
        with torch.inference_mode(False):
            pixels, words = reference.sine_positions_2d(height, width, dim), reference.sine_positions_1d(length, dim)
            _tables[key] = pixels[:, None].to(device, dtype), words[:, None].to(device, dtype)
    return _tables[key]


FORWARDS: dict[type[nn.Module], Callable[..., Tensor]] = {
    TransformerDecoder: _decoder,
    TransformerDecoderLayer: _layer,
    CrossAttention: _cross_attention_case,
    SelfAttention: _self_attention_case,
}
"""Repaired forwards by the class whose instances get them; every other module runs as published."""
