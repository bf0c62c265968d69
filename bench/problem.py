"""A case made concrete: a module and its tensors in one dtype on one device, which can be run, timed and checked."""

from __future__ import annotations

import copy
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

LOW_PRECISION = (torch.float16, torch.bfloat16)


@dataclass
class Problem:
    """One computation: ``module(**inputs, **data)``, whose first output is differentiated when training.

    In float16 and bfloat16 it runs as in training: parameters stay float32, ``inputs`` (activations) arrive rounded,
    and the forward pass is under autocast. In float32 and float64 everything has that dtype.

    Attributes:
        module: holds the parameters; called with the tensors by name; returns one tensor or a tuple.
        inputs: activations by name, which get gradients when training.
        data: everything that gets none: masks, targets, tokens, images, positions.
        training: whether the backward pass belongs to it; else it runs under inference mode.
        optimizer: whether an Adam step on the parameters belongs to it, too.
        dtype: what it computes in.
    """

    module: nn.Module
    inputs: dict[str, Tensor]
    data: dict[str, Tensor]
    training: bool = True
    optimizer: bool = False
    dtype: torch.dtype = torch.float32

    def __post_init__(self) -> None:
        self._adam: torch.optim.Adam | None = None
        self._upstream: Tensor | None = None
        self.module.train(self.training)

    def to(self, device: torch.device, dtype: torch.dtype) -> Problem:
        """A copy of its own on ``device``, computing in ``dtype``."""
        wide = torch.float32 if dtype in LOW_PRECISION else dtype
        module = copy.deepcopy(self.module).to(device, wide)
        inputs = {name: _moved(tensor, device, dtype) for name, tensor in self.inputs.items()}
        data = {name: _moved(tensor, device, wide) for name, tensor in self.data.items()}
        return replace(self, module=module, inputs=inputs, data=data, dtype=dtype)

    @property
    def device(self) -> torch.device:
        return next(iter((self.inputs | self.data).values())).device

    def leaves(self) -> dict[str, Tensor]:
        """What gets a gradient: the activations and the parameters."""
        parameters = {name: p for name, p in self.module.named_parameters() if p.requires_grad}
        return {name: tensor.requires_grad_() for name, tensor in self.inputs.items()} | parameters

    def forward(self, module: Callable[..., Any] | None = None) -> tuple[Tensor, ...]:
        """The outputs, of ``module`` where an arm made one from this problem's."""
        with self._autocast():
            outputs = (module or self.module)(**self.inputs, **self.data)
        return outputs if isinstance(outputs, tuple) else (outputs,)

    def step(self, module: Callable[..., Any] | None = None) -> None:
        """What is timed: forward, or forward and backward, or these and an Adam step."""
        if not self.training:
            with torch.inference_mode():
                self.forward(module)
            return
        leaves = self.leaves()
        try:
            output = self.forward(module)[0]
            output.backward(None if output.ndim == 0 else self._upstream_of(output))
            if self.optimizer:
                self._adam_step()
        finally:
            for leaf in leaves.values():
                leaf.grad = None

    def results(self, draws: int, module: Callable[..., Any] | None = None) -> dict[str, Tensor]:
        """Outputs, statistics that the forward pass updated, and gradients under ``draws`` random upstream gradients.

        The upstream gradients depend on the outputs' shapes alone, so that arms and dtypes share them. A gradient is
        (draws, *shape). Buffers change as in training: call it on a copy.
        """
        leaves = self.leaves() if self.training else {}
        with torch.set_grad_enabled(self.training):
            outputs = self.forward(module)
        found = {f"output {i}": output.detach() for i, output in enumerate(outputs)}
        found |= {f"statistic {name}": b.clone() for name, b in self.module.named_buffers() if b.is_floating_point()}
        if not self.training:
            return found
        differentiable = [output for output in outputs if output.requires_grad]
        drawn: dict[str, list[Tensor]] = {name: [] for name in leaves}
        for seed in range(draws):
            upstream = _random_like(differentiable, seed)
            gradients = torch.autograd.grad(
                differentiable, list(leaves.values()), upstream, retain_graph=seed < draws - 1, allow_unused=True
            )
            for name, gradient in zip(leaves, gradients, strict=True):
                if gradient is not None:
                    drawn[name].append(gradient)
        return found | {f"gradient of {name}": torch.stack(values) for name, values in drawn.items() if values}

    def _autocast(self) -> AbstractContextManager:
        low = self.dtype in LOW_PRECISION
        return torch.autocast(self.device.type, dtype=self.dtype) if low else nullcontext()

    def _upstream_of(self, output: Tensor) -> Tensor:
        if self._upstream is None:
            (self._upstream,) = _random_like([output], seed=0)
        return self._upstream

    def _adam_step(self) -> None:
        """With a learning rate of 0: the same arithmetic, and the weights stay where they are round after round."""
        if self._adam is None:
            self._adam = torch.optim.Adam(self.module.parameters(), lr=0.0)
        self._adam.step()


def _moved(tensor: Tensor, device: torch.device, dtype: torch.dtype) -> Tensor:
    return tensor.detach().to(device, dtype if tensor.is_floating_point() else tensor.dtype, copy=True)


def _random_like(outputs: list[Tensor], seed: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(o.shape, generator=generator, dtype=torch.float64).to(o) for o in outputs]
