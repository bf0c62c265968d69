"""Training on one small GPU: named settings by the card's memory, and which one to try when a batch does not fit.

=====  ===========  ==========  =====  ===================================================
gpu=   micro-batch  recompute   GiB    of a batch of 64, cris_r50 at 416 pixels, bf16
=====  ===========  ==========  =====  ===================================================
8gb    16           stages      5.4    4 parts; BatchNorm sees 16 references at a time
12gb   32           stages      7.0    2 parts; BatchNorm sees 32
16gb   64           stages      10.2   the whole batch at once, as published
24gb   64           pointwise   14.3   the whole batch at once, as published
=====  ===========  ==========  =====  ===================================================

Whatever the setting, an optimizer step averages the published batch of 64. What may change is BatchNorm: its statistics
follow the micro-batch, which is what one forward pass sees, so that a run of several parts is not quite the published
one. `--find-batch` looks for the largest part that fits; recomputation changes no number.

The sizes are worked out, not measured on these cards: see :func:`estimate_gib`. They leave a quarter of the card, which
is also enough for cris_r101. On 24 GiB recompute=none should fit cris_r50 (19.1 GiB), and is faster.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Recompute = Literal["auto", "none", "pointwise", "stages"]


@dataclass(frozen=True)
class GpuSetting:
    """What fits on a card.

    Attributes:
        memory: of the card, in GiB.
        micro_batch: references in one forward and backward pass.
        recompute: what is computed again in backward instead of kept; see :func:`.memory.set_recompute`.
        fused: update all weights in one kernel (CUDA only).
    """

    memory: int
    micro_batch: int
    recompute: Recompute
    fused: bool = True


GPU_SETTINGS = {
    "8gb": GpuSetting(8, 16, "stages"),
    "12gb": GpuSetting(12, 32, "stages"),
    "16gb": GpuSetting(16, 64, "stages"),
    "24gb": GpuSetting(24, 64, "pointwise"),
}
"""The table above, from the smallest card to the largest."""

_STEP_MIB = {"none": (263, 242), "pointwise": (72, 169), "stages": (72, 103)}
"""Peak of forward and backward in MiB, (whatever the batch, for each reference): cris_r50, 416 pixels, bf16 autocast,
17 tokens. Counted from the storages alive in a step on a CPU: the peaks in ``bench/results/whole_memory.json``."""

_WEIGHTS_GIB, _OTHER_GIB = 2.19, 1.5
"""146.8 million weights with gradients and Adam's two moments in float32; and a guess at what CUDA's context, cuDNN's
workspaces and fragmentation take."""


def estimate_gib(micro_batch: int, recompute: str) -> float:
    """What a training step of cris_r50 at 416 pixels in bf16 should need, in GiB. Worked out, not measured on a GPU."""
    fixed, each = _STEP_MIB[recompute]
    return _WEIGHTS_GIB + _OTHER_GIB + (fixed + each * micro_batch) / 1024


def find_setting(name: str) -> GpuSetting:
    """The setting of that name.

    Raises:
        ValueError: there is none.
    """
    if name not in GPU_SETTINGS:
        raise ValueError(f"gpu={name!r} is unknown; choose one of {', '.join(GPU_SETTINGS)}, the memory of the card")
    return GPU_SETTINGS[name]


def parts_for(batch_size: int, micro_batch: int, processes: int = 1, multiple_of: int = 1) -> int:
    """The fewest equal parts (`accumulate`) of a batch in which no process holds more than `micro_batch` references.

    `multiple_of`: a part holds a multiple of so many references (those of one image).

    Raises:
        ValueError: the batch does not split that way.
    """
    for parts in range(1, batch_size // processes + 1):
        size, rest = divmod(batch_size, parts * processes)
        if not rest and size <= micro_batch and size % multiple_of == 0 and size >= 2:
            return parts
    raise ValueError(
        f"batch_size={batch_size} does not split into equal parts of 2 to {micro_batch} references"
        + (f" for each of {processes} processes" if processes > 1 else "")
        + (f", a multiple of {multiple_of} (expressions_per_image)" if multiple_of > 1 else "")
        + "; choose another batch_size, such as 64, or give accumulate"
    )


@dataclass(frozen=True)
class MemoryUse:
    """What decides how much memory a training step needs: the options of those names, and the number of processes."""

    batch_size: int
    accumulate: int = 1
    recompute: str = "none"
    gpu: str | None = None
    processes: int = 1

    @property
    def at_once(self) -> int:
        """References that one process holds in one forward and backward pass."""
        return self.batch_size // self.accumulate // self.processes


def what_next(use: MemoryUse) -> str:
    """What to do about a batch that does not fit, with the next smaller setting by name."""
    gpu = f", gpu={use.gpu}" if use.gpu else ""
    text = (
        f"{use.at_once} references at once (batch_size={use.batch_size}, "
        f"accumulate={use.accumulate}, recompute={use.recompute}{gpu}) do not fit this GPU. "
    )
    if use.recompute != "stages":
        text += "recompute=stages needs less memory and changes no number, so that --resume takes it. "
    smaller = next_smaller(use)
    if smaller is None:
        text += f"There is no smaller setting; more parts are accumulate={2 * use.accumulate}"
    else:
        setting = GPU_SETTINGS[smaller]
        text += (
            f"The next smaller setting is gpu={smaller} (micro-batch {setting.micro_batch}, "
            f"recompute={setting.recompute}; leave out accumulate= and recompute=)"
        )
    return text + (
        ", which is another run, because BatchNorm's statistics follow the micro-batch: choose a new output_folder. "
        "--find-batch searches for the largest micro-batch that fits"
    )


def next_smaller(use: MemoryUse) -> str | None:
    """The largest setting that needs clearly less than what is in use, going by :func:`estimate_gib`; None: none does.

    Where `gpu` is given, only settings for smaller cards come into question.
    """
    names = list(GPU_SETTINGS)
    names = names[: names.index(use.gpu)] if use.gpu else names
    now = estimate_gib(use.at_once, use.recompute)
    less = [
        name for name in names if estimate_gib(GPU_SETTINGS[name].micro_batch, GPU_SETTINGS[name].recompute) < now - 0.1
    ]
    return less[-1] if less else None
