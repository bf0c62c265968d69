"""What stands in for a GPU where :mod:`.scenarios` run on a CPU."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._library.custom_ops import OPDEFS
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode


class CudaAutocast(TorchFunctionMode):
    """Autocast on a CPU as it is on CUDA where that decides a kernel's types: there LayerNorm answers in float32."""

    def __torch_function__(self, function, types, arguments=(), keywords=None):
        if function is F.layer_norm and torch.is_autocast_enabled("cpu"):
            arguments = [value.float() if isinstance(value, Tensor) else value for value in arguments]
        return function(*arguments, **(keywords or {}))


class HollowProducts(TorchDispatchMode):
    """Matrix products only answer with the right shape: their values decide no launch, and they would take minutes."""

    HOLLOW = frozenset({"aten::mm", "aten::bmm", "aten::addmm", "aten::baddbmm"})

    def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
        keywords, name = keywords or {}, function._schema.name
        if name in OPDEFS:  # an operator with kernels: the products between its launches are hollow, too
            with self:
                return OPDEFS[name]._init_fn(*arguments, **keywords)
        if name not in self.HOLLOW:
            return function(*arguments, **keywords)
        if "out" in keywords:
            return keywords["out"]
        first, second = [each for each in arguments if isinstance(each, Tensor)][-2:]
        return first.new_zeros(*first.shape[:-1], second.shape[-1])
