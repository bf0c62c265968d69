"""The one table of operators: dispatch, doctor, the compile gate, the benchmarks and the tests all read it.

A new operator is a row here, a function in ``fastris/reference``, a file in ``fastris/ops`` and, where it has kernels,
one in ``kernels``. The table holds names only, so that reading it imports neither PyTorch nor Triton.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Operator:
    """One operator.

    Attributes:
        name: the public function, in ``fastris.ops.<module>``.
        module: its file in ``fastris/ops``.
        reference: the function in ``fastris.reference`` with the published formula.
        kernels: the file in ``kernels`` with its Triton path; empty where plain PyTorch is the fast path.
        case: the name under which ``fastris bench --op`` measures it.
    """

    name: str
    module: str
    reference: str
    kernels: str
    case: str

    def function(self) -> Callable[..., Any]:
        """The public function itself; imports PyTorch."""
        return getattr(importlib.import_module(f"fastris.ops.{self.module}"), self.name)


OPERATORS: dict[str, Operator] = {
    operator.name: operator
    for operator in (
        Operator("text_to_pixel_similarity", "similarity", "text_to_pixel_similarity", "similarity", "similarity"),
        Operator("text_to_pixel_contrastive_loss", "contrastive", "contrastive_loss", "contrastive", "similarity"),
        Operator("cross_attention", "cross_attention", "cross_attention", "cross_attention", "cross_attention"),
        Operator("upsample2x_conv3x3", "upsample_conv", "upsample2x_conv3x3", "upsample_conv", "upsample_conv"),
        Operator("self_attention", "self_attention", "self_attention", "", "self_attention"),
        Operator("feed_forward", "feed_forward", "feed_forward", "", "feed_forward"),
        Operator("pointwise_conv_cat", "pointwise_conv", "pointwise_conv_cat", "", "neck"),
        Operator("coord_conv", "coord_conv", "coord_conv", "", "neck"),
        Operator("word_attention", "word_attention", "separate_attention", "word_attention", "word_attention"),
        Operator(
            "bidirectional_attention",
            "bidirectional_attention",
            "bidirectional_attention",
            "bidirectional_attention",
            "bidirectional_attention",
        ),
        Operator(
            "few_query_attention",
            "few_query_attention",
            "few_query_attention",
            "few_query_attention",
            "few_query_attention",
        ),
        Operator("region_contrast", "region_contrast", "region_contrast", "region_contrast", "region_contrast"),
        Operator(
            "upsampled_bce_with_logits", "upsampled_bce", "upsampled_bce_with_logits", "upsampled_bce", "upsampled_bce"
        ),
        Operator("pixel_contrast", "pixel_contrast", "pixel_contrast", "pixel_contrast", "pixel_contrast"),
        Operator(
            "pixel_word_attention",
            "pixel_word_attention",
            "pixel_word_attention",
            "pixel_word_attention",
            "pixel_word_attention",
        ),
        Operator(
            "word_pixel_attention",
            "word_pixel_attention",
            "word_pixel_attention",
            "bidirectional_attention",
            "word_pixel_attention",
        ),
        Operator(
            "multiscale_deformable_attention",
            "multiscale_deformable_attention",
            "multiscale_deformable_attention",
            "deformable_attention",
            "deformable_attention",
        ),
    )
}
"""Name -> operator, in the order in which reports list them."""
