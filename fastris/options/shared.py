"""Types of options that several commands have."""

from __future__ import annotations

from typing import Literal

Amp = Literal["auto", "bf16", "fp16", "off"]
"""The option for mixed precision; :meth:`fastris.runtime.device.Precision.choose` resolves it for the device."""
