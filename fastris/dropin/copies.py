"""Copies of a module to run tests on: random parameters, no hooks, no shared state."""

from __future__ import annotations

import copy
import math
import random
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
_HOOK_FLAGS = ("_forward_hooks_with_kwargs", "_forward_hooks_always_called", "_forward_pre_hooks_with_kwargs")
# The length of the repeated sequence of random numbers: a prime, so that no two rows of a weight begin alike.
_PERIOD = 65_537


class Noise:
    """Normal random numbers of one dtype on one device, equal in every process; global generators are not touched."""

    def __init__(self, dtype: torch.dtype, device: torch.device):
        self.device = device
        generator = torch.Generator(device).manual_seed(0)
        self._numbers = torch.randn(_PERIOD, generator=generator, dtype=dtype, device=device)
        self._at = 0

    def __call__(self, *shape: int) -> Tensor:
        end = self._at + math.prod(shape)
        numbers = self._numbers.repeat(end // _PERIOD + 1) if end > _PERIOD else self._numbers
        drawn = numbers[self._at : end].clone().view(shape)
        self._at = end % _PERIOD
        return drawn


def random_copy(module: nn.Module, noise: Noise) -> nn.Module:
    """A deep copy without hooks, with random parameters and statistics in the dtype and on the device of ``noise``.

    SyncBatchNorm is replaced by a BatchNorm of this process alone. Raises TypeError where a parameter or buffer has no
    values (meta device), and whatever copying the module raises.
    """
    kept: dict[int, Any] = {}
    for child in module.modules():
        for name in (*HOOKS, *_HOOK_FLAGS):
            kept[id(getattr(child, name))] = OrderedDict()
        for parameter in child.parameters(recurse=False):
            drawn = _with_fan_in(parameter, noise)
            kept[id(parameter)] = nn.Parameter(drawn, requires_grad=drawn.is_floating_point())
        for name, buffer in child.named_buffers(recurse=False):
            kept[id(buffer)] = _statistics(name, buffer, noise)
    return _local_norms(copy.deepcopy(module, kept))


def fresh_copy(original: nn.Module) -> nn.Module:
    """A deep copy that shares only the parameters with ``original``."""
    return copy.deepcopy(original, {id(parameter): parameter for parameter in original.parameters()})


def without_dropout(module: nn.Module, dropped: str | None = None) -> nn.Module:
    """Set every dropout's probability to 0, or to 1 for the one named ``dropped``; returns ``module``."""
    for name, child in module.named_modules():
        if isinstance(child, nn.Dropout):
            child.p = float(name == dropped)
        elif isinstance(child, nn.MultiheadAttention):
            child.dropout = float(name == dropped)
    return module


def _with_fan_in(parameter: Tensor, noise: Noise) -> Tensor:
    _check_values(parameter)
    if not parameter.is_floating_point():
        return parameter.detach().to(noise.device, copy=True)
    fan_in = parameter[0].numel() if parameter.ndim > 1 else 4
    return noise(*parameter.shape).mul_(max(fan_in, 1) ** -0.5).add_(1.0 if parameter.ndim == 1 else 0.0)


def _statistics(name: str, buffer: Tensor, noise: Noise) -> Tensor:
    _check_values(buffer)
    if not buffer.is_floating_point():
        return buffer.detach().to(noise.device, copy=True)
    drawn = noise(*buffer.shape)
    return drawn.abs_().clamp_(max=1.5).add_(0.5) if name.endswith("running_var") else drawn


def _check_values(tensor: Tensor) -> None:
    if tensor.is_meta:
        raise TypeError("its tensors are on the meta device and have no values")


class _LocalNorm(nn.modules.batchnorm._BatchNorm):
    """BatchNorm of this process alone, for any number of dimensions, in place of SyncBatchNorm."""

    def _check_input_dim(self, input: Tensor) -> None:
        pass


def _local_norms(module: nn.Module) -> nn.Module:
    """Replace SyncBatchNorm in place: in a distributed run it would wait for other processes, and needs a GPU."""
    for name, child in module.named_children():
        if isinstance(child, nn.SyncBatchNorm):
            local = _LocalNorm(child.num_features, child.eps, child.momentum, child.affine, child.track_running_stats)
            local._parameters, local._buffers = child._parameters, child._buffers
            setattr(module, name, local.train(child.training))
        else:
            _local_norms(child)
    return module


@contextmanager
def unnoticed(device: torch.device) -> Iterator[None]:
    """In this block random numbers are drawn without effect outside, and autocast and inference mode are off."""
    python, numpy = random.getstate(), np.random.get_state()
    with ExitStack() as stack:
        stack.enter_context(torch.random.fork_rng([device] if device.type == "cuda" else [], device_type="cuda"))
        stack.enter_context(torch.inference_mode(False))
        for kind in {"cpu", device.type}:
            stack.enter_context(torch.autocast(kind, enabled=False))
        try:
            yield
        finally:
            random.setstate(python)
            np.random.set_state(numpy)


def tensors_in(value: Any) -> list[Tensor]:
    """The tensors of a nested structure."""
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, (list, tuple)):
        return [tensor for item in value for tensor in tensors_in(item)]
    if isinstance(value, dict):
        return [tensor for item in value.values() for tensor in tensors_in(item)]
    return []


def structure_of(value: Any) -> Any:
    """The nesting of a value's tensors: a type, or (type, structures of the items)."""
    if isinstance(value, (list, tuple)):
        return type(value), *map(structure_of, value)
    return Tensor if isinstance(value, Tensor) else type(value)
