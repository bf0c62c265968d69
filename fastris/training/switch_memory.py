"""What the switches of a CRIS add to the memory of a training step: for the settings of small GPUs.

``python -m bench.switch_memory`` counts the bytes, of cris_r50 at 416 pixels with 17 tokens in bf16, and fails
where :data:`ADDED` says less than it finds, of each switch and of all that go together.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Added:
    """What is added to a plain CRIS.

    Attributes:
        parameters: weights, all of which are trained.
        step_mib: to the peak of forward and backward in MiB, (whatever the batch, for each reference), by recompute
            setting.
    """

    parameters: float
    step_mib: Mapping[str, tuple[float, float]]

    def plus(self, other: Added, times: float = 1.0) -> Added:
        """Both together, the other so many ``times``."""
        step = {
            recompute: (fixed + times * other.step_mib[recompute][0], each + times * other.step_mib[recompute][1])
            for recompute, (fixed, each) in self.step_mib.items()
        }
        return Added(self.parameters + times * other.parameters, step)


NOTHING = Added(0, {"none": (0, 0), "pointwise": (0, 0), "stages": (0, 0)})

ADDED: dict[str, Added] = {
    "vlba=neck": Added(19_287_808, {"none": (0, 14), "pointwise": (0, 14), "stages": (0, 14)}),
    "vlba=trunk": Added(57_839_872, {"none": (0, 79), "pointwise": (0, 74), "stages": (221, 13)}),
    "alignment_module=trunk": Added(120_448_000, {"none": (0, 62), "pointwise": (0, 72), "stages": (0, 33)}),
    "centre_layers": Added(20_886_785, {"none": (2, 4), "pointwise": (0, 4), "stages": (0, 4)}),
    "mask_grounding": Added(13_714_688, {"none": (83, 33), "pointwise": (59, 5), "stages": (55, 5)}),
    "alignment_loss": Added(262_656, {"none": (0, 1), "pointwise": (0, 1), "stages": (0, 1)}),
    "instance_contrast": Added(0, {"none": (0, 8), "pointwise": (0, 8), "stages": (0, 8)}),
}
"""By switch: its name, or name=value where it has several places."""

COUNTED_LAYERS = {"centre_layers": ("centre_layers", 6), "mask_grounding": ("predictor_layers", 4)}
"""Switch -> the option that says how many layers it has, and how many of them were counted."""


def switched_on(options: Mapping[str, Any]) -> dict[str, Any]:
    """Of a run's options those that switch something on, and those that say how many layers it has."""
    found: dict[str, Any] = {}
    for name, value in options.items():
        if _row(name, value) is not None:
            layers = COUNTED_LAYERS.get(name, (name, 0))[0]
            found |= {name: value} | ({layers: options[layers]} if layers in options else {})
    return found


def added_by(switches: Mapping[str, Any]) -> Added:
    """The sum of what switches add, given by the names of their options; what is off, or none of them, adds nothing.

    More layers than were counted add as much more as there are more of them; fewer layers count as these.
    """
    total = NOTHING
    for name, value in switches.items():
        row = _row(name, value)
        if row is not None:
            option, counted = COUNTED_LAYERS.get(name, ("", 1))
            layers = switches.get(option, counted)
            total = total.plus(row, max(1.0, layers / counted) if isinstance(layers, int) else 1.0)
    return total


def _row(name: str, value: Any) -> Added | None:
    return ADDED.get(f"{name}={value}") or (ADDED.get(name) if value else None)
