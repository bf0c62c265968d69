"""Run a model on one picture and its phrases: as it is, compiled, or as CUDA graphs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

PHRASES_AT_ONCE = 32
"""Phrases in one batch, for a model that encodes the picture once."""

IMAGES_AT_ONCE = 8
"""Phrases in one batch, for a model that encodes the picture again for every phrase."""

_WARM_UPS = 2  # calls before a capture: they choose kernels and allocate what is kept

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16, "float64": torch.float64}


def checked_dtype(dtype: str | torch.dtype) -> torch.dtype:
    """The PyTorch dtype of a name. Raises ValueError, listing them, for another."""
    found = DTYPES.get(dtype) if isinstance(dtype, str) else dtype
    if found is None or found not in DTYPES.values():
        raise ValueError(f"dtype={dtype!r} is unknown; choose from {', '.join(DTYPES)}")
    return found


class Runner:
    """Computes the logits (N, h, w) float32 of one square (3, S, S) and tokens (N, L), on the model's device.

    Args:
        model: in eval mode, on its device.
        compile: compile both halves with torch.compile at the first call, which takes minutes. A model that encodes
            the picture again for every phrase is compiled for 1, 2, 4, ... phrases: over a number that is left open
            its graph takes torch.compile hours.
        cuda_graph: capture the work for 1, 2, 4, ... phrases at the first call with so many, and replay it. The weights
            must then stay where they are; changes of their values are seen.

    Raises ValueError for both together, or for ``cuda_graph`` on anything but a CUDA device.
    """

    def __init__(self, model: Any, compile: bool = False, cuda_graph: bool = False):
        device = next(model.parameters()).device
        if compile and cuda_graph:
            raise ValueError("compile and cuda_graph cannot both be on; leave one out")
        if cuda_graph and device.type != "cuda":
            raise ValueError(f"cuda_graph needs a CUDA device, and the model is on {device}; leave it out")
        self.model, self.compile, self.cuda_graph = model, compile, cuda_graph
        self._pads = compile and not getattr(model, "shares_image", True)
        how: dict[str, Any] = {"dynamic": False} if self._pads else {}
        self._encode: Callable[..., Any] = torch.compile(model.encode_image, **how) if compile else model.encode_image
        self._segment: Callable[..., Any] = torch.compile(model.segment, **how) if compile else model.segment
        self._graphs: dict[tuple[int, ...], _Captured] = {}

    @torch.inference_mode()
    def __call__(self, square: Tensor, tokens: Tensor) -> Tensor:
        self.model.eval()
        parameter = next(self.model.parameters())
        images, tokens = square[None].to(parameter), tokens.to(parameter.device)
        if self.cuda_graph:
            return torch.cat([self._replayed(images, chunk) for chunk in tokens.split(self._at_once)])
        return self.answer(self._encode(images), tokens)

    @torch.inference_mode()
    def encode(self, square: Tensor) -> Any:
        """What the model keeps of one square (3, S, S), on its device, for any number of calls of :meth:`answer`.

        Raises ValueError with ``cuda_graph``, whose graphs hold both halves of the work.
        """
        if self.cuda_graph:
            raise ValueError("cuda_graph replays picture and phrases as one, so no picture can be kept; leave it out")
        self.model.eval()
        return self._encode(square[None].to(next(self.model.parameters())))

    @torch.inference_mode()
    def answer(self, features: Any, tokens: Tensor) -> Tensor:
        """The logits (N, h, w) float32 of tokens (N, L), of what :meth:`encode` returned."""
        tokens = tokens.to(next(self.model.parameters()).device)
        return torch.cat([self._scored(features, chunk) for chunk in tokens.split(self._at_once)])

    @property
    def _at_once(self) -> int:
        return PHRASES_AT_ONCE if getattr(self.model, "shares_image", True) else IMAGES_AT_ONCE

    def _scored(self, features: Any, tokens: Tensor) -> Tensor:
        padded = _to_power_of_two(tokens) if self._pads else tokens
        index = torch.zeros(len(padded), dtype=torch.int64, device=tokens.device)
        return self._segment(features, padded, index)[: len(tokens), 0].float().cpu()

    def _replayed(self, images: Tensor, tokens: Tensor) -> Tensor:
        padded = _to_power_of_two(tokens)
        key = (*images.shape, *padded.shape)
        if key not in self._graphs:
            self._graphs[key] = _Captured(self.model, images, padded)
        return self._graphs[key](images, padded)[: len(tokens), 0].float().cpu()


def _to_power_of_two(tokens: Tensor) -> Tensor:
    """Tokens (N, L) and the first row again and again, up to 1, 2, 4, ... rows."""
    rows = 1 << (len(tokens) - 1).bit_length()
    return torch.cat([tokens, tokens[:1].expand(rows - len(tokens), -1)])


class _Captured:
    """The model's work on inputs of these shapes, as a CUDA graph with tensors of its own."""

    def __init__(self, model: Any, images: Tensor, tokens: Tensor):
        from fastris.runtime.graph_timing import captured

        self.images, self.tokens = images.clone(), tokens.clone()
        self.logits: Any = None
        index = torch.zeros(len(tokens), dtype=torch.int64, device=tokens.device)

        def work() -> None:
            self.logits = model.segment(model.encode_image(self.images), self.tokens, index)

        with torch.cuda.device(images.device):
            for _ in range(_WARM_UPS):
                work()
            torch.cuda.synchronize()
            try:
                self.graph = captured(work)
            except RuntimeError as error:
                why = " ".join(str(error).split())[:200]
                raise RuntimeError(f"cuda_graph: this model cannot be captured ({why}); leave it out") from error
        self.device = images.device

    def __call__(self, images: Tensor, tokens: Tensor) -> Tensor:
        with torch.cuda.device(self.device):
            self.images.copy_(images)
            self.tokens.copy_(tokens)
            self.graph.replay()
        return self.logits
