"""``python -m vllmd`` and ``/usr/bin/vllmd``."""

from __future__ import annotations

import sys

from vllmd.daemon.main import main

if __name__ == "__main__":
    sys.exit(main())
