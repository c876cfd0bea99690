"""What of the clients is made of the table of verbs, and of each other."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[2]


def test_the_clients_are_current() -> None:
    """Whoever changes ``asynchronous.py`` or a row of the table of verbs runs packaging/dev/make-clients."""
    script = [sys.executable, str(REPOSITORY / "packaging/dev/make-clients"), "--check"]
    assert subprocess.run(script, capture_output=True, text=True).stdout == ""
