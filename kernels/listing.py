"""``python -m fastris.kernels.listing``: the name on the command line of fastris/gate/listing_command.py."""

from __future__ import annotations

import runpy

if __name__ == "__main__":
    runpy.run_module("fastris.gate.listing_command", run_name="__main__")
