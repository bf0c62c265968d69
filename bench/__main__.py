"""``python -m bench`` is ``fastris bench``."""

import sys

from fastris.commands.cli import main

if __name__ == "__main__":
    sys.exit(main(["bench", *sys.argv[1:]]))
