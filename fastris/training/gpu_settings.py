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

alignformer_swin_b at 480 pixels with 20 words, bf16. It has no BatchNorm: parts average the gradient of the whole
batch, but for rounding, what dropout draws, and the instance contrast, which compares the references of one part:

=====  ===========  ==========  =====  ===================================================
gpu=   micro-batch  recompute   GiB    of a batch of 32
=====  ===========  ==========  =====  ===================================================
8gb    1            stages      6.0    32 parts
12gb   8            stages      7.7    4 parts
16gb   16           stages      9.7    2 parts
24gb   8            pointwise   15.3   4 parts; less is computed again
=====  ===========  ==========  =====  ===================================================

magnet_swin_b at 480 pixels with 20 words, bf16, without Mask Grounding and alignment loss. It has no BatchNorm, either:

=====  ===========  ==========  =====  ===================================================
gpu=   micro-batch  recompute   GiB    of a batch of 32
=====  ===========  ==========  =====  ===================================================
8gb    1            stages      6.2    32 parts; less than a quarter of the card is left
12gb   8            stages      8.8    4 parts
16gb   16           stages      11.7   2 parts
24gb   8            pointwise   17.3   4 parts; less is computed again
=====  ===========  ==========  =====  ===================================================

Every system has a row in :data:`SYSTEMS`; one without a row of its own goes by CRIS's. What switches add to a CRIS is
in :mod:`fastris.training.switch_memory`; where a setting would then leave less than a quarter of the card, more is
computed again, or fewer references are in a part.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from fastris.training.switch_memory import added_by

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


_OTHER_GIB = 1.5
"""A guess at what CUDA's context, cuDNN's workspaces and fragmentation take."""
_SHARE, _MOST_SHARE = 0.75, 0.9
"""How much of a card a CRIS with switches may need by the estimate, and how much where no setting needs less."""


@dataclass(frozen=True)
class SystemMemory:
    """What a system's training needs on a GPU, and what is chosen for each card.

    Attributes:
        settings: by name, from the smallest card to the largest.
        step_mib: peak of forward and backward in MiB, (whatever the batch, for each reference), by recompute setting;
            counted from the storages alive in a step on a CPU, in bf16 autocast at the recipe's size.
        weights_gib: weights with gradients and Adam's two moments in float32.
        smallest_part: references in the smallest part of a batch.
    """

    settings: Mapping[str, GpuSetting]
    step_mib: Mapping[str, tuple[float, float]]
    weights_gib: float
    smallest_part: int

    @property
    def statistics(self) -> bool:
        """Whether BatchNorm takes statistics from a part of the batch."""
        return self.smallest_part > 1

    def gib(self, micro_batch: int, recompute: str) -> float:
        """What a training step should need, in GiB."""
        fixed, each = self.step_mib[recompute]
        return self.weights_gib + _OTHER_GIB + (fixed + each * micro_batch) / 1024

    def with_switches(self, switches: Mapping[str, Any]) -> SystemMemory:
        """The same for a CRIS with switches, by the names of their options. A card too small for it has no setting."""
        added = added_by(switches)
        if not added.parameters and not any(map(any, added.step_mib.values())):
            return self
        step = {
            name: (fixed + added.step_mib[name][0], each + added.step_mib[name][1])
            for name, (fixed, each) in self.step_mib.items()
        }
        memory = replace(self, step_mib=step, weights_gib=self.weights_gib + 16 * added.parameters / 2**30)
        found = {name: memory._fitting(setting) for name, setting in self.settings.items()}
        return replace(memory, settings={name: setting for name, setting in found.items() if setting is not None})

    def _fitting(self, setting: GpuSetting) -> GpuSetting | None:
        """The setting, or the first that needs less and leaves a quarter of its card; None if none fits the card."""
        for each in _less_and_less(setting, self.smallest_part):
            needed = self.gib(each.micro_batch, each.recompute)
            if needed < _SHARE * each.memory:
                return each
        return each if needed < _MOST_SHARE * each.memory else None


def _less_and_less(setting: GpuSetting, smallest: int) -> Iterator[GpuSetting]:
    """The setting, then all computed again, then ever smaller parts of a batch."""
    yield setting
    if setting.recompute != "stages":
        setting = replace(setting, recompute="stages")
        yield setting
    while setting.micro_batch // 2 >= smallest:
        setting = replace(setting, micro_batch=setting.micro_batch // 2)
        yield setting


SYSTEMS = {
    "cris": SystemMemory(
        {
            "8gb": GpuSetting(8, 16, "stages"),
            "12gb": GpuSetting(12, 32, "stages"),
            "16gb": GpuSetting(16, 64, "stages"),
            "24gb": GpuSetting(24, 64, "pointwise"),
        },
        # cris_r50, 416 pixels, 17 tokens: the peaks in bench/results/whole_memory.json
        {"none": (263, 242), "pointwise": (72, 169), "stages": (72, 103)},
        2.19,  # 146.8 million
        smallest_part=2,
    ),
    "alignformer": SystemMemory(
        {
            "8gb": GpuSetting(8, 1, "stages"),
            "12gb": GpuSetting(12, 8, "stages"),
            "16gb": GpuSetting(16, 16, "stages"),
            "24gb": GpuSetting(24, 8, "pointwise"),
        },
        # alignformer_swin_b, 480 pixels, 20 words: counted as CRIS's, but "none" at one reference alone, where casts of
        # weights and gradients are taken as fixed
        {"none": (526, 1807), "pointwise": (130, 1231), "stages": (177, 251)},
        4.07,  # 273.2 million
        smallest_part=1,
    ),
    "magnet": SystemMemory(
        {
            "8gb": GpuSetting(8, 1, "stages"),
            "12gb": GpuSetting(12, 8, "stages"),
            "16gb": GpuSetting(16, 16, "stages"),
            "24gb": GpuSetting(24, 8, "pointwise"),
        },
        # magnet_swin_b, 480 pixels, 20 words: lines through the storages alive at one and at three references, counted
        # on tensors without values, deformable attention as its kernels keep it; gradients are in the weights' bytes,
        # and where the peak comes before all of them exist, the line begins below 0. "none": at one reference alone
        {"none": (-1025, 2950), "pointwise": (-1025, 1585), "stages": (-139, 380)},
        4.43,  # 297.0 million
        smallest_part=1,
    ),
}
"""The tables above, by system."""

DEFAULT = "cris"
GPU_SETTINGS = SYSTEMS[DEFAULT].settings
"""CRIS's settings, whose names are those of all systems."""


def memory_of(system: str, switches: Mapping[str, Any] | None = None) -> SystemMemory:
    """The row of a system, or CRIS's for one without; of a CRIS with ``switches`` by the names of their options."""
    memory = SYSTEMS.get(system, SYSTEMS[DEFAULT])
    return memory.with_switches(switches) if switches and system == DEFAULT else memory


def estimate_gib(
    micro_batch: int, recompute: str, system: str = DEFAULT, switches: Mapping[str, Any] | None = None
) -> float:
    """What a training step of cris_r50, or a ``system``'s model, should need, in GiB. Worked out, not measured."""
    return memory_of(system, switches).gib(micro_batch, recompute)


def find_setting(name: str, system: str = DEFAULT, switches: Mapping[str, Any] | None = None) -> GpuSetting:
    """The setting of that name for a system, with ``switches`` where it is a CRIS.

    Raises:
        ValueError: there is none, or the card is too small for the switches.
    """
    every, memory = memory_of(system).settings, memory_of(system, switches)
    if name not in every:
        raise ValueError(f"gpu={name!r} is unknown; choose one of {', '.join(every)}, the memory of the card")
    if name not in memory.settings:
        least = memory.gib(memory.smallest_part, "stages")
        raise ValueError(
            f"gpu={name} has no setting for a model with these switches: even {memory.smallest_part} references at a "
            f"time should need {least:.1f} GiB. Choose one of {', '.join(memory.settings)}, or leave a switch out"
        )
    return memory.settings[name]


def parts_for(batch_size: int, micro_batch: int, processes: int = 1, multiple_of: int = 1, smallest: int = 2) -> int:
    """The fewest equal parts (`accumulate`) of a batch in which no process holds more than `micro_batch` references.

    `multiple_of`: a part holds a multiple of so many references (those of one image), and at least `smallest`.

    Raises:
        ValueError: the batch does not split that way.
    """
    for parts in range(1, batch_size // processes + 1):
        size, rest = divmod(batch_size, parts * processes)
        if not rest and size <= micro_batch and size % multiple_of == 0 and size >= smallest:
            return parts
    raise ValueError(
        f"batch_size={batch_size} does not split into equal parts of {smallest} to {micro_batch} references"
        + (f" for each of {processes} processes" if processes > 1 else "")
        + (f", a multiple of {multiple_of} (expressions_per_image)" if multiple_of > 1 else "")
        + "; choose another batch_size, such as 64, or give accumulate"
    )


@dataclass(frozen=True)
class MemoryUse:
    """What decides how much memory a training step needs: the options of those names, the processes, the system.

    ``switches`` are those of a CRIS, by the names of their options.
    """

    batch_size: int
    accumulate: int = 1
    recompute: str = "none"
    gpu: str | None = None
    processes: int = 1
    system: str = DEFAULT
    switches: Mapping[str, Any] = field(default_factory=dict)

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
    memory, smaller = memory_of(use.system, use.switches), next_smaller(use)
    if smaller is None:
        text += f"There is no smaller setting; more parts are accumulate={2 * use.accumulate}"
    else:
        setting = memory.settings[smaller]
        text += (
            f"The next smaller setting is gpu={smaller} (micro-batch {setting.micro_batch}, "
            f"recompute={setting.recompute}; leave out accumulate= and recompute=)"
        )
    because = ", because BatchNorm's statistics follow the micro-batch" if memory.statistics else ""
    return text + (
        f", which is another run{because}: choose a new output_folder. "
        "--find-batch searches for the largest micro-batch that fits"
    )


def next_smaller(use: MemoryUse) -> str | None:
    """The largest setting that needs clearly less than what is in use, going by :func:`estimate_gib`; None: none does.

    Where `gpu` is given, only settings for smaller cards come into question.
    """
    memory = memory_of(use.system, use.switches)
    settings, names = memory.settings, list(memory.settings)
    if use.gpu:
        card = memory_of(use.system).settings[use.gpu].memory
        names = [name for name in names if settings[name].memory < card]
    now = memory.gib(use.at_once, use.recompute)

    def needs(setting: GpuSetting) -> float:
        return memory.gib(setting.micro_batch, setting.recompute)

    less = [name for name in names if needs(settings[name]) < now - 0.1]
    return less[-1] if less else None
