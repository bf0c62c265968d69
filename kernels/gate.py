"""``python -m fastris.kernels.gate``: the compile gate's name on the command line.

The gate runs the model's parts to see what they launch, so it lives above them, in ``fastris/gate``.
"""

from __future__ import annotations

import runpy

if __name__ == "__main__":
    runpy.run_module("fastris.gate", run_name="__main__")
