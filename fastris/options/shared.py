"""Values that options of several commands take."""

from __future__ import annotations

from typing import Literal

Amp = Literal["auto", "bf16", "fp16", "off"]
"""Mixed precision, before :meth:`fastris.runtime.device.Precision.choose` decides what it means on the device."""
