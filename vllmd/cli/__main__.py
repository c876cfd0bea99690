"""``python -m vllmd.cli``."""

from __future__ import annotations

import sys

from vllmd.cli import main

if __name__ == "__main__":
    sys.exit(main())
