"""Inputs, calls and the dropout formula that both test files of cross-attention share."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from fastris.ops.cross_attention import cross_attention
from fastris.ops.proofs import masked_cross_attention
from fastris.reference import AttentionWeights

WEIGHTS = AttentionWeights._fields


@dataclass(frozen=True)
class Case:
    """One problem: batch, pixels, words, width, heads, and how many words of each sample are real (all by default)."""

    batch: int
    rows: int
    words: int
    dim: int
    heads: int
    real: tuple[int, ...] = ()

    def __str__(self) -> str:
        real = "-real" + ".".join(map(str, self.real)) if self.real else ""
        return f"B{self.batch}-N{self.rows}-L{self.words}-D{self.dim}-h{self.heads}{real}"

    @property
    def padding_mask(self) -> Tensor | None:
        """True where a word is padding, None where no lengths are given."""
        if not self.real:
            return None
        return torch.arange(self.words)[None] >= torch.tensor(self.real)[:, None]

    def inputs(self, scale: float = 1.0) -> dict[str, Tensor]:
        """Random tensors under the names that :meth:`call` takes; the logits grow with ``scale``."""
        generator = torch.Generator().manual_seed(0)
        dim = self.dim
        shapes = {"x": (self.batch, self.rows, dim), "text": (self.batch, self.words, dim)}
        shapes |= {"positions": (self.rows, dim), "text_positions": (self.words, dim)}
        shapes |= {"norm_weight": (dim,), "norm_bias": (dim,), "in_proj_weight": (3 * dim, dim)}
        shapes |= {"in_proj_bias": (3 * dim,), "out_proj_weight": (dim, dim), "out_proj_bias": (dim,)}
        shapes |= {"post_norm_weight": (dim,), "post_norm_bias": (dim,)}
        tensors = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
        for name in ("in_proj_weight", "in_proj_bias", "out_proj_weight", "out_proj_bias"):
            tensors[name] *= dim**-0.5
        tensors["in_proj_weight"][: 2 * dim] *= scale
        for name in ("norm_weight", "post_norm_weight"):
            tensors[name] = 1 + 0.2 * tensors[name]
        return tensors

    def call(self, impl: str, **options) -> Callable[..., Tensor]:
        """``cross_attention`` of this case as a function of the named tensors."""

        def function(x: Tensor, text: Tensor, positions: Tensor, text_positions: Tensor, **weights: Tensor) -> Tensor:
            mask = self.padding_mask
            mask = mask if mask is None else mask.to(x.device)
            sources = x, text, positions, text_positions, mask
            return cross_attention(*sources, AttentionWeights(**weights), self.heads, impl=impl, **options)

        return function


def masked_formula(
    case: Case, weights_kept: Tensor, branch_kept: Tensor, attention_dropout: float, dropout: float
) -> Callable[..., Tensor]:
    """The published sub-layer with given dropout masks (B, N, heads, L) and (B, N, D), True where kept."""

    def function(**named: Tensor) -> Tensor:
        masks = weights_kept, branch_kept, attention_dropout, dropout
        return masked_cross_attention(named, case.padding_mask, case.heads, *masks)

    return function
