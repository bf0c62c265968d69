"""``python -m fastris``: the same as the ``fastris`` command."""

import os
import sys

from fastris.commands.cli import main

if __name__ == "__main__":
    code = main()
    if "RANK" in os.environ and int(os.environ.get("WORLD_SIZE", "1")) > 1:
        # One of several processes, whose work is done and written: while the interpreter takes itself apart, a thread
        # of gloo that is still alive can abort it (seen with PyTorch 2.15), and torchrun would call the run failed.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)
