"""`python -m bokehflux` is the command `bokehflux`."""

from __future__ import annotations

import sys

from bokehflux.app.cli import main

if __name__ == "__main__":
    sys.exit(main())
