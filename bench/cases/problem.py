"""A case made concrete: a module and its tensors in one dtype on one device, which can be run, timed and checked."""

from __future__ import annotations

import copy
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.profiler import record_function

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
        tuned: whether Adam is fused and, on CUDA, images and weights are channels_last.
        published: what the reference arm runs in the module's place, where that has code of its own.
    """

    module: nn.Module
    inputs: dict[str, Tensor]
    data: dict[str, Tensor]
    training: bool = True
    optimizer: bool = False
    dtype: torch.dtype = torch.float32
    tuned: bool = False
    published: Callable[[nn.Module], nn.Module] | None = None

    def __post_init__(self) -> None:
        self._adam: list[torch.optim.Adam] = []  # made when first needed, and shared by with_module
        self._upstream: list[Tensor] = []
        self.module.train(self.training)

    def to(self, device: torch.device, dtype: torch.dtype, tuned: bool = False) -> Problem:
        """A copy of its own on ``device``, computing in ``dtype``, ``tuned`` or as it came."""
        wide = torch.float32 if dtype in LOW_PRECISION else dtype
        layout = torch.channels_last if tuned and device.type == "cuda" else torch.preserve_format
        module = copy.deepcopy(self.module).to(device, wide)
        if layout is torch.channels_last:
            module = module.to(memory_format=layout)
        inputs = {name: _moved(tensor, device, dtype, layout) for name, tensor in self.inputs.items()}
        data = {name: _moved(tensor, device, wide, layout) for name, tensor in self.data.items()}
        return replace(self, module=module, inputs=inputs, data=data, dtype=dtype, tuned=tuned)

    def with_module(self, module: nn.Module) -> Problem:
        """The same tensors and the same optimizer for another module on the same parameters."""
        other = replace(self, module=module)
        other._adam = self._adam
        return other

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
            outputs = (self.module if module is None else module)(**self.inputs, **self.data)
        return outputs if isinstance(outputs, tuple) else (outputs,)

    def step(self, module: Callable[..., Any] | None = None) -> None:
        """Everything that belongs to it: forward, or forward and backward, or these and an Adam step."""
        if not self.training:
            with torch.inference_mode():
                self.forward(module)
            return
        with record_function("forward"):
            outputs = self.training_forward(module)
        self.backward(outputs)

    def training_forward(self, module: Callable[..., Any] | None = None) -> tuple[Tensor, ...]:
        """The outputs, with what the backward pass needs."""
        self.leaves()
        return self.forward(module)

    def backward(self, outputs: tuple[Tensor, ...]) -> None:
        """All gradients of a loss, which comes first, or under random upstream gradients; and the Adam step."""
        try:
            with record_function("backward"):
                if outputs[0].ndim == 0:
                    outputs[0].backward()
                else:
                    ends = [output for output in outputs if output.requires_grad]
                    torch.autograd.backward(ends, self._upstream_of(ends))
            if self.optimizer:
                with record_function("optimizer"):
                    self._adam_step()
        finally:
            for leaf in self.leaves().values():
                leaf.grad = None

    def results(self, draws: int, module: Callable[..., Any] | None = None) -> dict[str, Tensor]:
        """Outputs, statistics that the forward pass updated, and gradients under ``draws`` random upstream gradients.

        The upstream gradients depend on the outputs' shapes alone, so that arms and dtypes share them. A gradient is
        (draws, *shape). Buffers change as in training: call it on a copy.
        """
        with torch.set_grad_enabled(self.training):
            outputs = self.training_forward(module) if self.training else self.forward(module)
        found = {f"output {i}": output.detach().clone() for i, output in enumerate(outputs)}
        if not self.training:
            return found
        found |= {f"statistic {name}": b.clone() for name, b in self.module.named_buffers() if b.is_floating_point()}
        leaves = self.leaves()
        drawn: dict[str, list[Tensor]] = {name: [] for name in leaves}
        for seed in range(draws):
            if seed:  # anew: a compiled backward pass may overwrite what its forward pass kept
                if self.device.type == "cuda":
                    torch.compiler.cudagraph_mark_step_begin()
                outputs = self.training_forward(module)
            ends = [output for output in outputs if output.requires_grad]
            seeds = _random_like(ends, seed)
            gradients = list(torch.autograd.grad(ends, list(leaves.values()), seeds, allow_unused=True))
            for name in reversed(leaves):  # one at a time: in float64 a whole model's are gigabytes
                if (gradient := gradients.pop()) is not None:
                    drawn[name].append(gradient.clone())
        stacked = {
            name: values[0][None] if draws == 1 else torch.stack(values) for name, values in drawn.items() if values
        }
        return found | {f"gradient of {name}": values for name, values in stacked.items()}

    def _autocast(self) -> AbstractContextManager:
        low = self.dtype in LOW_PRECISION
        return torch.autocast(self.device.type, dtype=self.dtype) if low else nullcontext()

    def _upstream_of(self, outputs: list[Tensor]) -> list[Tensor]:
        if not self._upstream:
            self._upstream = _random_like(outputs, seed=0)
        return self._upstream

    def _adam_step(self) -> None:
        """With a learning rate of 0: the same arithmetic, and the weights stay where they are round after round."""
        if not self._adam:
            self._adam.append(torch.optim.Adam(self.module.parameters(), lr=0.0, fused=self.tuned or None))
        self._adam[0].step()


def _moved(tensor: Tensor, device: torch.device, dtype: torch.dtype, layout: torch.memory_format) -> Tensor:
    moved = tensor.detach().to(device, dtype if tensor.is_floating_point() else tensor.dtype, copy=True)
    return moved.contiguous(memory_format=layout) if layout is torch.channels_last and moved.ndim == 4 else moved


def _random_like(outputs: list[Tensor], seed: int) -> list[Tensor]:
    """Random numbers in the layout, dtype and place of ``outputs``, the same for every one of these."""
    generator = torch.Generator().manual_seed(seed)
    random = (torch.randn(output.shape, generator=generator, dtype=torch.float64) for output in outputs)
    return [torch.empty_like(output).copy_(numbers) for output, numbers in zip(outputs, random, strict=True)]
