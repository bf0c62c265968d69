"""``python -m fastris`` is ``fastris``."""

from fastris.cli import main

raise SystemExit(main())
