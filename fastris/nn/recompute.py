"""Less memory for the backward pass, for time: parts of the forward are computed again instead of kept.

Every convolution of the image encoder is followed by BatchNorm and ReLU. Autograd keeps the convolution's result for
the norm's gradient and the ReLU's result for the next convolution's: two maps where one would do, because the second
is a pointwise function of the first. ``"pointwise"`` keeps what products compute (convolutions, matrix products,
attention) and the small maps that pooling leaves, and computes the rest again: norms, ReLU, casts of the weights to
autocast's dtype. ``"stages"`` does too, but keeps nothing but the input of those stages of the image encoder that have
the largest maps for the cheapest products: the stem, layer1 and layer2.

Both keep nothing but the input of the text encoder. It computes little for its many small operations, of which every
one costs time to watch.

Both are ``torch.utils.checkpoint`` without reentrance, the first with selective contexts. A hand-written autograd
function for convolution, norm and ReLU would keep as much and dispatch faster, but would have to do again, for every
dtype and memory format, what autograd, autocast and SyncBatchNorm do for the modules as they are, and match their bits.
:func:`recomputed` adds what PyTorch leaves to the caller: BatchNorm's running statistics move once, modules compute
again in the mode (training or not) and by the path (:mod:`fastris.dispatch`) of the forward pass, and the casts of one
pass do not depend on another pass's.

The decoder and the projector are left alone: their autograd functions keep little as they are.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from fastris.dispatch import requested_impl, use_impl

RECOMPUTE_SETTINGS = ("none", "pointwise", "stages")

_KEPT = ("convolution", "mm", "addmm", "bmm", "baddbmm", "linear", "matmul", "avg_pool2d")
_PRODUCTS = {f"{name}.default" for name in _KEPT}
_ATTENTION = "_scaled_dot_product"


def check_setting(setting: str) -> str:
    """``setting`` itself. Raises ValueError, with the valid ones, for any other."""
    if setting not in RECOMPUTE_SETTINGS:
        raise ValueError(f"recompute must be one of {', '.join(RECOMPUTE_SETTINGS)}, got {setting!r}")
    return setting


def recomputed(
    modules: Sequence[nn.Module], setting: str, function: Callable[..., Any], *inputs: Tensor, whole: bool = False
) -> Any:
    """``function(*inputs)``, with intermediate results that are computed again in the backward pass.

    Args:
        modules: what ``function`` calls, or what holds it; without them BatchNorm's statistics would move twice.
        setting: one of :data:`RECOMPUTE_SETTINGS`.
        function: deterministic but for PyTorch's generators, whose state is restored for the second pass.
        whole: keep nothing but the inputs, instead of what products compute.

    Values, gradients, dropout masks and BatchNorm's running statistics are those of ``"none"``, bit for bit. Nothing is
    recomputed in eval mode or without gradients. Under ``torch.compile``, ``"pointwise"`` is left to the compiler,
    which decides by itself which pointwise results to keep. SyncBatchNorm exchanges its sums once more, on all ranks
    in the same order. What kept products can be run backward once: PyTorch's selective checkpoints allow no more.
    """
    if setting == "none" or not any(module.training for module in modules) or not torch.is_grad_enabled():
        return function(*inputs)
    if torch.compiler.is_compiling():
        stage = whole and setting == "stages"
        return checkpoint(function, *inputs, use_reentrant=False) if stage else function(*inputs)
    kind, impl = inputs[0].device.type, requested_impl()

    def first_pass(*inputs: Tensor) -> Any:
        with _own_casts(kind):
            return function(*inputs)

    modes = [(module, module.training) for top in modules for module in top.modules()]

    def contexts() -> tuple[AbstractContextManager, AbstractContextManager]:
        keep, use = (nullcontext(),) * 2 if whole else create_selective_checkpoint_contexts(_keep_products)
        return keep, _second_pass(modes, impl, use)

    return checkpoint(first_pass, *inputs, use_reentrant=False, context_fn=contexts)


def _keep_products(context: Any, operator: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    return _policy(operator)


@functools.cache  # it is asked for every operation
def _policy(operator: Any) -> CheckpointPolicy:
    namespace, _, name = str(operator).partition(".")
    if name in _PRODUCTS or name.startswith(_ATTENTION) or namespace == "fastris":
        return CheckpointPolicy.MUST_SAVE
    return CheckpointPolicy.PREFER_RECOMPUTE


def _own_casts(kind: str) -> AbstractContextManager:
    """Autocast, where it is on, without its cache: else a second use of the weights in one block would cast nothing,
    and the copies would live until the block ends."""
    if not torch.is_autocast_enabled(kind):
        return nullcontext()
    return torch.autocast(kind, torch.get_autocast_dtype(kind), cache_enabled=False)


@contextmanager
def _second_pass(modes: list[tuple[nn.Module, bool]], impl: str, inner: AbstractContextManager) -> Iterator[None]:
    """Modules and operators in the mode of the first pass, and norms with copies of their running statistics to move.

    The backward pass may run outside the forward's :func:`use_impl` block, and on CUDA runs in another thread.
    """
    now = [(module, module.training) for module, _ in modes]
    moved = [
        (module, module._buffers.copy()) for module, training in modes if training and isinstance(module, _BatchNorm)
    ]
    try:
        for module, training in modes:
            module.training = training
        for norm, buffers in moved:
            for name, buffer in buffers.items():
                norm._buffers[name] = None if buffer is None else buffer.clone()
        with use_impl(impl), inner:
            yield
    finally:
        for module, training in now:
            module.training = training
        for norm, buffers in moved:
            norm._buffers.update(buffers)
