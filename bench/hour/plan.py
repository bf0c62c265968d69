"""The steps in their order: what matters most is on disk first. Imports no torch, so that help comes at once."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

NO_TF32 = {"NVIDIA_TF32_OVERRIDE": "0"}
"""cuBLAS and cuDNN compute float32 in IEEE float32, whatever PyTorch asks for: read by NVIDIA's libraries."""

POISONED = 70
"""Exit code of a step's process after an error that leaves its CUDA context unusable: see work.py."""

COMPILING = 4


@dataclass(frozen=True)
class Step:
    """One step.

    Attributes:
        name: on the command line and in the files; its work is in the module of that name beside this one.
        title: for people.
        share: of the minutes, in minutes of 30; what a step leaves goes to those after it.
        patience: seconds that one item may take before it counts as hanging; :data:`COMPILING` times that where its
            name says that it compiles; the tests' step watches its own.
        environment: variables of its process.
        tuned: whether it runs by what ``fastris tune`` has measured in this folder; the others, as fastris comes.
    """

    name: str
    title: str
    share: float
    patience: float
    environment: Mapping[str, str] = field(default_factory=dict)
    tuned: bool = False

    def patience_for(self, item: str) -> float:
        return self.patience * (COMPILING if "compiled" in item or "autotune" in item else 1)


STEPS = (
    Step("device", "device, versions, copy bandwidth, matrix products per dtype", 1.0, 60),
    Step("tests", "kernel tests, and tests that need a GPU, without TF32", 6.0, math.inf, NO_TF32),
    Step("sanitizer", "compute-sanitizer on tiny cases: memcheck, racecheck", 3.5, 240),
    Step("kernels", "operators by graph replay: repaired, torch, Triton; without TF32", 7.0, 90, NO_TF32),
    Step("tune", "fastris tune", 2.5, 600, tuned=True),
    Step("training", "the training step in bfloat16: time and peak memory", 5.0, 120, tuned=True),
    Step("profile", "a profile of one training step", 1.5, 90, tuned=True),
    Step("curve", "real training steps, torch against Triton: the same curve", 3.5, 240, NO_TF32, tuned=True),
)
