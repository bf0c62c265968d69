"""Whether a module may be passed over: whether code that works with its weights does all that calling it would do."""

from __future__ import annotations

from typing import Any

from torch import nn
from torch.nn.modules.module import _has_any_global_hook


def is_plainly(kind: type[nn.Module], module: Any) -> bool:
    """Whether calling the module does what its kind does and nothing else: no subclass, hook or forward of its own."""
    if type(module) is not kind or "forward" in vars(module):
        return False
    hooks = (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks)
    return not (any(hooks) or _has_any_global_hook())
