"""Activation recomputation: keep fewer tensors for the backward pass, and compute the others again there.

Every convolution of the image encoder is followed by BatchNorm and ReLU. Autograd keeps the convolution's result for
the norm's gradient and the ReLU's result for the next convolution's: two maps where one would do, because the second
is a pointwise function of the first. The settings:

- ``"pointwise"`` keeps the results of products (convolutions, matrix products, attention) and of pooling, and computes
  the rest again: norms, ReLU, casts of the weights to autocast's dtype.
- ``"stages"`` does the same, but of the stem, layer1 and layer2 it keeps the input alone. These stages of the image
  encoder have the largest maps and the cheapest products.

Of the text encoder both keep the input alone: it has many small operations, and deciding about each costs time.

Both use ``torch.utils.checkpoint`` (``use_reentrant=False``), the first with selective contexts. A hand-written
autograd function for convolution, norm and ReLU would keep as much and dispatch faster, but would have to repeat, for
every dtype and memory format, what autograd, autocast and SyncBatchNorm do, bit for bit. :func:`recomputed` adds what
PyTorch leaves to the caller: BatchNorm's running statistics are updated once, modules compute again in the mode
(training or not) and by the path (:mod:`fastris.dispatch`) of the forward pass, and each pass casts weights for itself.

CRIS's decoder and projector are not recomputed: their autograd functions keep little anyway. What AlignFormer computes
again, see :meth:`fastris.AlignFormer.set_recompute`.
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

_KEPT = ("convolution", "mm", "addmm", "bmm", "baddbmm", "linear", "_linear_pointwise", "matmul", "avg_pool2d")
_PRODUCTS = {f"{name}.default" for name in _KEPT}
_ATTENTION = "_scaled_dot_product"


def check_setting(setting: str) -> str:
    """Return ``setting``; raise ValueError unless it is one of :data:`RECOMPUTE_SETTINGS`."""
    if setting not in RECOMPUTE_SETTINGS:
        raise ValueError(f"recompute must be one of {', '.join(RECOMPUTE_SETTINGS)}, got {setting!r}")
    return setting


def recomputed(
    modules: Sequence[nn.Module], setting: str, function: Callable[..., Any], *inputs: Tensor, whole: bool = False
) -> Any:
    """Return ``function(*inputs)``; its intermediate results are computed again in the backward pass.

    Args:
        modules: the modules that ``function`` runs, or their parents. Their BatchNorm statistics are updated once only.
        setting: one of :data:`RECOMPUTE_SETTINGS`.
        function: deterministic but for PyTorch's generators, whose state is restored for the second pass.
        whole: keep the inputs alone, instead of the results of products.

    Values, gradients, dropout masks and BatchNorm's running statistics are those of ``"none"``, bit for bit. Nothing is
    recomputed in eval mode or without gradients. Under ``torch.compile``, ``"pointwise"`` is left to the compiler,
    which decides by itself which pointwise results to keep. SyncBatchNorm exchanges its sums once more, on all ranks
    in the same order. Unless ``whole``, the backward pass can run only once, as in PyTorch's selective checkpoints.
    """
    if setting == "none" or not any(module.training for module in modules) or not torch.is_grad_enabled():
        return function(*inputs)
    if torch.compiler.is_compiling():
        stage = whole and setting == "stages"
        return checkpoint(function, *inputs, use_reentrant=False) if stage else function(*inputs)
    kind, impl = inputs[0].device.type, requested_impl()

    def first_pass(*inputs: Tensor) -> Any:
        with _autocast_without_cache(kind):
            return function(*inputs)

    modes = [(module, module.training) for top in modules for module in top.modules()]

    def contexts() -> tuple[AbstractContextManager, AbstractContextManager]:
        keep, use = (nullcontext(),) * 2 if whole else create_selective_checkpoint_contexts(_keep_products)
        return keep, _restore_first_pass(modes, impl, use)

    return checkpoint(first_pass, *inputs, use_reentrant=False, context_fn=contexts)


def _keep_products(context: Any, operator: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    return _policy(operator)


@functools.cache  # it is called for every operation
def _policy(operator: Any) -> CheckpointPolicy:
    namespace, _, name = str(operator).partition(".")
    if name in _PRODUCTS or name.startswith(_ATTENTION) or namespace == "fastris":
        return CheckpointPolicy.MUST_SAVE
    return CheckpointPolicy.PREFER_RECOMPUTE


def _autocast_without_cache(kind: str) -> AbstractContextManager:
    """Autocast without its cache of cast weights, if autocast is on for the device type ``kind``.

    With the cache, a second use of a weight would record no cast to compute again, and the copies would stay in memory
    until the caller's autocast block ends.
    """
    if not torch.is_autocast_enabled(kind):
        return nullcontext()
    return torch.autocast(kind, torch.get_autocast_dtype(kind), cache_enabled=False)


@contextmanager
def _restore_first_pass(
    modes: list[tuple[nn.Module, bool]], impl: str, inner: AbstractContextManager
) -> Iterator[None]:
    """Recompute under the modules' modes and the operators' path of the first pass.

    Norms update copies of their running statistics, which are then dropped. The backward pass may run outside the
    forward's :func:`use_impl` block, and on CUDA runs in another thread.
    """
    modes_before = [(module, module.training) for module, _ in modes]
    own_buffers = [
        (module, module._buffers.copy()) for module, training in modes if training and isinstance(module, _BatchNorm)
    ]
    try:
        for module, training in modes:
            module.training = training
        for norm, buffers in own_buffers:
            for name, buffer in buffers.items():
                norm._buffers[name] = None if buffer is None else buffer.clone()
        with use_impl(impl), inner:
            yield
    finally:
        for module, training in modes_before:
            module.training = training
        for norm, buffers in own_buffers:
            norm._buffers.update(buffers)
