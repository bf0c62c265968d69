"""What is assumed of a GPU that was not measured: where the kernels lose on paper, `auto` does not take them."""

from __future__ import annotations

from dataclasses import dataclass

from fastris.tuned.sizes import SMALL


@dataclass(frozen=True)
class Loss:
    """Where the kernels are expected to lose, and why. None stands for all; ``capability`` is the GPU's, (9, 0) say."""

    why: str
    operator: str | None = None
    precision: str | None = None
    bucket: str | None = None
    capability: tuple[int, int] | None = None


EXPECTED_LOSSES = (
    Loss(
        "its products of the pixels' size are cuBLAS's on either path, and nobody has measured whether the rest pays",
        operator="bidirectional_attention",
    ),
    Loss(
        "cuBLAS multiplies without each head's padding, and nobody has measured whether the rest pays",
        operator="word_attention",
    ),
    Loss(
        "its products of the pixels' size are cuBLAS's on either path, and nobody has measured whether the rest pays",
        operator="pixel_word_attention",
    ),
    Loss(
        "its products of the pixels' size are cuBLAS's on either path, and nobody has measured whether the rest pays",
        operator="word_pixel_attention",
    ),
    Loss("small batches are bound by launches, of which the kernels make more", bucket=SMALL),
    Loss(
        "in IEEE float32 its products have no tensor cores, and cuBLAS tiles them better",
        operator="cross_attention",
        precision="float32",
    ),
    Loss(
        "in IEEE float32 its products have no tensor cores, and half of their rows are padding",
        operator="few_query_attention",
        precision="float32",
    ),
    Loss(
        "on H100 and H200 the float32 gather costs more than cuDNN's convolution",
        operator="upsample2x_conv3x3",
        precision="float32",
        capability=(9, 0),
    ),
)
"""The conservative table. A measurement on the GPU itself (`fastris tune`) takes its place."""


def expected_loss(operator: str, precision: str, bucket: str, capability: tuple[int, int]) -> str | None:
    """Why the kernels are expected to lose there, or None where they are expected to win."""
    asked = {"operator": operator, "precision": precision, "bucket": bucket, "capability": capability}
    for loss in EXPECTED_LOSSES:
        if all(getattr(loss, name) in (None, value) for name, value in asked.items()):
            return loss.why
    return None
